"""One run on many processes: torchrun, FSDP2 and activation recomputation, applied from outside the model.

The model, the blocks and the losses know nothing of this. Every rank reads the layout of the whole step (which rows,
which documents, which triples), since that is a pure function of the step, and works on its own slice of the rows;
so counts, divisors and the gate need no communication and are those of one process. Gradients are summed over ranks,
because every loss is a share of a mean over the global batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from data.batch import IGNORE_LABEL, Batch
from errors import InputError, require, require_choice, require_number
from training.building import Fill
from training.compile import compile_blocks
from training.meeting import PARTING, leave_together, meet, teardown
from training.recompute import RECOMPUTE, recompute
from training.sharding import GATHERED, shard
from training.shared_errors import SHARED, tell, told_error

T = TypeVar("T")
KINDS = ("none", "ddp", "fsdp", "hsdp")


@dataclass
class ParallelConfig:
    # none: one process. Under torchrun: ddp (every rank holds everything), fsdp (weights, gradients and optimizer are
    # cut over all ranks), hsdp (cut inside a group of `shard_ranks`, replicated between the groups).
    data: str = "none"
    # hsdp: ranks that share one copy of the weights; null = those of one node.
    shard_ranks: int | None = None
    # Which activations of a block are computed again in the backward pass: none | selective | full. The hidden states
    # at the boundaries are always kept: STP reads them.
    recompute: str = "none"
    # How blocks' weights travel for their passes. fp32: as they are, which is what one process computes. bf16: half the
    # bytes, every parameter of a block rounded (norms and decays too); needs precision bf16. Weights, gradients'
    # sums, optimizer and the residual stream stay float32. Part of a run's identity where it is bf16.
    gather: str = "fp32"
    # A collective that takes longer than this ends the job (a rank has died or hangs).
    timeout_seconds: float = 600.0

    def validate(self, path: str = "parallel") -> None:
        require_choice(f"{path}.data", self.data, KINDS)
        require_choice(f"{path}.recompute", self.recompute, RECOMPUTE)
        require_choice(f"{path}.gather", self.gather, GATHERED)
        problem = f"{self.gather} is for ddp, fsdp and hsdp (also of one process); data is none, which gathers nothing"
        require(self.gather == "fp32" or self.data != "none", f"{path}.gather", problem)
        require_number(f"{path}.timeout_seconds", self.timeout_seconds, 1.0)
        if self.shard_ranks is not None:
            require_number(f"{path}.shard_ranks", self.shard_ranks, 1)
            problem = f"only hsdp has groups of ranks; data is {self.data}"
            require(self.data == "hsdp", f"{path}.shard_ranks", problem)


def processes() -> int:
    """How many processes torchrun (or srun, see scripts.launch) started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_processes(config: ParallelConfig, size: int) -> None:
    """Raises InputError unless `parallel.data` can be done by so many processes."""
    problem = f"none is for one process, and there are {size}; use ddp, fsdp or hsdp"
    require(size == 1 or config.data != "none", "parallel.data", problem)
    if size > 1 and config.data == "hsdp" and config.shard_ranks is not None:
        require_groups(config.shard_ranks, size)


def require_groups(shards: int, size: int) -> None:
    """Raises InputError unless so many ranks split into groups of `shards`."""
    if size % shards:
        near = min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - shards))
        raise InputError(f"parallel.shard_ranks: {size} ranks do not split into groups of {shards}; nearest is {near}")


class World:
    """The processes of a run: who this one is, what it works on, and what all of them have to agree on."""

    def __init__(self, config: ParallelConfig, device: torch.device, rank: int, size: int, mesh: DeviceMesh | None):
        self.config, self.device, self.rank, self.size, self.mesh = config, device, rank, size, mesh
        self.again = False  # whether torchrun has started this job before

    @classmethod
    @contextmanager
    def join(cls, config: ParallelConfig, device: torch.device) -> Iterator[World]:
        """Forms the process group for `parallel.data` (none forms none) and takes it down at the end.

        Raises InputError if the number of processes and the config disagree.
        """
        size = processes()
        require_processes(config, size)
        if config.data == "none":
            yield cls(config, device, 0, 1, None)
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)  # resolve_device chose it: one GPU for each process of a node
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=config.timeout_seconds)
        store: dist.Store = dist.HashStore()  # one process without torchrun is a world of one
        rank, again = 0, False
        if "RANK" in os.environ:
            store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
            store, again = meet(store, rank, size, timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
        world = cls(config, device, rank, size, None)
        world.again = again
        try:
            world.mesh = make_mesh(config, device.type, size)
            _limit(world.mesh, timeout)
            yield world
        except SHARED as error:
            traceback.clear_frames(error.__traceback__)  # they hold the model
            line = f"{type(error).__name__}: {error}"
            spoken = leave_together(store, rank, size, line, PARTING) == line and rank != 0
            cast(Any, error).spoken = spoken  # by rank 0, see errors.exit_with
            world.mesh = None
            teardown(error)
            raise
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            world.mesh = None
            teardown(error)
            raise
        leave_together(store, rank, size, "", timeout)
        world.mesh = None
        teardown()

    @classmethod
    def alone(cls) -> World:
        """One process that forms no group."""
        return cls(ParallelConfig(), torch.device("cpu"), 0, 1, None)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the receipt, the metrics and the log."""
        return self.rank == 0

    def my_rows(self, n_rows: int) -> Tensor:
        """The rows of a step of n_rows that this rank works on: a slice, the same number for every rank."""
        return torch.arange(n_rows, device=self.device).chunk(self.size)[self.rank]

    def share(self, batch: Batch) -> Batch:
        """This rank's rows of a batch that all ranks hold. Where the rows do not go round, a rank without one takes
        the first row with nothing to learn from: all ranks make the same calls."""
        if self.size == 1:
            return batch
        rows = torch.arange(len(batch.row_ids))[self.rank :: self.size]
        labels = batch.labels if len(rows) else torch.full_like(batch.labels, IGNORE_LABEL)
        rows = rows if len(rows) else torch.zeros(1, dtype=torch.int64)
        return Batch(batch.tokens[rows], labels[rows], batch.document_ids[rows], batch.row_ids[rows])

    def parallelize(self, model: Any, compile_mode: str = "none", fill: Fill | None = None) -> None:
        """Recomputation, then compilation, then sharding: per block, in place. compile_mode: none | blocks.

        fill: gives a model without memory its weights (training/building.py), of each block just before it is cut.
        """
        fill = fill or (lambda part: None)
        for block in model.blocks:
            recompute(block, self.config.recompute)
        if compile_mode == "blocks":
            compile_blocks(model)
        fill(model)
        if self.mesh is not None:
            shard(model, self.mesh, self.config.gather, before=fill)
        else:
            for block in model.blocks:
                fill(block)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place; returns it."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank. Every rank has to ask."""
        if self.mesh is None:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The (JSON-able) value of every rank, by rank. JSON and not objects: no pickle is read, not even our own."""
        if self.mesh is None:
            return [value]
        data = json.dumps(value).encode()
        longest = torch.tensor(len(data))
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
        padded = torch.zeros(int(longest), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded, group=group)
        return [json.loads(bytes(part.tolist()).rstrip(b"\0")) for part in found]

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0 (JSON-able), on every rank. An error of this project or of the disk is
        raised on all of them."""
        if self.mesh is None:
            return work()
        told: dict[str, Any] = {}
        if self.is_main:
            try:
                told = {"value": work()}
            except SHARED as error:
                self.gather({"error": tell(error)})
                raise
        told = self.gather(told)[0]
        if "error" in told:
            raise told_error(told["error"])
        return told["value"]

    def everywhere(self, work: Callable[[], T]) -> T:
        """What `work`, which talks to no other rank, gives on this one. An error of this project or of the disk on one
        rank is raised on all, with the rank's number."""
        if self.size == 1:
            return work()
        found: list[T] = []
        problem = None
        try:
            found.append(work())
        except SHARED as error:
            problem = tell(error)
        for rank, seen in enumerate(self.gather(problem)):
            if seen is not None:
                raise told_error(seen, f"rank {rank}: " if rank else "")
        return found[0]

    def main_first(self, work: Callable[[], T]) -> T:
        """Rank 0 does it before the others, who find it done (a corpus to prepare)."""
        found: list[T] = []
        self.from_main(lambda: found.append(work()))
        return self.everywhere(lambda: found[0] if found else work())

    def agree(self, facts: dict[str, str]) -> str:
        """The sha256 of facts that every rank must see alike. Raises InputError naming a rank that sees another one."""
        seen = self.gather(facts)
        for rank, theirs in enumerate(seen):
            other = next((name for name in facts if theirs.get(name) != seen[0].get(name)), None)
            require(other is None, f"rank {rank}", f"has another {other} than rank 0")
        return hashlib.sha256(json.dumps(seen[0], sort_keys=True).encode()).hexdigest()

    def bind_thread(self) -> None:
        """For another thread that may touch the device: CUDA makes it forget which one is this process's."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def side_group(self, patience: timedelta) -> dist.ProcessGroup | None:
        """A group of all ranks for another thread (checkpoints), whose messages mix with no other's; all ranks ask for
        it together. After a collective that took longer than `patience` it is of no use any more."""
        return None if self.mesh is None else dist.new_group(backend="gloo", timeout=patience)


def make_mesh(config: ParallelConfig, device_type: str, size: int) -> DeviceMesh:
    """fsdp: (size,). ddp: (size, 1), replicas of one shard. hsdp: (groups, shard_ranks). Raises InputError."""
    if config.data == "fsdp":
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    shards = 1 if config.data == "ddp" else config.shard_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", size))
    require_groups(shards, size)
    return init_device_mesh(device_type, (size // shards, shards), mesh_dim_names=("replicate", "shard"))


def _limit(mesh: DeviceMesh, timeout: timedelta) -> None:
    """A mesh makes groups of its own, with torch's 10 or 30 minutes."""
    for group in mesh.get_all_groups():
        _set_pg_timeout(timeout, group)
