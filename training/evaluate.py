"""Held-out loss per original byte, and a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.batch import Batch
from data.statistics import bits_per_byte, label_counts, unigram_bits_per_byte
from losses.lm import lm_loss_sum
from model.context import SequenceContext
from model.generate import generate
from training.distributed import World


def validate(
    model: Any,
    batches: Iterable[Batch],
    token_bytes: NDArray[np.int64],
    autocast: Callable[[], AbstractContextManager],
    world: World | None = None,
) -> dict[str, float]:
    """val_loss (nats per token), val_bits_per_byte and unigram_bits_per_byte over all loss-bearing held-out tokens.

    token_bytes: (V,) original UTF-8 bytes of each token. The unigram entropy is that of the very same tokens by
    their own counts: what a model without context could reach at best. Every rank works on its share of each batch.
    """
    world = world or World.alone()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, counts = 0.0, np.zeros(len(token_bytes), dtype=np.int64)
    with torch.no_grad(), autocast():
        for batch in batches:
            on_device = world.share(batch).to(device)
            output = model(on_device.tokens, SequenceContext.from_document_ids(on_device.document_ids))
            loss_sum, _ = lm_loss_sum(output.final, model.head.weight, on_device.labels)
            nats += float(loss_sum)
            counts += label_counts(batch.labels, len(token_bytes))
    model.train(was_training)
    nats = float(world.sum(torch.tensor(nats, dtype=torch.float64, device=device)))
    return {
        "val_loss": nats / max(int(counts.sum()), 1),
        "val_bits_per_byte": float(bits_per_byte(nats, counts, token_bytes)),
        "unigram_bits_per_byte": unigram_bits_per_byte(counts, token_bytes),
    }


def sample_text(
    model: Any, tokenizer: Any, prompt: str, n_tokens: int, temperature: float, seed: int, world: World | None = None
) -> str:
    """A continuation of the prompt, drawn with a generator of its own so that training is not disturbed.

    Of several ranks each draws its own, and a step gathers weights: so none of them stops before the others.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    start = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt)]], device=device)
    stop = tokenizer.eos_id if world is None or world.size == 1 else None
    tokens = generate(model, start, n_tokens, temperature=temperature, stop_token=stop, generator=generator)
    found = tokens[0].tolist()
    drawn = found[start.shape[1] :]
    if tokenizer.eos_id in drawn:
        found = found[: start.shape[1] + drawn.index(tokenizer.eos_id) + 1]
    return tokenizer.decode(found)
