"""metrics.jsonl, the truth about a run's course, and wandb, a second writer that may fail.

One flat JSON object per line and per `log`: {"step": ..., name: number or text, ...}. Lines are only ever appended;
a resumed run first drops what lies beyond its checkpoint, so that there is neither a gap nor a duplicate.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import require, require_choice
from training.durable import fsync_path, sha256_file
from training.wandb_writer import WandbWriter

METRICS = "metrics.jsonl"
Scalar = float | int | str | bool | None


@dataclass
class WandbConfig:
    # offline: files in the run folder, no network, no account; online: needs `wandb login`; disabled: never imported.
    mode: str = "offline"
    project: str = "amer"
    # Your account or team; null: wandb's default.
    entity: str | None = None
    # Shown name; null: the run id.
    name: str | None = None
    tags: list[str] = field(default_factory=list)

    def validate(self, path: str = "wandb") -> None:
        require_choice(f"{path}.mode", self.mode, ["offline", "online", "disabled"])
        require(bool(self.project.strip()), f"{path}.project", "expected a name")


class Tracker:
    """Writes the metrics of one run (one process of it: rank 0).

    folder: the run folder (created). resume_step: the checkpoint's number of finished steps, whose records and the
    earlier ones are kept; None starts an empty file. config: the merged config, for wandb. message: receives one line
    for everything that went wrong; no failure of a disk or of wandb ever ends the run.

    Log everything that belongs to step N before N is saved: what comes later is dropped when N is resumed.
    """

    def __init__(
        self,
        folder: str | Path,
        run_id: str,
        wandb: WandbConfig | None = None,
        config: dict[str, Any] | None = None,
        resume_step: int | None = None,
        message: Callable[[str], None] = print,
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS
        self.message = message
        if resume_step is None:
            self.path.write_bytes(b"")
        else:
            truncate_metrics(self.path, resume_step, message)
        self._file = self.path.open("ab", buffering=0)
        self._unwritten: list[bytes] = []
        self._failing = False
        self._wandb: WandbWriter | None = None
        if wandb is not None and wandb.mode != "disabled":
            self._wandb = WandbWriter(folder, run_id, wandb, config or {}, message)
            self._wandb.replay(read_metrics(self.path))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends one record and forwards it to wandb. Tensors and numpy scalars become numbers; NaN and inf null.

        Raises TypeError for a value that is no scalar, no text and no tensor of one element.
        """
        record: dict[str, Scalar] = {"step": int(step)}
        record.update({name: _scalar(name, value) for name, value in metrics.items()})
        self._unwritten.append((json.dumps(record, allow_nan=False) + "\n").encode())
        self._write()
        if self._wandb is not None:
            self._wandb.log(record)

    def sync(self) -> None:
        """Forces the records to the disk, for a power cut; call it before a checkpoint."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self.message(f"{self.path}: not synced: {error.strerror}")

    def digest(self) -> dict[str, Any]:
        """Writes what is left and identifies the file: {"bytes", "sha256"}, and "unwritten" records if there are."""
        self._write()
        lost = {"unwritten": len(self._unwritten)} if self._unwritten else {}
        try:
            return {"bytes": self.path.stat().st_size, "sha256": sha256_file(self.path), **lost}
        except OSError as error:
            return {"bytes": None, "sha256": None, "problem": str(error.strerror), **lost}

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Writes what is left; tells wandb that the run is over, with final values if given."""
        self._write()
        self._file.close()
        if self._unwritten:
            self.message(f"{self.path}: {len(self._unwritten)} records were never written")
        if self._wandb is not None:
            self._wandb.finish({name: _scalar(name, value) for name, value in (summary or {}).items()})

    def _write(self) -> None:
        """Appends what waits. On a full disk nothing half-written stays, and the records wait for the next call."""
        if not self._unwritten:
            return
        data = b"".join(self._unwritten)
        end: int | None = None
        try:
            end = os.fstat(self._file.fileno()).st_size
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except (OSError, ValueError) as error:
            if end is not None:
                _truncate(self.path, end)
            if not self._failing:
                self.message(f"{self.path}: not written, trying again at every record: {error}")
            self._failing = True
            return
        if self._failing:
            self.message(f"{self.path}: writing again, nothing is lost")
        self._failing = False
        self._unwritten.clear()


class NoTracker(Tracker):
    """For the ranks that keep no books: has a tracker's methods and writes nothing."""

    def __init__(self) -> None:
        pass

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def digest(self) -> dict[str, Any]:
        return {}

    def close(self, summary: dict[str, Any] | None = None) -> None:
        pass


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file (or of a run folder), in order; half-written lines are left out, [] if no file."""
    path = Path(path)
    path = path / METRICS if path.is_dir() else path
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [record for _, record in _records(file) if record is not None]


def truncate_metrics(path: Path, step: int, message: Callable[[str], None] = print) -> None:
    """Drops the records of later steps and what is no record (a line that a kill cut short), in one atomic step.

    The file is left alone, byte for byte, where there is nothing to drop; it is created if missing. Raises OSError.
    """
    if not path.exists():
        path.write_bytes(b"")
        message(f"{path}: missing, so this run's earlier metrics are lost; starting an empty file")
        return
    temporary = path.with_name(f".{path.name}.tmp")
    later = broken = cut = 0
    with path.open("rb") as source, temporary.open("wb") as target:
        for line, record in _records(source):
            if record is None:
                broken += 1
            elif record["step"] > step:
                later += 1
            else:
                cut += not line.endswith(b"\n")
                target.write(line.rstrip(b"\n") + b"\n")
        target.flush()
        os.fsync(target.fileno())
    if later or broken or cut:
        temporary.replace(path)
        fsync_path(path.parent)
    if later or broken:
        message(f"{path.name}: dropped {later} records after step {step}, {broken} damaged lines")
    temporary.unlink(missing_ok=True)


def _records(file: Any) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line with its record, or None where the line is none. A whole object without its newline is a record."""
    for line in file:
        record = None
        try:
            parsed = json.loads(line)
            if isinstance(parsed, dict) and isinstance(parsed.get("step"), int):
                record = parsed
        except (ValueError, RecursionError):
            pass
        yield line, record


def _scalar(name: str, value: Any) -> Scalar:
    if value is None or isinstance(value, (str, bool)):
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"metric {name}: expected a scalar or text, got {type(value).__name__}")


def _truncate(path: Path, size: int) -> None:
    with contextlib.suppress(OSError):  # else the half line stays; readers and the next resume drop it
        os.truncate(path, size)
