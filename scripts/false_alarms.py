"""How often preflight refuses a sound run: python -m scripts.false_alarms [--seeds N] [--json]

Every seed is another small model of all four letters (pattern, layout, form, sampler and boundaries drawn from it),
proven in float32 and in bfloat16 autocast: half of them untrained, as before a run's first step, half after some steps
on the language model alone, as where the gate opens. Nothing is wrong with any of them, so a refusal is a false alarm.
Exit code 0: none; 1: some.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import Progress

from data.batch import IGNORE_LABEL, Batch
from errors import exit_with
from losses.objective import Objective, STPConfig
from losses.triples import Triples
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig
from training.machine import configure_threads
from training.preflight import Preflight, PreflightReport

PATTERNS = ("AMER", "AEMEAR", "MEMERA", "REAM", "EMAR", "AEMEAEMEAEMR")
DTYPES = (torch.float32, torch.bfloat16)
TRAINED_STEPS = 20


@dataclass
class Count:
    """alarms: (seed, failures) of the runs that were refused."""

    proofs: int = 0
    seconds: float = 0.0
    alarms: list[tuple[int, list[str]]] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.false_alarms", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="models to prove (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    arguments = parser.parse_args()
    configure_threads(1)
    counts = {str(dtype).removeprefix("torch."): Count() for dtype in DTYPES}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for seed in progress.track(range(arguments.first, arguments.first + arguments.seeds), description="seeds"):
            for dtype, count in zip(DTYPES, counts.values(), strict=True):
                started = time.perf_counter()
                report = prove(seed, dtype)
                count.seconds += time.perf_counter() - started
                count.proofs += 1
                if not report.ok:
                    count.alarms.append((seed, report.failures()))
    if arguments.json:
        print(json.dumps({name: {"proofs": c.proofs, "alarms": len(c.alarms)} for name, c in counts.items()}))
    for name, count in counts.items():
        for seed, failures in count.alarms:
            print(f"false alarm: seed {seed}, {name}: {'; '.join(failures)}", file=sys.stderr)
        if not arguments.json:
            each = count.seconds / max(count.proofs, 1)
            print(f"{name}: {len(count.alarms)} false alarms in {count.proofs} proofs, {each:.2f} s each")
    return 1 if any(count.alarms for count in counts.values()) else 0


def prove(seed: int, dtype: torch.dtype) -> PreflightReport:
    """The whole preflight on the sound model and batch of a seed."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    model = small_model(choose, generator)
    form = choose.choice(["triple", "triple", "consecutive", "patch_complement"])
    ordered = [] if form == "patch_complement" else ["norm_penalty"]
    stp = STPConfig(
        form=form,
        sampler=choose.choice(["anchor", "anchor", "uniform", "sorted_offset"]),
        n_spans=choose.choice([2, 4, 8]),
        window=choose.choice([None, 8, 64]),
        boundaries=choose.choice([["all"], ["all", "final"], ["last"], ["changes"]]),
        variant=choose.choice(["standard"] * 4 + ["detached", "gradient_noise", *ordered]),
    )
    objective = Objective(stp, model.letters, seed=seed)
    batch = random_batch(choose, generator, model.embedding.num_embeddings)

    def autocast() -> AbstractContextManager:
        return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)

    triples = objective.draw(batch.document_ids, batch.row_ids, choose.randrange(1000))
    if choose.random() < 0.5:
        train(model, objective, batch, triples, autocast)
    return Preflight.of(model, objective, autocast, dtype, seed).run(batch, triples)


def train(
    model: HybridLM,
    objective: Objective,
    batch: Batch,
    triples: Triples,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Some steps with the gate shut: gradients of the language model and of STP are then of other sizes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    context = SequenceContext.from_document_ids(batch.document_ids)
    for _ in range(TRAINED_STEPS):
        optimizer.zero_grad()
        with autocast():
            output = model(batch.tokens, context)
            loss = objective(output, model.head.weight, batch.labels, triples, stp_weight=torch.tensor(0.0))
        loss.total.backward()
        optimizer.step()


def small_model(choose: random.Random, generator: torch.Generator) -> HybridLM:
    config = ModelConfig(pattern=choose.choice(PATTERNS), d_model=choose.choice([32, 64]))
    config.head = choose.choice(["tied", "untied"])
    config.attention.n_heads, config.attention.n_kv_heads = 4, choose.choice([1, 2, 4])
    config.attention.position, config.attention.gate = (
        choose.choice(["rope", "none"]),
        choose.choice(["none", "sigmoid"]),
    )
    config.mamba2.head_dim, config.mamba2.d_state = 16, choose.choice([8, 16])
    config.mamba2.chunk_size = choose.choice([16, 32])
    config.moe.n_experts, config.moe.expert_ff = choose.choice([1, 4, 8]), 32
    model = HybridLM(config, choose.choice([97, 512]))
    model.init_weights(generator)
    return model


def random_batch(choose: random.Random, generator: torch.Generator, vocab_size: int, rows: int = 3) -> Batch:
    """Packed rows of documents of random lengths, the last one padded."""
    length = choose.choice([48, 64, 96])
    document_ids = torch.full((rows, length), -1, dtype=torch.int32)
    for row in range(rows):
        start, number, end = 0, 0, length if row < rows - 1 else length - choose.randrange(20)
        while start < end:
            stop = min(end, start + choose.randrange(1, 40))
            document_ids[row, start:stop] = number
            start, number = stop, number + 1
    tokens = torch.randint(vocab_size, (rows, length), generator=generator)
    labels = tokens.roll(-1, 1)
    ends = torch.cat([document_ids[:, 1:] != document_ids[:, :-1], torch.ones(rows, 1, dtype=torch.bool)], 1)
    labels = torch.where(ends | (document_ids < 0), IGNORE_LABEL, labels)
    return Batch(tokens, labels, document_ids, torch.arange(rows))


if __name__ == "__main__":
    exit_with(main)
