"""Prepares the corpus of a run ahead of it, or checks it:

    python -m scripts.prepare_data CONFIG [key.path=value ...] [--workers N] [--verify]

with the config and the overrides of the run, as the settings of its `data:` section name the folder under artifacts/ in
which it looks. A run prepares by itself what is not there.
"""

from __future__ import annotations

import argparse
import sys
import time

from data.prepare import prepare
from data.prepared import SPLITS, Prepared, verify
from data.progress import show_progress
from errors import exit_with, require
from training.config import load_config


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.prepare_data", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a YAML file, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="those of the run, e.g. data.path='my_texts/*.txt'")
    parser.add_argument("--workers", type=int, help="processes that tokenise (default: one per core)")
    parser.add_argument("--verify", action="store_true", help="read everything again and compare sha256")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    config.validate()
    require(args.workers is None or args.workers > 0, "--workers", f"expected at least 1, got {args.workers}")
    start = time.monotonic()
    with show_progress() as progress:
        prepared = prepare(config.data, progress=progress, workers=args.workers)
        by_size = verify(prepared.folder, progress) if args.verify else []
    _describe(prepared)
    for line in by_size:
        print(line)
    if args.verify:
        print("verified: every recorded sha256 agrees")
    print(f"{prepared.folder} ready in {time.monotonic() - start:.1f} s")
    return 0


def _describe(prepared: Prepared) -> None:
    for corpus in prepared.manifest["corpora"]:
        for split in SPLITS:
            if split not in corpus:
                continue
            part = corpus[split]
            counts = f"{part['tokens']:,} tokens"
            if "bytes" in part:
                ratio = part["bytes"] / part["tokens"]
                counts = f"{part['documents']:,} documents, {part['bytes']:,} bytes, {counts}, {ratio:.2f} bytes/token"
            print(f"{corpus['label']} {split}: {counts}")
    for note in prepared.notes:
        print(f"note: {note}")
    print(f"manifest sha256 {prepared.manifest_sha256}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    exit_with(main)
