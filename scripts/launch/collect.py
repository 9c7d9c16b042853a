"""Proof of what ran: recomputes every hash of a run and says which ones its receipt does not match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from data.prepared import MANIFEST, verify
from errors import InputError
from training.checkpoint_folder import NAME
from training.config import config_sha256
from training.durable import sha256_file
from training.environment import git_state
from training.manifest import MANIFEST as CHECKPOINT_MANIFEST
from training.manifest import damages
from training.metrics import METRICS, read_metrics


@dataclass
class Check:
    """ok None: it could not be checked here, note says why."""

    what: str
    ok: bool | None
    note: str


def verify_run(folder: Path, receipt: dict[str, Any], alive: bool = False) -> list[Check]:
    """Reads everything that the receipt names: config, checkpoints, data, metrics.

    alive: the run goes on meanwhile. It writes metrics, saves checkpoints and removes old ones while others are hashed.
    """
    return [
        _config(folder, receipt),
        *_checkpoints(folder, receipt, alive),
        *_data(receipt),
        *_metrics(folder, receipt, alive),
    ]


def _config(folder: Path, receipt: dict[str, Any]) -> Check:
    try:
        # plain values as they stand in the file: defaults that came later do not change what ran
        stored = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        found = config_sha256(dict(cast(dict, stored)))
    except Exception as error:  # the YAML parser raises many kinds
        return Check("config.yaml", False, f"not readable: {str(error).splitlines()[0]}")
    return _compare("config.yaml", found, receipt.get("config_sha256"))


def _checkpoints(folder: Path, receipt: dict[str, Any], alive: bool) -> list[Check]:
    # what names no hash is held against one that nothing has
    listed = [(str(e.get("folder")), e.get("manifest_sha256") or "none") for e in receipt.get("checkpoints") or []]
    checks = [_checkpoint(folder / "checkpoints" / name, expected, alive) for name, expected in listed]
    present = {path.name for path in (folder / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)}
    unlisted = "saved after the receipt was read" if alive else "the receipt was closed before it could be listed"
    for name in sorted(present - {name for name, _ in listed}):
        check = _checkpoint(folder / "checkpoints" / name, None, alive)
        checks.append(check if check.ok is False else Check(name, None, check.note or f"sound, but {unlisted}"))
    return checks


def _checkpoint(path: Path, expected: str | None, alive: bool) -> Check:
    """expected: the sha256 of its manifest, or None where nothing lists it (the note of a sound one is empty)."""
    try:
        found = sha256_file(path / CHECKPOINT_MANIFEST)
        problems = damages(path)
    except OSError as error:
        problems = [f"manifest: {error.strerror}"]
    if problems and alive and not path.exists():
        return Check(path.name, None, "pruned meanwhile")
    if problems:
        return Check(path.name, False, "; ".join(problems))
    return _compare(path.name, found, expected) if expected is not None else Check(path.name, True, "")


def _data(receipt: dict[str, Any]) -> list[Check]:
    data = receipt.get("data") or {}
    folder = Path(str(data.get("folder") or ""))
    if not data.get("folder") or not folder.is_dir():
        return [Check("data", None, f"{data.get('folder')} is not here: its manifest is {data.get('manifest_sha256')}")]
    try:
        checks = [_compare(f"{folder.name}/{MANIFEST}", sha256_file(folder / MANIFEST), data.get("manifest_sha256"))]
    except OSError as error:
        return [Check(f"{folder.name}/{MANIFEST}", False, str(error.strerror))]
    try:
        by_size = verify(folder)  # the tokenizer too: it is opened by its hash in the manifest
        note = f"{len(by_size)} shards used in place, by size alone" if by_size else "every shard and the tokenizer"
        checks.append(Check(folder.name, True, note))
    except (InputError, OSError) as error:
        checks.append(Check(folder.name, False, str(error)))
    return checks


def _metrics(folder: Path, receipt: dict[str, Any], alive: bool) -> list[Check]:
    recorded = receipt.get("metrics_file") or {}
    if alive or receipt.get("status") in ("running", "killed") or not recorded:
        why = "it is still written" if alive else "no hash: the run was not closed by its own process"
        return [Check(METRICS, None, why)]
    try:
        found = sha256_file(folder / METRICS)
    except OSError as error:
        return [Check(METRICS, False, str(error.strerror))]
    checks = [_compare(METRICS, found, recorded.get("sha256"))]
    final = (receipt.get("metrics") or {}).get("val_bits_per_byte")
    if final is not None:
        values = [r["val_bits_per_byte"] for r in read_metrics(folder) if "val_bits_per_byte" in r]
        same = bool(values) and values[-1] == final
        note = f"{final:.4f}" if same else f"the receipt says {final}, the last record {values[-1:]}"
        checks.append(Check("val_bits_per_byte", same, note))
    return checks


def _compare(what: str, found: str, expected: Any) -> Check:
    if found == expected:
        return Check(what, True, f"sha256 {found[:12]}")
    said = str(expected)[:12] if expected else "none"
    return Check(what, False, f"sha256 {found[:12]}, the receipt says {said}")


def print_collected(receipt: dict[str, Any], checks: list[Check], console: Console) -> None:
    table = Table(title=f"receipt of {receipt.get('run_id')}", show_header=False)
    git, stp, proof = receipt.get("git") or {}, receipt.get("stp") or {}, receipt.get("preflight") or {}
    here = git_state()
    same = "this checkout" if here == git else "not what is checked out here"
    dirty = f", uncommitted changes {str(git['dirty_sha256'])[:12]}" if git.get("dirty_sha256") else ""
    metrics = {k: v for k, v in (receipt.get("metrics") or {}).items() if isinstance(v, (int, float))}
    rows = {
        "status": receipt.get("status"),
        "reason": ((receipt.get("reason") or "").strip().splitlines() or [None])[-1],
        "started, ended": f"{receipt.get('started')}, {receipt.get('ended')}",
        "starts": len(receipt.get("starts") or []),
        "step, tokens": f"{receipt.get('step'):,}, {receipt.get('tokens'):,}",
        "code": f"{str(git.get('commit'))[:12]}{dirty} ({same})",
        "model": (receipt.get("model") or {}).get("letters"),
        "machine": receipt.get("machine"),
        "preflight": {True: "ok", False: "failed", None: "not run"}[proof.get("ok")],
        "STP live over tokens": stp.get("live_tokens") if stp.get("enabled") else "off",
        **{name: f"{value:,.4g}" for name, value in metrics.items()},
        "warnings": "\n".join(receipt.get("warnings") or []) or None,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    console.print(table, markup=False)
    checked = Table(title="recomputed")
    for column in ("what", "", "note"):
        checked.add_column(column, overflow="fold")
    for check in checks:
        checked.add_row(check.what, {True: "ok", False: "DIFFERS", None: "not checked"}[check.ok], check.note)
    console.print(checked, markup=False)
