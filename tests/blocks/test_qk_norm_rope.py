"""QK-norm and rotation: the fused kernel against plain torch, and rotation's own properties."""

import pytest
import torch

from blocks.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference, rotary_table

N_HEADS, N_KV_HEADS, HEAD_DIM, REST, EPS = 3, 1, 10, 7, 1e-6
WIDTH = (N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM + REST


def inputs(dtype, rotated=True):
    qkv = torch.randn(2, 70, WIDTH).to(dtype)
    weights = 1 + 0.3 * torch.randn(2, HEAD_DIM)
    positions = torch.randint(0, 50, (2, 70))
    table = rotary_table(torch.arange(50), HEAD_DIM, 1e4, torch.float32) if rotated else None
    return qkv, weights[0], weights[1], positions, table


def with_gradients(form, qkv, q_weight, k_weight, positions, table, cotangents):
    leaves = [t.clone().requires_grad_() for t in (qkv, q_weight, k_weight)]
    outs = form(*leaves, positions, table, N_HEADS, N_KV_HEADS, EPS)
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, cotangents)]


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fused_equals_plain_torch_in_float64(dtype, rotated):
    qkv, q_weight, k_weight, positions, table = inputs(dtype, rotated)
    shapes = [(2, 70, N_HEADS, HEAD_DIM), (2, 70, N_KV_HEADS, HEAD_DIM), (2, 70, N_KV_HEADS, HEAD_DIM), (2, 70, REST)]
    cotangents = [torch.randn(shape).to(dtype) for shape in shapes]
    fused = with_gradients(qk_norm_rope, qkv, q_weight, k_weight, positions, table, cotangents)
    wide = [t.double() for t in (qkv, q_weight, k_weight)]
    wide_table = tuple(t.double() for t in table) if rotated else None
    exact = with_gradients(qk_norm_rope_reference, *wide, positions, wide_table, [c.double() for c in cotangents])
    assert all(a.shape == b.shape for a, b in zip(fused, exact, strict=True))
    for a, b in zip(fused, exact, strict=True):
        tolerance = 4e-3 if a.dtype == torch.bfloat16 else 1e-6  # relative to the norm; half a bfloat16 unit
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_queries_and_keys_have_unit_root_mean_square_before_the_weight():
    qkv, _, _, positions, table = inputs(torch.float32)
    ones = torch.ones(HEAD_DIM)
    q, k, _, _ = qk_norm_rope(100 * qkv, ones, ones, positions, table, N_HEADS, N_KV_HEADS, EPS)
    for heads in (q, k):  # rotation keeps lengths
        assert torch.allclose(heads.square().mean(-1), torch.ones(()), atol=1e-5)


def test_scores_depend_on_the_distance_of_positions_only():
    q, k = torch.randn(2, HEAD_DIM, dtype=torch.float64)
    cos, sin = rotary_table(torch.arange(40), HEAD_DIM, 100.0, torch.float64)
    ones = torch.ones(HEAD_DIM, dtype=torch.float64)

    def rotated(x, position):
        qkv = torch.cat((x, torch.zeros(2 * HEAD_DIM, dtype=x.dtype)))[None]
        return qk_norm_rope(qkv, ones, ones, torch.tensor([position]), (cos, sin), 1, 1, EPS)[0].flatten()

    scores = [rotated(q, i + 7) @ rotated(k, i) for i in (0, 3, 31)]
    assert torch.allclose(scores[0], torch.stack(scores[1:]), rtol=1e-10)
    assert not torch.isclose(scores[0], rotated(q, 8) @ rotated(k, 0), rtol=1e-3)
