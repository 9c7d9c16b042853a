"""Writes the weights of a run as one safetensors file: python -m scripts.export RUN out.safetensors.

The file holds the tensors of `HybridLM.state_dict()` (the language model; no predictor of STP) and, in its metadata,
the config, the tokenizer's hash and the checkpoint that it came from; `out.safetensors.sha256` stands beside it.
`train.py ... init_from=out.safetensors` starts from it, and every library that reads safetensors can. No pickle is
written or read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from errors import InputError, exit_with
from training.checkpoint_folder import load_state, step_of
from training.config import load_config
from training.durable import sha256_file
from training.manifest import MANIFEST
from training.receipt import read_receipt
from training.run import find_checkpoint
from training.weights import export_weights


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run id, a run folder (its newest valid checkpoint), or a checkpoint folder")
    parser.add_argument("out", type=Path, help="the file to write, e.g. demo.safetensors")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.suffix != ".safetensors" or out.is_dir() or not out.parent.is_dir():
        raise InputError(f"{out}: expected the name of a .safetensors file in a folder that is there")
    if out.exists() and not arguments.force:
        raise InputError(f"{out}: exists already; --force replaces it")
    checkpoint = find_checkpoint(arguments.run)
    folder = checkpoint.parent.parent
    receipt = read_receipt(folder)
    config = dataclasses.asdict(load_config(folder / "config.yaml"))
    metadata = {
        "amer_config": json.dumps(config),
        "amer_run": str(receipt.get("run_id") or folder.name),
        "amer_step": str(step_of(checkpoint)),
        "amer_tokens": str(load_state(checkpoint)["run"]["tokens"]),
        "amer_git_commit": str((receipt.get("git") or {}).get("commit")),
        "amer_tokenizer_sha256": str((receipt.get("data") or {}).get("tokenizer_sha256")),
        "amer_checkpoint_sha256": sha256_file(checkpoint / MANIFEST),
    }
    names = export_weights(checkpoint, out, metadata)
    print(f"{out}: {len(names)} tensors of {checkpoint}, {out.stat().st_size:,} bytes; {out.name}.sha256 beside it")
    return 0


if __name__ == "__main__":
    exit_with(main)
