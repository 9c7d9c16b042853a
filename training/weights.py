"""Weights alone: out of a checkpoint into a model, or into one safetensors file with the config in its metadata.

Everything that reads a model and does not go on with its run (evaluation, inspection, export, `init_from`) reads it
here. It gets the language model and nothing else: `stp.predictor`'s map is trained and saved with the model, but no
forward pass uses it, so it is left out on purpose. Never a pickle.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from errors import InputError
from training.checkpoint_folder import load_checkpoint
from training.distributed import World
from training.durable import replace_atomically, sha256_file
from training.manifest import MANIFEST
from training.run import find_checkpoint
from training.tensor_store import flatten, require_same, stored_shapes

FORMAT = "amer-weights-1"
# What train.py hangs onto the model for the loss alone.
LOSS_ONLY = "stp_predictor."


def export_weights(checkpoint: Path, target: Path, metadata: dict[str, str]) -> list[str]:
    """Writes the weights of a checkpoint (names as in `HybridLM.state_dict`, a tied head once) and `target`.sha256.

    Returns the names. Raises InputError for a damaged checkpoint, OSError if the target cannot be written.
    """
    stored = _empty(checkpoint)
    load_checkpoint(checkpoint, {"model": stored})
    weights = {name: tensor for name, tensor in stored.items() if not name.startswith(LOSS_ONLY)}
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        save_file(weights, temporary, {"format": "pt", "amer_format": FORMAT, **metadata})
        digest = sha256_file(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    replace_atomically(target.with_name(f"{target.name}.sha256"), f"{digest}  {target.name}\n".encode())
    return sorted(weights)


def load_weights(name: str | Path, model: nn.Module, world: World | None = None) -> dict[str, str]:
    """Fills a model from a run id, a run or checkpoint folder, or a file of `export_weights`.

    Returns where they come from: {"path", "sha256"}, of a checkpoint folder the hash of its manifest.

    A predictor of STP that is stored is left out, and one that the model has stays as it is, whatever the source: a run
    that starts from weights begins its own (see above).
    A file is compared with the hash beside it (`X.sha256`) where there is one: safetensors itself does not notice
    damage. Raises InputError, on every rank of `world`: not there, damaged, or of another model (nothing is filled
    then).
    """
    path, world = Path(name), world or World.alone()
    into = {key: tensor for key, tensor in flatten(model.state_dict()).items() if not key.startswith(LOSS_ONLY)}
    is_file = world.from_main(path.is_file)
    if not is_file:
        checkpoint = find_checkpoint(str(name), world=world)
        # read and thrown away: a section is compared as a whole
        empty = world.everywhere(lambda: _empty(checkpoint))
        unused = {key: tensor for key, tensor in empty.items() if key.startswith(LOSS_ONLY)}
        load_checkpoint(checkpoint, {"model": {**into, **unused}}, world)
        return _origin(checkpoint, world)
    stored = world.everywhere(lambda: _read(path, into))
    with torch.no_grad():
        for key, tensor in into.items():
            whole = stored[key]
            if isinstance(tensor, DTensor):  # each rank takes its part
                whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
            tensor.copy_(whole)
    return _origin(path, world)


def _origin(path: Path, world: World) -> dict[str, str]:
    file = path if path.is_file() else path / MANIFEST
    return {"path": str(path), "sha256": world.from_main(lambda: sha256_file(file))}


def _read(path: Path, into: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of `export_weights`, if they are those of `into`. Raises InputError."""
    beside = path.with_name(f"{path.name}.sha256")
    if beside.is_file() and beside.read_text(errors="replace").split()[:1] != [sha256_file(path)]:
        raise InputError(f"{path}: damaged: its sha256 is not the one in {beside.name}")
    try:
        stored = load_file(path)
    except Exception as error:  # safetensors raises many kinds on bytes that are not its own
        raise InputError(f"{path}: not a safetensors file: {error}") from None
    stored = {key: value for key, value in stored.items() if not key.startswith(LOSS_ONLY)}
    require_same(path, {key: (tuple(value.shape), value.dtype) for key, value in stored.items()}, into)
    return stored


def _empty(checkpoint: Path) -> dict[str, Tensor]:
    """Tensors to read the weights of a checkpoint into, by their names in the model. Raises InputError."""
    return {
        name.removeprefix("model."): torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in stored_shapes(checkpoint / "tensors").items()
        if name.startswith("model.")
    }
