"""Two controls that act: what else than straightness could an effect of STP be?

gradient_noise: any push of that size at those tokens would do. The value is STP's. Backward, at every boundary and
    token that STP reads, the gradient g that STP sends there (the sum over the triples that read it) becomes

        |g| u,   u uniform on the unit sphere of the D channels, hashed from (seed, step, row), boundary and token,

    so the same tokens are pushed equally hard, at the same steps and under the same weight, in a direction that means
    nothing; the norm at a boundary is STP's too. Per token and not per boundary: noise spread over other tokens, or
    evenly over these, would be another push. Directions at different tokens, boundaries and steps are independent, so
    they add up less across boundaries than STP's do: what is matched is the gradient at each boundary by itself.
    A learned predictor keeps STP's gradient.
    Expect: no systematic change; what STP's arm has in common with this one is not straightness.

norm_penalty: less movement would do. At the same triples, in place of 1 - cos,

        sum_k |h_k - c|^2 / sum_k |h_k|^2,   k over s, r, t and c their mean: in [0, 1],

    which is a third of |h_t - h_r|^2 + |h_r - h_s|^2 + |h_t - h_s|^2, against the norm of the states. Its gradient
    pulls the three towards their mean (and away from 0, which keeps the measure free of scale, as STP is): both move
    the triangle as a whole to a smaller or larger copy of itself, so every angle stays, and it is exactly orthogonal to
    STP's gradient, triple by triple. The sum of the two neighbouring displacements alone would not be: it is smallest
    with r halfway between s and t, so it straightens. At equal weight it does not press as hard as STP does (see
    stp/grad_norm); choose its weight so that steps get as short as in STP's arm.
    Expect: shorter steps, angles left alone. The value of the term (`stp/raw`) is the penalty's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from losses.keyed import keyed_directions

# Tokens of a row are numbered below this, boundaries above.
_BOUNDARY = 1 << 32


class GradientNoise(torch.autograd.Function):
    """rows (n_boundaries, P, B, n, D), unchanged; backward: noise of the norm that the gradient has at each token.

    points (P, B, n): the tokens that the rows are of. key (B,) int64.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, points: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(points, key)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return noise_like(gradient, *ctx.saved_tensors), None, None


def noise_like(gradient: Tensor, points: Tensor, key: Tensor) -> Tensor:
    """gradient (n_boundaries, P, B, n, D) -> noise of its norm per boundary and token; see above.

    A token that several rows are of gets it once, at the first of them, in the size of their sum.
    """
    n_boundaries, P, B, n, D = gradient.shape
    tokens = points.transpose(0, 1).reshape(B, P * n)
    at_rows = gradient.permute(0, 2, 1, 3, 4).reshape(n_boundaries, B, P * n, D)
    first = (tokens[:, :, None] == tokens[:, None, :]).to(torch.int64).argmax(-1)
    places = first[None, :, :, None].expand_as(at_rows)
    sums = torch.zeros_like(at_rows).scatter_add(2, places, at_rows)
    boundaries = torch.arange(n_boundaries, device=key.device)[:, None, None] * _BOUNDARY
    directions = keyed_directions(key[None, :, None], tokens[None] + boundaries, D)
    noise = sums.square().sum(-1, keepdim=True).sqrt() * directions.to(gradient.dtype)
    return noise.view(n_boundaries, B, P, n, D).permute(0, 2, 1, 3, 4)


def relative_spread(rows: Tensor) -> Tensor:
    """rows (n_boundaries, P, B, n, D) -> (n_boundaries, B, n): the spread around their mean, relative to their norms.

    0 with zero gradient where all states are 0.
    """
    total = rows.square().sum((1, -1))
    spread = (rows - rows.mean(1, keepdim=True)).square().sum((1, -1))
    return spread / torch.where(total > 0, total, 1.0)
