"""Next-token cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from blocks.kernels.linear_cross_entropy import AUTO_CHUNK, IGNORE_INDEX, linear_cross_entropy, token_losses


def lm_loss_sum(final: Tensor, weight: Tensor, labels: Tensor, chunk: int = AUTO_CHUNK) -> tuple[Tensor, Tensor]:
    """Summed negative log likelihood (nats) and the number of loss-bearing tokens.

    final (B, T, D): final-normed hidden states; weight (V, D): the output projection; labels (B, T) int64, already
    shifted, -100 where a token bears no loss. The caller divides by the global count, so a micro-batch of any size
    weighs what it should; a batch without labels gives a graph-connected zero. Under autocast the products run in
    its dtype.
    """
    labels = labels.flatten()
    return linear_cross_entropy(_autocast(final.flatten(0, -2)), weight, labels, chunk), (labels != IGNORE_INDEX).sum()


def lm_token_losses(final: Tensor, weight: Tensor, labels: Tensor, chunk: int = AUTO_CHUNK) -> Tensor:
    """(B, T) negative log likelihoods in nats, 0 where ignored; no gradient. For evaluation."""
    losses = token_losses(_autocast(final.flatten(0, -2)), weight, labels.flatten(), chunk)
    return losses.view(labels.shape)


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(device))
    return x
