"""Gradient checks: does the STP term of each boundary, alone, reach that boundary's block and the one below?

Never through the joint loss: deeper terms feed the blocks below and would hide a cut wire.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.context import SequenceContext
from training.distributed import World
from training.gradients import by_backward
from training.sharding import full, own_part, unsharded

LINK_TOLERANCE = 1e-3
SMALLEST_RATIO = 1e-4  # of the largest boundary gradient; a single parameter must only be non-zero
# What is looked at per boundary, by the names under which the receipt lists it.
GRADIENT_CHECKS = (
    "state_gradient",  # its own term reaches the state
    "stream_below",  # and the state below, through its block
    "block_parameters",  # and every parameter tensor of the block
    "blocks_above",  # and none of the blocks above
    "block_link",  # what arrives below is the gradient of hidden + mixer(norm(hidden))
    "gradient_scale",  # and is not vanishingly small beside the other boundaries'
)
STREAM_DTYPES = (torch.float32, torch.float64)


@dataclass
class BoundaryResult:
    """What the STP term of one boundary did. grad_norm: |d term / d state| at the boundary itself.

    problems: name of the check that failed -> what was seen.
    """

    index: int | str
    family: str
    grad_norm: float
    block_grad_norm: float
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems


class Watch:
    """Remembers each boundary's tensor as its producer returned it, to tell later edits in place, and the first block
    that was given a stream of too low a precision (its own mixer may raise before anything else can be looked at)."""

    def __init__(self, model: Any) -> None:
        self.produced: list[tuple[Tensor, int]] = []
        self.low_precision: str | None = None
        self.handles = [model.embedding.register_forward_hook(self._note)]
        for index, block in enumerate(model.blocks, start=1):
            self.handles.append(block.register_forward_pre_hook(functools.partial(self._check_input, index)))
            self.handles.append(block.register_forward_hook(self._note))

    def _note(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.produced.append((output, output._version))

    def _check_input(self, index: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].dtype not in STREAM_DTYPES and self.low_precision is None:
            self.low_precision = f"block {index} is given a residual stream in {inputs[0].dtype}, expected float32"

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()


def check_collector(output: Any, watch: Watch, n_blocks: int, shape: tuple[int, ...]) -> str | None:
    """Count, shapes, dtypes, requires_grad, distinct storages and no edit in place. None if all is well."""
    states = output.hidden_states
    if len(states) != n_blocks + 1:
        return f"{len(states)} hidden states, expected {n_blocks + 1}"
    for i, state in enumerate([*states, output.final]):
        name = f"boundary {i}" if i <= n_blocks else "final"
        if tuple(state.shape) != shape:
            return f"{name}: shape {tuple(state.shape)}, expected {shape}"
        if state.dtype not in STREAM_DTYPES:
            return f"{name}: dtype {state.dtype}, expected float32"
        if not state.requires_grad:
            return f"{name}: does not require grad (detached or made under no_grad)"
    if watch.low_precision is not None:
        return watch.low_precision
    if len({state.untyped_storage().data_ptr() for state in states}) != len(states):
        return "two boundaries share storage (the same tensor twice, or a block that writes in place)"
    for i, ((produced, version), state) in enumerate(zip(watch.produced, states, strict=False)):
        if produced._version != version or state._version != version:
            return f"boundary {i}: edited in place after its block returned it"
        if state.data_ptr() != produced.data_ptr():
            return f"boundary {i}: the collected tensor is not the one that block {i} returned"
    return None


def check_boundary(
    model: Any,
    output: Any,
    context: SequenceContext,
    index: int | str,
    term: Tensor,
    autocast: Callable[[], AbstractContextManager],
    world: World,
) -> BoundaryResult:
    """term: this boundary's own STP term (scalar). Gradients only; `.grad` is afterwards as it was.

    Ranks ask each other before they go on: one that leaves alone would leave the others waiting in a collective.
    """
    states, depth = output.hidden_states, len(model.blocks)
    if index == "final":
        here, below, module, above = output.final, states[depth], model.final_norm, []
    elif index == 0:
        here, below, module, above = states[0], None, model.embedding, list(model.blocks)
    else:
        here, below, module = states[int(index)], states[int(index) - 1], model.blocks[int(index) - 1]
        above = list(model.blocks[int(index) :])
    family = {"final": "final", 0: "embedding"}.get(index) or module.letter
    result = BoundaryResult(index, family, 0.0, 0.0)
    for name, tensor in (("its state", here), ("the state below", below)):
        if tensor is not None and not tensor.requires_grad:
            result.problems["state_gradient"] = f"{name} does not require grad (detached or made under no_grad)"
    if not term.requires_grad:
        result.problems.setdefault("state_gradient", "its STP term has no gradient")
    named = dict(module.named_parameters())
    frozen = [name for name, parameter in named.items() if not parameter.requires_grad]
    if frozen:
        result.problems["block_parameters"] = f"{frozen[0]} is frozen"
    if world.any(bool(result.problems)):
        return result
    above_parameters = [p for block in above for p in block.parameters() if p.requires_grad]
    states_here = [here] if below is None else [here, below]
    of_states, of_parameters = by_backward(model, term, states_here, [*named.values(), *above_parameters])
    grad_here, grad_below = of_states[0], of_states[-1]
    own = [None if grad is None else full(grad) for grad in of_parameters[: len(named)]]
    over = of_parameters[len(named) :]  # zeros, of all the blocks above: every rank looks at its part
    reaches_above = world.any(any(grad is not None and bool(own_part(grad).any()) for grad in over))
    del of_parameters, over

    if grad_here is None or not bool(torch.isfinite(grad_here).all()) or not bool(grad_here.any()):
        result.problems["state_gradient"] = f"gradient of its term at the state is {_word(grad_here)}"
    if world.any(bool(result.problems)) or grad_here is None:
        return result
    result.grad_norm = float(grad_here.double().norm())
    if below is not None and (grad_below is None or not bool(grad_below.any())):
        result.problems["stream_below"] = f"gradient at the boundary below is {_word(grad_below)}: the stream is cut"
    for name, grad in zip(named, own, strict=True):
        if grad is None or not bool(torch.isfinite(grad).all()) or not bool(grad.any()):
            result.problems.setdefault("block_parameters", f"gradient of {name} is {_word(grad)}")
    result.block_grad_norm = sum(float(g.double().square().sum()) for g in own if g is not None) ** 0.5
    if reaches_above:
        result.problems["blocks_above"] = "its term reaches a block above it: the list is permuted or off by one"
    if world.any(bool(result.problems)):
        return result
    if below is not None and grad_below is not None:
        with unsharded(model if index == "final" else module):
            expected = _link(module, index, below, context, grad_here, autocast)
        error = float((expected - grad_below).double().norm() / expected.double().norm().clamp_min(1e-300))
        if not error < LINK_TOLERANCE:
            result.problems["block_link"] = (
                f"gradient below differs by {error:.1e} from hidden + mixer(norm(hidden)): a lane or branch is cut"
            )
    return result


def _link(
    module: Any,
    index: int | str,
    below: Tensor,
    context: SequenceContext,
    grad_here: Tensor,
    autocast: Callable[[], AbstractContextManager],
) -> Tensor:
    """The gradient that must arrive below, from the block's own parts and not through its forward."""
    z = below.detach().requires_grad_()
    with torch.enable_grad(), autocast():
        y = module(z) if index == "final" else z + module.mixer(module.norm(z), context)
    (grad,) = torch.autograd.grad(y, z, grad_here.to(y.dtype))
    return grad


def _word(grad: Tensor | None) -> str:
    if grad is None:
        return "missing"
    return "zero" if bool(torch.isfinite(grad).all()) else "not finite"


def check_predictor(model: Any, predictor: nn.Module, terms: list[Tensor]) -> str | None:
    """A learned map in the term: trained with the model, and reached by the term of every boundary."""
    owned = {id(parameter) for parameter in model.parameters()}
    for name, parameter in predictor.named_parameters():
        if id(parameter) not in owned:
            return f"{name} is not among the model's parameters: it would be neither trained nor saved"
        for term in terms:
            (grad,) = by_backward(model, term, parameters=[parameter])[1]
            grad = None if grad is None else full(grad)
            if grad is None or not bool(torch.isfinite(grad).all()) or not bool(grad.any()):
                return f"gradient of {name} is {_word(grad)}"
    return None


def flag_vanishing(boundaries: list[BoundaryResult]) -> None:
    """Adds the check that looks at all boundaries together."""
    for kind in ("grad_norm", "block_grad_norm"):
        largest = max((getattr(b, kind) for b in boundaries), default=0.0)
        for b in boundaries:
            if b.ok and getattr(b, kind) < SMALLEST_RATIO * largest:
                b.problems["gradient_scale"] = (
                    f"{kind} {getattr(b, kind):.1e} is below {SMALLEST_RATIO:.0e} of the largest"
                )
