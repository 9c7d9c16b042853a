"""A plan: what a config needs on a cluster before any of it is rented. Pure functions; scripts.plan shows them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from errors import InputError, require, require_choice, require_number
from training.config import RunConfig
from training.distributed import require_groups
from training.plan_cost import (
    KINDS,
    RECOMPUTE,
    Assumptions,
    Communication,
    Flops,
    StepTime,
    communication,
    flops_per_token,
    step_time,
)
from training.plan_hardware import Cluster
from training.plan_memory import F32, Memory, Stack, largest
from training.plan_proofs import peaks, selected
from training.sharding import GATHERED
from training.summary import meta_model, parameter_counts

GIB = 2**30
CHECKPOINT_COPIES = 3  # weights and AdamW's two averages, float32


@dataclass(frozen=True)
class Setting:
    """kind: parallel.data; recompute: parallel.recompute; micro_rows: rows per rank and micro-batch."""

    kind: str
    recompute: str
    micro_rows: int
    micro_batches: int


@dataclass(frozen=True)
class Estimate:
    """One setting on the cluster. needed_gib: the peak of a rank with fragmentation and what is reserved, over plain
    steps, steps that probe and preflight, of which `memory` is the one that needs most."""

    setting: Setting
    memory: Memory
    needed_gib: float
    fits: bool
    flops: Flops
    sent: Communication
    time: StepTime
    tokens_per_second: float  # where communication hides behind compute
    tokens_per_second_serial: float  # where it does not at all
    days: float


@dataclass(frozen=True)
class Plan:
    cluster: Cluster
    assumptions: Assumptions
    parameters: int
    active_parameters: int
    families: dict[str, dict[str, int]]  # letter, embedding, head -> blocks, parameters, forward FLOPs per token
    tokens: int
    tokens_per_step: int
    steps: int
    checkpoint_bytes: int
    checkpoints_kept: int
    estimates: tuple[Estimate, ...]  # of every kind and recomputation
    chosen: Estimate
    notes: tuple[str, ...]


def make_plan(
    config: RunConfig,
    cluster: Cluster,
    assumptions: Assumptions | None = None,
    kind: str | None = None,
    recompute: str | None = None,
) -> Plan:
    """kind and recompute: the setting to look at closely; None: the config's, or the fastest that fits where that is
    none (or has no GPUs to be cut over), halfway between communication that hides behind compute and that does not.

    Every kind and recomputation is estimated with the largest micro-batch that fits (the config's rows per step are
    kept; so the accumulation is what gives). Raises InputError.
    """
    assumptions = assumptions or Assumptions()
    require_number("--mfu", assumptions.mfu, 0.0, 1.0, exclusive=True)
    if kind is not None:
        require_choice("--data", kind, KINDS)
    if recompute is not None:
        require_choice("--recompute", recompute, RECOMPUTE)
    require(config.precision != "fp32", "precision", "plans are for bf16 on a GPU, got fp32; use bf16 or auto")
    require(kind != "none" or cluster.gpus == 1, "--data", f"none is for one process, not for {cluster.gpus}; use fsdp")
    if cluster.gpus > 1 and config.parallel.data != "none" and kind is None and recompute is None:
        kind, recompute = config.parallel.data, config.parallel.recompute
    if config.parallel.shard_ranks is not None and cluster.gpus > 1:
        require_groups(config.parallel.shard_ranks, cluster.gpus)
    planner = _Planner(config, cluster, assumptions)
    kinds = ("none",) if cluster.gpus == 1 else tuple(k for k in KINDS if k != "none")
    if cluster.nodes == 1 and cluster.gpus > 1:
        kinds = ("ddp", "fsdp")  # hsdp in one node is fsdp
    if kind is not None and kind not in kinds:
        kinds = (*kinds, kind)
    estimates = tuple(planner.best(k, r) for k in kinds for r in RECOMPUTE)
    chosen = _choose(estimates, kind, recompute)
    return planner.plan(estimates, chosen)


def _choose(estimates: tuple[Estimate, ...], kind: str | None, recompute: str | None) -> Estimate:
    wanted = [e for e in estimates if kind in (None, e.setting.kind) and recompute in (None, e.setting.recompute)]
    return min(wanted, key=lambda e: (not e.fits, e.time.overlapped + e.time.serial if e.fits else e.needed_gib))


class _Planner:
    def __init__(self, config: RunConfig, cluster: Cluster, assumptions: Assumptions) -> None:
        self.config, self.cluster, self.assumptions = config, cluster, assumptions
        self.length, self.vocab_size = config.data.sequence_length, config.data.tokenizer.vocab_size
        self.model = meta_model(config, self.vocab_size)
        rows, gpus = config.train.batch_rows, cluster.gpus
        if rows % gpus:
            near = max(1, round(rows / gpus)) * gpus
            raise InputError(f"train.batch_rows: {rows} rows do not split over {gpus} GPUs; nearest is {near}")
        self.rank_rows = rows // gpus
        self.boundaries = selected(config.stp, self.model.letters)
        self._stacks: dict[tuple[int, str, bool], Stack] = {}

    def stack(self, rows: int, recompute: str, again: bool = False) -> Stack:
        key = rows, recompute, again and recompute != "full"  # what is computed again is freed as it is used
        if key not in self._stacks:
            self._stacks[key] = Stack.trace(
                self.config.model, self.vocab_size, rows, self.length, torch.bfloat16, recompute, "cuda", key[2]
            )
        return self._stacks[key]

    def best(self, kind: str, recompute: str) -> Estimate:
        """With the largest micro-batch that fits; with one row where none does."""
        sizes = [rows for rows in range(self.rank_rows, 0, -1) if self.rank_rows % rows == 0]
        for rows in sizes:
            found = self.estimate(Setting(kind, recompute, rows, self.rank_rows // rows))
            if found.fits or rows == 1:
                return found
        raise AssertionError("one row is always among the sizes")

    def shards(self, kind: str) -> int:
        """Ranks that share one copy of weights, gradients and optimizer."""
        groups = self.config.parallel.shard_ranks or self.cluster.gpus_per_node
        return {"none": 1, "ddp": 1, "fsdp": self.cluster.gpus, "hsdp": min(groups, self.cluster.gpus)}[kind]

    def estimate(self, setting: Setting) -> Estimate:
        config, cluster, assumed = self.config, self.cluster, self.assumptions
        stack, shards = self.stack(setting.micro_rows, setting.recompute), self.shards(setting.kind)
        width = (GATHERED[config.parallel.gather] or torch.float32).itemsize
        memory = largest(
            list(
                peaks(
                    self.stack,
                    setting.recompute,
                    setting.micro_rows,
                    config.train.batch_rows,
                    self.boundaries,
                    shards=shards,
                    gathers=setting.kind != "none",
                    accumulates=setting.micro_batches > 1,
                    weight_bytes=width,
                ).values()
            )
        )
        needed = memory.total / GIB * (1 + assumed.fragmentation) + assumed.reserved_gib
        flops = flops_per_token(self.model, self.length, setting.recompute)
        sent = communication(
            stack.parameters,
            stack.root,
            shards,
            setting.micro_batches,
            cluster,
            assumed.link_efficiency,
            width,
        )
        time = step_time(flops, self.rank_rows * self.length, stack.parameters // shards, sent, cluster, assumed.mfu)
        tokens = self.config.train.batch_rows * self.length
        return Estimate(
            setting,
            memory,
            needed,
            needed <= cluster.gpu.memory_gib,
            flops,
            sent,
            time,
            tokens / time.overlapped,
            tokens / time.serial,
            self.config.train.tokens / (tokens / time.overlapped) / 86400,
        )

    def plan(self, estimates: tuple[Estimate, ...], chosen: Estimate) -> Plan:
        config, model = self.config, self.model
        counts = parameter_counts(model)
        families: dict[str, dict[str, int]] = {}
        letters = Counter(model.letters)
        for row in model.layout(self.length):
            family = families.setdefault(row["letter"], {"blocks": letters[row["letter"]], "parameters": 0, "flops": 0})
            family["parameters"] += row["parameters"]
            family["flops"] += row["flops_per_token"]
        head = model.head.weight.numel()
        families["embedding"] = {"blocks": 0, "parameters": model.embedding.weight.numel(), "flops": 0}
        own = head if model.config.head == "untied" else 0
        families["head"] = {"blocks": 0, "parameters": own + model.config.d_model, "flops": 2 * head}
        tokens_per_step = config.train.batch_rows * self.length
        steps = -(-config.train.tokens // tokens_per_step)
        permanent = steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
        return Plan(
            self.cluster,
            self.assumptions,
            counts["total"],
            counts["active"],
            families,
            config.train.tokens,
            tokens_per_step,
            steps,
            CHECKPOINT_COPIES * F32 * counts["total"],
            config.checkpoint.keep_last + permanent,
            estimates,
            chosen,
            NOTES,
        )


# What a reader has to know about the figures; shown below them and in --json.
NOTES = (
    "Memory: the blocks' GPU code path traced on fake tensors, with stand-ins for RMSNorm and flex attention, and the "
    "shapes alone of causal_conv1d and mamba_chunk_scan_combined. UNMEASURED on a GPU. The same method meets a CPU's "
    "measured peak (--measure), but the CPU's kernels keep other tensors.",
    "Sharding: FSDP2's gathered blocks (two and a buffer), gradient buffer and root are assumed. Two ranks over gloo "
    "on a CPU needed 7% less than that says; UNMEASURED on a GPU.",
    "Time: executed matmul FLOPs at the assumed share of the peak, rings at the assumed share of the links. "
    "UNMEASURED. R's time loop, latencies, data, validation and checkpoints are not in it.",
    "Preflight proves two whole rows on every rank, whatever the micro-batch, and keeps whole gradients of the "
    "embedding and the last block; `in` says whether it, a step that probes gradients or a plain step needs most. "
    "UNMEASURED on a GPU. Probes of the forward pass, validation and what the controls prove beyond STP's checks are "
    "not in it.",
)
