"""What a run is doing, from the files in its folder and the process or job behind it."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from errors import InputError
from losses.gate import TokenGate
from scripts.launch import slurm
from scripts.launch.job import LOG, Job, local_processes
from training.config import load_config
from training.metrics import METRICS
from training.ownership import Ownership, describe_owner, live_owner, read_owner
from training.progress import format_duration
from training.receipt import mark_killed, read_receipt
from training.watchdog import STACKS

TAIL_BYTES = 1 << 16
# unknown: Slurm, which has its job, does not answer; nothing may take that for an end
ALIVE = ("running", "starting", "queued", "unknown")


@dataclass
class RunStatus:
    """state: queued, starting, running, unknown (Slurm does not answer), or how it ended (finished, stopped, preempted,
    crashed, killed, refused, failed = it ended before it opened a receipt, new = never started)."""

    run_id: str
    state: str
    reason: str | None
    step: int
    tokens: int
    total_tokens: int | None
    tokens_per_second: float | None
    seconds_left: float | None
    last_checkpoint: str | None
    last_checkpoint_step: int | None
    stp: str
    stp_live: bool
    skipped_steps: int
    warnings: list[str]
    started: str | None
    ended: str | None
    owner: str | None
    backend: str | None

    @property
    def is_alive(self) -> bool:
        return self.state in ALIVE


def describe(folder: Path) -> RunStatus:
    """Reads everything, and closes the receipt of a process that is found dead (`killed`)."""
    job = Job.read(folder)
    state, owner, said = state_of(folder)
    receipt = read_receipt(folder)
    last = _last_step(folder / METRICS)
    total = _total_tokens(folder)
    tokens = int(receipt.get("tokens") or 0)
    speed = last.get("tokens_per_second") if state == "running" else None
    speed = speed or (receipt.get("metrics") or {}).get("tokens_per_second")
    left = max(total - tokens, 0) / speed if total and speed and state == "running" else None
    checkpoints = receipt.get("checkpoints") or [{}]
    stp, live = _stp(folder, receipt)
    reason = receipt.get("reason") if state not in ("new", *ALIVE) else said
    if state == "failed":
        reason = _last_line(folder / LOG)
    elif state == "killed" and _has_text(folder / STACKS):
        reason = f"{reason}; it hung: see {STACKS}"
    return RunStatus(
        run_id=folder.name,
        state=state,
        reason=reason,
        step=int(receipt.get("step") or 0),
        tokens=tokens,
        total_tokens=total,
        tokens_per_second=speed,
        seconds_left=left,
        last_checkpoint=checkpoints[-1].get("folder"),
        last_checkpoint_step=checkpoints[-1].get("step"),
        stp=stp,
        stp_live=live,
        skipped_steps=int(last.get("skipped_steps") or 0),
        warnings=list(receipt.get("warnings") or []),
        started=receipt.get("started"),
        ended=receipt.get("ended") if state not in ALIVE else None,
        owner=describe_owner(owner) if owner else None,
        backend=job.backend if job else ("train.py" if receipt else None),
    )


def state_of(folder: Path) -> tuple[str, dict[str, Any] | None, str | None]:
    """The state, the process that owns the run if one lives, and what Slurm said where that leaves the state unknown.
    Closes the receipt of a dead process."""
    job = Job.read(folder)
    owner = live_owner(folder)
    gone = owner if owner is not None and _ended_under_slurm(owner) else None
    if gone is not None:
        _bury(folder, gone)
        owner = live_owner(folder)
    receipt = read_receipt(folder).get("status")
    if owner is not None and owner != gone:
        return ("running" if receipt == "running" else "starting"), owner, None
    if job is not None and local_processes(folder, job):
        return "starting", job.process, None
    if job is not None and job.slurm_job:
        try:
            word = slurm.state(job.slurm_job)
        except slurm.NotInstalledError:
            word = None
        except InputError as error:
            return "unknown", None, str(error)
        if word is not None:
            return ("queued" if word == "PENDING" else "starting"), None, None
    if receipt == "running":
        buried = _bury(folder, gone)
        return ("killed", None, None) if buried else ("starting", read_owner(folder) or None, None)
    if receipt is None:
        return ("failed" if job is not None else "new"), None, None
    return str(receipt), None, None


def _ended_under_slurm(owner: dict[str, Any]) -> bool:
    """Whether Slurm knows that a process on another machine is dead: a job of a machine of its own that is over, or
    waits for another start. Where it does not answer, nobody knows."""
    if not owner.get("slurm_job") or owner.get("host") == socket.gethostname():
        return False
    try:
        ended = slurm.state(str(owner["slurm_job"])) in (None, "PENDING")
        return ended and slurm.has_node(str(owner.get("host")))
    except InputError:
        return False


def _bury(folder: Path, gone: dict[str, Any] | None) -> bool:
    """Closes the receipt of a dead process and removes its note, under the lock: a start that happens right now is not
    overwritten (False). On a disk that refuses it is said and not written."""
    own = Ownership(folder)
    try:
        own.take(gone)
        mark_killed(folder)
    except InputError:
        return False
    except OSError:
        pass
    finally:
        own.release()
    return True


def _last_step(path: Path) -> dict[str, Any]:
    """The last record of a training step, from the end of the file: it may be long."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and "tokens_per_second" in record:
            return record
    return {}


def _total_tokens(folder: Path) -> int | None:
    try:
        return int(OmegaConf.load(folder / "config.yaml").train.tokens)
    except Exception:  # a missing or damaged file: `collect` says so
        return None


def _stp(folder: Path, receipt: dict[str, Any]) -> tuple[str, bool]:
    try:
        config = load_config(folder / "config.yaml")
        gate = TokenGate(config.stp.gate, config.stp.weight)
    except InputError:
        return "unknown", False
    if not config.stp.enabled:
        return "off", False
    live = (receipt.get("stp") or {}).get("live_tokens") or []
    if live and live[-1][1] >= int(receipt.get("tokens") or 0):
        return f"live since token {live[-1][0]:,}", True
    if live:
        return f"was live over tokens {live}", False
    return f"not live yet, the gate opens at token {gate.opens_at_token:,}", False


def _has_text(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _last_line(path: Path) -> str | None:
    """What a run said last: its error if there is one."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    said = [line.strip() for line in lines if line.strip() and not line.startswith("---")]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return errors[-1] if errors else said[-1] if said else "it left no word"  # torchrun adds a page of its own


def print_status(status: RunStatus, console: Console) -> None:
    table = Table(title=status.run_id, show_header=False)
    share = f" ({status.tokens / status.total_tokens:.0%} of {status.total_tokens:,})" if status.total_tokens else ""
    first = (status.reason or "").strip().splitlines()
    rows = {
        "state": status.state + (f": {first[-1]}" if first else ""),
        "runs as": status.owner,
        "step": f"{status.step:,}",
        "tokens": f"{status.tokens:,}{share}",
        "tokens/s": f"{status.tokens_per_second:,.0f}" if status.tokens_per_second else None,
        "time left": format_duration(status.seconds_left) if status.seconds_left is not None else None,
        "last checkpoint": status.last_checkpoint or "none yet",
        "STP": status.stp,
        "skipped steps": str(status.skipped_steps) if status.skipped_steps else None,
        "warnings": "\n".join(status.warnings) or None,
        "started": status.started,
        "ended": status.ended,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, value)
    console.print(table, markup=False)


def print_list(statuses: list[RunStatus], console: Console) -> None:
    table = Table()
    for column in ("run", "state", "step", "tokens", "of", "last checkpoint", "STP live", "started"):
        table.add_column(column, justify="right" if column in ("step", "tokens", "of") else "left", overflow="fold")
    for status in statuses:
        share = f"{status.tokens / status.total_tokens:.0%}" if status.total_tokens else ""
        last, live = status.last_checkpoint or "", "yes" if status.stp_live else "no"
        started = (status.started or "")[:16]
        table.add_row(status.run_id, status.state, f"{status.step:,}", f"{status.tokens:,}", share, last, live, started)
    console.print(table, markup=False)
