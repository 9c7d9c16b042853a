"""Damaged files: each is truncated, deleted and bit-flipped once, must be noticed, and must not change the result."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from errors import InputError
from scripts.chaos.place import REFERENCE, Place, Tally
from scripts.chaos.zygote import Zygote
from scripts.launch.collect import verify_run
from training.receipt import read_receipt

HOWS = ("truncated", "deleted", "flipped")
STOPPED = "half-way"
CHECKPOINT, RUN, DATA = "checkpoint files", "run files (collect)", "data and tokenizer files (collect)"


def stopped_run(place: Place, zygote: Zygote) -> Path:
    """A run with two checkpoints that was stopped half-way: what the damages are done to."""
    folder = place.runs / STOPPED
    pid = zygote.start(STOPPED)
    while len(list((folder / "checkpoints").glob("step-*"))) < 2 and not zygote.is_done():
        time.sleep(0.002)
    os.kill(pid, signal.SIGTERM)
    code, said = zygote.wait()
    if code != 4:
        raise RuntimeError(f"the run to damage was not stopped: exit code {code}: {said[-400:]}")
    return folder


def damage_checkpoints(place: Place, zygote: Zygote, tally: Tally) -> None:
    """Every file of the newest checkpoint: the start must name it, take the older one, and end bit-identical."""
    stopped = stopped_run(place, zygote)
    newest = max((stopped / "checkpoints").glob("step-*"))
    for file, how in _cases(newest):
        run_id = f"damaged-{file.name[:5]}-{how}"
        copy = place.runs / run_id
        shutil.copytree(stopped, copy)
        name = file.relative_to(stopped)
        _damage(copy / name, how)
        code, said = zygote.run(run_id)
        noticed = f"skipped damaged checkpoint runs/{run_id}/checkpoints/{newest.name}" in said
        tally.add("damage", CHECKPOINT, noticed, f"{name} {how}: not noticed")
        problem = f"exit code {code}: {said[-400:]}" if code else place.difference(run_id)
        tally.add("continued", CHECKPOINT, problem is None, f"{name} {how}: {problem}")
        place.clean(run_id)
    run_id = "damaged-all"
    shutil.copytree(stopped, place.runs / run_id)
    for checkpoint in (place.runs / run_id / "checkpoints").glob("step-*"):
        _damage(next((checkpoint / "tensors").iterdir()), "flipped")
    code, said = zygote.run(run_id)
    tally.add("damage", CHECKPOINT, "no valid checkpoint, starting from the beginning" in said, "all: not noticed")
    problem = f"exit code {code}: {said[-400:]}" if code else place.difference(run_id)
    tally.add("continued", CHECKPOINT, problem is None, f"all checkpoints flipped: {problem}")
    place.clean(run_id)


def damage_for_collect(place: Place, tally: Tally) -> None:
    """Every file that the receipt of a finished run vouches for: `launch collect` must point at it."""
    reference = place.runs / REFERENCE
    receipt = read_receipt(reference)
    data = place.folder / receipt["data"]["folder"]
    receipt["data"]["folder"] = str(data)  # collect reads it relative to where it is called
    clean = [check for check in verify_run(reference, receipt) if check.ok is not True]
    if clean:
        raise RuntimeError(f"collect finds fault with the undisturbed run: {clean}")
    judged = {"receipt.json", ".lock"}  # the receipt is what vouches; the lock holds nothing
    for file, how in [*_cases(reference, judged), *_cases(data, {"tokenizer.model.sha256"})]:
        group = DATA if data in file.parents else RUN
        kept = file.read_bytes()
        _damage(file, how)
        try:
            found = [check for check in verify_run(reference, receipt) if check.ok is False]
        except InputError as error:  # said, but not by collect's own table
            found = []
            tally.failures.append(f"{group}: {file} {how}: collect ended with {error}")
        finally:
            file.write_bytes(kept)
        tally.add("damage", group, bool(found), f"{file.name} {how}: collect found nothing")


def _cases(folder: Path, left_out: set[str] | None = None) -> Iterator[tuple[Path, str]]:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.name not in (left_out or set()):
            for how in HOWS:
                yield file, how


def _damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[: len(data) * 2 // 3])
    else:
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)
