"""Tensors to and from a folder: torch's distributed checkpoint (DCP) in its safetensors storage. No pickle.

DCP's default storage unpickles its `.metadata`. Its safetensors storage keeps everything (dtype, shape, the offsets
of shards) in safetensors headers, which are JSON. Reading back, 0-dimensional step counters, every dtype, and
resharding of an FSDP2 model with its optimizer (2 -> 1, 2, 4 ranks and 4 -> 1, equal losses) were tried on torch 2.13.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from errors import InputError, nearest

Tree = Mapping[str, Any]  # nested mappings of str to Tensor
Shape = tuple[tuple[int, ...], torch.dtype]


def flatten(tree: Tree) -> dict[str, Tensor]:
    """{"model": {"a.weight": t}} -> {"model.a.weight": t}. A tensor that is there twice (tied) is kept once."""
    flat: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in _leaves(tree):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}; other state belongs into JSON")
        identity = _identity(tensor)
        if identity is not None and identity in seen:
            continue
        if name in flat:
            raise TypeError(f"{name}: two tensors have this name")
        if identity is not None:
            seen.add(identity)
        flat[name] = tensor
    return flat


def snapshot(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies in main memory, so that training may go on while they are written."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in flat.items()}


def write_tensors(folder: Path, flat: dict[str, Tensor], group: Any = None) -> None:
    """Writes and fsyncs `shard-*.safetensors` into a folder (created). Raises OSError or RuntimeError.

    group: the ranks that write together, each its own shards (a tensor that all of them hold is written once).
    """
    dcp = _dcp()
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(flat, storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:
        raise _cause(error) from None


def shard_prefix(rank: int) -> str:
    """How the names of the files begin that a rank of `write_tensors` writes."""
    return f"shard-{rank + 1:05d}-"


def require_stored(folder: Path, into: dict[str, Tensor], sections: set[str]) -> None:
    """Before `read_tensors`: raises InputError if a name, shape or dtype differs (`sections` are the top-level names
    that must match completely) or if a file is no safetensors file. Talks to no other rank."""
    stored = stored_shapes(folder)
    require_same(folder, {name: stored[name] for name in stored if name.split(".", 1)[0] in sections}, into)


def read_tensors(folder: Path, into: dict[str, Tensor]) -> None:
    """Fills the tensors of `into` in place, bit for bit; all ranks together. Raises InputError."""
    dcp = _dcp()
    try:
        dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    except dcp.CheckpointException as error:
        raise InputError(f"{folder}: not readable: {_one_line(_cause(error))}") from None


def open_shards(folder: Path) -> None:
    """Raises an exception (of many kinds) unless there are shards and each can be opened."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{folder.name}: no safetensors file")
    for shard in shards:
        with safe_open(shard, framework="pt"):
            pass


def stored_shapes(folder: Path) -> dict[str, Shape]:
    """name -> (shape, dtype) of every tensor in a folder of `write_tensors`. Raises InputError."""
    try:
        stored = _dcp().HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in stored.items()}
    except Exception as error:  # safetensors and JSON raise many kinds on bytes that are not theirs
        raise InputError(f"{folder}: not readable as safetensors: {_one_line(error)}") from None


def require_same(source: Path, stored: Mapping[str, Shape], into: Mapping[str, Tensor]) -> None:
    """Raises InputError naming the first tensor whose name, shape or dtype differs."""
    for name in sorted(into.keys() ^ stored.keys()):
        if name in into:
            raise InputError(f"{source}: has no tensor {name}{nearest(name, stored)}; it is of another model")
        raise InputError(f"{source}: has a tensor {name} that the model here lacks{nearest(name, into)}")
    for name, tensor in into.items():
        here = (tuple(tensor.shape), tensor.dtype)
        if stored[name] != here:
            raise InputError(f"{source}: tensor {name} is {_spell(*stored[name])}, the model here has {_spell(*here)}")


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _identity(tensor: Tensor) -> tuple[Any, ...] | None:
    """Equal for two views of the very same elements; None where there is no memory to compare."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.numel() == 0 or local.is_meta:
        return None
    return (local.device, local.data_ptr(), tuple(local.shape), local.stride(), local.dtype)


def _dcp() -> Any:
    import torch.distributed.checkpoint as dcp  # half a second: only where a checkpoint is touched

    # one process without torch.distributed is an ordinary case here, not worth a warning per save
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    return dcp


def _cause(error: Any) -> BaseException:
    """DCP wraps what happened on each rank: the first of these."""
    for failure in error.failures.values():
        cause = failure[0] if isinstance(failure, tuple) else failure
        if isinstance(cause, Exception):
            return cause
    return RuntimeError(_one_line(error))


def _spell(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
