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
from training.checkpoint import NAME
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


def verify_run(folder: Path, receipt: dict[str, Any]) -> list[Check]:
    """Reads everything that the receipt names: config, checkpoints, data, metrics."""
    return [_config(folder, receipt), *_checkpoints(folder, receipt), *_data(receipt), *_metrics(folder, receipt)]


def _config(folder: Path, receipt: dict[str, Any]) -> Check:
    try:
        # plain values as they stand in the file: defaults that came later do not change what ran
        stored = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        found = config_sha256(dict(cast(dict, stored)))
    except Exception as error:  # the YAML parser raises many kinds
        return Check("config.yaml", False, f"not readable: {str(error).splitlines()[0]}")
    return _compare("config.yaml", found, receipt.get("config_sha256"))


def _checkpoints(folder: Path, receipt: dict[str, Any]) -> list[Check]:
    checks, listed = [], set()
    for entry in receipt.get("checkpoints") or []:
        name = str(entry.get("folder"))
        listed.add(name)
        path = folder / "checkpoints" / name
        try:
            found = sha256_file(path / CHECKPOINT_MANIFEST)
        except OSError as error:
            checks.append(Check(name, False, f"manifest: {error.strerror}"))
            continue
        problems = damages(path)
        if problems:
            checks.append(Check(name, False, "; ".join(problems)))
        else:
            checks.append(_compare(name, found, entry.get("manifest_sha256")))
    present = {path.name for path in (folder / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)}
    for name in sorted(present - listed):
        problems = damages(folder / "checkpoints" / name)
        note = "; ".join(problems) if problems else "sound, but the receipt was closed before it could be listed"
        checks.append(Check(name, False if problems else None, note))
    return checks


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


def _metrics(folder: Path, receipt: dict[str, Any]) -> list[Check]:
    recorded = receipt.get("metrics_file") or {}
    if receipt.get("status") in ("running", "killed") or not recorded:
        return [Check(METRICS, None, "no hash: the run was not closed by its own process")]
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


def print_collected(folder: Path, receipt: dict[str, Any], checks: list[Check], console: Console) -> None:
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
