"""On a GPU attention reads a block mask, made once per batch: the same branch here, with a stand-in for its kernel,
whose backward pass torch has for a GPU only."""

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch._dynamo.utils import counters

from blocks.kernels import attention
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig
from training.recompute import recompute

VOCAB, B, T = 61, 2, 160


def dense(q, k, v, block_mask, enable_gqa):
    """What flex_attention computes, by the same mask."""
    visible = flex.create_mask(block_mask.mask_mod, B, 1, T, T, device="cpu")
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=enable_gqa)


@pytest.fixture
def made(monkeypatch):
    """The masks made, on the branch of a GPU."""
    found, honest = [], flex.create_block_mask

    def spy(*arguments, **options):
        found.append(honest(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(flex, "create_block_mask", spy)
    monkeypatch.setattr(attention, "uses_flex", lambda device: True)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: dense)
    return found


def make_model(window):
    config = ModelConfig(pattern="AEAA", d_model=32)
    config.attention.n_heads, config.attention.n_kv_heads, config.attention.window = 4, 2, window
    config.moe.n_experts, config.moe.expert_ff = 4, 16
    model = HybridLM(config, VOCAB)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def make_context(lengths):
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return SequenceContext.from_document_ids(torch.stack([row, torch.zeros_like(row)]))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("kind", ["none", "full"])
def test_one_mask_per_batch_whatever_the_depth_and_what_is_computed_again(made, monkeypatch, window, kind):
    model, tokens, contexts = make_model(window), torch.randint(VOCAB, (B, T)), []
    for block in model.blocks:
        recompute(block, kind)
    gradients = []
    for lengths in ([100, 60], [1, 30, 129]):
        contexts.append(make_context(lengths))
        states = model(tokens, contexts[-1]).hidden_states
        gradients.append(torch.autograd.grad(states[-1].square().sum(), list(model.parameters()), allow_unused=True))
        assert len(made) == len(contexts)
    monkeypatch.undo()
    for context, found in zip(contexts, gradients, strict=True):  # the same numbers as a CPU's own form
        fresh = SequenceContext.from_document_ids(context.document_ids)
        loss = model(tokens, fresh).hidden_states[-1].square().sum()
        expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_compiled_blocks_take_the_mask_from_outside_and_do_not_compile_again(made):
    torch._dynamo.reset()
    counters.clear()
    model, tokens = make_model(9), torch.randint(VOCAB, (B, T))
    for block in model.stack:
        block.compile(fullgraph=True, backend="eager")
    plain = make_model(9)
    with torch.no_grad():
        for number, lengths in enumerate(([100, 60], [1, 30, 129], [160]), start=1):
            found = model(tokens, make_context(lengths)).hidden_states[-1]
            assert len(made) == number
            expected = plain(tokens, make_context(lengths)).hidden_states[-1]
            made.pop()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["recompiles"] and not counters["graph_break"]
    torch._dynamo.reset()
