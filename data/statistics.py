"""What a model without context would pay on the held-out text: the number that a loss is read beside."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.batch import IGNORE_LABEL


def label_counts(labels: Tensor, vocab_size: int) -> NDArray[np.int64]:
    """labels: any shape, -100 ignored -> (V,) how often each token is predicted."""
    kept = labels[labels != IGNORE_LABEL]
    return torch.bincount(kept.flatten().cpu(), minlength=vocab_size).numpy()


def count_bytes(counts: NDArray[np.int64], token_bytes: NDArray[np.int64]) -> int:
    """Original UTF-8 bytes behind the counted tokens. counts, token_bytes: (V,)."""
    return int(counts @ token_bytes)


def unigram_bits_per_byte(counts: NDArray[np.int64], token_bytes: NDArray[np.int64]) -> float:
    """Entropy of the tokens by their own counts, in bits per original UTF-8 byte. counts, token_bytes: (V,).

    A lower bound of what any fixed distribution over tokens could reach on them. NaN if they hold no byte.
    """
    total, n_bytes = counts.sum(), count_bytes(counts, token_bytes)
    if n_bytes == 0:
        return float("nan")
    seen = counts[counts > 0].astype(np.float64)
    return float(-(seen * np.log2(seen / total)).sum() / n_bytes)


def bits_per_byte(total_nats: float, counts: NDArray[np.int64], token_bytes: NDArray[np.int64]) -> float:
    """Summed cross-entropy (nats) over the counted labels -> bits per original UTF-8 byte."""
    n_bytes = count_bytes(counts, token_bytes)
    return total_nats / np.log(2.0) / n_bytes if n_bytes else float("nan")
