"""Cheap gradients for a few rows of tensors that get a gradient anyway.

STP reads 3 rows per triple out of every boundary. Autograd's way back is a zero tensor of the boundary's full size per
read, filled and added. But in training the LM's gradient arrives at every boundary in any case, so the rows can be
added to it where it stands: in place if nobody else holds it, to a copy if somebody does. Nothing of the size (B, T, D)
is made, in either direction. The result equals autograd's up to the order of the additions.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Another torch may not tell how many hold a tensor; then rows join a copy.
COUNTABLE = hasattr(torch._C, "_storage_address") and hasattr(torch._C, "_storage_Use_Count")

# Key of a joined state's hook where it is the first: handles of torch count up from 0.
FIRST = -1

# Adds one boundary's row gradients to its gradient, (B, T, D) contiguous, in place.
Adder = Callable[[Tensor], None]


class GradientJoin:
    """One use of a list of states: at those marked `joined`, row gradients join the gradient that arrives.

    Only in a plain `.backward()` through the tensor given to `watch` (the total of LM and STP), where that other
    gradient is certain. Every other backward gets dense gradients from autograd: that of one boundary's STP term
    alone, and whatever goes through torch.autograd.grad (which captures some gradients before hooks may add to them).
    """

    def __init__(self, states: Sequence[Tensor], joined: Sequence[bool]) -> None:
        self.joined = list(joined)
        self.sentinel, self._sentinel_node = _sentinel()
        self._pending: list[Adder | None] = [None] * len(states)
        self._task = -1
        if COUNTABLE:
            _free_counts()  # measured now: not inside the backward that needs it
        for index, state in enumerate(states):
            if self.joined[index]:
                _register_first(state, functools.partial(self._arrive, index))

    def watch(self, total: Tensor) -> None:
        _register_first(total, self._mark)

    def _mark(self, gradient: Tensor) -> None:
        # Of a backward for chosen inputs the engine runs only what leads there, and nothing leads to the sentinel.
        plain = torch._C._will_engine_execute_node(self._sentinel_node)
        self._task = _graph_task() if plain else -1
        self._pending = [None] * len(self._pending)

    def give(self, index: int, adder: Adder) -> bool:
        """Called in backward: True if `adder` will be run on the gradient of state `index` of this backward."""
        if not self.joined[index] or self._task != _graph_task() or torch.is_grad_enabled():
            return False
        self._pending[index] = adder
        return True

    def _arrive(self, index: int, gradient: Tensor | None) -> Tensor | None:
        adder, self._pending[index] = self._pending[index], None
        if adder is None or self._task != _graph_task():
            return None
        if gradient is None:
            raise RuntimeError(f"state {index}: no gradient arrived that STP's could join; the graph is not as it was")
        if is_owned(gradient):
            adder(gradient)
            return None
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        adder(gradient)
        return gradient


@functools.cache
def _sentinel() -> tuple[Tensor, Any]:
    """A leaf that a reader takes as an input, so that it is in the graph, and that nobody asks a gradient of; and its
    node. One for all: it never gets a gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), requires_grad=True)
        view: Any = leaf.view_as(leaf)
        return leaf, view.grad_fn.next_functions[0][0]


def _register_first(state: Tensor, hook: Callable[[Tensor], Any]) -> None:
    """Tensor.register_hook, in front of the hooks that are there: those must see the whole gradient. (The engine goes
    by the order of insertion, so the others are taken out and put in again. The common case, no other hook, does
    without register_hook's handle: a third of the time, 13 times a step.)"""
    tensor: Any = state
    if tensor._backward_hooks is None and state.requires_grad and state.grad_fn is not None:
        tensor._backward_hooks = OrderedDict()
        tensor.grad_fn._register_hook_dict(state)
        tensor._backward_hooks[FIRST] = hook
        return
    handle = state.register_hook(hook)
    hooks = tensor._backward_hooks
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)


def _graph_task() -> int:
    return torch._C._current_graph_task_id()


def is_owned(gradient: Tensor) -> bool:
    """Inside a tensor hook, called from one: nobody else holds this gradient, so it may be changed in place.

    Somebody does if the caller passed it, a `.grad` or another hook kept it, autograd.grad returns it, or it is
    expanded or a view. The counts of a gradient that is known to be free are measured once, on this very torch.
    """
    if not COUNTABLE or type(gradient) is not Tensor or not gradient.is_contiguous():
        return False
    # As many frames hold the gradient here as in the measurement below, so the counts compare.
    names, tensors, storages = _counts(gradient)
    free_names, free_tensors, free_storages = _free_counts()
    return names <= free_names and tensors <= free_tensors and storages <= free_storages


def _counts(gradient: Tensor) -> tuple[int, int, int]:
    # Not through untyped_storage(): the object that it makes would hold on to the storage.
    c: Any = torch._C
    tensor: Any = gradient
    return sys.getrefcount(gradient), tensor._use_count(), c._storage_Use_Count(c._storage_address(gradient))


@functools.cache
def _free_counts() -> tuple[int, int, int]:
    seen: list[tuple[int, int, int]] = []

    def probe(gradient: Tensor) -> tuple[int, int, int]:  # stands for is_owned
        return _counts(gradient)

    class Holder:
        def hook(self, index: int, gradient: Tensor) -> None:  # stands for GradientJoin._arrive
            seen.append(probe(gradient))

    with torch.enable_grad():
        leaf = torch.ones(2, requires_grad=True)
        middle = leaf * 2
        middle.register_hook(functools.partial(Holder().hook, 0))
        (middle * torch.full((2,), 3.0)).backward(torch.ones(2))
    return seen[0]


def joins(states: Sequence[Tensor], final: Tensor, selected: Sequence[int]) -> list[bool]:
    """For every boundary: is a gradient certain to arrive there whenever one arrives at `final`?

    states: all of them, each computed from the one before, `final` from the last. True where the next boundary reads
    this very tensor and gets a gradient itself: as it is joined too, or selected (then it has STP's own, dense).
    Looks at a few nodes of the graph, so what hides deeper gets the dense gradient: slower, not wrong.
    """
    result = [False] * len(states)
    following, arrives = final, True
    for index in range(len(states) - 1, -1, -1):
        state = states[index]
        result[index] = arrives and state.requires_grad and _reads(following, state)
        following, arrives = state, result[index] or (index in selected and state.requires_grad)
    return result


def _reads(output: Tensor, source: Tensor, depth: int = 4, nodes: int = 24) -> bool:
    """Does the graph of `output` use `source` within a few steps?"""
    target = source.grad_fn
    if output.grad_fn is None or target is None or output is source:
        return False
    level: list[Any] = [output.grad_fn]
    for _ in range(depth):
        following: list[Any] = []
        for node in level:
            for parent, number in node.next_functions:
                if parent is target and number == source.output_nr:
                    return True
                if parent is not None:
                    following.append(parent)
        nodes -= len(level)
        if nodes <= 0:
            break
        level = following[:nodes]
    return False


class ReadRows(torch.autograd.Function):
    """Rows `flat` (N,) of every (B, T, D) state, seen as (B x T, D) -> (n_states, N, D), float32 or better."""

    @staticmethod
    def forward(ctx: Any, join: GradientJoin, sentinel: Tensor, flat: Tensor, *states: Tensor) -> Tensor:
        ctx.join, ctx.flat = join, flat
        ctx.shapes = [(state.shape, state.dtype) for state in states]
        rows = [state.reshape(-1, state.shape[-1]).index_select(0, flat) for state in states]
        return torch.stack(rows).to(torch.promote_types(states[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        results: list[Tensor | None] = [None] * 3
        for index, (shape, dtype) in enumerate(ctx.shapes):
            rows = gradient[index].to(dtype)
            if not ctx.needs_input_grad[index + 3] or ctx.join.give(index, _row_adder(ctx.flat, rows)):
                results.append(None)
            else:
                dense = rows.new_zeros(shape[0] * shape[1], shape[2]).index_add(0, ctx.flat, rows)
                results.append(dense.view(shape))
        return tuple(results)


def _row_adder(flat: Tensor, rows: Tensor) -> Adder:
    def add(gradient: Tensor) -> None:
        gradient.view(-1, gradient.shape[-1]).index_add_(0, flat, rows)

    return add
