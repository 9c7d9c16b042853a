"""A finished checkpoint folder: its name, what makes it unreadable, its state, its tensors. Nothing here writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from errors import InputError
from training.distributed import World
from training.manifest import damages, read_manifest
from training.tensor_store import Tree, flatten, open_shards, read_tensors, require_stored

NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")


def load_checkpoint(path: str | Path, into: Tree, world: World | None = None, checked: bool = False) -> dict[str, Any]:
    """Checks every byte against the manifest, fills the tensors of `into` in place, and returns the state.

    `into` has the form given to `save`, or only some of its top-level sections: {"model": model.state_dict()} takes
    the weights alone. world: the ranks that load it together share the reading of bytes for their hashes.
    checked: somebody has just compared every byte, so sizes and names are enough here.
    Raises InputError, on all of them: damaged, or names, shapes or dtypes differ (nothing is filled then).
    """
    path, flat, world = Path(path), flatten(into), world or World.alone()

    def check() -> dict[str, Any]:
        if not path.is_dir():
            raise InputError(f"{path}: no such checkpoint")
        problems = damages(path, hashes=not checked, part=(world.rank, world.size))
        if problems:
            raise InputError(f"{path}: damaged checkpoint: {problems[0]}")
        state = load_state(path)
        require_stored(path / "tensors", flat, set(into))
        return state

    state = world.everywhere(check)
    read_tensors(path / "tensors", flat)
    return state


def load_state(path: str | Path) -> dict[str, Any]:
    """state.json alone, without checking the other files. Raises InputError if it cannot be read."""
    try:
        return dict(json.loads((Path(path) / "state.json").read_bytes())["state"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: state.json is not readable: {spell(error)}") from None


def step_of(path: str | Path) -> int:
    """The number of finished steps that a checkpoint folder's name carries."""
    return order_of(Path(path))[0]


def order_of(path: Path) -> tuple[int, int]:
    """(step, attempt): the newest is the largest. Raises InputError for another name."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise InputError(f"{path}: not a checkpoint folder (step-00000000)")
    return int(match[1]), int(match[2] or 1)


def unreadable(path: Path) -> list[str]:
    """Problems that a rewritten manifest hides: files that are not what their names say, a step of another folder."""
    try:
        load_state(path)
        if read_manifest(path)["step"] != step_of(path):
            return ["manifest.json: is of another step"]
        open_shards(path / "tensors")
    except Exception as error:  # safetensors raises many kinds on foreign bytes
        return [spell(error)]
    return []


def spell(error: BaseException) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
