"""The check of the memory model: two training steps of a config, two that probe gradients, or preflight, on this
machine's CPU, in a process of their own.

python -m training.plan_measure CONFIG RECOMPUTE DURING [key=value ...] prints the peak in bytes as JSON. The start
(interpreter, libraries, compiled kernels, all warmed up on a small model of the same letters) is not counted: the peak
of the resident size is reset by the kernel (/proc/self/clear_refs) and read back afterwards. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from data.batch import Batch
from errors import require
from losses.objective import Objective
from losses.triples import Triples
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig
from model.pattern import parse_pattern
from training.config import RunConfig, load_config
from training.evidence import gradient_evidence
from training.machine import PEAK_RESET, configure_threads, resident_growth
from training.optimizer import build_optimizer, clip_gradients
from training.plan_memory import PREFLIGHT, PROBE, STEP, Memory, Stack
from training.plan_proofs import ROWS, peaks, selected
from training.preflight import Preflight
from training.recompute import recompute, repeatable


def measure(config_path: Path, overrides: list[str], recomputed: str, during: str = STEP) -> int:
    """Peak bytes in a process of its own. during: STEP, PROBE, PREFLIGHT. Raises InputError where there is no /proc."""
    require(PEAK_RESET.exists(), "--measure", "needs Linux: it reads the peak of the resident size")
    # blocks of more than 64 KiB go back to the kernel when freed, so that the resident size is what is alive
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "training.plan_measure", str(config_path), recomputed, during, *overrides]
    done = subprocess.run(
        command, env={**os.environ, **settings}, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, check=True
    )
    return int(json.loads(done.stdout)["peak_bytes"])


def on_this_cpu(config: RunConfig, dtype: torch.dtype, recomputed: str) -> dict[str, Memory]:
    """What is predicted for `measure`: STEP, PROBE, PREFLIGHT -> its peak."""
    vocab_size, length = config.data.tokenizer.vocab_size, config.data.sequence_length
    letters = parse_pattern(config.model.pattern, config.model.depth).letters

    def trace(rows: int, kind: str, again: bool) -> Stack:
        return Stack.trace(config.model, vocab_size, rows, length, dtype, kind, "cpu", again)

    train = config.train
    rows, chosen = train.batch_rows // train.accumulation, selected(config.stp, letters)
    return peaks(trace, recomputed, rows, train.batch_rows, chosen, accumulates=train.accumulation > 1)


def main(config_path: str, recomputed: str, during: str, *overrides: str) -> None:
    config = load_config(config_path, overrides)
    configure_threads(1)
    small = replace(config.model, pattern="".join(sorted(set(config.model.pattern))), depth=None)
    length = min(128, config.data.sequence_length)
    for _ in range(2):
        _Work(config, small, recomputed).run(during, rows=2, length=length, before=length)
    rows = ROWS if during == PREFLIGHT else config.train.batch_rows // config.train.accumulation

    def work() -> None:
        _Work(config, config.model, recomputed).run(during, rows, config.data.sequence_length, before=length)

    print(json.dumps({"peak_bytes": resident_growth(work)}))


class _Work:
    """A model and its optimizer, and what train.py does with them."""

    def __init__(self, config: RunConfig, model_config: ModelConfig, recomputed: str) -> None:
        self.config = config
        self.model = HybridLM(model_config, config.data.tokenizer.vocab_size).train()
        self.model.init_weights(torch.Generator().manual_seed(0))
        for block in self.model.stack:
            recompute(block, recomputed)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.objective = Objective(config.stp, self.model.letters, seed=0)
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32

    def run(self, during: str, rows: int, length: int, before: int) -> None:
        """Two steps, or preflight after a step of one short row (`before` tokens), which makes AdamW's averages."""
        if during == PREFLIGHT:
            self.step(0, 1, before, probing=False)
            batch, triples = self.batch(0, rows, length)
            assert triples is not None
            preflight = Preflight.of(self.model, self.objective, self.autocast, self.dtype, seed=0)
            report = preflight.run(batch, triples)
            assert report.ok, report.failures()
            return
        for step in range(2):
            self.step(step, rows, length, probing=during == PROBE)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def batch(self, step: int, rows: int, length: int) -> tuple[Batch, Triples | None]:
        tokens = torch.randint(self.config.data.tokenizer.vocab_size, (rows, length + 1))
        document_ids = torch.zeros(rows, length, dtype=torch.int32)
        found = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), document_ids, torch.arange(rows))
        triples = self.objective.draw(document_ids, found.row_ids, step) if self.config.stp.enabled else None
        return found, triples

    def step(self, step: int, rows: int, length: int, probing: bool) -> None:
        """One, as train.py makes it."""
        weight = torch.tensor(self.config.stp.weight) if self.config.stp.enabled else None
        for number in range(self.config.train.accumulation):
            batch, triples = self.batch(step, rows, length)
            probes = probing and number == 0
            with self.autocast(), repeatable(self.model, probes):
                output = self.model(batch.tokens, SequenceContext.from_document_ids(batch.document_ids))
                loss = self.objective(output, self.model.head.weight, batch.labels, triples, stp_weight=weight)
            if probes:
                gradient_evidence(self.objective, output, loss)
            loss.total.backward()
            del output, loss
        clip_gradients(self.model.parameters(), self.config.optimizer.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
