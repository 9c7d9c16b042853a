"""The learning rate as a pure function of progress, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from errors import require, require_choice, require_number

KINDS = ("cosine", "linear", "wsd", "constant")


@dataclass
class ScheduleConfig:
    # cosine | linear: decay over everything after the warmup; wsd: warmup, stable, decay at the end; constant.
    kind: str = "cosine"
    # Share of the token budget over which the rate rises linearly from 0 to optimizer.learning_rate.
    warmup_fraction: float = 0.05
    # wsd: share of the token budget over which the rate falls linearly at the end.
    decay_fraction: float = 0.2
    # The rate at the end, as a share of optimizer.learning_rate.
    final_fraction: float = 0.1

    def validate(self, path: str = "schedule") -> None:
        require_choice(f"{path}.kind", self.kind, KINDS)
        for name in ("warmup_fraction", "decay_fraction", "final_fraction"):
            require_number(f"{path}.{name}", getattr(self, name), 0.0, 1.0)
        require(
            self.kind != "wsd" or self.warmup_fraction + self.decay_fraction <= 1.0,
            f"{path}.decay_fraction",
            f"warmup {self.warmup_fraction:g} and decay {self.decay_fraction:g} overlap; expected a sum of at most 1",
        )


def learning_rate_factor(config: ScheduleConfig, progress: float) -> float:
    """The factor on optimizer.learning_rate at progress = consumed tokens / token budget, clipped to [0, 1].

    Count the tokens of the step that is about to be applied, so that the first step has a rate above 0 and the last
    one has exactly `final_fraction`. Continuous everywhere; 1 at the end of the warmup.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup_fraction:
        return progress / config.warmup_fraction
    if config.kind == "constant":
        return 1.0
    start = 1.0 - config.decay_fraction if config.kind == "wsd" else config.warmup_fraction
    if progress < start:
        return 1.0
    decayed = (progress - start) / (1.0 - start) if start < 1.0 else 0.0
    remaining = 0.5 * (1.0 + math.cos(math.pi * decayed)) if config.kind == "cosine" else 1.0 - decayed
    return config.final_fraction + (1.0 - config.final_fraction) * remaining
