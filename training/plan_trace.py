"""What one block or the head holds in memory, found by running the real module on fake tensors.

Fake tensors have shapes and storages but no bytes, and our operators say what they return for them, so the code that
trains is what is counted: nothing here repeats how a block works. Every storage is followed from its birth to its
death through forward and backward. What an operator allocates and frees inside itself is not visible that way and
comes from `SCRATCH`.

Two sets of kernels: "cpu" is what a CPU runs (checked against measured peaks: scripts.plan --measure). "cuda" takes the
branches that a GPU takes, with stand-ins of the same inputs, outputs and saved tensors for the kernels that are not
operators of ours (fused RMSNorm, flex attention): no GPU has confirmed it yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blocks.block import Block
from losses.lm import lm_loss_sum
from model.context import SequenceContext
from model.hybrid import MIXERS, ModelConfig
from training.plan_kernels import SCRATCH, cuda_branches
from training.recompute import recompute

KERNELS = ("cpu", "cuda")


@dataclass(frozen=True)
class Held:
    """Bytes beyond parameters, inputs and the layout of the batch, for one micro-batch.

    kept: from this forward to its backward, the output included; kept_in_autocast: the same while the autocast region
    is open, where it also caches casts of weights; forward_peak and backward_peak: the most at once, the latter with
    the gradient of the output and of the module's own parameters; output: the result alone.
    """

    parameters: int
    output: int
    kept: int
    kept_in_autocast: int
    forward_peak: int
    backward_peak: int


class LiveBytes(TorchDispatchMode):
    """Sums the storages that are alive. `ignore` what was there before."""

    def __init__(self, scratch: dict[str, Callable[..., int]]) -> None:
        super().__init__()
        self.scratch = scratch
        self.now = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._see(tensor, counted=False)

    def _see(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        inside = self.scratch.get(func._schema.name)
        self.peak = max(self.peak, self.now + (inside(*args) if inside else 0))
        return out


def trace_block(
    config: ModelConfig,
    letter: str,
    rows: int,
    length: int,
    dtype: torch.dtype,
    recomputed: str,
    kernels: str,
    again: bool = False,
) -> Held:
    """One block of a family on rows x length tokens. dtype: of the matmuls, bfloat16 by autocast.
    recomputed: none | selective | full. again: the graph is gone through once more, so its backward pass frees nothing
    that was kept."""
    with _fake(kernels):
        mixer_class, name = MIXERS[letter]
        block = Block(letter, config.d_model, mixer_class(config.d_model, getattr(config, name)), config.norm_eps)
        recompute(block, recomputed)
        context = SequenceContext.from_document_ids(torch.zeros(rows, length, dtype=torch.int32))

        def forward(hidden: Tensor) -> Tensor:
            return block(hidden, context)

        return _trace(block, forward, config.d_model, rows, length, dtype, kernels, vars(context), again)


def trace_head(config: ModelConfig, vocab_size: int, rows: int, length: int, dtype: torch.dtype, kernels: str) -> Held:
    """The final norm and the head with its loss. (STP's rows are too few to count.)"""
    with _fake(kernels):
        norm, head = nn.RMSNorm(config.d_model, eps=config.norm_eps), nn.Linear(config.d_model, vocab_size, bias=False)
        labels = torch.zeros(rows, length, dtype=torch.int64)
        keep: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            keep.append(norm(hidden))  # the caller holds `final` too
            return lm_loss_sum(keep[-1], head.weight, labels)[0]

        module = nn.ModuleList([norm, head])
        return _trace(module, forward, config.d_model, rows, length, dtype, kernels, labels)


@contextmanager
def _fake(kernels: str) -> Iterator[None]:
    with ExitStack() as stack:
        if kernels == "cuda":
            stack.enter_context(cuda_branches())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _trace(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    d_model: int,
    rows: int,
    length: int,
    dtype: torch.dtype,
    kernels: str,
    given: Any,
    again: bool = False,
) -> Held:
    module.train()
    hidden = torch.empty(rows, length, d_model, requires_grad=True)
    live = LiveBytes(SCRATCH[kernels])
    live.ignore([*module.parameters(), *module.buffers(), hidden, given])
    with live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = forward(hidden)
            kept_in_autocast = live.now
        kept, forward_peak = live.now, live.peak
        live.peak = live.now
        y.backward(torch.ones_like(y), retain_graph=again)
        backward_peak = live.peak
    parameters = sum(parameter.numel() for parameter in module.parameters())
    output = y.untyped_storage().nbytes()
    return Held(parameters, output, kept, kept_in_autocast, forward_peak, backward_peak)
