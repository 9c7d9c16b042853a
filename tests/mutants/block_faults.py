"""Faults of blocks: in-place sums, cut lanes, precision, and leaks through each kind of mixer."""

from __future__ import annotations

import train
from blocks.ablock import Attention
from blocks.block import Block
from blocks.eblock import MoE
from blocks.kernels import m2rnn_mixer, mamba2
from model.hybrid import HybridLM
from tests.mutants.collector_faults import ALL, RETURN
from tests.mutants.mutant import Mutant
from tests.mutants.patching import Replace, Rewrite

SUM = "return hidden + self.mixer(self.norm(hidden), context)"
FUSED_M = "kernel_name(zxbcdt.device, zxbcdt.dtype) != CPU_KERNEL"
FUSED_R = "kernel_name(projected.device, projected.dtype) != CPU_KERNEL"
SCAN = "        segment_ids,\n        shape.chunk_size"


def block(new: str) -> tuple[Rewrite, ...]:
    return (Rewrite(Block.forward, SUM, f"return {new}"),)


def in_parts(old: str, new: str) -> tuple[Rewrite, ...]:
    """Mamba-2 from its parts instead of fused, with a change in them."""
    return Rewrite(mamba2.mamba2_inner, FUSED_M, "True"), Rewrite(mamba2._one_after_another, old, new)


def r_in_parts(old: str, new: str) -> tuple[Rewrite, ...]:
    return Rewrite(m2rnn_mixer.m2rnn_mixer, FUSED_R, "True"), Rewrite(m2rnn_mixer._compose, old, new)


def casting_wrapper(honest):
    """Hooks on every block, put there after the model is built, as a wrapper around modules would."""

    def build(model, config):
        for block in model.blocks:
            block.register_forward_hook(lambda module, inputs, output: output.bfloat16())
        return honest(model, config)

    return build


EXPERTS = "y, rows = grouped_experts(x_products, expert_ids, weights, self.up_proj, self.down_proj, self.kind)"
CAPACITY = """n = 3 * len(x) // 4
    y, rows = grouped_experts(x_products[:n], expert_ids[:n], weights[:n], self.up_proj, self.down_proj, self.kind)
    y = F.pad(y, (0, 0, 0, len(x) - n))"""

MUTANTS = (
    Mutant(
        "in-place residual add",
        "hidden.add_(update): every entry of the list is the last state",
        block("hidden.add_(self.mixer(self.norm(hidden.clone()), context))"),
        "collector",
    ),
    Mutant(
        "in-place scaling",
        "a block scales the stream in place after it was collected",
        block("hidden.mul_(0.999) + self.mixer(self.norm(hidden), context)"),
        "collector",
    ),
    Mutant(
        "in-place final norm",
        "the final norm writes into the last boundary",
        (
            Rewrite(
                HybridLM.forward,
                RETURN,
                "return HybridOutput(hidden_states, hidden.copy_(self.final_norm(hidden.clone())))",
            ),
        ),
        "collector",
    ),
    Mutant(
        "rolled time axis",
        "one block rolls the stream by one token",
        block('(hidden + self.mixer(self.norm(hidden), context)).roll(1 if self.letter == "M" else 0, 1)'),
        "causality",
    ),
    Mutant(
        "lane detached",
        "the residual lane of a block is detached",
        block('(hidden.detach() if self.letter == "M" else hidden) + self.mixer(self.norm(hidden), context)'),
        "block_link",
    ),
    Mutant(
        "branch input detached",
        "the mixer of a block reads a detached stream",
        block('hidden + self.mixer(self.norm(hidden.detach() if self.letter == "M" else hidden), context)'),
        "block_link",
    ),
    Mutant(
        "branch output detached",
        "the update of a block is detached: nothing in it learns",
        block('hidden + (lambda y: y.detach() if self.letter == "R" else y)(self.mixer(self.norm(hidden), context))'),
        "block_parameters",
    ),
    Mutant(
        "stream in bfloat16",
        "the residual stream is carried in bfloat16, the mixers read it in float32",
        (
            *block("(hidden + self.mixer(self.norm(hidden.float()), context)).bfloat16()"),
            Rewrite(
                HybridLM.forward,
                "hidden = self.embedding(tokens)",
                "hidden = self.embedding(tokens).bfloat16()",
                (("self.final_norm(hidden)", "self.final_norm(hidden.float())"),),
            ),
        ),
        "collector",
        ALL,
    ),
    Mutant(
        "a sharding wrapper casts the stream",
        "block outputs are cast to bfloat16 by a hook, as FSDP2 does with output_dtype",
        (Replace(train, "build_optimizer", casting_wrapper),),
        "collector",
        ("precision=bf16", "stp.boundaries=[1,2,3,4]"),
    ),
    Mutant(
        "leak through attention",
        "attention reads across documents",
        (Rewrite(Attention.forward, "context.segment_ids", "torch.zeros_like(context.segment_ids)"),),
        "document_isolation",
    ),
    Mutant(
        "attention looks ahead",
        "queries, keys and values see the next token",
        (Rewrite(Attention.forward, "self.project(x,", "self.project(0.9 * x + 0.1 * x.roll(-1, 1),"),),
        "causality",
    ),
    Mutant(
        "leak through the convolution of M",
        "the convolution reads over the start of a document",
        in_parts("conv_weight, conv_bias, segment_ids)", "conv_weight, conv_bias, torch.zeros_like(segment_ids))"),
        "document_isolation",
    ),
    Mutant(
        "leak through the scan of M",
        "the state is carried into the next document",
        in_parts(SCAN, SCAN.replace("segment_ids", "torch.zeros_like(segment_ids)")),
        "document_isolation",
    ),
    Mutant(
        "leak through the convolution of R",
        "the convolution reads over the start of a document",
        r_in_parts("conv_bias, segment_ids)", "conv_bias, torch.zeros_like(segment_ids))"),
        "document_isolation",
    ),
    Mutant(
        "leak through the state of R",
        "the state is carried into the next document",
        r_in_parts("D, starts,", "D, torch.zeros_like(starts),"),
        "document_isolation",
    ),
    Mutant(
        "experts drop tokens",
        "tokens beyond a capacity are not processed",
        (Rewrite(MoE.mix, EXPERTS, CAPACITY),),
        "experts_process_all_tokens",
    ),
    Mutant(
        "experts weighted over the batch",
        "routing weights are divided by a mean over all tokens, later ones included",
        (Rewrite(MoE.route, "* self.route_scale", "* scores.sum(-1, keepdim=True) / scores.sum(-1).mean()"),),
        "causality",
    ),
)
