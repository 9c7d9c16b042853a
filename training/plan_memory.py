"""Peak memory of one training step, composed from what its blocks hold (plan_trace.py).

The step is replayed: forward block by block, the head, backward from the last block to the first, the update. At each
moment what is alive is added up; the peak is the largest sum, and its parts are what the tables show.

One process: weights, gradients and AdamW's two averages are float32 and whole. Under fsdp and hsdp they are cut over
the ranks that share a copy, and FSDP2 gathers whole blocks for their passes (none while the head works): two at a time
(the next one is fetched early), their flat buffer, and in the backward pass the flat buffer of the gradients that are
being summed; the root (embedding, final norm, head) stays gathered, and its gradient, whole on every rank, until the
end of the backward pass, when it is summed. ddp is hsdp with groups of one rank (training/distributed.py), so blocks
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
STEP, PROBE, PREFLIGHT = "step", "probing step", "preflight"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment of its peak. `moment` and `during` say when that is."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int  # whole blocks that FSDP2 has collected for their passes
    states: int  # the residual stream at every boundary, which STP reads, as far as this pass has come
    activations: int  # what blocks and head keep for their backward passes
    working: int  # what the operation at work needs on top
    moment: str
    during: str = STEP  # or PROBE, PREFLIGHT: training/plan_proofs.py

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
        again: bool = False,
    ) -> Stack:
        letters = parse_pattern(config.pattern, config.depth).letters
        held = {
            letter: trace_block(config, letter, rows, length, dtype, recomputed, kernels, again)
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


@dataclass(frozen=True)
class Replay:
    """A stack on one rank. shards: ranks that share one copy of weights, gradients and optimizer. gathers: FSDP2 is at
    work, with blocks' weights in weight_bytes each. accumulates: several micro-batches per step, so gradients are there
    from the start."""

    stack: Stack
    shards: int = 1
    gathers: bool = False
    accumulates: bool = False
    weight_bytes: int = F32

    @property
    def weights(self) -> int:
        return F32 * -(-self.stack.parameters // self.shards)

    @property
    def of_root(self) -> int:
        """The head's gradient: begun by the head, summed and cut after the last block where weights are gathered."""
        return F32 * self.stack.head.parameters if self.gathers else 0

    @property
    def kept(self) -> list[int]:
        return [block.kept - block.output for block in self.stack.blocks]

    @property
    def kept_in_autocast(self) -> list[int]:
        return [block.kept_in_autocast - block.output for block in self.stack.blocks]

    @property
    def whole(self) -> int:
        """Bytes of every boundary and `final`."""
        return (len(self.stack.blocks) + 2) * self.stack.state

    @property
    def gathered_root(self) -> int:
        """All that is gathered while the head works: no block is at its pass then."""
        return F32 * self.stack.root if self.gathers else 0

    @property
    def _largest(self) -> int:
        return max(block.parameters for block in self.stack.blocks)

    def at(
        self,
        name: str,
        gradients: int,
        activations: int,
        working: int,
        states: int | None = None,
        gathered: int | None = None,
        during: str = STEP,
    ) -> Memory:
        """The sum at one moment. states, gathered: None: all of them."""
        if gathered is None:
            gathered = self.gathered_root + (3 * self.weight_bytes * self._largest if self.gathers else 0)
        states = self.whole if states is None else states
        optimizer = ADAMW_AVERAGES * self.weights
        return Memory(self.weights, gradients, optimizer, gathered, states, activations, working, name, during)

    def in_backward(self, index: int) -> tuple[int, int]:
        """Bytes when the backward pass is at a block: gradients, and what it needs beyond what it keeps."""
        blocks, block = self.stack.blocks, self.stack.blocks[index]
        done = sum(block.parameters for block in blocks[index + 1 :]) + (
            0 if self.gathers else self.stack.head.parameters
        )
        gradients = self.of_root + (self.weights if self.accumulates else F32 * -(-done // self.shards))
        reducing = F32 * self._largest if self.gathers else 0
        return gradients, block.backward_peak - block.output + reducing - self.kept[index]

    def step(self) -> list[Memory]:
        """A plain step."""
        stack, kept, kept_open, state = self.stack, self.kept, self.kept_in_autocast, self.stack.state
        first = self.weights if self.accumulates else 0  # gradients that are there when a pass begins
        found = [
            self.at(f"forward of block {i + 1}", first, sum(kept_open[:i]), block.forward_peak, (i + 1) * state)
            for i, block in enumerate(stack.blocks)
        ]
        forward, backward = stack.head.forward_peak - state, stack.head.backward_peak - state
        root = self.gathered_root
        found.append(self.at("forward of the head", first, sum(kept_open), forward, gathered=root))
        found.append(self.at("backward of the head", first, sum(kept), backward, gathered=root))
        for index in reversed(range(len(stack.blocks))):
            gradients, working = self.in_backward(index)
            found.append(self.at(f"backward of block {index + 1}", gradients, sum(kept[: index + 1]), working))
        embedding = state + F32 * stack.embedding * (self.gathers or self.accumulates)
        found.append(self.at("backward of the embedding", self.weights + self.of_root, 0, embedding))
        if self.gathers:
            found.append(self.at("reduction of the root", self.weights + root, 0, root))
        found.append(self.at("update", self.weights, 0, 0, states=0, gathered=0))
        return found


def largest(moments: Sequence[Memory]) -> Memory:
    return max(moments, key=lambda memory: memory.total)
