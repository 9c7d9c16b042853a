"""The small world that the chaos suite breaks: a corpus, a tiny run, and what it ends in when nobody disturbs it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from training.metrics import read_metrics
from training.receipt import read_receipt

ROOT = Path(__file__).parents[2]
_COUNTING = threading.Lock()  # several workers, one tally
# Metrics that say how fast it was, not what was computed.
TIMINGS = ("tokens_per_second", "gemm_share")
REFERENCE = "undisturbed"
# All four families, accumulation, the gate's ramp, validations, skipped outliers: everything that has state.
CONFIG = """
model:
  pattern: AMER
  d_model: 32
  attention: {n_heads: 4, n_kv_heads: 2}
  mamba2: {head_dim: 16, d_state: 8, chunk_size: 16}
  moe: {n_experts: 4, top_k: 2, expert_ff: 16}
data:
  path: texts/*.txt
  sequence_length: 48
  validation_fraction: 0.1
  tokenizer: {vocab_size: 300}
stp:
  weight: 0.1
  n_spans: 4
  boundaries: [all, final]
  gate: {start_tokens: 1000, ramp_tokens: 1500}
train: {tokens: 4000, batch_rows: 4, accumulation: 2, log_every: 2, probe_every: 5}
optimizer: {learning_rate: 3.0e-2}
validation: {rows: 8, sample_tokens: 8, every_fraction: 0.3}
checkpoint: {every_steps: 2}
health: {outliers: skip, outlier_sigmas: 1.0, outlier_window: 8}
wandb: {mode: disabled}
threads: 1
"""


@dataclass
class Tally:
    """What the last line counts, and every failure with its words."""

    counts: dict[str, list[int]] = field(
        default_factory=lambda: {"continued": [0, 0], "damage": [0, 0], "input": [0, 0]}
    )
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0
    core_seconds: float = 0.0

    def add(self, kind: str, group: str, ok: bool, words: str = "") -> None:
        """kind: continued, damage or input."""
        with _COUNTING:
            for counts in (self.counts[kind], self.groups.setdefault(group, {}).setdefault(kind, [0, 0])):
                counts[0] += ok
                counts[1] += 1
            if not ok:
                self._fail(f"{group}: {words}")

    def _fail(self, words: str) -> None:
        """Said at once as well as at the end: a suite that is ended early must not take its finding with it."""
        self.failures.append(words)
        print(f"FAILED {words}", file=sys.stderr, flush=True)

    def note(self, group: str, **numbers: int | float) -> None:
        """Numbers of a group that are shown and not judged; they add up."""
        into = self.groups.setdefault(group, {}).setdefault("notes", {})
        for name, number in numbers.items():
            into[name] = into.get(name, 0) + number

    def merge(self, other: dict[str, Any]) -> None:
        for kind, (ok, total) in other["counts"].items():
            self.counts[kind][0] += ok
            self.counts[kind][1] += total
        for group, found in other["groups"].items():
            mine = self.groups.setdefault(group, {})
            for kind, value in found.items():
                if kind == "notes":
                    self.note(group, **value)
                else:
                    mine[kind] = [a + b for a, b in zip(mine.get(kind, [0, 0]), value)]
        self.seconds += other["seconds"]
        self.core_seconds += other["core_seconds"]
        for words in other["failures"]:
            self._fail(words)
        self.skipped += other["skipped"]

    @property
    def passed(self) -> bool:
        return not self.failures and all(ok == total for ok, total in self.counts.values())

    def line(self) -> str:
        (n, m), (d, f), (c, b) = (self.counts[kind] for kind in ("continued", "damage", "input"))
        continued, damages = f"{n} undisturbed-identical of {m} continued", f"{d} of {f} damages detected"
        return f"chaos: {continued}, {damages}, {c} of {b} bad inputs clean"


class Place:
    """A working folder with texts, config and the undisturbed run; runs are compared with that one, bit by bit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"

    def build(self) -> float:
        """Writes everything and runs it undisturbed, by the command that people type; returns that run's seconds."""
        words = random.Random(0)
        (self.folder / "texts").mkdir(parents=True)
        for number in range(60):
            lines = (f"def f{words.randrange(9)}(x): return x * {words.randrange(99)}" for _ in range(8))
            (self.folder / "texts" / f"{number}.txt").write_text("\n".join(lines))
        (self.folder / "tiny.yaml").write_text(CONFIG)
        started = time.monotonic()
        done = self.command(f"run_id={REFERENCE}", timeout=900)  # the first one compiles the kernels
        if done.returncode != 0:
            raise RuntimeError(f"the undisturbed run failed: {done.stderr}")
        if not read_receipt(self.runs / REFERENCE)["skipped_steps"]:
            raise RuntimeError("the undisturbed run skips no outlier, so nothing would show that this state is kept")
        return time.monotonic() - started

    def command(self, *overrides: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """A real `python train.py` to its end."""
        process = self.popen(*overrides)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def popen(self, *overrides: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "tiny.yaml", *overrides],
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def difference(self, run_id: str) -> str | None:
        """The first thing in which a finished run differs from the undisturbed one; None: not a bit."""
        return difference(self.runs / run_id, self.runs / REFERENCE)

    def clean(self, run_id: str) -> None:
        shutil.rmtree(self.runs / run_id, ignore_errors=True)

    def put_away(self, run_id: str, problem: str | None) -> str:
        """Removes a run that ended well; keeps one that did not, beside the undisturbed one, and says where."""
        if problem is None:
            self.clean(run_id)
            return ""
        kept = Path(tempfile.mkdtemp(prefix=f"amer-chaos-kept-{run_id}-"))
        for name in (run_id, REFERENCE):
            shutil.copytree(self.runs / name, kept / name, dirs_exist_ok=True)
        self.clean(run_id)
        return f" (kept in {kept})"


def difference(run: Path, reference: Path) -> str | None:
    ours, theirs = read_receipt(run), read_receipt(reference)
    for key in ("status", "step", "tokens", "skipped_steps"):
        if ours.get(key) != theirs.get(key):
            return f"receipt {key}: {ours.get(key)}, undisturbed {theirs.get(key)}"
    if ours.get("stp", {}).get("live_tokens") != theirs["stp"]["live_tokens"]:
        return f"live tokens: {ours.get('stp')}, undisturbed {theirs['stp']}"
    mine, undisturbed = (_records(folder) for folder in (run, reference))
    if mine != undisturbed:
        return f"metrics: {len(mine)} records, undisturbed {len(undisturbed)}; {_first_difference(mine, undisturbed)}"
    last, last_reference = (_last_checkpoint(folder) for folder in (run, reference))
    if last.name.split("-")[1] != last_reference.name.split("-")[1]:
        return f"last checkpoint: {last.name}, undisturbed {last_reference.name}"
    state, state_reference = (json.loads((folder / "state.json").read_bytes()) for folder in (last, last_reference))
    if state != state_reference:
        return f"state.json: {state}, undisturbed {state_reference}"
    weights, weights_reference = (_tensors(folder) for folder in (last, last_reference))
    if weights.keys() != weights_reference.keys():
        return f"tensors: {sorted(weights.keys() ^ weights_reference.keys())[:3]} on one side only"
    for name, tensor in weights.items():
        other = weights_reference[name]
        if tensor.dtype != other.dtype or not torch.equal(_bits(tensor), _bits(other)):
            return f"tensor {name}"
    return None


def environment() -> dict[str, str]:
    """One thread, and a kernel pool that survives a fork (scripts.chaos.zygote)."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}
    return {**os.environ, **threads, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}


def _records(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in read_metrics(folder)]


def _first_difference(mine: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> str:
    for a, b in zip(mine, undisturbed):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                return f"step {a['step']}: {key} is {a.get(key)}, undisturbed {b.get(key)}"
    return "one ends early"


def _last_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted((folder / "tensors").glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN equals itself, and 0.0 is not -0.0."""
    return tensor.contiguous().flatten().view(torch.uint8)
