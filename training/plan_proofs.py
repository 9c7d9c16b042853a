"""Peak memory of what proves STP: preflight (training/preflight.py) and a step that probes (training/evidence.py).

Both go through one graph several times, so what blocks keep stays to the end, and where recomputation is selective
everything is computed again instead (training/recompute.py): stacks are to be traced with `repeated(recompute)`.
Not in it: what the controls gradient_noise and norm_penalty prove beyond STP's own checks, and stp.predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from losses.objective import Objective, STPConfig
from training.plan_memory import F32, PREFLIGHT, PROBE, STEP, Memory, Replay, Stack, largest

ROWS = 2  # of the batch, whole, on every rank, whatever the micro-batch


def repeated(recompute: str) -> str:
    """parallel.recompute as it is for graphs that are gone through several times."""
    return "full" if recompute == "selective" else recompute


def selected(config: STPConfig, letters: Sequence[str]) -> list[int]:
    """The boundaries that STP reads, `final` as the index after the last block's; none where it is off."""
    if not config.enabled:
        return []
    return [len(letters) + 1 if b == "final" else int(b) for b in Objective(config, letters).boundaries]


def peaks(
    trace: Callable[[int, str, bool], Stack],
    recompute: str,
    rows: int,
    batch_rows: int,
    boundaries: Sequence[int],
    **at: Any,
) -> dict[str, Memory]:
    """STEP, PROBE, PREFLIGHT -> its largest moment. trace: rows, recompute, again -> a stack. boundaries: `selected`;
    none where STP is off. at: for `Replay`."""
    found = {STEP: largest(Replay(trace(rows, recompute, False), **at).step())}
    if boundaries:
        kind = repeated(recompute)
        found[PROBE] = largest(probing_step(Replay(trace(rows, kind, True), **at), boundaries))
        proven = trace(min(ROWS, batch_rows), kind, True)
        found[PREFLIGHT] = largest(preflight(Replay(proven, **{**at, "accumulates": False}), boundaries))
    return found


def probing_step(replay: Replay, boundaries: Sequence[int]) -> list[Memory]:
    """The first micro-batch of a step that probes. boundaries: `selected`."""
    replay = replace(replay, accumulates=False)  # no gradient of the step is there yet
    stack, state = replay.stack, replay.stack.state
    held = sum(replay.kept) + stack.head.kept - state  # `final` is among the states
    found = [replace(memory, during=PROBE) for memory in replay.step()]

    def moment(name: str, working: int, gathered: int | None = None) -> None:
        found.append(replay.at(name, 0, held, working, gathered=gathered, during=PROBE))

    # the reader of a boundary's rows makes a dense gradient for every other one too (losses/joined.py)
    moment("gradient of STP at a boundary", (len(boundaries) + 2) * state)
    moment("gradient of the LM at the head", stack.head.backward_peak - stack.head.kept, replay.gathered_root)
    for index, block in enumerate(stack.blocks):
        moment(f"gradient of the LM at block {index + 1}", block.backward_peak - block.kept + 2 * state)
    return found


def preflight(replay: Replay, boundaries: Sequence[int]) -> list[Memory]:
    """Preflight, and the same proof at the gate's opening. replay: of `ROWS` rows, without accumulation; AdamW's
    averages are there at the opening, and where a run goes on. boundaries: `selected`."""
    stack, state, head = replay.stack, replay.stack.state, replay.stack.head
    kept, found = sum(replay.kept), []

    def moment(name: str, gradients: int, activations: int, working: int, states: int | None = None) -> None:
        found.append(replay.at(name, gradients, activations, working, states, during=PREFLIGHT))

    for index, block in enumerate(stack.blocks):
        before = sum(replay.kept_in_autocast[:index])
        moment(f"forward of block {index + 1}", 0, before, block.forward_peak, (index + 1) * state)
    again = F32 * head.parameters + state  # what one more loss of the same states keeps
    moment("total with the gate shut", 0, kept, head.forward_peak - state + again)
    held = kept + head.kept - state + again
    compared = F32 * (stack.embedding + stack.blocks[-1].parameters)  # gradients that are kept to be compared
    moment("backward of the total's head", 0, held + compared, head.backward_peak - head.kept)
    for index in reversed(range(len(stack.blocks))):
        gradients, working = replay.in_backward(index)
        dense = state * sum(boundary <= index for boundary in boundaries)  # of STP, waiting further down
        moment(f"backward of the total's block {index + 1}", gradients, held + compared, working + dense)
    root = F32 * stack.root if replay.gathers else 0
    moment("end of the total's backward", replay.weights + root, held + compared, max(root, state))
    # of a boundary's own gradients its block's are looked at, whole on every rank
    blocks = [stack.blocks[boundary - 1].parameters for boundary in boundaries if 0 < boundary <= len(stack.blocks)]
    link = max(block.backward_peak for block in stack.blocks) + 4 * state
    moment("gradient below a boundary", F32 * max(blocks, default=0), held, link)
    if 0 in boundaries:  # its norm in float64
        moment("norm of the embedding's gradient", F32 * stack.embedding, held, 4 * F32 * stack.embedding)
    return found
