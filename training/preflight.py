"""Preflight: proof, on the real model and a real batch, that STP reaches the weights it claims to reach.

A dead auxiliary loss looks exactly like one that is alive, so every run proves the wire before it spends compute,
and proves the gradients again when the gate opens. It leaves no trace: weights, buffers, counters and random state
are bit-identical afterwards.
"""

from __future__ import annotations

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
from training.probes import probe_forward
from training.wiring import SMALLEST_RATIO, BoundaryResult, Versions, check_boundary, check_collector

VALUE_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 3e-2


@dataclass
class PreflightReport:
    """checks: name -> None if it holds, else what was seen."""

    boundaries: list[BoundaryResult] = field(default_factory=list)
    checks: dict[str, str | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return all(problem is None for problem in self.checks.values()) and all(b.ok for b in self.boundaries)

    def as_dict(self) -> dict[str, Any]:
        """The receipt's `preflight` entry."""
        rows = [{"index": b.index, "family": b.family, "grad_norm": b.grad_norm, "ok": b.ok} for b in self.boundaries]
        checks = {name: problem is None for name, problem in self.checks.items()}
        return {"ok": self.ok, "seconds": round(self.seconds, 3), "boundaries": rows, "checks": checks}

    def failures(self) -> list[str]:
        found = [f"{name}: {problem}" for name, problem in self.checks.items() if problem is not None]
        for b in self.boundaries:
            found += [f"boundary {b.index} ({b.family}): {problem}" for problem in b.problems]
        return found


@dataclass
class Preflight:
    """The checks of one run. autocast: makes the context that training forwards run in; matmul_dtype: its dtype."""

    model: Any
    objective: Objective
    autocast: Callable[[], AbstractContextManager]
    matmul_dtype: torch.dtype
    vocab_size: int
    chunk: int
    seed: int

    @classmethod
    def of(
        cls,
        model: Any,
        objective: Objective,
        autocast: Callable[[], AbstractContextManager],
        matmul_dtype: torch.dtype,
        seed: int,
    ) -> Preflight:
        """With the chunk lengths and the vocabulary read off the model."""
        chunks = [block.mixer.chunk_size for block in model.blocks if hasattr(block.mixer, "chunk_size")]
        vocab_size = model.embedding.num_embeddings
        return cls(model, objective, autocast, matmul_dtype, vocab_size, max([32, *chunks]), seed)

    def run(self, batch: Batch, triples: Triples) -> PreflightReport:
        """Everything: collector, gradients per boundary, probes, objective. Two rows of the batch are used."""
        started = time.perf_counter()
        report = PreflightReport()
        with _NoTrace(self.model):
            self._gradients(batch, triples, report)
            self.model.eval()
            for attempt in range(2):  # a router tie flips an expert by rounding: rare, and gone with another seed
                probes = probe_forward(
                    self.model, self.chunk, self.vocab_size, self.matmul_dtype, self.autocast(), self.seed + attempt
                )
                if all(problem is None for problem in probes.values()):
                    break
            report.checks.update(probes)
        report.seconds = time.perf_counter() - started
        return report

    def run_gradients(self, batch: Batch, triples: Triples) -> PreflightReport:
        """The gradient checks alone: what is proven again at the step where the gate opens."""
        started = time.perf_counter()
        report = PreflightReport()
        with _NoTrace(self.model):
            self._gradients(batch, triples, report)
        report.seconds = time.perf_counter() - started
        return report

    def _gradients(self, batch: Batch, triples: Triples, report: PreflightReport) -> None:
        rows = _rows_with_triples(triples)
        batch, triples = _select(batch, rows), triples.select(rows)
        context = SequenceContext.from_document_ids(batch.document_ids)
        report.checks["triples_inside_documents"] = _check_triples(triples, batch.document_ids)
        if report.checks["triples_inside_documents"] is not None:
            return
        self.model.train()
        for mixer in self.model.moe_mixers():
            mixer.counts.zero_()
        with Versions(self.model) as versions, torch.enable_grad(), self.autocast():
            output = self.model(batch.tokens, context)
        shape = (*batch.tokens.shape, self.model.config.d_model)
        report.checks["collector"] = check_collector(output, versions, len(self.model.blocks), shape)
        report.checks["experts_process_all_tokens"] = _check_experts(self.model, batch.tokens.numel())
        if len(output.hidden_states) != len(self.model.blocks) + 1:
            return
        terms = self.objective.stp_terms(output.hidden_states, output.final, triples)
        for index, term in terms.items():
            if self.objective.is_control:
                report.boundaries.append(_control_result(self.model, output, index, term))
            else:
                result = check_boundary(self.model, output, context, index, term, self.autocast)
                report.boundaries.append(result)
        if not self.objective.is_control:
            _flag_vanishing(report.boundaries)
            report.checks["total"] = self._check_total(output, batch, triples, terms)

    def _check_total(self, output: Any, batch: Batch, triples: Triples, terms: dict[int | str, Tensor]) -> str | None:
        """Forced open, the objective's total is LM + weight x STP in value and in gradient."""
        leaves = [self.model.embedding.weight, *self.model.blocks[-1].parameters()]
        # Large enough that the LM gradient's own rounding (bf16 matmuls) does not drown STP's in the difference.
        weight = torch.tensor(100.0, device=batch.tokens.device)

        def total(stp_weight: Tensor) -> Tensor:
            with torch.enable_grad(), self.autocast():
                head = self.model.head.weight
                return self.objective(output, head, batch.labels, triples, stp_weight=stp_weight).total

        def gradient(loss: Tensor) -> Tensor:
            grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
            parts = [
                (g if g is not None else torch.zeros_like(p)).flatten() for g, p in zip(grads, leaves, strict=True)
            ]
            return torch.cat(parts).double()

        opened, closed = total(weight), total(weight * 0)
        stp = sum(terms.values(), torch.zeros((), device=weight.device)) / len(terms)
        expected_total = float(closed.detach()) + float(weight) * float(stp.detach())
        if not abs(float(opened.detach()) - expected_total) <= VALUE_TOLERANCE * (1 + abs(expected_total)):
            return f"forced open it is {float(opened.detach()):.6f}, LM + weight x STP is {expected_total:.6f}"
        expected, seen = gradient(stp) * float(weight), gradient(opened) - gradient(closed)
        error = float((seen - expected).norm() / expected.norm().clamp_min(1e-300))
        if not error <= GRADIENT_TOLERANCE:
            return f"its gradient differs by {error:.1e} from LM + weight x STP: the term is not in it as configured"
        return None


def require_ok(report: PreflightReport, when: str) -> None:
    """Raises PreflightError with every failure on its own line."""
    if not report.ok:
        lines = "\n  ".join(report.failures())
        raise PreflightError(f"preflight {when}: STP is not wired as configured\n  {lines}")


class _NoTrace:
    """Restores buffers, mode and random state; checks that no `.grad` was left."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = {module: module.training for module in self.model.modules()}
        self.buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.rng = torch.get_rng_state()

    def __exit__(self, *exc: object) -> None:
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])
        for module, mode in self.modes.items():
            module.training = mode
        torch.set_rng_state(self.rng)


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


def _control_result(model: Any, output: Any, index: int | str, term: Tensor) -> BoundaryResult:
    """A control declares that it sends no gradient; exactly none may arrive."""
    family = {"final": "final", 0: "embedding"}.get(index) or model.blocks[int(index) - 1].letter
    result = BoundaryResult(index, family, 0.0, 0.0)
    if term.requires_grad:
        grads = torch.autograd.grad(term, output.hidden_states, retain_graph=True, allow_unused=True)
        if any(grad is not None and bool(grad.any()) for grad in grads):
            result.problems.append("a control that declares no gradient sends one")
    return result


def _flag_vanishing(boundaries: list[BoundaryResult]) -> None:
    for kind in ("grad_norm", "block_grad_norm"):
        largest = max((getattr(b, kind) for b in boundaries), default=0.0)
        for b in boundaries:
            if b.ok and getattr(b, kind) < SMALLEST_RATIO * largest:
                b.problems.append(f"{kind} {getattr(b, kind):.1e} is below {SMALLEST_RATIO:.0e} of the largest")
