"""The M mixer against transformers' Mamba2Mixer: the same state_dict on both sides, outputs and all gradients.

Run in an environment with transformers 5.24 and without mamba-ssm (which the peer would call on a CPU, in vain):
    python -m pytest tests/oracle_suites/hf
Packed rows are compared with the peer on each document alone; it has no document resets in its torch path.
"""

import pytest
import torch

from blocks.mblock import Mamba2, Mamba2Config
from model.context import SequenceContext

transformers = pytest.importorskip("transformers")

D_MODEL = 64
# The peer computes its scan in float32 in any model; so does our kernel, except for a float64 model.
TOLERANCE = {torch.float64: 5e-6, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def make_pair(n_groups, head_dim, d_state, own_chunk, peer_chunk, dtype):
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    own = Mamba2(D_MODEL, Mamba2Config(d_state, n_groups=n_groups, head_dim=head_dim, chunk_size=own_chunk))
    config = transformers.Mamba2Config(
        hidden_size=D_MODEL,
        num_heads=2 * D_MODEL // head_dim,
        head_dim=head_dim,
        state_size=d_state,
        expand=2,
        n_groups=n_groups,
        conv_kernel=4,
        chunk_size=peer_chunk,
        use_bias=False,
        use_conv_bias=True,
        time_step_limit=(0.0, float("inf")),
    )
    peer = Mamba2Mixer(config, layer_idx=0)
    with torch.no_grad():
        for parameter in (own.A_log, own.dt_bias, own.D, own.norm.weight):
            parameter.add_(0.3 * torch.randn_like(parameter))
    peer.load_state_dict(own.state_dict(), strict=True)
    own.load_state_dict(peer.state_dict(), strict=True)
    return own.to(dtype), peer.to(dtype)


def gradients(mixer, y, leaf, cotangent):
    named = dict(mixer.named_parameters())
    found = torch.autograd.grad(y, [leaf, *named.values()], cotangent.to(y.dtype))
    return {"y": y.detach(), **dict(zip(("x", *named), found, strict=True))}


def alone(mixer, x, lengths):
    return torch.cat([mixer(part) for part in x.split(lengths, dim=1)], dim=1)


def relative_errors(found, expected):
    return {n: float((found[n].double() - e.double()).norm() / e.double().norm()) for n, e in expected.items()}


@pytest.mark.parametrize("lengths", [[90], [30, 1, 59], [16, 16, 58]], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 64, 64, 64, 256), (2, 16, 8, 16, 16), (4, 8, 24, 32, 64)], ids=["default", "small", "odd"]
)
@pytest.mark.parametrize("precision", list(TOLERANCE), ids=["float64", "float32", "bfloat16"])
def test_equals_the_transformers_mixer(precision, sizes, lengths):
    lowered = precision == torch.bfloat16
    own, peer = make_pair(*sizes, torch.float32 if lowered else precision)
    x, cotangent = torch.randn(2, 2, 90, D_MODEL, dtype=next(own.parameters()).dtype)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    leaf, peer_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        y = own(leaf, SequenceContext.from_document_ids(ids))
    # The peer in float32 (float64) is what both are measured against where we run lower.
    expected = gradients(peer, alone(peer, peer_leaf, lengths), peer_leaf, cotangent)
    found = gradients(own, y, leaf, cotangent)
    assert found.keys() == expected.keys()
    errors = relative_errors(found, expected)
    allowed = dict.fromkeys(errors, TOLERANCE[precision])
    if lowered:  # a sum that cancels (D has one number a head) loses relative precision in anybody's bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            y_peer = alone(peer, peer_leaf, lengths)
        theirs = relative_errors(gradients(peer, y_peer, peer_leaf, cotangent), expected)
        allowed = {name: max(TOLERANCE[precision], 1.5 * error) for name, error in theirs.items()}
    assert all(errors[name] < allowed[name] for name in errors), (errors, allowed)
