"""receipt.json: what ran, on what, and what came of it. Whole at every moment, and closed with a reason.

Keys that people and scripts rely on: run_id, status, config_sha256, git {commit, dirty_sha256},
data {manifest_sha256}, tokens, metrics {val_bits_per_byte, unigram_bits_per_byte, tokens_per_second, gemm_share},
stp {enabled, boundaries, live_tokens [[from, to], ...]}, preflight {ok, seconds, boundaries, checks}.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data.plain import strict
from errors import require_choice
from training.durable import replace_atomically

RECEIPT = "receipt.json"
STATUSES = ("running", "finished", "stopped", "preempted", "crashed", "killed", "refused")
METRIC_KEYS = ("val_bits_per_byte", "unigram_bits_per_byte", "tokens_per_second", "gemm_share")


class Receipt:
    """The receipt of a run folder. `Receipt.start` begins or continues one; nothing here ever ends a run.

    message: receives one line when the receipt could not be written (a full disk); it is tried again at every update.
    """

    def __init__(
        self,
        path: Path | None,
        content: dict[str, Any],
        message: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
        every_seconds: float = 10.0,
    ) -> None:
        self.path = path
        self.content = content
        self.message = message
        self._clock = clock
        self._every_seconds = every_seconds
        self._written = float("-inf")
        self._failing = False

    @classmethod
    def start(
        cls,
        folder: str | Path,
        run_id: str,
        config_sha256: str,
        *,
        git: Mapping[str, Any],
        environment: Mapping[str, Any],
        message: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
        **fields: Any,
    ) -> Receipt:
        """Writes the receipt of a run that begins now: status running, every key present.

        An earlier receipt in the folder is continued: what it says and `fields` do not is kept, and each start is
        listed under `starts`. fields: e.g. data={"manifest_sha256": ...}, stp={"enabled": ..., "boundaries": [...]},
        kernels={...}, process={...}, model={...}. Raises OSError if the folder cannot be written at all.
        """
        path = Path(folder) / RECEIPT
        path.parent.mkdir(parents=True, exist_ok=True)
        content = _skeleton(run_id)
        earlier = read_receipt(folder)
        _merge(content, {key: value for key, value in earlier.items() if _fits(content.get(key), value)})
        now = {"run_id": run_id, "status": "running", "config_sha256": config_sha256, "reason": None, "ended": None}
        content.update(now, git=dict(git), environment=dict(environment))
        _merge(content, fields)
        # how the previous start ended: a receipt that still says running was left by a process that died
        after = {"running": "killed"}.get(earlier.get("status", ""), earlier.get("status"))
        content["starts"].append({"time": _utc(), "git": dict(git), "tokens": content["tokens"], "after": after})
        receipt = cls(path, content, message, clock)
        for half in path.parent.glob(f".{RECEIPT}.*.tmp"):  # of a process that was killed while writing
            half.unlink(missing_ok=True)
        replace_atomically(path, receipt._encode())
        receipt._written = clock()
        return receipt

    @classmethod
    def unwritten(cls, run_id: str) -> Receipt:
        """One in memory alone, for the ranks that keep no books."""
        return cls(None, {**_skeleton(run_id), "starts": [{}]})

    def update(self, **fields: Any) -> None:
        """Merges nested mappings into the receipt and writes it; lists and scalars are replaced."""
        _merge(self.content, fields)
        self._write()

    def progress(self, step: int, tokens: int) -> None:
        """After each step: kept in memory, written every ten seconds."""
        self.content["step"], self.content["tokens"] = int(step), int(tokens)
        if self._clock() - self._written >= self._every_seconds:
            self._write()

    def stp_live(self, start: int, end: int) -> None:
        """STP had a non-zero weight for the tokens in [start, end). Joins intervals that touch. Kept in memory until
        the next write. Raises ValueError for an interval that ends before it starts or lies before the last one's end.
        """
        if end < start:
            raise ValueError(f"stp_live: expected start <= end, got [{start}, {end})")
        intervals = self.content["stp"]["live_tokens"]
        if end == start:
            return
        if intervals and start < intervals[-1][1]:
            raise ValueError(f"stp_live: [{start}, {end}) overlaps the last interval {intervals[-1]}")
        if intervals and intervals[-1][1] == start:
            intervals[-1][1] = int(end)
        else:
            intervals.append([int(start), int(end)])

    @property
    def live_tokens(self) -> list[list[int]]:
        """A copy of the live intervals: belongs into the checkpoint's state."""
        return copy.deepcopy(self.content["stp"]["live_tokens"])

    def resume(self, step: int, tokens: int, live_tokens: list[list[int]]) -> None:
        """Goes back to a checkpoint: what a lost stretch of the run had written is dropped."""
        self.content["step"], self.content["tokens"] = int(step), int(tokens)
        self.content["stp"]["live_tokens"] = copy.deepcopy(live_tokens)
        self.content["checkpoints"] = [entry for entry in self.content["checkpoints"] if entry["step"] <= step]
        self.content["starts"][-1].update(step=int(step), tokens=int(tokens))
        self._write()

    def checkpoint(self, step: int, tokens: int, path: str | Path, manifest_sha256: str) -> None:
        """Lists a finished checkpoint; those whose folder has been removed leave the list. Listing twice is once."""
        name, folder = Path(path).name, Path(path).parent
        entry = {"step": int(step), "tokens": int(tokens), "folder": name, "manifest_sha256": manifest_sha256}
        known = {(old["folder"], old["manifest_sha256"]) for old in self.content["checkpoints"]}
        entries = (
            [*self.content["checkpoints"]]
            if (name, manifest_sha256) in known
            else [*(old for old in self.content["checkpoints"] if old["folder"] != name), entry]
        )
        entries = [old for old in entries if (folder / old["folder"]).is_dir()]
        if entries != self.content["checkpoints"]:
            self.update(checkpoints=entries)

    def finish(self, status: str, reason: str | None = None, **fields: Any) -> None:
        """Closes the receipt: status, reason (for a crash: the traceback), end time, last fields."""
        require_choice("receipt.status", status, [name for name in STATUSES if name != "running"])
        self.update(**fields, status=status, reason=reason, ended=_utc())

    def _encode(self) -> bytes:
        return (json.dumps(strict(self.content), indent=2, allow_nan=False) + "\n").encode()

    def _write(self) -> None:
        self._written = self._clock()
        if self.path is None:
            return
        try:
            replace_atomically(self.path, self._encode())
        except OSError as error:
            if not self._failing:
                self.message(f"{self.path}: not written, trying again: {error.strerror or error}")
            self._failing = True
        else:
            self._failing = False


def mark_killed(folder: str | Path) -> None:
    """Closes the receipt of a process that died without closing it. The caller owns the folder. Raises OSError."""
    content = read_receipt(folder)
    if content.get("status") == "running":
        reason = "its process was found dead: killed, or its machine went down"
        content |= {"status": "killed", "reason": reason, "ended": _utc()}
        replace_atomically(Path(folder) / RECEIPT, (json.dumps(content, indent=2) + "\n").encode())


def read_receipt(folder: str | Path) -> dict[str, Any]:
    """The receipt of a run folder, or {} if there is none that can be read."""
    try:
        return dict(json.loads((Path(folder) / RECEIPT).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def run_folder(name: str, runs: Path) -> Path:
    """A run's id or a path: runs/NAME if a run is there, whatever else has that name where one stands; else NAME if
    there is such a path, else runs/NAME, which may not be there."""
    inside, outside = runs / name, Path(name)
    is_run = (inside / RECEIPT).is_file() or (inside / "config.yaml").is_file()  # the second: begun, or queued
    return outside if outside.exists() and not is_run else inside


def _skeleton(run_id: str) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "status": "running",
        "reason": None,
        "started": _utc(),
        "ended": None,
        "config_sha256": None,
        "git": {"commit": None, "dirty_sha256": None},
        "data": {"manifest_sha256": None},
        "init_from": None,
        "step": 0,
        "tokens": 0,
        "metrics": dict.fromkeys(METRIC_KEYS),
        "stp": {"enabled": False, "boundaries": [], "live_tokens": []},
        "preflight": {"ok": None, "seconds": None, "boundaries": [], "checks": {}},
        "kernels": {},
        "environment": {},
        "checkpoints": [],
        "starts": [],
    }


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(dict(value) if isinstance(value, Mapping) else value)


def _fits(default: Any, value: Any) -> bool:
    """Whether a value read back has the kind of the key's default: a receipt may have been edited by hand."""
    return type(value) is type(default) if isinstance(default, (dict, list)) else True


def _utc() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
