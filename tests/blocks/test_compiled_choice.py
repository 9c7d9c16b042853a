"""Under torch.compile a GPU's branches are one graph, with and without the packages that bring its kernels."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mamba2_cases import context_of, scan_inputs, segments_of

from blocks.eblock import MoE, MoEConfig
from blocks.kernels import causal_conv, grouped_experts, m2rnn, m2rnn_mixer, mamba2, ssd
from blocks.mblock import Mamba2, Mamba2Config
from blocks.rblock import M2RNN, M2RNNConfig

SEGMENTS = segments_of([10, 23, 7], batch=2)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("operation", [ssd, causal_conv, m2rnn, mamba2, m2rnn_mixer], ids=lambda m: m.__name__)
def test_the_choice_for_a_gpu_is_a_constant_of_the_graph(operation):
    """dynamo looks through functools.cache, and would meet the import of a package that is not there."""

    def choose(x):
        return x + 1, operation.kernel_name(torch.device("cuda"), torch.bfloat16)

    y, name = torch.compile(choose, fullgraph=True, backend="eager")(torch.zeros(1))
    assert y == 1 and name == operation.kernel_name(torch.device("cuda"), torch.bfloat16)


def gradients_of(form, inputs, cotangent):
    """A stand-in for a kernel's backward pass. In a thread of its own, as autograd is off inside an operator."""

    def derive():
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(form(*leaves), leaves, cotangent)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(derive).result()


def convolve(x, weight, bias, seq_idx=None, activation=None):
    assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0 and x.shape[1] % 8 == 0
    assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and activation == "silu"
    return causal_conv.causal_conv_reference(x.transpose(1, 2), weight, bias, seq_idx).transpose(1, 2)


def convolve_backward(x, weight, bias, dy, seq_idx, initial, dfinal, dx, wants_dinitial, silu):
    assert dy.stride(1) == 1 and silu and not wants_dinitial and initial is dfinal is dx is None
    return *gradients_of(lambda *t: convolve(*t, seq_idx, "silu"), (x, weight, bias), dy), None


def scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None):
    assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and chunk_size == 256
    return ssd.ssd_reference(x, dt, A, B, C, D, seq_idx, 16)


def scan_backward(dy, x, dt, A, B, C, y, chunk_size, D=None, seq_idx=None):
    assert torch.equal(y, scan(x, dt, A, B, C, chunk_size, D=D, seq_idx=seq_idx))
    form = lambda *t: scan(*t[:5], chunk_size, D=t[5], seq_idx=seq_idx)  # noqa: E731
    return *gradients_of(form, (x, dt, A, B, C, D), dy), None, None, None


@pytest.fixture(params=["absent", "present"])
def gpu(request, monkeypatch):
    """M and R take the branches that they take on a GPU, without and with the packages of the kernels there."""
    if request.param == "present":
        monkeypatch.setattr(causal_conv, "kernel_name", lambda *_: causal_conv.CUDA_KERNEL)
        monkeypatch.setattr(causal_conv, "cuda_kernel", lambda: ((convolve, convolve_backward), "a stand-in"))
        monkeypatch.setattr(ssd, "kernel_name", lambda *_: ssd.CUDA_KERNEL)
        monkeypatch.setattr(ssd, "cuda_kernel", lambda: ((scan, scan_backward), "a stand-in"))
    monkeypatch.setattr(mamba2, "kernel_name", lambda *_: ssd.CUDA_KERNEL)
    monkeypatch.setattr(m2rnn_mixer, "kernel_name", lambda *_: m2rnn.TRITON)


@pytest.mark.parametrize(
    "mixer",
    [
        Mamba2(32, Mamba2Config(head_dim=16, d_state=8, chunk_size=16)),
        M2RNN(32, M2RNNConfig(n_heads=2, key_dim=16, value_dim=16)),
    ],
    ids=["M", "R"],
)
def test_a_gpus_branches_are_one_graph_with_the_same_gradients(gpu, mixer):
    mixer.init_weights(2, torch.Generator().manual_seed(0))
    context, x = context_of(SEGMENTS), torch.randn(2, 40, 32)
    results = []
    for form in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = form(leaf, context)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *mixer.parameters()])])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [8, 21])
def test_the_operators_pass_gradients_as_plain_torch_does(gpu, channels):
    inputs = [torch.randn(2, 40, channels + 5)[..., 5:], torch.randn(channels, 4), torch.randn(channels)]
    scanned = scan_inputs(2, 40, 4, 2, head_dim=4, d_state=4, dtype=torch.float32)
    pairs = (
        (inputs, causal_conv.causal_conv, causal_conv.causal_conv_reference, (SEGMENTS,)),
        (scanned, ssd.ssd, ssd.ssd_reference, (SEGMENTS, 16)),
    )
    for tensors, form, reference, rest in pairs:
        cotangent = torch.randn(tensors[0].shape)
        found, expected = (
            torch.autograd.grad(f(*leaves, *rest), leaves, cotangent)
            for f in (form, reference)
            for leaves in ([t.clone().requires_grad_() for t in tensors],)
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_experts_on_a_gpu_are_one_graph_and_count_their_rows(monkeypatch):
    monkeypatch.setattr(grouped_experts, "kernel_name", lambda *_: grouped_experts.CUDA_KERNEL)
    mixer, x, results = MoE(32, MoEConfig(n_experts=5, top_k=2, expert_ff=16)), torch.randn(2, 40, 32), []
    mixer.init_weights(2, torch.Generator().manual_seed(0))
    for form in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = form(leaf, context_of(SEGMENTS)).float()
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *mixer.parameters()])])
        assert torch.equal(mixer.counts, mixer.route(x.flatten(0, 1))[0].flatten().bincount(minlength=5))
        mixer.start_counting()
    for eager, graph in zip(*results, strict=True):
        assert (graph - eager).norm() <= 2e-2 * eager.norm()
