"""The data that a run's model knows: what a number about it has to be measured on."""

from __future__ import annotations

from pathlib import Path

from data.prepared import Prepared
from errors import InputError
from training.checkpoint_folder import load_state
from training.receipt import read_receipt
from training.saving import data_identity


def require_same_data(data: Prepared, folder: Path, checkpoint: Path) -> None:
    """Raises InputError unless `data`, made anew from the config of the run in `folder`, is what it was trained on.

    The config names texts, it does not hold them: a file that came or went since makes other tokens, and of documents
    that were trained on a held-out split. A checkpoint of an earlier version does not know its data; the receipt does.
    """
    was = load_state(checkpoint).get("data") or read_receipt(folder).get("data")
    if not isinstance(was, dict) or not was.get("manifest_sha256"):
        return  # neither says
    if not any(was.get(key) == now for key, now in data_identity(data).items()):
        then, now = str(was["manifest_sha256"])[:12], data.manifest_sha256[:12]
        raise InputError(
            f"{folder}: its data were {then} (sha256 of the manifest) and are now {now}, so its model would be scored "
            f"on other tokens and splits than its own; put the texts back as they were"
        )
