"""Gradients by a plain `.backward()`, as in a training step: FSDP2's hooks and STP's joined rows take part in nothing
else. What they leave in `.grad` is read and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from training.sharding import unsharded


def by_backward(
    model: Any, scalar: Tensor, states: Sequence[Tensor] = (), parameters: Iterable[Tensor] = ()
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """d scalar / d states (activations) and / d parameters of the model, None where none arrives; keeps the graph.

    Parameters' gradients are summed over ranks and cut as the parameters are. `.grad` is afterwards as it was.
    """
    caught: list[Tensor | None] = [None] * len(states)

    def catch(place: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            caught[place] = gradient.detach()

        return hook

    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    handles = [state.register_hook(catch(place)) for place, state in enumerate(states)]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        with unsharded(model):
            scalar.backward(retain_graph=True)
        return caught, [parameter.grad for parameter in parameters]
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in kept:
            parameter.grad = gradient
