"""The check of the memory model: two training steps of a config on this machine's CPU, in a process of their own.

python -m training.plan_measure CONFIG [key=value ...] prints the peak in bytes as JSON. The start (interpreter,
libraries, compiled kernels, all warmed up on a small model of the same letters) is not counted: the peak of the
resident size is reset by the kernel (/proc/self/clear_refs) and read back afterwards. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from errors import require
from losses.objective import Objective
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig
from training.config import RunConfig, load_config
from training.machine import PEAK_RESET, configure_threads, resident_growth
from training.optimizer import build_optimizer, clip_gradients
from training.recompute import recompute


def measure(config_path: Path, overrides: list[str], recomputed: str) -> int:
    """Peak bytes of two steps, in a process of its own. Raises InputError where there is no /proc."""
    require(PEAK_RESET.exists(), "--measure", "needs Linux: it reads the peak of the resident size")
    # blocks of more than 64 KiB go back to the kernel when freed, so that the resident size is what is alive
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "training.plan_measure", str(config_path), recomputed, *overrides]
    done = subprocess.run(
        command, env={**os.environ, **settings}, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, check=True
    )
    return int(json.loads(done.stdout)["peak_bytes"])


def main(config_path: str, recomputed: str, *overrides: str) -> None:
    config = load_config(config_path, overrides)
    configure_threads(1)
    small = replace(config.model, pattern="".join(sorted(set(config.model.pattern))), depth=None)
    for _ in range(2):
        _steps(config, small, recomputed, rows=1, length=min(128, config.data.sequence_length))
    rows = config.train.batch_rows // config.train.accumulation
    steps = partial(_steps, config, config.model, recomputed, rows, config.data.sequence_length)
    print(json.dumps({"peak_bytes": resident_growth(steps)}))


def _steps(config: RunConfig, model_config: ModelConfig, recomputed: str, rows: int, length: int) -> None:
    """Two steps as train.py makes them."""
    vocab_size = config.data.tokenizer.vocab_size
    model = HybridLM(model_config, vocab_size).train()
    model.init_weights(torch.Generator().manual_seed(0))
    for block in model.stack:
        recompute(block, recomputed)
    optimizer = build_optimizer(model, config.optimizer)
    objective = Objective(config.stp, model.letters, seed=0)
    document_ids = torch.zeros(rows, length, dtype=torch.int32)
    weight = torch.tensor(config.stp.weight) if config.stp.enabled else None
    for step in range(2):
        for _ in range(config.train.accumulation):
            tokens = torch.randint(vocab_size, (rows, length + 1))
            triples = objective.draw(document_ids, torch.arange(rows), step) if config.stp.enabled else None
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"):
                output = model(tokens[:, :-1], SequenceContext.from_document_ids(document_ids))
                labels = tokens[:, 1:].contiguous()
                loss = objective(output, model.head.weight, labels, triples, stp_weight=weight)
            loss.total.backward()
            del output, loss
        clip_gradients(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
