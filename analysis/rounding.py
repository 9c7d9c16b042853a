"""Whether rounding, not the model, made the angles: states kept in fewer digits bend every straight path.

Rounding moves each state by an independent error e. A step then carries the difference of two of them, neighbouring
steps share one with opposite signs, and a straight path of step s reads 1 - cos = 3 e^2 / (s^2 + 2 e^2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Bits of the significand that is stored, hidden bit included.
SIGNIFICAND_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
# A bias of 1 - cos above this (2.6 degrees on a straight path) is flagged.
FLAG_ABOVE = 0.001


def stored_precision(hidden: Tensor) -> str:
    """The coarsest of float64, float32, float16, bfloat16 that holds every value of the tensor exactly.

    States that went through bfloat16 and came back as float32 are found out by their zero bits.
    """
    name = str(hidden.dtype).removeprefix("torch.")
    if hidden.dtype not in (torch.float32, torch.float64):
        return name
    values = hidden.detach().flatten()
    for coarse in (torch.bfloat16, torch.float16, torch.float32):
        if coarse != hidden.dtype and torch.equal(values.to(coarse).to(hidden.dtype), values):
            return str(coarse).removeprefix("torch.")
    return name


def rounding_bias(state_norm: float, step_norm: float, precision: str) -> float:
    """1 - cos that a perfectly straight path reads when its states are rounded to this precision (independent errors).

    Rounding to b bits leaves errors that are uniform inside a cell of width 2^(1 - b) of the value's power of two; for
    values that are log-uniform over a power of two, their mean square is 2/9 ln 2 x 4^-b of that of the values.
    """
    if not (step_norm > 0 and math.isfinite(step_norm) and math.isfinite(state_norm)):
        return float("nan")
    mean_square = 2 / 9 * math.log(2) * 4.0 ** -SIGNIFICAND_BITS[precision]
    ratio = mean_square * (state_norm / step_norm) ** 2
    return 3 * ratio / (1 + 2 * ratio)
