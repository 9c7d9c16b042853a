"""What a step measured, and the metrics record that it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from losses.objective import Objective, ObjectiveOutput
from training.distributed import World
from training.signals import StopSignals


@dataclass
class State:
    """What a checkpoint holds beside tensors. tokens: loss-bearing ones consumed; live_tokens: where STP acted;
    recent: [loss, gradient norm] of the last finite steps, where outliers are judged by them."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    live_tokens: list[list[int]] = field(default_factory=list)
    recent: list[list[float]] = field(default_factory=list)


@dataclass
class Measured:
    """Sums of one optimizer step over its micro-batches. All values are shares of global means, so they add up.

    They stay on the device (`sums`) until `over_ranks` reads them, once per step: every reading makes the host wait.
    """

    total: float = 0.0
    lm: float = 0.0
    stp: Tensor | None = None  # (n_boundaries,) float64, on the CPU
    masked: Tensor | None = None  # (n_boundaries,) degenerate triples, likewise
    triples: int = 0
    evidence: dict[str, float] = field(default_factory=dict)
    curvature: dict[str, float] = field(default_factory=dict)  # of this rank's first rows
    sums: Tensor | None = None  # (2,) total, lm or (3 + 2 n_boundaries,) total, lm, triples, stp, masked; float64

    def add(self, loss: ObjectiveOutput) -> None:
        parts = [loss.total, loss.lm]
        if loss.stp_per_boundary is not None and loss.stp_terms is not None:
            parts += [loss.stp_terms.n_valid, loss.stp_per_boundary, loss.stp_terms.n_degenerate]
        values = torch.cat([part.detach().double().flatten() for part in parts])
        self.sums = values if self.sums is None else self.sums + values


def over_ranks(measured: Measured, world: World, signals: StopSignals) -> None:
    """Reads the sums, those of all ranks in place of this one's: in one small reduction, which also carries whether any
    was asked to stop, so that all of them log, judge and leave together."""
    assert measured.sums is not None
    wishes = (signals.wished is not None, signals.wished == "preempted")
    flags = [measured.sums.new_full((1,), float(wish)) for wish in wishes]  # filled there: a copy would wait
    total, lm, *stp, stop, preempted = world.sum(torch.cat([measured.sums, *flags])).tolist()
    measured.total, measured.lm = total, lm
    if stp:
        measured.triples = int(stp[0])
        measured.stp, measured.masked = torch.tensor(stp[1:], dtype=torch.float64).chunk(2)
    if world.size > 1 and stop > 0:
        signals.agree("preempted" if preempted > 0 else "stopped")


def step_metrics(measured: Measured, objective: Objective, moe_mixers: list[Any]) -> dict[str, Any]:
    """Losses, STP per family and in all, its masked share, live evidence, curvature, routing of every E block."""
    metrics: dict[str, Any] = {"loss/total": measured.total, "loss/lm": measured.lm}
    metrics |= measured.evidence | measured.curvature
    if measured.stp is not None and measured.masked is not None:
        metrics["stp/raw"] = float(measured.stp.mean())
        metrics |= {f"stp/raw/{family}": value for family, value in objective.family_means(measured.stp).items()}
        metrics["stp/masked_share"] = float(measured.masked.mean()) / max(measured.triples, 1)
    for number, mixer in enumerate(moe_mixers):
        routing = mixer.metrics()
        metrics |= {f"moe/{name}/{number}": value for name, value in routing.items() if name != "load"}
        metrics |= {f"moe/load/{number}/{expert}": share for expert, share in enumerate(routing["load"])}
    return metrics
