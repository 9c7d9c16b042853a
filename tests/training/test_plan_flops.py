"""FLOPs that plans are made of, against the profiler's counter on the plain torch forms in float64, within 3%.

Our fused operators hide their products from the profiler, so the reference forms run instead. Those multiply the whole
square of an attention score matrix where a causal kernel needs the lower half: that surplus is taken off, exactly.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import blocks.ablock
import blocks.mblock
import blocks.rblock
from blocks.kernels.attention import document_mask
from blocks.kernels.linear_cross_entropy import linear_cross_entropy_reference
from blocks.kernels.m2rnn_mixer import m2rnn_mixer_reference
from blocks.kernels.mamba2 import mamba2_inner_reference
from model.context import SequenceContext
from model.hybrid import HybridLM
from training.config import load_config
from training.plan_cost import flops_per_token
from training.recompute import recompute
from training.summary import meta_model

DEMO = Path(__file__).parents[2] / "configs/demo.yaml"
LENGTH, VOCABULARY = 128, 512


def dense_attention(q, k, v, segment_ids, *_):
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    probabilities = scores.masked_fill(~document_mask(segment_ids)[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", probabilities, v)


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    monkeypatch.setattr(blocks.ablock, "document_attention", dense_attention)
    monkeypatch.setattr(blocks.mblock, "mamba2_inner", mamba2_inner_reference)
    monkeypatch.setattr(blocks.rblock, "m2rnn_mixer", m2rnn_mixer_reference)


def counted_per_token(config, kind):
    model = HybridLM(config, VOCABULARY).double()
    model.init_weights(torch.Generator().manual_seed(0))
    for block in model.stack:
        recompute(block, kind)
    tokens = torch.randint(VOCABULARY, (1, LENGTH))
    context = SequenceContext.single_documents(tokens)
    with FlopCounterMode(display=False) as counter:
        final = model(tokens, context).final.flatten(0, 1)
        linear_cross_entropy_reference(final, model.head.weight, tokens.flatten()).sum().backward()
    surplus = 0.0
    for block in model.stack:
        if block.letter == "A":
            inner = block.mixer.n_heads * block.mixer.head_dim
            surplus += (3 + (kind == "full")) * 4 * inner * (LENGTH - (LENGTH + 1) / 2)
    return model, counter.get_total_flops() / LENGTH - surplus


@pytest.mark.parametrize("pattern", ["A", "M", "E", "R", "AEMEAEMEAEMR"])
@pytest.mark.parametrize("kind", ["none", "full"])
def test_what_is_planned_is_what_the_profiler_counts(pattern, kind):
    config = replace(load_config(DEMO).model, pattern=pattern)
    model, counted = counted_per_token(config, kind)
    planned = flops_per_token(model, LENGTH, kind)
    assert planned.training == 3 * model.flops_per_token(LENGTH)
    # R: the profiler sees no product in k v^T and q^T h, which are elementwise there
    assert planned.executed == pytest.approx(counted, rel=0.03 if "R" in pattern else 1e-9), planned.executed / counted


def test_recomputing_selectively_repeats_attention_and_scan_alone():
    model = meta_model(load_config(DEMO, ["model.pattern=AEMR"]), VOCABULARY)
    a, m = model.stack[0].mixer, model.stack[2].mixer
    scores = 4 * a.n_heads * a.head_dim * (LENGTH + 1) / 2
    chunk, state = m.config.chunk_size, m.config.d_state
    scan = 2 * (chunk * state + m.d_inner * (chunk + 2 * state))
    planned = flops_per_token(model, LENGTH, "selective")
    assert planned.executed - planned.training == int(scores) + scan
