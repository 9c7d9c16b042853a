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
    """Sums of one optimizer step over its micro-batches. All values are shares of global means, so they add up."""

    total: float = 0.0
    lm: float = 0.0
    stp: Tensor | None = None  # (n_boundaries,)
    masked: Tensor | None = None  # (n_boundaries,) degenerate triples
    triples: int = 0
    evidence: dict[str, float] = field(default_factory=dict)
    curvature: dict[str, float] = field(default_factory=dict)  # of this rank's first rows

    def add(self, loss: ObjectiveOutput) -> None:
        self.total += float(loss.total.detach())
        self.lm += float(loss.lm.detach())
        if loss.stp_per_boundary is not None and loss.stp_terms is not None:
            stp, masked = loss.stp_per_boundary.detach(), loss.stp_terms.n_degenerate
            self.stp = stp if self.stp is None else self.stp + stp
            self.masked = masked if self.masked is None else self.masked + masked
            self.triples += int(loss.stp_terms.n_valid)


def over_ranks(measured: Measured, world: World, signals: StopSignals) -> None:
    """Sums of all ranks in place of this one's, in one small reduction, which also carries whether any was asked to
    stop: so that all of them log, judge and leave together."""
    if world.size == 1:
        return
    size = 0 if measured.stp is None else measured.stp.numel()
    parts = [torch.tensor([measured.total, measured.lm, float(measured.triples)], dtype=torch.float64)]
    if measured.stp is not None and measured.masked is not None:
        parts += [measured.stp.double().cpu(), measured.masked.double().cpu()]
    parts.append(torch.tensor([signals.wished is not None, signals.wished == "preempted"], dtype=torch.float64))
    whole = world.sum(torch.cat(parts).to(world.device)).cpu()
    measured.total, measured.lm, measured.triples = float(whole[0]), float(whole[1]), int(whole[2])
    if measured.stp is not None and measured.masked is not None:
        measured.stp, measured.masked = whole[3 : 3 + size], whole[3 + size : 3 + 2 * size]
    if whole[-2] > 0:
        signals.agree("preempted" if whole[-1] > 0 else "stopped")


def step_metrics(measured: Measured, objective: Objective, moe_mixers: list[Any]) -> dict[str, Any]:
    """Losses, STP per family and in all, its masked share, live evidence, curvature, routing of every E block."""
    metrics: dict[str, Any] = {"loss/total": measured.total, "loss/lm": measured.lm}
    metrics |= measured.evidence | measured.curvature
    if measured.stp is not None and measured.masked is not None:
        metrics["stp/raw"] = float(measured.stp.mean())
        metrics |= {f"stp/raw/{family}": value for family, value in objective.family_means(measured.stp).items()}
        metrics["stp/masked_share"] = float(measured.masked.to(torch.float64).mean()) / max(measured.triples, 1)
    for number, mixer in enumerate(moe_mixers):
        routing = mixer.metrics()
        metrics |= {f"moe/{name}/{number}": value for name, value in routing.items() if name != "load"}
        metrics |= {f"moe/load/{number}/{expert}": share for expert, share in enumerate(routing["load"])}
    return metrics
