"""Pickles that act, in place of every file that a start reads: none is ever executed, none ends in a traceback."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

from scripts.chaos.damage import STOPPED
from scripts.chaos.mishaps import refused_cleanly
from scripts.chaos.place import Place, Tally
from scripts.chaos.zygote import Zygote
from training.durable import sha256_file
from training.manifest import write_manifest
from training.receipt import read_receipt

GROUP = "malicious pickles"


class Payload:
    """Unpickling it writes a file: the proof that somebody unpickled it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.marker, "executed"))


def malicious_pickles(place: Place, zygote: Zygote, tally: Tally) -> None:
    """A pickle that acts, in place of every file that a start reads; the manifest beside it rewritten to fit."""
    marker = place.folder / "executed"
    stopped = place.runs / STOPPED
    payload = pickle.dumps(Payload(marker))
    data = place.folder / read_receipt(stopped)["data"]["folder"]
    data_files = sorted(path for path in data.rglob("*") if path.is_file())
    run_files = sorted(path for path in stopped.rglob("*") if path.is_file() and path.name != ".lock")
    run_files += [stopped / "checkpoints" / run_files[0].name]
    for file in [*data_files, *run_files]:
        shutil.copytree(stopped, place.runs / "evil")
        inside = stopped in file.parents
        target = place.runs / "evil" / file.relative_to(stopped) if inside else file
        kept = None if inside else (file.read_bytes(), (data / "manifest.json").read_bytes())
        target.write_bytes(payload)
        for checkpoint in {parent for parent in target.parents if parent.name.startswith("step-")}:
            if target.name != "manifest.json":
                write_manifest(checkpoint, int(checkpoint.name.split("-")[1]))
        if not inside and target.name != "manifest.json":
            fit_data_manifest(data)
        code, said = zygote.run("evil")
        executed = marker.exists()
        words = f"{file.name}: executed {executed}, exit code {code}: {said[-300:]}"
        clean = not executed and "Traceback" not in said and (code == 0 or refused_cleanly(code, _errors(said)))
        tally.add("input", GROUP, clean, words)
        marker.unlink(missing_ok=True)
        if kept is not None:
            file.write_bytes(kept[0])
            (data / "manifest.json").write_bytes(kept[1])
        place.clean("evil")


def fit_data_manifest(data: Path) -> None:
    """What an attacker does who has exchanged files of a prepared corpus: sizes and hashes that fit them."""

    def fit(entry: object) -> None:
        for child in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            fit(child)
        if isinstance(entry, dict) and "prefix" in entry:
            for kind in ("bin", "idx"):
                file = data / f"{entry['prefix']}.{kind}"
                entry |= {f"{kind}_bytes": file.stat().st_size, f"{kind}_sha256": sha256_file(file)}
        elif isinstance(entry, dict) and "file" in entry:
            entry["sha256"] = sha256_file(data / entry["file"])

    manifest = json.loads((data / "manifest.json").read_bytes())
    fit(manifest)
    (data / "manifest.json").write_text(json.dumps(manifest))


def _errors(said: str) -> str:
    return "\n".join(line for line in said.splitlines() if line.startswith(("error", "Traceback")))
