"""What the Mamba-2 tests share: document layouts, random inputs and the recurrence spelled out."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from blocks.kernels.mamba2 import Mamba2Shape
from model.context import SequenceContext

PARTS = ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight")


def segments_of(lengths, batch=1):
    """(batch, sum of lengths) int32: rows of documents of these lengths."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return row.to(torch.int32).expand(batch, -1).contiguous()


def random_segments(batch, length, share, seed):
    """Every token but the first starts a document with probability `share`."""
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share
    starts[:, 0] = False
    return starts.cumsum(dim=1).to(torch.int32)


def context_of(segment_ids):
    return SequenceContext.from_document_ids(segment_ids)


def scan_inputs(batch, length, n_heads, n_groups, head_dim, d_state, seed=0, dtype=torch.float64):
    """x, dt, A, B, C, D of `ssd`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=dtype)

    return [
        normal(batch, length, n_heads, head_dim),
        F.softplus(normal(batch, length, n_heads) - 1),
        -normal(n_heads).exp(),
        normal(batch, length, n_groups, d_state),
        normal(batch, length, n_groups, d_state),
        normal(n_heads),
    ]


def recurrence(x, dt, A, B, C, D, segment_ids):
    """The five lines that `ssd` computes, one token and one head at a time."""
    batch, length, n_heads, _ = x.shape
    rows = []
    for b in range(batch):
        for head in range(n_heads):
            group, state = head * B.shape[2] // n_heads, 0.0
            for t in range(length):
                if t and segment_ids[b, t] != segment_ids[b, t - 1]:
                    state = 0.0
                state = (dt[b, t, head] * A[head]).exp() * state
                state = state + dt[b, t, head] * torch.outer(x[b, t, head], B[b, t, group])
                rows.append(state @ C[b, t, group] + D[head] * x[b, t, head])
    return torch.stack(rows).unflatten(0, (batch, n_heads, length)).transpose(1, 2)


def inner_inputs(batch, length, n_heads, shape, taps=4, seed=0):
    """The tensors of `mamba2_inner` in float64, in the order of PARTS."""
    generator = torch.Generator().manual_seed(seed)
    inner = n_heads * shape.head_dim
    channels = inner + 2 * shape.n_groups * shape.d_state

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return [
        normal(batch, length, inner + channels + n_heads),
        0.5 * normal(channels, taps),
        0.5 * normal(channels),
        normal(n_heads) - 1,
        normal(n_heads),
        normal(n_heads),
        1 + 0.2 * normal(inner),
    ]


def run_inner(form, tensors, segment_ids, shape, dtype):
    """[y, gradients in the order of PARTS]: zxbcdt in `dtype`, parameters as trained (float64 only in float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [t.to(dtype if i == 0 else wide).requires_grad_() for i, t in enumerate(tensors)]
    y = form(*leaves, segment_ids, shape)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16()  # exact in every dtype
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def relative_errors(found, expected):
    """name -> |found - expected| / |expected|.

    The inputs have unit scale, so a gradient far below 1 is a sum of terms of that size that cancel, and is as exact
    as they are: the norm has a floor of 1 per element (root mean square). dt_bias is the sum over all tokens of
    zxbcdt's last columns: its floor is the norm of those very terms; A_log is a sum of terms like them (both go
    through the decay dt A).
    """
    scale = {n: max(float(b.norm()), b.numel() ** 0.5) for n, b in zip(("y", *PARTS), expected, strict=True)}
    terms = expected[1 + PARTS.index("zxbcdt")][..., -expected[1 + PARTS.index("dt_bias")].shape[0] :]
    for name in ("dt_bias", "A_log"):
        scale[name] = max(scale[name], float(terms.norm()))
    return {n: float((a.double() - b).norm()) / scale[n] for n, a, b in zip(scale, found, expected, strict=True)}


@st.composite
def shapes(draw):
    """A Mamba2Shape and a number of heads, with sizes around the vector length of 16 and off it."""
    n_groups = draw(st.sampled_from([1, 2]))
    shape = Mamba2Shape(
        head_dim=draw(st.sampled_from([1, 4, 16, 20, 64])),
        d_state=draw(st.sampled_from([1, 8, 16, 24, 64])),
        n_groups=n_groups,
        chunk_size=draw(st.sampled_from([1, 7, 16, 32, 64])),
        eps=0.1,  # keeps a norm over one channel tame
    )
    return shape, n_groups * draw(st.sampled_from([1, 2, 3]))
