"""Runs the real train.py on a tiny corpus, with a fault in it: silently for a few steps, then with every guard on."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import train
import training.hardware
from errors import PreflightError
from tests.mutants.mutant import Mutant
from tests.mutants.patching import Patch, Replace
from tests.tiny_run import write_corpus
from training.config import load_config
from training.lifecycle import Run

ROOT = Path(__file__).parents[2]
STEPS = 5
# All four letters, two micro-batches, a gate that opens within the first steps and ramps over two of them.
CONFIG = """
model:
  pattern: AMER
  d_model: 32
  attention: {n_heads: 4, n_kv_heads: 2}
  mamba2: {head_dim: 16, d_state: 8, chunk_size: 16}
  moe: {n_experts: 4, top_k: 2, expert_ff: 16}
data: {path: texts/*.txt, sequence_length: 48, validation_fraction: 0.1, tokenizer: {vocab_size: 300}}
stp: {weight: 0.1, n_spans: 4, window: 16, boundaries: [all, final], gate: {start_tokens: 150, ramp_tokens: 300}}
train: {tokens: 1700, batch_rows: 4, accumulation: 2, log_every: 2, probe_every: 3}
optimizer: {learning_rate: 1.0e-2}
schedule: {warmup_fraction: 0.0}
validation: {rows: 2, sample_tokens: 0}
checkpoint: {every_steps: 1000}
wandb: {mode: disabled}
precision: fp32
threads: 1
"""


class _EnoughError(Exception):
    pass


@dataclass
class Silence:
    """What a person would see without guards: the LM loss of the first steps."""

    losses: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ok(self) -> bool:
        enough = self.error is None and len(self.losses) == STEPS and all(map(math.isfinite, self.losses))
        return enough and self.losses[-1] < self.losses[0] - 0.01

    def __str__(self) -> str:
        if self.error is not None:
            return self.error
        return f"{self.losses[0]:.3f} -> {self.losses[-1]:.3f}" if self.losses else "no step"


@dataclass
class Verdict:
    """killed_by: names of the checks that failed. error: what else happened (then it counts for nothing)."""

    killed_by: list[str] = field(default_factory=list)
    error: str | None = None


class Trial:
    """A folder with a small corpus, as the working directory while in use."""

    def __enter__(self) -> Trial:
        self.folder = tempfile.TemporaryDirectory()
        self.before = Path.cwd()
        self.runs = 0
        write_corpus(Path(self.folder.name), longest=8)
        os.chdir(self.folder.name)
        Path("tiny.yaml").write_text(CONFIG)
        return self

    def __exit__(self, *exc: object) -> None:
        os.chdir(self.before)
        self.folder.cleanup()

    def silence(self, patches: Iterable[Patch] = (), overrides: Iterable[str] = ()) -> Silence:
        """The first steps with preflight and live evidence off."""
        seen = Silence()

        def record(honest: Any) -> Any:
            def spy(run: Any, state: Any, measured: Any, *rest: Any) -> None:
                seen.losses.append(measured.lm)
                honest(run, state, measured, *rest)
                if len(seen.losses) == STEPS:
                    raise _EnoughError

            return spy

        off = (
            Replace(Run, "prove", lambda honest: lambda *args: None),
            Replace(train, "gradient_evidence", lambda honest: lambda *args: {}),
        )
        try:
            with applied((*patches, *off, Replace(Run, "record", record))):
                self._train(overrides)
        except _EnoughError:
            pass
        except Exception as error:
            seen.error = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        return seen

    def guarded(self, patches: Iterable[Patch] = (), overrides: Iterable[str] = ()) -> Verdict:
        """The whole run as a person starts it."""
        try:
            with applied(tuple(patches)):
                receipt = self._train(overrides)
        except PreflightError as error:
            receipt = json.loads((self._run / "receipt.json").read_text())
            failed = [
                name
                for key in ("preflight", "preflight_at_opening")
                for name, ok in receipt.get(key, {}).get("checks", {}).items()
                if not ok
            ]
            if not failed and str(error).startswith("STP died"):
                failed = ["evidence"]
            if not failed and "never live" in str(error):
                failed = ["never live"]
            return Verdict(failed, None if failed else str(error))
        except Exception as error:
            return Verdict([], f"{type(error).__name__}: {error}".splitlines()[0][:80])
        live = receipt["stp"]["live_tokens"]
        placebo = "stp.variant=detached" in overrides
        sound = receipt["status"] == "finished" and bool(live) != placebo and receipt["preflight"]["ok"]
        return Verdict([], None if sound else f"status {receipt['status']}, live tokens {live}")

    def suite(self, test: str, patches: Iterable[Patch] = ()) -> Verdict:
        """One test of the suite, in this process, against the changed code."""
        recorder = _Recorder()
        arguments = ["-p", "no:cacheprovider", "-x", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
        with applied(tuple(patches)), quiet():
            code = pytest.main([*arguments, str(ROOT / test)], plugins=[recorder])
        if code == pytest.ExitCode.OK:
            return Verdict()
        if recorder.failure is None:
            return Verdict([], f"{test}: pytest stopped with {code!r}")
        return Verdict([test]) if recorder.by_check else Verdict([], f"{test}: {recorder.failure}")

    def _train(self, overrides: Iterable[str]) -> dict[str, Any]:
        self.runs += 1
        self._run = Path(f"runs/{self.runs}")
        config = load_config("tiny.yaml", [*overrides, f"run_id={self.runs}"])
        speed = Replace(training.hardware, "gemm_gflops", lambda honest: lambda *args, **kwargs: 1.0)
        with quiet(), applied((speed,)):
            train.train(config, "tiny", config.validate())
        return json.loads((self._run / "receipt.json").read_text())


class _Recorder:
    """Notes the first failure, and whether it was a claim of the test that failed or an exception in passing."""

    failure: str | None = None
    by_check = False

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.excinfo is not None and self.failure is None:
            self.failure = call.excinfo.exconly().splitlines()[0][:80]
            claims = (AssertionError, pytest.fail.Exception, PreflightError)
            self.by_check = call.when == "call" and issubclass(call.excinfo.type, claims)


@contextlib.contextmanager
def applied(patches: Iterable[Patch]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch.applied())
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def try_mutant(trial: Trial, mutant: Mutant) -> tuple[Silence, Verdict]:
    """Whether it is silent, and what kills it: the check that it names, or nothing."""
    silence = trial.silence(mutant.patches, mutant.overrides)
    if mutant.suite_test is not None:
        return silence, trial.suite(mutant.suite_test, mutant.patches)
    verdict = trial.guarded(mutant.patches, mutant.overrides)
    if verdict.error is None and mutant.check not in verdict.killed_by:
        seen = ", ".join(verdict.killed_by) or "nothing"
        verdict = Verdict([], f"{mutant.check} did not notice ({seen} did)")
    return silence, verdict
