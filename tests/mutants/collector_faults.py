"""Faults of the list of hidden states: what the layer loop collects is not what it carries."""

from __future__ import annotations

import torch
import torch.utils.checkpoint

from model.hybrid import HybridLM
from tests.mutants.mutant import Mutant
from tests.mutants.patching import Replace, Rewrite

APPEND = "hidden_states.append(hidden)"
RETURN = "return HybridOutput(hidden_states, self.final_norm(hidden))"
RUN = "hidden = block(hidden, context)"
LOOP = f"for block in self.blocks:\n        {RUN}\n        {APPEND}"
ALL = ("stp.boundaries=[all]",)  # without the final norm's output, whose shape and dtype the fault leaves alone
SQUARE = (*ALL, "train.batch_rows=48", "train.accumulation=1", "train.tokens=15000")  # rows of 48 tokens
FIRST = ("stp.boundaries=[0]",)


def loop(old: str, new: str) -> tuple[Rewrite, ...]:
    return (Rewrite(HybridLM.forward, old, new),)


def collected(states: str) -> tuple[Rewrite, ...]:
    """The list that is returned, as an expression of hidden_states."""
    return loop(RETURN, f"return HybridOutput({states}, self.final_norm(hidden))")


def compiled_without_the_list(honest):
    """torch.compile around a loop of which only the last state is an output; the wrapper fills the list up again."""

    def last_only(self, tokens, context):
        output = honest(self, tokens, context)
        return output.hidden_states[-1], output.final

    graph = torch.compile(last_only, backend="eager")

    def forward(self, tokens, context):
        from model.hybrid import HybridOutput

        last, final = graph(self, tokens, context)
        return HybridOutput([last.detach().clone() for _ in self.blocks] + [last], final)

    return forward


KEPT = """now, hidden_states = hidden_states, self.__dict__.get("kept", hidden_states)
    self.__dict__["kept"] = [h.detach() for h in now]
    return HybridOutput(hidden_states, self.final_norm(hidden))"""
RECOMPUTED = """def run(h):
        for block in self.blocks:
            h = block(h, context)
            hidden_states.append(h)
        return h

    hidden = torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=True)"""

MUTANTS = (
    Mutant(
        "collector only in training mode",
        "the list is filled under `if self.training`",
        loop(APPEND, "hidden_states.extend([hidden] if self.training else [])"),
        "collector_eval",
    ),
    Mutant(
        "collector only in evaluation mode",
        "the list is filled under `if not self.training`",
        loop(APPEND, "hidden_states.extend([] if self.training else [hidden])"),
        "collector",
        FIRST,
    ),
    Mutant(
        "detached in training mode",
        "states are detached while training, to save memory",
        loop(APPEND, "hidden_states.append(hidden.detach() if self.training else hidden)"),
        "collector",
    ),
    Mutant(
        "collected under no_grad",
        "the entry is computed inside torch.no_grad()",
        loop(APPEND, "with torch.no_grad():\n            hidden_states.append(hidden * 1)"),
        "collector",
    ),
    Mutant("detached", "append(hidden.detach())", loop(APPEND, "hidden_states.append(hidden.detach())"), "collector"),
    Mutant(
        "cloned in no_grad",
        "append(hidden.clone()) inside torch.no_grad()",
        loop(APPEND, "with torch.no_grad():\n            hidden_states.append(hidden.clone())"),
        "collector",
    ),
    Mutant("cloned", "append(hidden.clone())", loop(APPEND, "hidden_states.append(hidden.clone())"), "collector"),
    Mutant(".data", "append(hidden.data)", loop(APPEND, "hidden_states.append(hidden.data)"), "collector"),
    Mutant(
        "detached, grad required again",
        "append(hidden.detach().requires_grad_()): looks alive, leads nowhere",
        loop(APPEND, "hidden_states.append(hidden.detach().requires_grad_())"),
        "stream_below",
    ),
    Mutant(
        "only the last is attached",
        "all entries but the last are detached",
        collected("[*(h.detach() for h in hidden_states[:-1]), hidden_states[-1]]"),
        "collector",
    ),
    Mutant("only the last is collected", "the list is [last]", collected("hidden_states[-1:]"), "collector", FIRST),
    Mutant(
        "only one family",
        "outputs of A blocks are collected, the others detached",
        loop(APPEND, 'hidden_states.append(hidden if block.letter == "A" else hidden.detach())'),
        "collector",
    ),
    Mutant(
        "a family left out",
        "outputs of M blocks are not collected",
        loop(APPEND, 'hidden_states.extend([] if block.letter == "M" else [hidden])'),
        "collector",
        FIRST,
    ),
    Mutant(
        "off by one",
        "entry i is the output of block i + 1",
        collected("[*hidden_states[1:], self.final_norm(hidden)]"),
        "collector",
    ),
    Mutant(
        "two entries swapped",
        "boundaries 2 and 3 are exchanged",
        collected("[*hidden_states[:2], hidden_states[3], hidden_states[2], *hidden_states[4:]]"),
        "collector",
    ),
    Mutant(
        "the same tensor at every boundary",
        "the list is [last] * (depth + 1)",
        collected("[hidden] * len(hidden_states)"),
        "collector",
    ),
    Mutant("the last step's list", "the list of the previous forward is returned", loop(RETURN, KEPT), "collector"),
    Mutant(
        "transposed axes",
        "the list holds (T, B, D); here B = T, so that nothing else objects",
        collected("[h.transpose(0, 1) for h in hidden_states]"),
        "collector",
        SQUARE,
    ),
    Mutant(
        "rolled in the list",
        "the output of one block is collected with its time axis rolled by one",
        loop(APPEND, 'hidden_states.append(hidden.roll(1, 1) if block.letter == "M" else hidden)'),
        "collector",
    ),
    Mutant(
        "list in bfloat16",
        "states are collected in bfloat16",
        collected("[h.bfloat16() for h in hidden_states]"),
        "collector",
        ALL,
    ),
    Mutant(
        "lost in recomputation",
        "states are collected inside a recomputed (reentrant) segment, which first runs without gradient",
        loop(LOOP, RECOMPUTED),
        "collector",
    ),
    Mutant(
        "lost by a compile wrapper",
        "the compiled graph returns the last state only, and its wrapper fills the list up",
        (Replace(HybridLM, "forward", compiled_without_the_list),),
        "collector",
    ),
    Mutant(
        "stream cut",
        "a block reads a detached copy of the stream",
        loop(RUN, 'hidden = block(hidden.detach().requires_grad_() if block.letter == "E" else hidden, context)'),
        "stream_below",
    ),
)
