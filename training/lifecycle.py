"""Run: everything around the training step. Opens the folder, resumes, proves, records, validates, saves, closes."""

from __future__ import annotations

import contextlib
import math
import sys
import traceback
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from data.prepared import Prepared
from data.stream import validation_batches
from errors import InputError, PreflightError, Stopped, StorageError
from losses.objective import Objective
from losses.triples import Triples
from model.hybrid import HybridLM
from training.announce import closing, opening
from training.config import RunConfig
from training.distributed import World
from training.drift import DriftMonitor, device_memory
from training.durable import replace_atomically
from training.environment import describe_environment, git_state, shared_facts
from training.evaluate import sample_text, validate
from training.hardware import Machine
from training.measured import Measured, State, step_metrics
from training.metrics import NoTracker, Tracker
from training.ownership import Ownership, process_identity
from training.preflight import Preflight, PreflightReport, require_ok
from training.progress import Progress, SpeedMeter, Status
from training.receipt import Receipt
from training.run import RunFolder
from training.saving import Saver
from training.shared_errors import SHARED
from training.summary import as_receipt
from training.watchdog import Watchdog


class Run:
    """A context manager: leaving it closes the receipt with the reason, whatever that is.

    Entering it makes this process the owner of the run folder. Raises InputError (owned by another process, damaged or
    foreign checkpoint) or StorageError (a folder that cannot be written).
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        machine: Machine,
        data: Prepared,
        model: HybridLM,
        optimizer: torch.optim.AdamW,
        objective: Objective,
        world: World,
        warnings: list[str],
    ) -> None:
        self.config, self.folder, self.machine, self.data, self.world = config, folder, machine, data, world
        self.model, self.optimizer, self.objective = model, optimizer, objective
        T = config.data.sequence_length
        self.meter = SpeedMeter(config.train.tokens, 3 * model.flops_per_token(T), machine.gflops * world.size)
        self.progress = Progress(self.meter, None if world.is_main else Console(quiet=True))
        self.saver = Saver(config, folder, data, model, optimizer, self.progress.message, world)
        self.drift = DriftMonitor(config.health, self._warn, device_memory(machine.device))
        self.watchdog = Watchdog(config.health.hung_step_seconds, folder.path, self._hung, world.rank)
        self.warnings = warnings
        self.proven = self.proven_open = False
        self.owner: Ownership | None = None
        self.tracker: Tracker

    def __enter__(self) -> Run:
        try:
            self._open()
        except OSError as error:
            where = error.filename or self.folder.path
            problem = StorageError(f"{where}: the run cannot begin: {error.strerror or error}")
            self._abandon(problem)
            raise problem from None
        except BaseException as error:
            self._abandon(error)
            raise
        return self

    def _open(self) -> None:
        config, folder = self.config, self.folder
        letters = "".join(self.model.letters)
        folder.resumes = self.world.from_main(self._claim)
        facts = shared_facts(config.sha256, self.data.manifest_sha256, self.machine.kernels(letters))
        self.agreement = self.world.agree(facts)
        self.restored = state = self.saver.restore()
        if not self.world.is_main:
            self.receipt, self.tracker = Receipt.unwritten(folder.run_id), NoTracker()
        self.world.from_main(lambda: self._open_books(letters))
        self.receipt.resume(state.step, state.tokens, state.live_tokens)
        self.progress.__enter__()
        for line in opening(folder, state, self.machine, self.data, self.model, self.warnings):
            self.progress.message(line)
        self.world.everywhere(self.watchdog.__enter__)

    def _claim(self) -> bool:
        """Makes this process the owner of the folder; whether a run was started there before."""
        self.owner = self.folder.claim(self.config)
        return self.folder.resumes

    def _open_books(self, letters: str) -> None:
        """config.yaml, receipt.json, metrics.jsonl, wandb: one process writes them."""
        config, folder = self.config, self.folder
        if not (folder.path / "config.yaml").exists():
            replace_atomically(folder.path / "config.yaml", config.to_yaml().encode())
        self.receipt = Receipt.start(
            folder.path,
            folder.run_id,
            config.sha256,
            git=git_state(),
            environment=describe_environment(self.machine.device),
            message=self.progress.message,
            process=process_identity(),
            data={
                "manifest_sha256": self.data.manifest_sha256,
                "tokenizer_sha256": self.data.tokenizer.sha256,
                "folder": str(self.data.folder),
            },
            stp={"enabled": config.stp.enabled, "boundaries": self.objective.boundaries if config.stp.enabled else []},
            model=as_receipt(self.model, config.data.sequence_length),
            kernels=self.machine.kernels(letters),
            machine=self.machine.describe(),
            parallel={"data": config.parallel.data, "ranks": self.world.size, "agreement_sha256": self.agreement},
        )
        if self.saver.began_from:
            self.receipt.update(init_from=self.saver.began_from)
        self.tracker = Tracker(
            folder.path,
            folder.run_id,
            config.wandb,
            asdict(config),
            resume_step=self.restored.step if folder.resumes else None,
            message=self.progress.message,
        )

    def prove(self, preflight: Preflight, batch: Any, triples: Triples | None, stp_weight: float) -> None:
        """Preflight before this process's first step, and its gradient checks again when the gate opens.

        Raises PreflightError.
        """
        if triples is None:
            return
        first, opening = not self.proven, stp_weight != 0 and not self.proven_open
        if first:
            self._judge(preflight.run(batch, triples), "before the first step", "preflight")
        elif opening:
            self._judge(preflight.run_gradients(batch, triples), "at the opening of the gate", "preflight_at_opening")
        self.proven, self.proven_open = True, self.proven_open or stp_weight != 0
        if first or opening:
            self.meter.pause()

    def _judge(self, report: PreflightReport, when: str, key: str) -> None:
        self.receipt.update(**{key: report.as_dict()})
        require_ok(report, when)
        norms = [boundary.grad_norm for boundary in report.boundaries]
        proven = (
            f"STP reaches all {len(norms)} selected boundaries, gradient norms {min(norms):.1e} .. {max(norms):.1e}"
            if not self.objective.is_control
            else f"the control sends no gradient at any of its {len(norms)} boundaries, as declared"
        )
        self.progress.message(f"preflight {when}: ok in {report.seconds:.1f} s; {proven}")

    def record(
        self, state: State, measured: Measured, grad_norm: Tensor, stp_weight: float, accepted: bool, n_tokens: int
    ) -> None:
        """After each step: counts, the progress line, metrics at their cadence, validation, checkpoints, signals."""
        if stp_weight != 0 and accepted and not self.objective.is_control and measured.triples > 0:
            self.receipt.stp_live(state.tokens, state.tokens + n_tokens)
        state.step += 1
        state.tokens += n_tokens
        state.skipped_steps += not accepted
        state.live_tokens = self.receipt.live_tokens
        self.meter.lap(n_tokens)
        self.receipt.progress(state.step, state.tokens)
        ended = state.tokens >= self.config.train.tokens
        due = ended or state.step % self.config.train.log_every == 0
        learning_rate = self.optimizer.param_groups[0]["lr"]
        stp = None if measured.stp is None else float(measured.stp.mean())
        status = Status(state.step, state.tokens, measured.lm, stp, stp_weight, learning_rate)
        self.progress.update(status, line=due)
        if due or measured.evidence or measured.curvature or not accepted:
            counts = {"tokens": state.tokens, "skipped_steps": state.skipped_steps}
            speed = {"tokens_per_second": self.meter.tokens_per_second, "gemm_share": self.meter.recent_gemm_share}
            rates = {"learning_rate": learning_rate, "grad_norm": float(grad_norm), "stp/weight": stp_weight}
            self.drift.observe(state.step, self.meter.tokens_per_second)
            found = step_metrics(measured, self.objective, self.model.moe_mixers())
            self.tracker.log(state.step, {**counts, **found, **rates, **speed})
        if not accepted:
            reason = "an outlier" if math.isfinite(measured.total + float(grad_norm)) else "not finite"
            self.progress.message(
                f"step {state.step}: loss or gradient norm is {reason}, skipped ({state.skipped_steps} so far)"
            )
        self.watchdog.beat()
        if ended or self._validation_is_due(state.tokens - n_tokens, state.tokens):
            self._validate(state)
        if ended or self.saver.due(state.step):
            self._save(state)
        self.saver.note(self.receipt)
        self.watchdog.beat()

    def _validation_is_due(self, before: int, after: int) -> bool:
        """Whether a multiple of every_fraction of the budget lies in (before, after]: the same after any resume."""
        spacing = self.config.validation.every_fraction * self.config.train.tokens
        return after // spacing > before // spacing

    def _validate(self, state: State) -> None:
        settings, T = self.config.validation, self.config.data.sequence_length
        rows = max(1, self.config.train.batch_rows // self.config.train.accumulation)
        batches = validation_batches(self.data, T, rows, settings.rows)
        found = validate(self.model, batches, self.data.token_bytes, self.machine.autocast, self.world)
        ratio = found["val_bits_per_byte"] / found["unigram_bits_per_byte"]
        self.tracker.log(state.step, {"tokens": state.tokens, **found})
        speed = {"tokens_per_second": self.meter.mean_tokens_per_second, "gemm_share": self.meter.gemm_share}
        self.receipt.update(metrics={**found, **speed})
        self.progress.message(
            f"held out: loss {found['val_loss']:.3f} nats/token, {found['val_bits_per_byte']:.3f} bits/byte; "
            f"unigram entropy {found['unigram_bits_per_byte']:.3f} bits/byte: the model needs {ratio:.0%} of it"
        )
        if settings.sample_tokens:
            rounded = self.config.parallel.gather == "bf16"  # then float32 inputs do not fit the weights
            with self.machine.autocast() if rounded else contextlib.nullcontext():
                text = sample_text(
                    self.model,
                    self.data.tokenizer,
                    settings.sample_prompt,
                    settings.sample_tokens,
                    settings.sample_temperature,
                    self.config.seed,
                    self.world,
                )
            self.progress.message("sample:\n" + "\n".join(f"  | {line}" for line in text.splitlines()))
        self.meter.pause()

    def _save(self, state: State) -> None:
        self.tracker.sync()
        self.saver.save(state)
        self.meter.pause()

    def stop(self, state: State, status: str) -> None:
        """Saves and raises Stopped (exit code 4). status: stopped or preempted."""
        self._save(state)
        self.saver.confirm(state, self.receipt)
        raise Stopped(f"{status} at step {state.step}; the same command continues {self.folder.path}")

    def finish(self, state: State) -> None:
        """Waits for the last checkpoint, closes the receipt and says what to type next."""
        self.saver.confirm(state, self.receipt)
        if self.config.stp.enabled and not self.objective.is_control and not state.live_tokens:
            raise PreflightError("STP is on but was never live: the gate opened on no step with a valid triple")
        self._close("finished", steps=state.step, skipped_steps=state.skipped_steps)
        if self.world.is_main:
            for line in closing(self.folder, state, self.receipt.content["metrics"], self.config.stp.enabled):
                self.progress.message(line)

    def _warn(self, text: str) -> None:
        """A line in the log and in the receipt; of other ranks than 0, which have neither, on stderr."""
        if not self.world.is_main:
            print(f"rank {self.world.rank}: warning: {text}", file=sys.stderr)
        self.progress.message(f"warning: {text}")
        self.receipt.content.setdefault("warnings", []).append(text)

    def _hung(self, reason: str) -> None:
        """From the watchdog's thread, just before it ends the process."""
        self.progress.message(reason)
        self.receipt.finish("crashed", reason)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watchdog.__exit__()
        alone = error is not None and self.world.size > 1 and not isinstance(error, SHARED)
        self.saver.wait(self.config.parallel.timeout_seconds if alone else None)  # its writers wait for other ranks
        if isinstance(error, Stopped):
            self._close("preempted" if str(error).startswith("preempted") else "stopped", str(error))
        elif isinstance(error, PreflightError):
            self._close("refused", str(error))
        elif isinstance(error, KeyboardInterrupt):
            self._close("stopped", "interrupted")
        elif isinstance(error, (InputError, StorageError)):
            self._close("crashed", str(error))
        elif error is not None:
            self._close("crashed", "".join(traceback.format_exception(error)))
        self.tracker.close(self.receipt.content["metrics"])
        self.progress.__exit__()
        if self.owner is not None:
            self.owner.release()

    def _close(self, status: str, reason: str | None = None, **fields: Any) -> None:
        self.receipt.finish(status, reason, metrics_file=self.tracker.digest(), **fields)

    def _abandon(self, error: BaseException) -> None:
        """The opening failed: whatever of it is there already is closed."""
        if hasattr(self, "receipt"):
            self.receipt.finish("crashed", str(error))
        if self.owner is not None:
            self.owner.release()
            self.folder.remove_if_empty()
