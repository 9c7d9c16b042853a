"""The data that a run's model knows: what a number about it has to be measured on."""

from __future__ import annotations

from pathlib import Path

from data.prepared import Prepared
from errors import InputError
from training.saving import changed_data, data_identity


def require_same_data(data: Prepared, folder: Path, checkpoint: Path) -> None:
    """Raises InputError unless `data`, made anew from the config of the run in `folder`, is what it was trained on:
    of documents that it knows, splits made anew would hold some out."""
    changed = changed_data(folder, checkpoint, data_identity(data))
    if changed is not None:
        raise InputError(
            f"{changed}, so its model would be scored on other tokens and splits than its own; put the texts back as "
            f"they were"
        )
