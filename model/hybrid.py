"""HybridLM: embedding, the layer loop, final norm, head. The model knows nothing of losses or parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.ablock import Attention, AttentionConfig
from blocks.block import Block
from blocks.eblock import MoE, MoEConfig
from blocks.mblock import Mamba2, Mamba2Config
from blocks.rblock import M2RNN, M2RNNConfig
from errors import require, require_choice, require_number
from model.context import SequenceContext
from model.pattern import parse_pattern


@dataclass
class ModelConfig:
    # One letter a block: A attention, M Mamba-2, E mixture of experts, R M2RNN.
    pattern: str = "AEMEAEMEAEMR"
    # The pattern is tiled to this many blocks; null = once. A partial last tile is allowed and announced.
    depth: int | None = None
    d_model: int = 192
    norm_eps: float = 1e-5
    # untied: a head of its own; tied: the embedding matrix is the head.
    head: str = "untied"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    moe: MoEConfig = field(default_factory=MoEConfig)
    m2rnn: M2RNNConfig = field(default_factory=M2RNNConfig)

    def validate(self, path: str = "model") -> None:
        """Raises InputError naming the key. Only the families that the pattern uses are checked."""
        require_number(f"{path}.d_model", self.d_model, 1)
        require_number(f"{path}.norm_eps", self.norm_eps, 0.0, exclusive=True)
        require(self.depth is None or self.depth > 0, f"{path}.depth", f"expected at least 1 block, got {self.depth}")
        require_choice(f"{path}.head", self.head, ["tied", "untied"])
        for letter in sorted(set(parse_pattern(self.pattern, self.depth).letters)):
            _, config_name = MIXERS[letter]
            getattr(self, config_name).validate(f"{path}.{config_name}", self.d_model)


# The registry: letter -> (mixer class, name of its config in ModelConfig).
MIXERS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "A": (Attention, "attention"),
    "M": (Mamba2, "mamba2"),
    "E": (MoE, "moe"),
    "R": (M2RNN, "m2rnn"),
}


@dataclass
class HybridOutput:
    """hidden_states: depth + 1 tensors (B, T, D); entry i is the residual stream after block i, 0 the embedding.
    final: (B, T, D), the last one after the final norm: what the head reads."""

    hidden_states: list[Tensor]
    final: Tensor


class HybridLM(nn.Module):
    """A stack of pre-norm residual blocks spelled by a pattern of letters."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.letters = parse_pattern(config.pattern, config.depth).letters
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.blocks = nn.ModuleList(self._block(letter) for letter in self.letters)
        self.final_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Makes the embedding matrix the head where the config says so (again, where tensors were replaced)."""
        if self.config.head == "tied":
            self.head.weight = self.embedding.weight

    @property
    def stack(self) -> list[Block]:
        """The blocks, typed."""
        return cast(list[Block], list(self.blocks))

    def _block(self, letter: str) -> Block:
        mixer_class, config_name = MIXERS[letter]
        mixer = mixer_class(self.config.d_model, getattr(self.config, config_name))
        return Block(letter, self.config.d_model, mixer, self.config.norm_eps)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fills every parameter in place; on a meta model call `to_empty` first."""
        self.init_root(generator)
        for block in self.stack:
            self.init_block(block, generator)

    def init_root(self, generator: torch.Generator | None = None) -> None:
        """The first part of `init_weights`: embedding, head, final norm."""
        nn.init.normal_(self.embedding.weight, std=0.02 if self.config.head == "tied" else 1.0, generator=generator)
        if self.config.head == "untied":
            nn.init.normal_(self.head.weight, std=self.config.d_model**-0.5, generator=generator)
        nn.init.ones_(self.final_norm.weight)

    def init_block(self, block: Block, generator: torch.Generator | None = None) -> None:
        """One of the parts that follow, in the order of the stack."""
        nn.init.ones_(block.norm.weight)
        block.mixer.init_weights(len(self.blocks), generator)

    def forward(self, tokens: Tensor, context: SequenceContext) -> HybridOutput:
        """tokens: (B, T) int64. The residual stream stays float32 (float64 in a float64 model) at every boundary."""
        if "A" in self.letters:
            context.block_mask(self.config.attention.window)  # before any block, which may be compiled or recomputed
        hidden = self.embedding(tokens)
        hidden_states = [hidden]
        for block in self.blocks:
            hidden = block(hidden, context)
            hidden_states.append(hidden)
        return HybridOutput(hidden_states, self.final_norm(hidden))

    def logits(self, final: Tensor) -> Tensor:
        """final: (..., D) -> (..., V). Training uses the chunked head of losses/lm.py instead."""
        return F.linear(final, self.head.weight.to(final.dtype))

    def init_state(self, batch_size: int, max_length: int) -> list[dict[str, Tensor]]:
        """Decoding state before the first token of a document, one entry per block."""
        return [block.mixer.init_state(batch_size, max_length) for block in self.stack]

    def step(self, tokens: Tensor, states: list[dict[str, Tensor]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """tokens: (B,) -> logits (B, V) and the next states. Equals `forward` at that position."""
        hidden = self.embedding(tokens)
        next_states = []
        for block, state in zip(self.stack, states, strict=True):
            hidden, state = block.step(hidden, state)
            next_states.append(state)
        return self.logits(self.final_norm(hidden)), next_states

    def moe_mixers(self) -> list[Any]:
        """The routed E mixers, in stack order (those whose selection bias is balanced)."""
        return [block.mixer for block in self.stack if block.letter == "E" and block.mixer.n_experts > 1]

    def layout(self, sequence_length: int) -> list[dict[str, Any]]:
        """One row per block: index, letter, family, parameters, forward matmul FLOPs per token."""
        return [
            {
                "index": index,
                "letter": block.letter,
                "family": block.family,
                "parameters": sum(parameter.numel() for parameter in block.parameters()),
                "flops_per_token": block.mixer.flops_per_token(sequence_length),
            }
            for index, block in enumerate(self.stack, start=1)
        ]

    def flops_per_token(self, sequence_length: int) -> int:
        """Forward matmul FLOPs of one token, head included; training costs three times that."""
        blocks = sum(row["flops_per_token"] for row in self.layout(sequence_length))
        return blocks + 2 * self.head.weight.numel()
