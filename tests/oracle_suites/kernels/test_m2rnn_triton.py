"""The Triton kernel of M2RNN against the literal loop, in Triton's interpreter where there is no GPU.

Needs an environment with triton, with TRITON_INTERPRET=1 set before it is imported (a GPU needs neither):
    TRITON_INTERPRET=1 python -m pytest tests/oracle_suites/kernels/test_m2rnn_triton.py
"""

import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
if not ON_GPU and os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("no CUDA GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from blocks.kernels import m2rnn_triton  # noqa: E402
from blocks.kernels.m2rnn import m2rnn_reference  # noqa: E402
from blocks.kernels.m2rnn_layout import prepare  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
# batch, length, heads (N, Nq, Nk), K, V, chunk, share of tokens that start a document, gradient clip
CASES = {
    "training tile": (2, 21, (4, 1, 1), 16, 16, 8, 0.1, None),
    "padded tile": (1, 9, (3, 3, 1), 5, 3, 4, 0.2, None),
    "wide": (1, 6, (2, 2, 1), 64, 16, 4, 0.0, None),
    "clipped": (2, 11, (2, 1, 2), 8, 8, 16, 0.2, 0.3),
    "one token": (2, 1, (2, 1, 1), 8, 8, 16, 1.0, None),
    "one-token documents": (1, 7, (2, 1, 1), 8, 8, 3, 1.0, None),
    "boundaries at chunk edges": (1, 12, (2, 1, 1), 16, 16, 4, "edges", None),
}


def make_case(batch, length, heads, key_dim, value_dim, share, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (0.7 * torch.randn(*shape, generator=generator)).to(DEVICE)

    n_heads, n_q, n_k = heads
    if share == "edges":
        starts = (torch.arange(length) % 4 == 0).expand(batch, -1)
    else:
        starts = torch.rand(batch, length, generator=generator) < share
    q, k, v = (
        normal(batch, length, n_q, key_dim),
        normal(batch, length, n_k, key_dim),
        normal(batch, length, n_heads, value_dim),
    )
    weight = torch.eye(value_dim, device=DEVICE) + 0.2 * normal(n_heads, value_dim, value_dim)
    forget = torch.rand(batch, length, n_heads, generator=generator).to(DEVICE)
    state = normal(batch, n_heads, key_dim, value_dim)
    dy, dlast = normal(batch, length, n_heads, value_dim), normal(batch, n_heads, key_dim, value_dim)
    inputs = (q.to(dtype), k.to(dtype), v.to(dtype), weight, forget, normal(n_heads, value_dim))
    return inputs, starts.to(DEVICE), state, dy, dlast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_literal_loop(name, dtype):
    batch, length, heads, key_dim, value_dim, chunk, share, clip = CASES[name]
    inputs, starts, state, dy, dlast = make_case(batch, length, heads, key_dim, value_dim, share, dtype)
    prepared = prepare(*inputs, starts, state)
    y, last, checkpoints = m2rnn_triton.forward(prepared, chunk)
    found = m2rnn_triton.backward(prepared, checkpoints, dy, dlast, math.inf if clip is None else clip, chunk)
    leaves = [t.double().requires_grad_() for t in (*inputs, state)]
    y_expected, last_expected = m2rnn_reference(*leaves[:6], starts, leaves[6], gradient_clip=clip)
    expected = torch.autograd.grad((y_expected, last_expected), leaves, (dy.double(), dlast.double()))
    names = ("y", "last", "q", "k", "v", "weight", "forget", "skip", "initial_state")
    pairs = zip(names, (y, last, *found), (y_expected, last_expected, *expected), strict=True)
    errors = {n: float((a.double() - b).detach().norm() / (b.detach().norm() + 1e-12)) for n, a, b in pairs}
    # sigmoid-based tanh is exact to 2e-7 absolute; the inputs are rounded before, not inside
    assert max(errors.values()) < 5e-6, errors


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from blocks.kernels.m2rnn_triton import _backward_kernel, _forward_kernel

for kernel in (_forward_kernel, _backward_kernel):
    constants = {"K": 16, "V": 16, "KT": 16, "VT": 16, "CHUNK": 16}
    types = {"starts_ptr": "*i8", "limit": "fp32"} | {name: "constexpr" for name in constants}
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    for capability in (80, 90):
        source = ASTSource(fn=kernel, signature=signature, constexprs=places)
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
"""


def test_compiles_for_gpus_that_are_not_here():
    """What the interpreter does not see: types of loop-carried values, shapes that tl.dot takes, registers."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not ON_GPU, reason="dispatch by device needs a GPU")
def test_the_operator_runs_it_on_a_gpu():
    from blocks.kernels.m2rnn import TRITON, kernel_name, m2rnn

    assert kernel_name(torch.device("cuda"), torch.bfloat16) == TRITON
    inputs, starts, state, *_ = make_case(2, 21, (4, 1, 1), 16, 16, 0.1)
    y, last = m2rnn(*inputs, starts, state)
    y_expected, last_expected = m2rnn_reference(*inputs, starts, state)
    assert (y - y_expected).norm() < 5e-6 * y_expected.norm()
    assert (last - last_expected).norm() < 5e-6 * last_expected.norm()
