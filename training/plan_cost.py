"""FLOPs, communication and time of a training step: arithmetic on a model without memory and a cluster's data sheet.

The time model. Compute: executed matmul FLOPs (3 x forward, and what recomputation does again) at an assumed share of
the GPU's peak. Communication: rings at an assumed share of the links' speed, as often as FSDP2 calls them. Update:
AdamW reads and writes 28 bytes per parameter of the shard at the memory's speed. A step takes between
max(compute, communication) + update, where communication hides behind compute as far as it fits, and the sum, where
nothing overlaps. Not in it: latencies, data loading, checkpoints, validation, and whether a kernel of an unusual shape
(the time loop of R above all) reaches the assumed share.
"""

from __future__ import annotations

from dataclasses import dataclass

from blocks.block import Block
from model.hybrid import HybridLM
from training.plan_hardware import Cluster

F32 = 4
ADAMW_BYTES = 28  # per parameter: weight, two averages read and written, gradient read
KINDS = ("none", "ddp", "fsdp", "hsdp")
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Assumptions:
    """None of these was measured on the GPUs of the plan."""

    mfu: float = 0.35  # share of the matmul peak that a step's executed FLOPs reach
    link_efficiency: float = 0.8  # share of a link's speed that collectives reach
    reserved_gib: float = 3.0  # driver, libraries, communication buffers
    fragmentation: float = 0.05  # of the planned bytes, lost in the allocator


@dataclass(frozen=True)
class Flops:
    """Matmul FLOPs per token. forward; training = 3 x forward; executed adds what recomputation does again."""

    forward: int
    executed: float

    @property
    def training(self) -> int:
        return 3 * self.forward


def flops_per_token(model: HybridLM, sequence_length: int, recomputed: str) -> Flops:
    """full: every block's forward once more, up to its last linear layer (torch stops at the last tensor that the
    backward pass needs). selective: only products that are not kept, which are those inside
    attention and scan; linear layers, experts and the recurrence's results are kept."""
    layout = model.layout(sequence_length)
    again = 0.0
    if recomputed == "full":
        again = sum(row["flops_per_token"] for row in layout) - sum(2 * _last_linear(block) for block in model.stack)
    elif recomputed == "selective":
        for block, row in zip(model.stack, layout, strict=True):
            if block.letter in "AM":
                linear = sum(p.numel() for n, p in block.mixer.named_parameters() if n.endswith("proj.weight"))
                again += row["flops_per_token"] - 2 * linear
    forward = model.flops_per_token(sequence_length)
    return Flops(forward, 3 * forward + again)


def _last_linear(block: Block) -> int:
    """Weights of the linear layer that ends a block; 0 where routed experts do."""
    mixer = block.mixer
    if block.letter == "E":
        expert = mixer.dense or mixer.shared
        return 0 if expert is None else expert.down_proj.weight.numel()
    return (mixer.o_proj if block.letter == "A" else mixer.out_proj).weight.numel()


@dataclass(frozen=True)
class Communication:
    """Of one rank and one optimizer step. Bytes are what it sends."""

    gather_bytes: float  # weights of blocks, before forward and before backward
    reduce_bytes: float  # gradients
    seconds: float

    @property
    def total_bytes(self) -> float:
        return self.gather_bytes + self.reduce_bytes


def communication(
    parameters: int,
    root: int,
    shards: int,
    micro_batches: int,
    cluster: Cluster,
    efficiency: float,
    weight_bytes: int = F32,
) -> Communication:
    """Gradients and the root travel as float32, blocks' weights in weight_bytes each (parallel.gather); every
    micro-batch gathers and reduces (training/sharding.py).

    root: parameters of embedding, norm and head, which stay gathered between forward and backward. shards: ranks that
    share one copy.
    """
    if cluster.gpus == 1:
        return Communication(0.0, 0.0, 0.0)
    groups = cluster.gpus // shards
    gathered, reduced = 2 * weight_bytes * (parameters - root) + F32 * root, F32 * parameters
    share = (shards - 1) / shards
    gather_bytes, reduce_bytes = gathered * share, reduced * share
    seconds = cluster.ring_seconds(gathered + reduced, shards, efficiency)
    if groups > 1:  # and an all-reduce of the shard between the groups
        size = reduced / shards
        reduce_bytes += 2 * size * (groups - 1) / groups
        if shards == 1:
            seconds += 2 * cluster.ring_seconds(size, groups, efficiency)
        else:
            seconds += 2 * cluster.exchange_seconds(size, groups, efficiency)
    return Communication(micro_batches * gather_bytes, micro_batches * reduce_bytes, micro_batches * seconds)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    communication: float
    update: float

    @property
    def overlapped(self) -> float:
        """Communication hides behind compute as far as it fits."""
        return max(self.compute, self.communication) + self.update

    @property
    def serial(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.communication + self.update


def step_time(
    flops: Flops, tokens_per_rank: int, shard_parameters: int, sent: Communication, cluster: Cluster, mfu: float
) -> StepTime:
    compute = flops.executed * tokens_per_rank / (mfu * cluster.gpu.tflops * 1e12)
    update = ADAMW_BYTES * shard_parameters / (cluster.gpu.memory_gbps * 1e9)
    return StepTime(compute, sent.seconds, update)
