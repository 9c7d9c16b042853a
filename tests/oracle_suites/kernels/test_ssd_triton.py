"""Our SSD and convolution against mamba-ssm's and causal-conv1d's: their Triton kernels with document resets, forward
and backward, through the very call that the CUDA path makes, and their plain torch references.

Needs an environment with triton, mamba-ssm and causal-conv1d (built without CUDA: see the research notes on
`*_FORCE_BUILD` and `*_SKIP_CUDA_BUILD`). Without a GPU set TRITON_INTERPRET=1 before triton is imported:
    TRITON_INTERPRET=1 python -m pytest tests/oracle_suites/kernels/test_ssd_triton.py
"""

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import types

import pytest
import torch

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
if not ON_GPU and not INTERPRETED:
    pytest.skip("no CUDA GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
for package in ("mamba_ssm", "causal_conv1d"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

from blocks.kernels import ssd as kernels  # noqa: E402
from blocks.kernels.causal_conv import causal_conv, causal_conv_reference  # noqa: E402
from blocks.kernels.ssd import ssd, ssd_reference  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
CHUNK = 256 if ON_GPU else 16
TOLERANCE = {torch.float32: 1e-2 if ON_GPU else 1e-4, torch.bfloat16: 3e-2}  # a GPU may multiply in TF32
NAMES = ("y", "x", "dt", "A", "B", "C", "D")


@pytest.fixture
def without_gpu(monkeypatch):
    """Lets the packages import, and their Triton kernels run in the interpreter, on a machine without CUDA.

    Their __init__ files import compiled CUDA extensions, so the packages are entered through bare modules.
    """
    if ON_GPU:
        return
    for package in ("mamba_ssm", "causal_conv1d"):
        spec = importlib.util.find_spec(package)
        module = types.ModuleType(package)
        module.__path__, module.__spec__ = list(spec.submodule_search_locations), spec
        monkeypatch.setitem(sys.modules, package, module)
    for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
        module = types.ModuleType(extension)
        module.__spec__ = importlib.machinery.ModuleSpec(extension, None)
        monkeypatch.setitem(sys.modules, extension, module)
    monkeypatch.setattr(torch.cuda, "device", lambda *a, **k: contextlib.nullcontext())
    properties = types.SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *a, **k: properties)


def products_of_numbers(monkeypatch):
    """The interpreter keeps bfloat16 as uint16 and its tl.dot multiplies those bit patterns (Triton 3.9: the product
    of two matrices of ones gives 16256^2 per term). Hands it float32 instead, which holds every bfloat16 exactly."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    original = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: original(self, widened(a), widened(b), *rest),
    )


@pytest.fixture
def triton_scan(without_gpu, monkeypatch):
    """Makes `ssd` call mamba-ssm's kernel, as on a GPU."""
    kernels.cuda_kernel.cache_clear()  # an earlier try was outside `without_gpu`
    assert kernels.cuda_kernel()[1] == "imported"
    if not ON_GPU:
        products_of_numbers(monkeypatch)
        # one configuration each: nothing to time and choose from
        modules = [m for name, m in sys.modules.items() if name.startswith("mamba_ssm.ops.triton")]
        for value in [v for m in modules for v in vars(m).values() if isinstance(v, triton.runtime.Autotuner)]:
            monkeypatch.setattr(value, "configs", value.configs[-1:])
    monkeypatch.setattr(kernels, "kernel_name", lambda device, dtype: kernels.CUDA_KERNEL)
    monkeypatch.setattr(kernels, "CUDA_CHUNK", CHUNK)


def scan_inputs(length, n_heads, n_groups, dtype=torch.float32):
    def normal(*size):
        return torch.randn(*size, device=DEVICE)

    x, B, C = (normal(2, length, n, 16).to(dtype) for n in (n_heads, n_groups, n_groups))
    dt = torch.nn.functional.softplus(normal(2, length, n_heads) - 1)
    return [x, dt, -normal(n_heads).exp(), B, C, normal(n_heads)]


def outputs_and_gradients(form, inputs, *arguments):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = form(*leaves, *arguments)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


@pytest.mark.parametrize("lengths", [[40], [16, 16, 8], [7, 1, 20, 12]], ids=str)
@pytest.mark.parametrize(("n_heads", "n_groups"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16"])
def test_triton_scan_with_document_resets(triton_scan, dtype, n_heads, n_groups, lengths):
    inputs = scan_inputs(sum(lengths), n_heads, n_groups, dtype)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    segment_ids = ids.to(torch.int32).expand(2, -1).to(DEVICE)
    found = outputs_and_gradients(ssd, inputs, segment_ids, 64)
    expected = outputs_and_gradients(ssd_reference, [t.double() for t in inputs], segment_ids, 8)
    pairs = zip(NAMES, found, expected, strict=True)
    errors = {name: float((a.double() - b).norm() / b.norm()) for name, a, b in pairs}
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_minimal_reference_of_mamba_ssm(without_gpu):
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete

    x, dt, A, B, C, _ = (t.double() for t in scan_inputs(48, 4, 4))
    expected, _ = ssd_minimal_discrete(x * dt[..., None], dt * A, B, C, 16)
    segment_ids = torch.zeros(2, 48, dtype=torch.int32, device=DEVICE)
    found = ssd_reference(x, dt, A, B, C, torch.zeros_like(A), segment_ids, 64)
    assert (found - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("taps", [2, 3, 4])
def test_reference_convolution_of_causal_conv1d(without_gpu, taps):
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    x, weight, bias = torch.randn(2, 30, 8), torch.randn(8, taps), torch.randn(8)
    segment_ids = torch.zeros(2, 30, dtype=torch.int32)
    expected = causal_conv1d_ref(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    assert (causal_conv_reference(x, weight, bias, segment_ids) - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.skipif(not ON_GPU, reason="the compiled kernel of causal-conv1d needs a GPU")
def test_cuda_convolution_with_document_resets():
    x, weight, bias = torch.randn(2, 70, 40), torch.randn(40, 4), torch.randn(40)
    segment_ids = (torch.rand(2, 70) < 0.1).cumsum(dim=1).to(torch.int32)
    inputs = [t.to(DEVICE) for t in (x, weight, bias)]
    found = outputs_and_gradients(causal_conv, inputs, segment_ids.to(DEVICE))
    expected = outputs_and_gradients(causal_conv_reference, [t.double() for t in inputs], segment_ids.to(DEVICE))
    assert all((a.double() - b).norm() < 1e-4 * b.norm() for a, b in zip(found, expected, strict=True))
