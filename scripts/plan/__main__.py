"""What a config takes on a cluster: python -m scripts.plan CONFIG [key=value ...] --gpu h100-80gb --gpus 64

Parameters, FLOPs, memory of a rank, communication, speed, days and checkpoints, before anything is rented. Builds the
model without memory and starts nothing. With --measure: the memory model against this machine's CPU instead.
Exit code 0: planned (whether or not it fits); 2: bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import torch
from rich.console import Console

from errors import exit_with, require_choice
from scripts.plan.tables import show, show_measured
from training.config import RunConfig, load_config
from training.machine import resolve_precision
from training.plan import Plan, make_plan
from training.plan_cost import RECOMPUTE, Assumptions
from training.plan_hardware import Cluster
from training.plan_measure import measure, on_this_cpu


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.plan", description="What a config takes on a cluster.")
    parser.add_argument("config", help="a YAML file, e.g. configs/scale/nam56r_4b.yaml")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. train.batch_rows=512")
    parser.add_argument("--gpu", default="h100-80gb", help="e.g. h100-80gb, a100-80gb, rtx4090-24gb")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--network-gbit", type=float, default=400.0, help="between nodes, per GPU (default 400)")
    parser.add_argument("--mfu", type=float, default=Assumptions.mfu, help="assumed share of the matmul peak")
    parser.add_argument("--data", help="ddp | fsdp | hsdp; default: the config's, else the fastest that fits")
    parser.add_argument("--recompute", help="none | selective | full; default: likewise")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON and nothing else")
    parser.add_argument("--measure", action="store_true", help="two steps on this CPU against the memory model")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    warnings = config.validate()
    console = Console()
    if arguments.measure:
        found = check(config, arguments)
        if arguments.json:
            print(json.dumps(found))
        for one in () if arguments.json else found:
            show_measured(one, console)
        return 0
    cluster = Cluster.of(arguments.gpu, arguments.gpus, arguments.gpus_per_node, arguments.network_gbit)
    plan = make_plan(config, cluster, Assumptions(mfu=arguments.mfu), arguments.data, arguments.recompute)
    if arguments.json:
        print(json.dumps(as_dict(plan)))
    else:
        show(plan, console)
        for warning in warnings:
            console.print(f"note: {warning}", markup=False, highlight=False)
    return 0


def check(config: RunConfig, arguments: Any) -> list[dict[str, Any]]:
    """Predicted and measured peaks on this CPU in bytes: of a plain step, one that probes, and preflight."""
    recompute = arguments.recompute or "none"
    require_choice("--recompute", recompute, RECOMPUTE)
    precision = resolve_precision(config.precision, torch.device("cpu"))
    predicted = on_this_cpu(config, precision.dtype, recompute)
    overrides = [*arguments.overrides, f"precision={precision.name}"]
    return [
        {
            "predicted_bytes": memory.total,
            "measured_bytes": measure(arguments.config, overrides, recompute, during),
            "memory": dataclasses.asdict(memory),
        }
        for during, memory in predicted.items()
    ]


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, with the sums that its tables show."""
    found = dataclasses.asdict(plan)
    for estimate, entry in zip((*plan.estimates, plan.chosen), (*found["estimates"], found["chosen"]), strict=True):
        entry["memory"]["total"] = estimate.memory.total
        entry["flops"]["training"] = estimate.flops.training
        entry["time"] |= {"overlapped": estimate.time.overlapped, "serial": estimate.time.serial}
    return found


if __name__ == "__main__":
    exit_with(main)
