"""Preflight: proof, on the real model and a real batch, that STP reaches the weights it claims to reach.

A dead auxiliary loss looks exactly like one that is alive, so every run proves the wire before it spends compute,
and proves the gradients again when the gate opens. It leaves no trace: weights, gradients, buffers, counters and
random state are bit-identical afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from errors import PreflightError
from losses.objective import Objective
from losses.triples import Triples
from model.context import SequenceContext
from training.controls import PLACEBO_CHECKS, check_control, placebo_result
from training.distributed import World
from training.draws import check_draws
from training.probes import probe_forward
from training.recompute import repeatable
from training.sharding import reshard
from training.total import ForcedTotals, check_total
from training.wiring import (
    GRADIENT_CHECKS,
    BoundaryResult,
    Watch,
    check_boundary,
    check_collector,
    check_predictor,
    flag_vanishing,
)

RANK_TOLERANCE = 1e-2  # machines of another kind may round otherwise
ENOUGH_TRIPLES = 48
MOST_DRAWS = 64
OTHER_STEPS = 1 << 40  # beyond any run: draws that no training step uses


@dataclass
class PreflightReport:
    """checks: name -> None if it holds, else what was seen (at the first boundary where it does not)."""

    boundaries: list[BoundaryResult] = field(default_factory=list)
    checks: dict[str, str | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(problem is None for problem in self.checks.values())

    def failed(self) -> list[str]:
        """Names of the checks that do not hold."""
        return [name for name, problem in self.checks.items() if problem is not None]

    def failures(self) -> list[str]:
        """One line for each, with its name; those that look at boundaries one for each boundary."""
        found = []
        for name in self.failed():
            per_boundary = [
                f"boundary {b.index} ({b.family}): {b.problems[name]}" for b in self.boundaries if name in b.problems
            ]
            found += [f"{name}: {problem}" for problem in per_boundary or [str(self.checks[name])]]
        return found

    def as_dict(self) -> dict[str, Any]:
        """The receipt's `preflight` entry."""
        rows = [{"index": b.index, "family": b.family, "grad_norm": b.grad_norm, "ok": b.ok} for b in self.boundaries]
        checks = {name: problem is None for name, problem in self.checks.items()}
        return {"ok": self.ok, "seconds": round(self.seconds, 3), "boundaries": rows, "checks": checks}


@dataclass
class Preflight:
    """The checks of one run. autocast: makes the context that training forwards run in; matmul_dtype: its dtype.
    chunk: the longest chunk that a mixer works in, from which the probes' documents take their lengths."""

    model: Any
    objective: Objective
    autocast: Callable[[], AbstractContextManager]
    matmul_dtype: torch.dtype
    vocab_size: int
    chunk: int
    seed: int
    world: World = field(default_factory=World.alone)

    @classmethod
    def of(
        cls,
        model: Any,
        objective: Objective,
        autocast: Callable[[], AbstractContextManager],
        matmul_dtype: torch.dtype,
        seed: int,
        world: World | None = None,
    ) -> Preflight:
        """With the chunk lengths and the vocabulary read off the model. Every rank proves the same rows."""
        chunks = [getattr(getattr(block.mixer, "config", None), "chunk_size", 0) for block in model.blocks]
        vocab_size = model.embedding.num_embeddings
        return cls(
            model, objective, autocast, matmul_dtype, vocab_size, max([32, *chunks]), seed, world or World.alone()
        )

    def run(self, batch: Batch, triples: Triples) -> PreflightReport:
        """Everything: collector, gradients per boundary, objective, probes. Two rows of the batch are used."""
        started = time.perf_counter()
        report = PreflightReport()
        with _NoTrace(self.model), repeatable(self.model):
            self._gradients(batch, triples, report)
            wrong_tensors = report.checks.get("collector") is not None
            if not self.world.any(wrong_tensors):
                self._probes(report)
        self._agree(report)
        report.seconds = time.perf_counter() - started
        return report

    def run_gradients(self, batch: Batch, triples: Triples) -> PreflightReport:
        """The gradient checks alone: what is proven again at the step where the gate opens."""
        started = time.perf_counter()
        report = PreflightReport()
        with _NoTrace(self.model), repeatable(self.model):
            self._gradients(batch, triples, report)
        self._agree(report)
        report.seconds = time.perf_counter() - started
        return report

    def _agree(self, report: PreflightReport) -> None:
        """Every rank proved the same rows with the same weights, so all must have seen the same, or all refuse."""
        if self.world.size == 1:
            return
        norms = [boundary.grad_norm for boundary in report.boundaries]
        ranks = self.world.gather({"failed": report.failed(), "norms": norms})
        differences = [_difference(seen, ranks[0]) for seen in ranks]
        found = (f"rank {rank}: {difference}" for rank, difference in enumerate(differences) if difference)
        report.checks["ranks_agree"] = next(found, None)

    def _probes(self, report: PreflightReport) -> None:
        self.model.eval()
        for attempt in range(2):  # a router tie flips an expert by rounding: rare, and gone with another seed
            probes = probe_forward(
                self.model, self.chunk, self.vocab_size, self.matmul_dtype, self.autocast(), self.seed + attempt
            )
            # all ranks go once more if one has to: a forward pass is a collective
            if not self.world.any(any(problem is not None for problem in probes.values())):
                break
        report.checks.update(probes)

    def _gradients(self, batch: Batch, triples: Triples, report: PreflightReport) -> None:
        triples = self._more(batch, triples)
        rows = _rows_with_triples(triples)
        batch, triples = _select(batch, rows), triples.select(rows)
        report.checks["triples_inside_documents"] = _check_triples(triples, batch.document_ids)
        report.checks.update(check_draws(self.objective, batch.document_ids.device))
        if report.checks["triples_inside_documents"] is not None:
            return
        self.model.train()
        context = SequenceContext.from_document_ids(batch.document_ids)
        output = self._collect(batch, context, report)
        if self.world.any(output is None):
            return
        terms = self.objective.stp_terms(output.hidden_states, output.final, triples)
        totals = ForcedTotals.of(self.model, self.objective, self.autocast, output, batch, triples)
        reshard(self.model)
        for index, term in terms.items():
            if self.objective.is_control:
                report.boundaries.append(placebo_result(self.model, output, index, term))
            else:
                result = check_boundary(self.model, output, context, index, term, self.autocast, self.world)
                report.boundaries.append(result)
        if self.objective.predictor is not None and not self.objective.is_control:
            report.checks["predictor"] = check_predictor(self.model, self.objective.predictor, list(terms.values()))
        if not self.objective.is_control:
            flag_vanishing(report.boundaries)
        for name in PLACEBO_CHECKS if self.objective.is_control else GRADIENT_CHECKS:
            problems = [f"boundary {b.index}: {b.problems[name]}" for b in report.boundaries if name in b.problems]
            report.checks[name] = problems[0] if problems else None
        report.checks.update(check_control(self.objective, output, triples))
        report.checks["total"] = check_total(self.model, self.objective, totals, terms, self.world)

    def _more(self, batch: Batch, triples: Triples) -> Triples:
        """With further draws for the same rows where the step's own are few: a row without room, or equal tokens at the
        ends of the only displacement, says nothing about the wire."""
        parts = [triples]
        while sum(int(part.valid.sum()) for part in parts) < ENOUGH_TRIPLES and len(parts) <= MOST_DRAWS:
            parts.append(self.objective.draw(batch.document_ids, batch.row_ids, OTHER_STEPS + len(parts)))
        return Triples.cat(parts)

    def _collect(self, batch: Batch, context: SequenceContext, report: PreflightReport) -> Any:
        """The output of a training forward, or None if the list of states is not what it must be.

        The second forward is looked at: only then does a list that is kept from an earlier one show.
        """
        shape = (*batch.tokens.shape, self.model.config.d_model)
        for _ in range(2):
            output: Any = None  # the first graph is let go before the second one grows
            for mixer in self.model.moe_mixers():
                mixer.counts.zero_()
            with Watch(self.model) as watch, torch.enable_grad(), self.autocast():
                try:
                    output = self.model(batch.tokens, context)
                except Exception as error:
                    if watch.low_precision is None:
                        raise
                    report.checks["collector"] = f"{watch.low_precision} ({type(error).__name__})"
                    return None
        report.checks["collector"] = check_collector(output, watch, len(self.model.blocks), shape)
        report.checks["experts_process_all_tokens"] = _check_experts(self.model, batch.tokens.numel())
        return output if report.checks["collector"] is None else None


def require_ok(report: PreflightReport, when: str) -> None:
    """Raises PreflightError with every failure on its own line."""
    if not report.ok:
        lines = "\n  ".join(report.failures())
        raise PreflightError(f"preflight {when}: STP is not wired as configured\n  {lines}")


class _NoTrace:
    """Puts back gradients, buffers, mode and random state."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = {module: module.training for module in self.model.modules()}
        self.buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.grads = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        self.rng = torch.get_rng_state()
        self.cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def __exit__(self, *exc: object) -> None:
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])
        for parameter, grad in self.grads:
            parameter.grad = grad
        for module, mode in self.modes.items():
            module.training = mode
        torch.set_rng_state(self.rng)
        if self.cuda_rng:
            torch.cuda.set_rng_state_all(self.cuda_rng)


def _difference(seen: dict[str, Any], first: dict[str, Any]) -> str:
    if seen["failed"]:
        return f"failed {', '.join(seen['failed'])}"
    if len(seen["norms"]) != len(first["norms"]) or not all(
        math.isclose(a, b, rel_tol=RANK_TOLERANCE) for a, b in zip(seen["norms"], first["norms"])
    ):
        return "other gradient norms than rank 0"
    return ""


def _rows_with_triples(triples: Triples) -> Tensor:
    """The two rows with the most valid triples."""
    counts = triples.valid.sum(dim=1)
    return counts.argsort(descending=True, stable=True)[:2]


def _check_triples(triples: Triples, document_ids: Tensor) -> str | None:
    if not bool(triples.valid.any()):
        return "no triple fits into any document of the batch"
    bad = int(triples.violations(document_ids))
    return f"{bad} triples cross a document, touch padding or are out of order" if bad else None


def _select(batch: Batch, rows: Tensor) -> Batch:
    return Batch(batch.tokens[rows], batch.labels[rows], batch.document_ids[rows], batch.row_ids[rows])


def _check_experts(model: Any, n_tokens: int) -> str | None:
    for mixer in model.moe_mixers():
        rows, expected = int(mixer.counts.sum()), n_tokens * mixer.top_k
        if rows != expected:
            return f"an expert block processed {rows} rows, not tokens x top_k = {expected}"
    return None
