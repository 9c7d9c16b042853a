"""TokenGate: when STP opens, counted in tokens so that batch size, accumulation and rank count cannot move it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from errors import InputError, require, require_number


@dataclass
class GateConfig:
    # Global loss-bearing tokens consumed before the gate opens. null (with start_steps null) = 0: open from the start.
    start_tokens: int | None = None
    # The same as a step count of a reference run; needs reference_tokens_per_step, since steps alone mean nothing.
    start_steps: int | None = None
    # Loss-bearing tokens per step of that reference run: start_tokens = start_steps x this.
    reference_tokens_per_step: int | None = None
    # Tokens over which the weight rises linearly from 0 to its full value; 0 = a hard switch.
    ramp_tokens: int = 0

    @property
    def resolved_start_tokens(self) -> int:
        """start_tokens, or start_steps x reference_tokens_per_step."""
        if self.start_steps is not None:
            return self.start_steps * (self.reference_tokens_per_step or 0)
        return self.start_tokens or 0

    def validate(self, path: str = "stp.gate", budget_tokens: int | None = None) -> list[str]:
        """Returns warnings. Raises InputError: bare steps, two starts, bad numbers, or a gate that never opens.

        budget_tokens: loss-bearing tokens of the whole run; None = not known here.
        """
        for name in ("start_tokens", "start_steps", "ramp_tokens"):
            if (value := getattr(self, name)) is not None:
                require_number(f"{path}.{name}", value, 0)
        if self.reference_tokens_per_step is not None:
            require_number(f"{path}.reference_tokens_per_step", self.reference_tokens_per_step, 1)
            require(
                self.start_steps is not None,
                f"{path}.reference_tokens_per_step",
                f"is only used with {path}.start_steps; give that too, or leave both out",
            )
        if self.start_steps is not None:
            require(
                self.start_tokens is None,
                f"{path}.start_tokens",
                f"and {path}.start_steps are two answers to one question; give one of them",
            )
            require(
                self.reference_tokens_per_step is not None,
                f"{path}.start_steps",
                f"steps alone say nothing about exposure; give {path}.reference_tokens_per_step too, "
                f"or {path}.start_tokens instead",
            )
        return [] if budget_tokens is None else self._check_budget(path, budget_tokens)

    def _check_budget(self, path: str, budget_tokens: int) -> list[str]:
        gate = TokenGate(self)
        if gate.opens_at_token >= budget_tokens:
            raise InputError(
                f"{path}.{'start_steps' if self.start_steps is not None else 'start_tokens'}: the gate opens at token "
                f"{gate.opens_at_token:,}, but the run ends at token {budget_tokens:,}; expected at most "
                f"{max(budget_tokens // 2, 0):,} (half of the budget)"
            )
        warnings = []
        if 2 * gate.opens_at_token > budget_tokens:
            warnings.append(
                f"{path}: the gate opens at token {gate.opens_at_token:,}, later than half of the run "
                f"({budget_tokens:,} tokens)"
            )
        if gate.full_at_token > budget_tokens:
            warnings.append(
                f"{path}: the ramp ends at token {gate.full_at_token:,}, after the run's last ({budget_tokens:,}); "
                f"the weight only reaches {gate.fraction(budget_tokens):.0%} of its value"
            )
        return warnings


class TokenGate:
    """weight(N) = weight x clip((N - N_on) / N_ramp, 0, 1); with N_ramp = 0 a hard switch at N >= N_on.

    N: loss-bearing tokens consumed before the optimizer step, over all micro-batches and ranks, as an int. The gate is
    a pure function of N and keeps no count of its own: N lives in the checkpoint.
    """

    def __init__(self, config: GateConfig | None = None, weight: float = 1.0) -> None:
        config = config or GateConfig()
        self.start_tokens = int(config.resolved_start_tokens)
        self.ramp_tokens = int(config.ramp_tokens)
        self.full_weight = float(weight)

    @property
    def opens_at_token(self) -> int:
        """The smallest N with a non-zero fraction: where "open" and live tokens begin."""
        return self.start_tokens + (1 if self.ramp_tokens else 0)

    @property
    def full_at_token(self) -> int:
        """The smallest N with fraction 1."""
        return self.start_tokens + self.ramp_tokens

    def fraction(self, consumed_tokens: int) -> float:
        """0 while closed, 1 when fully open."""
        if self.ramp_tokens == 0:
            return 1.0 if consumed_tokens >= self.start_tokens else 0.0
        return min(max((consumed_tokens - self.start_tokens) / self.ramp_tokens, 0.0), 1.0)

    def weight(self, consumed_tokens: int) -> float:
        """The STP weight of the step that starts after consumed_tokens."""
        return self.full_weight * self.fraction(consumed_tokens)

    def opens_at_step(self, tokens_per_step: float) -> int:
        """The 0-based step that the gate opens at for a steady number of loss-bearing tokens per step: a preview."""
        return math.ceil(self.opens_at_token / tokens_per_step)

    def state_dict(self) -> dict[str, int]:
        """The rule's constants; goes into the checkpoint beside N."""
        return {"start_tokens": self.start_tokens, "ramp_tokens": self.ramp_tokens}

    def load_state_dict(self, state: dict[str, int], key: str = "stp.gate") -> None:
        """Raises InputError if the checkpoint was made under another rule: a resumed gate must not move."""
        for name, ours in self.state_dict().items():
            theirs = state.get(name)
            require(
                theirs == ours,
                f"{key}.{name}",
                f"is {ours:,} here but {theirs if theirs is None else format(theirs, ',')} in the checkpoint; "
                f"keep the checkpoint's value to resume",
            )
