"""The A mixer against transformers' Qwen3 attention (QK-norm, rotary, grouped queries), weights carried over.

Packed documents reach the peer as a mask and as positions that restart.
"""

import pytest
import torch

from blocks.ablock import Attention, AttentionConfig
from blocks.kernels.attention import document_mask
from model.context import SequenceContext

transformers = pytest.importorskip("transformers")

D_MODEL, N_HEADS, N_KV_HEADS, HEAD_DIM = 64, 4, 2, 24
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-6}  # the peer's rotary angles are float32 in any model


@pytest.mark.parametrize("lengths", [[70], [33, 1, 36], [1, 1, 40, 28]], ids=str)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])
def test_equals_qwen3_attention(dtype, window, lengths):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    config = transformers.Qwen3Config(
        hidden_size=D_MODEL,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        attn_implementation="sdpa",
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    peer = Qwen3Attention(config, 0)
    for p in peer.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
    peer = peer.to(dtype)
    own = Attention(
        D_MODEL, AttentionConfig(n_heads=N_HEADS, n_kv_heads=N_KV_HEADS, head_dim=HEAD_DIM, window=window)
    ).to(dtype)
    with torch.no_grad():
        own.qkv_proj.weight.copy_(torch.cat([peer.q_proj.weight, peer.k_proj.weight, peer.v_proj.weight]))
        own.o_proj.weight.copy_(peer.o_proj.weight)
        own.q_norm.weight.copy_(peer.q_norm.weight)
        own.k_norm.weight.copy_(peer.k_norm.weight)
    ids = [[i for i, length in enumerate(lengths) for _ in range(length)]] * 2
    context = SequenceContext.from_document_ids(torch.tensor(ids))
    x, cotangent = torch.randn(2, 2, 70, D_MODEL, dtype=dtype)
    leaf = x.clone().requires_grad_()
    angles = Qwen3RotaryEmbedding(config)(x, context.positions)
    mask = document_mask(context.segment_ids, window)[:, None]
    y, (y_peer, _) = own(leaf, context), peer(leaf, angles, mask)
    assert (y - y_peer).norm() <= TOLERANCE[dtype] * y_peer.norm()
    peer_leaves = [peer.o_proj.weight, peer.q_norm.weight, peer.k_norm.weight]
    own_leaves = [own.o_proj.weight, own.q_norm.weight, own.k_norm.weight]
    grads = torch.autograd.grad(y, [leaf, own.qkv_proj.weight, *own_leaves], cotangent)
    projections = [peer.q_proj.weight, peer.k_proj.weight, peer.v_proj.weight]
    dx, dq, dk, dv, *rest = torch.autograd.grad(y_peer, [leaf, *projections, *peer_leaves], cotangent)
    for a, b in zip(grads, (dx, torch.cat([dq, dk, dv]), *rest), strict=True):
        assert (a - b).norm() <= TOLERANCE[dtype] * b.norm()
