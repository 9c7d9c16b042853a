"""What a person sees before compute is spent: layout, parameters, FLOPs, memory, and where the gate opens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from losses.gate import TokenGate
from losses.objective import Objective
from model.hybrid import HybridLM
from training.config import RunConfig

MIB = 2**20


def meta_model(config: RunConfig, vocab_size: int) -> HybridLM:
    """The model without memory: enough to count and to name."""
    with torch.device("meta"):
        return HybridLM(config.model, vocab_size)


def parameter_counts(model: HybridLM) -> dict[str, int]:
    """total and active (those that one token uses: top_k of n_experts)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for mixer in model.moe_mixers():
        routed = mixer.up_proj.numel() + mixer.down_proj.numel()
        idle += routed - routed * mixer.top_k // mixer.n_experts
    return {"total": total, "active": total - idle}


def preview(config: RunConfig, warnings: list[str], console: Console, *, layout_only: bool) -> None:
    """--print-layout and --dry-run: reads no text and starts nothing."""
    model = meta_model(config, config.data.tokenizer.vocab_size)
    if not layout_only:
        console.print(config.to_yaml(), markup=False, highlight=False)
    print_layout(model, config.data.sequence_length, console)
    if not layout_only:
        print_dry_run(config, model, Objective(config.stp, model.letters).boundaries, console)
    for warning in warnings:
        console.print(f"note: {warning}", markup=False)


def print_layout(model: HybridLM, sequence_length: int, console: Console) -> None:
    """One line per block: index, letter, family, parameters, forward matmul FLOPs per token."""
    table = Table(title=f"{''.join(model.letters)}: {len(model.letters)} blocks, d_model {model.config.d_model}")
    for column in ("block", "letter", "family", "parameters", "FLOPs/token"):
        table.add_column(column, justify="left" if column in ("letter", "family") else "right")
    for row in model.layout(sequence_length):
        parameters, flops = f"{row['parameters']:,}", f"{row['flops_per_token']:,}"
        table.add_row(str(row["index"]), row["letter"], row["family"], parameters, flops)
    head = model.head.weight.numel()
    table.add_row("", "", "embedding", f"{model.embedding.weight.numel():,}", "0")
    own = head if model.config.head == "untied" else 0
    table.add_row("", "", f"head ({model.config.head})", f"{own:,}", f"{2 * head:,}")
    console.print(table)
    counts = Counter(model.letters)
    parts = ", ".join(f"{counts[letter]} {letter}" for letter in sorted(counts))
    console.print(f"{parts}; forward {model.flops_per_token(sequence_length):,} FLOPs/token, training 3x that")


def print_dry_run(config: RunConfig, model: HybridLM, boundaries: list[int | str], console: Console) -> None:
    """Parameter, FLOP and memory table and the token and step at which the gate opens."""
    counts = parameter_counts(model)
    tokens_per_step = config.train.batch_rows * config.data.sequence_length
    steps = -(-config.train.tokens // tokens_per_step)
    training_flops = 3 * model.flops_per_token(config.data.sequence_length)
    table = Table(title="what this run takes", show_header=False)
    for name, value in {
        "parameters, total / active per token": f"{counts['total']:,} / {counts['active']:,}",
        "training FLOPs per token / in all": f"{training_flops:,} / {training_flops * config.train.tokens:.2e}",
        "tokens per step x steps": f"{tokens_per_step:,} x about {steps:,}",
        "weights + gradients + AdamW, fp32": f"{16 * counts['total'] / MIB:,.0f} MiB",
        "activations of one micro-batch, about": f"{activation_bytes(config, model) / MIB:,.0f} MiB",
    }.items():
        table.add_row(name, value)
    if config.stp.enabled:
        gate = TokenGate(config.stp.gate, config.stp.weight)
        opening = f"token {gate.opens_at_token:,}, about step {gate.opens_at_step(tokens_per_step):,}"
        table.add_row("STP gate opens at", f"{opening}; full weight at token {gate.full_at_token:,}")
        table.add_row("STP boundaries", ", ".join(map(str, boundaries)))
    else:
        table.add_row("STP", "off")
    console.print(table)


def activation_bytes(config: RunConfig, model: HybridLM) -> int:
    """Residual states plus what one micro-batch keeps for backward: an estimate, by active parameter widths."""
    rows = config.train.batch_rows // config.train.accumulation
    tokens = rows * config.data.sequence_length
    # a linear layer of n weights on d_model inputs keeps about n / d_model values a token, twice (input and output)
    vocabulary = {id(weight): weight.numel() for weight in (model.embedding.weight, model.head.weight)}  # tied: one
    widths = parameter_counts(model)["active"] - sum(vocabulary.values())
    per_token = (len(model.letters) + 2) * config.model.d_model * 4 + 2 * 4 * widths // config.model.d_model
    return tokens * per_token


def as_receipt(model: HybridLM, sequence_length: int) -> dict[str, Any]:
    """The receipt's `model` entry."""
    counts = parameter_counts(model)
    return {
        "letters": "".join(model.letters),
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "training_flops_per_token": 3 * model.flops_per_token(sequence_length),
    }
