from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.prepared import Prepared
from data.statistics import bits_per_byte, count_bytes, label_counts, unigram_bits_per_byte
from data.stream import validation_batches


def test_by_hand() -> None:
    labels = torch.tensor([[0, 0, 1, -100], [2, 2, 2, 2]])
    counts = label_counts(labels, 4)
    assert counts.tolist() == [2, 1, 4, 0]
    token_bytes = np.array([3, 0, 1, 5])
    assert count_bytes(counts, token_bytes) == 10
    entropy = 2 * math.log2(7 / 2) + math.log2(7) + 4 * math.log2(7 / 4)
    assert unigram_bits_per_byte(counts, token_bytes) == pytest.approx(entropy / 10, rel=1e-12)
    # the cross-entropy of that very distribution is the same number
    log_probs = torch.tensor([2 / 7, 1 / 7, 4 / 7, 1e-9]).double().log()
    nats = -sum(float(log_probs[label]) for label in labels.flatten() if label >= 0)
    assert bits_per_byte(nats, counts, token_bytes) == pytest.approx(entropy / 10, rel=1e-6)


def test_no_byte_is_not_a_number() -> None:
    counts, token_bytes = np.array([0, 3]), np.array([1, 0])
    assert math.isnan(unigram_bits_per_byte(counts, token_bytes))
    assert math.isnan(bits_per_byte(1.0, counts, token_bytes))


def test_bytes_of_all_validation_labels_are_the_bytes_of_the_held_out_text(prepared: Prepared) -> None:
    batches = validation_batches(prepared, 16, 8)
    counts = np.sum([label_counts(batch.labels, prepared.vocab_size) for batch in batches], axis=0)
    assert count_bytes(counts, prepared.token_bytes) == prepared.manifest["corpora"][0]["validation"]["bytes"]
    assert 0 < unigram_bits_per_byte(counts, prepared.token_bytes) < 8
