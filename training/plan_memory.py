"""Peak memory of one training step, composed from what its blocks hold (plan_trace.py).

The step is replayed: forward block by block, the head, backward from the last block to the first, the update. At each
moment what is alive is added up; the peak is the largest sum, and its parts are what the tables show.

One process: weights, gradients and AdamW's two averages are float32 and whole. Under fsdp and hsdp they are cut over
the ranks that share a copy, and FSDP2 gathers whole blocks for their passes: two at a time (the next one is fetched
early), their flat buffer, and in the backward pass the flat buffer of the gradients that are being summed; the root
(embedding, final norm, head) stays gathered, and its gradient, whole on every rank, until the end of the backward pass,
when it is summed. ddp is hsdp with groups of one rank (training/distributed.py), so blocks
are copied there too. The start needs less: a model is cut while it is made, block by block (training/building.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.hybrid import ModelConfig
from model.pattern import parse_pattern
from training.plan_trace import Held, trace_block, trace_head

F32 = 4
ADAMW_AVERAGES = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment of its peak. `moment` says when that is."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int  # whole blocks that FSDP2 has collected for their passes
    states: int  # the residual stream at every boundary, which STP reads, as far as this pass has come
    activations: int  # what blocks and head keep for their backward passes
    working: int  # what the operation at work needs on top
    moment: str

    @property
    def total(self) -> int:
        kept = self.weights + self.gradients + self.optimizer + self.gathered
        return kept + self.states + self.activations + self.working


@dataclass(frozen=True)
class Stack:
    """A model as memory sees it, for one size of micro-batch: blocks in order, head, sizes of the root's tensors."""

    blocks: tuple[Held, ...]
    head: Held
    embedding: int  # parameters
    tied: bool
    state: int  # bytes of one boundary

    @classmethod
    def trace(
        cls,
        config: ModelConfig,
        vocab_size: int,
        rows: int,
        length: int,
        dtype: torch.dtype,
        recomputed: str,
        kernels: str,
    ) -> Stack:
        letters = parse_pattern(config.pattern, config.depth).letters
        held = {
            letter: trace_block(config, letter, rows, length, dtype, recomputed, kernels)
            for letter in sorted(set(letters))
        }
        head = trace_head(config, vocab_size, rows, length, dtype, kernels)
        embedding, state = vocab_size * config.d_model, rows * length * config.d_model * F32
        return cls(tuple(held[letter] for letter in letters), head, embedding, config.head == "tied", state)

    @property
    def root(self) -> int:
        """Parameters of the root: embedding, final norm, head."""
        return self.head.parameters + (0 if self.tied else self.embedding)

    @property
    def parameters(self) -> int:
        return self.root + sum(block.parameters for block in self.blocks)


def peak_memory(
    stack: Stack, shards: int = 1, gathers: bool = False, accumulates: bool = False, weight_bytes: int = F32
) -> Memory:
    """shards: ranks that share one copy of weights, gradients and optimizer. gathers: FSDP2 is at work, with blocks'
    weights in weight_bytes each. accumulates: several micro-batches per step, so gradients are there from the start."""
    return max(_moments(stack, shards, gathers, accumulates, weight_bytes), key=lambda memory: memory.total)


def _moments(stack: Stack, shards: int, gathers: bool, accumulates: bool, weight_bytes: int) -> Sequence[Memory]:
    blocks, state = stack.blocks, stack.state
    weights = F32 * -(-stack.parameters // shards)
    optimizer = ADAMW_AVERAGES * weights
    largest = max(block.parameters for block in blocks)
    gathered = F32 * stack.root + 3 * weight_bytes * largest if gathers else 0
    reducing = F32 * largest if gathers else 0
    kept = [block.kept - block.output for block in blocks]
    kept_open = [block.kept_in_autocast - block.output for block in blocks]
    whole = (len(blocks) + 2) * state  # every boundary and `final`
    found: list[Memory] = []

    def moment(
        name: str,
        gradients: int,
        activations: int,
        working: int,
        states: int = whole,
        gathered: int = gathered,
    ) -> None:
        sizes = (weights, gradients, optimizer, gathered, states, activations, working)
        found.append(Memory(*sizes, name))

    first = weights if accumulates else 0  # gradients that are there when a pass begins
    for index, block in enumerate(blocks):
        begun = (index + 1) * state
        moment(f"forward of block {index + 1}", first, sum(kept_open[:index]), block.forward_peak, begun)
    head = stack.head
    moment("forward of the head", first, sum(kept_open), head.forward_peak - state)
    moment("backward of the head", first, sum(kept), head.backward_peak - state)
    of_root = F32 * head.parameters if gathers else 0  # begun by the head, summed and cut after the last block
    done = 0 if gathers else head.parameters
    for index in reversed(range(len(blocks))):
        block = blocks[index]
        gradients = of_root + (weights if accumulates else F32 * -(-done // shards))
        working = block.backward_peak - block.output + reducing - kept[index]
        moment(f"backward of block {index + 1}", gradients, sum(kept[: index + 1]), working)
        done += block.parameters
    embedding = state + F32 * stack.embedding * (gathers or accumulates)
    moment("backward of the embedding", weights + of_root, 0, embedding)
    if gathers:
        moment("reduction of the root", weights + F32 * stack.root, 0, F32 * stack.root)
    moment("update", weights, 0, 0, states=0, gathered=0)
    return found
