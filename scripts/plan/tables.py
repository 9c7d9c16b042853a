"""The plan as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.families import FAMILY_NAMES
from training.plan import GIB, Estimate, Plan
from training.plan_memory import PREFLIGHT, PROBE, STEP

NOISE = 300 << 20  # below it a measured peak says as much about Python as about the step
SHORT = {STEP: "step", PROBE: "probe", PREFLIGHT: "proof"}


def show(plan: Plan, console: Console) -> None:
    """Model, settings, the chosen one's memory and step, the run, and what the figures rest on."""
    _model(plan, console)
    _settings(plan, console)
    _memory(plan, console)
    _step(plan, console)
    _run(plan, console)
    for note in plan.notes:
        console.print(f"[dim]- {escape(note)}[/dim]", highlight=False)


def show_measured(found: dict[str, Any], console: Console) -> None:
    """--measure: the model of memory against what this CPU needed."""
    table = Table(title="peak memory of a training step on this CPU", title_justify="left")
    table.add_column("")
    table.add_column("MiB", justify="right")
    for name, size in found["memory"].items():
        if isinstance(size, int) and size:
            table.add_row(name, _mib(size))
    table.add_section()
    table.add_row("predicted", _mib(found["predicted_bytes"]))
    table.add_row("measured", _mib(found["measured_bytes"]))
    ratio = found["predicted_bytes"] / found["measured_bytes"]
    table.add_row("predicted / measured", f"{ratio:.3f}")
    console.print(table)
    console.print(f"the peak of a {found['memory']['during']} is in the {found['memory']['moment']}")
    if found["measured_bytes"] < NOISE:
        console.print(f"too small to compare: Python's own memory moves by tens of MiB; take {NOISE >> 20} MiB or more")


def _model(plan: Plan, console: Console) -> None:
    table = Table(title=f"the model: {_billions(plan.parameters)} parameters", title_justify="left")
    for name in ("part", "blocks", "parameters", "share", "forward FLOPs/token"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, family in plan.families.items():
        share = f"{family['parameters'] / plan.parameters:.0%}"
        forward = f"{family['flops'] / 1e6:,.0f} M" if family["flops"] else "-"
        blocks = str(family["blocks"] or "-")
        table.add_row(FAMILY_NAMES.get(name, name), blocks, f"{family['parameters']:,}", share, forward)
    table.add_section()
    flops = plan.chosen.flops
    table.add_row("in all", "", f"{plan.parameters:,}", "", f"{flops.forward / 1e6:,.0f} M")
    table.add_row("active per token", "", f"{plan.active_parameters:,}", "", "")
    table.add_row("training, per token", "", "", "", f"{flops.training / 1e9:,.2f} G")
    console.print(table)


def _settings(plan: Plan, console: Console) -> None:
    cluster = plan.cluster
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} of {cluster.gpus_per_node}"
    title = f"settings on {cluster.gpus} x {cluster.gpu.name} ({nodes}, {cluster.gpu.memory_gib:g} GiB each)"
    table = Table(title=title, title_justify="left")
    for name in ("data", "recompute", "rows", "GiB", "in", "fits", "k tokens/s", "days"):
        table.add_column(name, justify="left" if name in ("data", "recompute", "in", "fits") else "right")
    for estimate in plan.estimates:
        setting = estimate.setting
        slow, fast = estimate.tokens_per_second_serial, estimate.tokens_per_second
        speed = (f"{slow / 1e3:,.0f} - {fast / 1e3:,.0f}", _days(estimate, plan)) if estimate.fits else ("-", "-")
        table.add_row(
            setting.kind,
            setting.recompute,
            f"{setting.micro_rows} x {setting.micro_batches}",
            f"{estimate.needed_gib:.1f}",
            SHORT[estimate.memory.during],
            "[green]yes[/green]" if estimate.fits else "[red]no[/red]",
            *speed,
            style="bold" if estimate is plan.chosen else None,
        )
    console.print(table)
    console.print("rows per rank and micro-batch x micro-batches per step; bold: looked at below", style="dim")
    console.print("in: a plain step, a step that probes gradients or preflight's proof needs most", style="dim")
    if not any(estimate.fits for estimate in plan.estimates):
        console.print("nothing fits: take more GPUs, larger ones, or a shorter data.sequence_length", style="red")


def _memory(plan: Plan, console: Console) -> None:
    estimate, memory, assumed = plan.chosen, plan.chosen.memory, plan.assumptions
    table = Table(title=f"a rank's peak ({memory.during}): {_name(estimate)}", title_justify="left")
    table.add_column("GiB", justify="right")
    table.add_column("for")
    rows = {
        "weights, float32": memory.weights,
        "gradients, float32": memory.gradients,
        "AdamW's two averages, float32": memory.optimizer,
        "blocks gathered for their passes, root": memory.gathered,
        "residual stream at every boundary, float32 (read by STP)": memory.states,
        "what blocks and head keep for the backward pass": memory.activations,
        f"at work: {memory.moment}": memory.working,
        f"fragmentation, assumed {assumed.fragmentation:.0%}": memory.total * assumed.fragmentation,
        "driver, libraries, buffers: assumed": assumed.reserved_gib * GIB,
    }
    for name, size in rows.items():
        if size:
            table.add_row(f"{size / GIB:.2f}", name)
    table.add_section()
    table.add_row(f"{estimate.needed_gib:.2f}", f"of {plan.cluster.gpu.memory_gib:g}: {_verdict(estimate)}")
    console.print(table)


def _step(plan: Plan, console: Console) -> None:
    estimate, cluster, assumed = plan.chosen, plan.cluster, plan.assumptions
    time, sent = estimate.time, estimate.sent
    table = Table(title=f"one step of {plan.tokens_per_step:,} tokens", title_justify="left")
    table.add_column("seconds", justify="right")
    table.add_column("for")
    extra = estimate.flops.executed / estimate.flops.training
    again = f" x {extra:.2f} for recomputation" if extra > 1 else ""
    peak = f"{assumed.mfu:.0%} of {cluster.gpu.tflops:,.0f} TFLOP/s (assumed share)"
    table.add_row(f"{time.compute:.3f}", f"compute: {estimate.flops.training / 1e9:,.2f} GFLOP/token{again}, at {peak}")
    if sent.total_bytes:
        table.add_row(
            f"{time.communication:.3f}",
            f"communication: a rank sends {sent.gather_bytes / GIB:.1f} GiB of weights and "
            f"{sent.reduce_bytes / GIB:.1f} GiB of gradients",
        )
    table.add_row(f"{time.update:.3f}", f"update, at {cluster.gpu.memory_gbps:,.0f} GB/s of memory")
    table.add_section()
    table.add_row(f"{time.overlapped:.3f}", f"communication hidden as far as it fits: {_speed(estimate, plan)}")
    if sent.total_bytes:
        table.add_row(f"{time.serial:.3f}", f"nothing overlaps: {estimate.tokens_per_second_serial:,.0f} tokens/s")
    console.print(table)


def _run(plan: Plan, console: Console) -> None:
    estimate, cluster = plan.chosen, plan.cluster
    table = Table(title="the run", title_justify="left", show_header=False)
    hours = estimate.days * 24 * cluster.gpus
    checkpoint = plan.checkpoint_bytes / GIB
    table.add_row("budget", f"{plan.tokens:,} tokens = {plan.steps:,} steps")
    table.add_row("time", f"{_days(estimate, plan)} days, {hours:,.0f} GPU-hours at least")
    table.add_row("training FLOPs", f"{plan.chosen.flops.training * plan.tokens:.2e}")
    kept = f"{plan.checkpoints_kept} kept at the end = {checkpoint * plan.checkpoints_kept:,.0f} GiB"
    table.add_row("checkpoint", f"{checkpoint:,.1f} GiB (weights and AdamW, float32); {kept}")
    if cluster.gpus > 1:
        setting = estimate.setting
        table.add_row("to set", f"parallel.data={setting.kind} parallel.recompute={setting.recompute}")
        table.add_row("", f"train.accumulation={setting.micro_batches}")
    else:
        table.add_row("to set", f"train.accumulation={estimate.setting.micro_batches}")
        if estimate.setting.recompute != "none":
            table.add_row("", f"parallel.recompute={estimate.setting.recompute}")
    console.print(table)


def _name(estimate: Estimate) -> str:
    setting = estimate.setting
    return f"{setting.kind}, recompute {setting.recompute}, {setting.micro_rows} rows"


def _verdict(estimate: Estimate) -> str:
    return "[green]fits[/green]" if estimate.fits else "[red]does not fit[/red]"


def _speed(estimate: Estimate, plan: Plan) -> str:
    per_gpu = estimate.tokens_per_second / plan.cluster.gpus
    return f"{estimate.tokens_per_second:,.0f} tokens/s, {per_gpu:,.0f} per GPU"


def _days(estimate: Estimate, plan: Plan) -> str:
    """Between perfect overlap and none."""
    slow = plan.tokens / estimate.tokens_per_second_serial / 86400
    fast = f"{estimate.days:,.1f}"
    return fast if f"{slow:,.1f}" == fast else f"{fast} - {slow:,.1f}"


def _billions(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
