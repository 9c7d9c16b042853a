"""The plan's figure for the head on a GPU is what the head's own code allocates, on tensors without bytes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from blocks.kernels.linear_cross_entropy import _torch_form, chunk_tokens
from training.plan_kernels import SCRATCH
from training.plan_trace import LiveBytes


@pytest.mark.parametrize("n_words", [4096, 50257, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_heads_scratch_on_a_gpu_is_what_it_allocates(n_words, dtype):
    with FakeTensorMode():
        hidden, weight = torch.empty(16384, 1024, dtype=dtype), torch.empty(n_words, 1024)
        labels = torch.empty(16384, dtype=torch.int64)
        live = LiveBytes({})
        live.ignore([hidden, weight, labels])
        with live:
            losses, *grads = _torch_form(hidden, weight, labels, chunk_tokens(n_words, dtype, "cuda"), True)
    results = sum(t.numel() * t.element_size() for t in (losses, *grads))
    predicted = SCRATCH["cuda"]["amer::linear_cross_entropy"](hidden, weight, labels, 0, True)
    assert abs(predicted - (live.peak - results)) < 0.02 * predicted
