"""Run: everything around the training step. Opens the folder, resumes, proves, records, validates, saves, closes."""

from __future__ import annotations

import traceback
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from data.prepared import Prepared
from data.stream import validation_batches
from errors import InputError, PreflightError, Stopped
from losses.objective import Objective
from losses.triples import Triples
from model.hybrid import HybridLM
from training.checkpoint import Checkpointer, load_checkpoint
from training.config import RunConfig
from training.durable import write_durably
from training.environment import describe_environment, git_state
from training.evaluate import sample_text, validate
from training.hardware import Machine
from training.measured import Measured, State, step_metrics
from training.metrics import Tracker
from training.optimizer import optimizer_tensors
from training.preflight import Preflight, PreflightReport, require_ok
from training.progress import Progress, SpeedMeter, Status
from training.receipt import Receipt
from training.run import RunFolder, find_checkpoint, process_identity
from training.summary import as_receipt


class Run:
    """A context manager: leaving it closes the receipt with the reason, whatever that is."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        machine: Machine,
        data: Prepared,
        model: HybridLM,
        optimizer: torch.optim.AdamW,
        objective: Objective,
        warnings: list[str],
    ) -> None:
        self.config, self.folder, self.machine, self.data = config, folder, machine, data
        self.model, self.optimizer, self.objective = model, optimizer, objective
        T = config.data.sequence_length
        self.meter = SpeedMeter(config.train.tokens, 3 * model.flops_per_token(T), machine.gflops)
        self.progress = Progress(self.meter)
        self.checkpoints = Checkpointer(folder.path / "checkpoints", config.checkpoint, self.progress.message)
        self.warnings = warnings
        self.proven = self.proven_open = False

    def __enter__(self) -> Run:
        config, folder = self.config, self.folder
        letters = "".join(self.model.letters)
        self.restored = self._restore()
        folder.path.mkdir(parents=True, exist_ok=True)
        if not folder.resumes:
            write_durably(folder.path / "config.yaml", config.to_yaml().encode())
        self.receipt = Receipt.start(
            folder.path,
            folder.run_id,
            config.sha256,
            git=git_state(),
            environment=describe_environment(self.machine.device),
            message=self.progress.message,
            process=process_identity(),
            data={"manifest_sha256": self.data.manifest_sha256, "tokenizer_sha256": self.data.tokenizer.sha256},
            stp={"enabled": config.stp.enabled, "boundaries": self.objective.boundaries if config.stp.enabled else []},
            model=as_receipt(self.model, config.data.sequence_length),
            kernels=self.machine.kernels(letters),
            machine=self.machine.describe(),
        )
        state = self.restored
        self.receipt.resume(state.step, state.tokens, state.live_tokens)
        self.tracker = Tracker(
            folder.path,
            folder.run_id,
            config.wandb,
            asdict(config),
            resume_step=state.step if folder.resumes else None,
            message=self.progress.message,
        )
        self.progress.__enter__()
        self._announce(letters)
        return self

    def _announce(self, letters: str) -> None:
        say, model = self.progress.message, as_receipt(self.model, self.config.data.sequence_length)
        for warning in [*self.warnings, *self.data.notes]:
            say(f"note: {warning}")
        say(f"run {self.folder.path}" + (f", continued from step {self.restored.step}" if self.folder.resumes else ""))
        say(f"machine: {self.machine.describe()}")
        say("kernels: " + "; ".join(f"{name}: {kernel}" for name, kernel in self.machine.kernels(letters).items()))
        say(f"data: {self.data.name}, {self.data.train_tokens:,} training tokens, vocabulary {self.data.vocab_size:,}")
        say(f"model: {letters}, {model['parameters']:,} parameters, {model['active_parameters']:,} per token")

    def _restore(self) -> State:
        """Fills model and optimizer from the newest valid checkpoint, or the model from `init_from`."""
        tensors = self._tensors()
        path = self.checkpoints.latest_valid() if self.folder.resumes else None
        if path is not None:
            stored = load_checkpoint(path, tensors)
            return State(**stored["run"])
        if self.folder.resumes:
            self.progress.message(f"{self.folder.path}: no valid checkpoint, starting from the beginning")
        elif self.config.init_from is not None:
            load_checkpoint(find_checkpoint(self.config.init_from), {"model": tensors["model"]})
        return State()

    def prove(self, preflight: Preflight, batch: Any, triples: Triples | None, state: State, stp_weight: float) -> None:
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
        if due or measured.evidence or not accepted:
            counts = {"tokens": state.tokens, "skipped_steps": state.skipped_steps}
            speed = {"tokens_per_second": self.meter.tokens_per_second, "gemm_share": self.meter.recent_gemm_share}
            rates = {"learning_rate": learning_rate, "grad_norm": float(grad_norm), "stp/weight": stp_weight}
            found = step_metrics(measured, self.objective, self.model.moe_mixers())
            self.tracker.log(state.step, {**counts, **found, **rates, **speed})
        if not accepted:
            self.progress.message(f"step {state.step}: loss or gradient not finite, skipped ({state.skipped_steps})")
        if ended or self._validation_is_due(state.tokens - n_tokens, state.tokens):
            self._validate(state)
        if ended or self.checkpoints.due(state.step):
            self._save(state)

    def _validation_is_due(self, before: int, after: int) -> bool:
        """Whether a multiple of every_fraction of the budget lies in (before, after]: the same after any resume."""
        spacing = self.config.validation.every_fraction * self.config.train.tokens
        return after // spacing > before // spacing

    def _validate(self, state: State) -> None:
        settings, T = self.config.validation, self.config.data.sequence_length
        rows = max(1, self.config.train.batch_rows // self.config.train.accumulation)
        batches = validation_batches(self.data, T, rows, settings.rows)
        found = validate(self.model, batches, self.data.token_bytes, self.machine.autocast)
        ratio = found["val_bits_per_byte"] / found["unigram_bits_per_byte"]
        self.tracker.log(state.step, {"tokens": state.tokens, **found})
        speed = {"tokens_per_second": self.meter.mean_tokens_per_second, "gemm_share": self.meter.gemm_share}
        self.receipt.update(metrics={**found, **speed})
        self.progress.message(
            f"held out: loss {found['val_loss']:.3f} nats/token, {found['val_bits_per_byte']:.3f} bits/byte; "
            f"unigram entropy {found['unigram_bits_per_byte']:.3f} bits/byte: the model needs {ratio:.0%} of it"
        )
        if settings.sample_tokens:
            text = sample_text(
                self.model,
                self.data.tokenizer,
                settings.sample_prompt,
                settings.sample_tokens,
                settings.sample_temperature,
                self.config.seed,
            )
            self.progress.message("sample:\n" + "\n".join(f"  | {line}" for line in text.splitlines()))
        self.meter.pause()

    def _tensors(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.model, self.optimizer)}

    def _save(self, state: State) -> None:
        self.tracker.sync()
        stored = {"run": asdict(state), "config_sha256": self.config.sha256}
        self.checkpoints.save(state.step, self._tensors(), stored)  # says itself what goes wrong; the run goes on
        self._list_checkpoints()
        self.meter.pause()

    def _list_checkpoints(self) -> None:
        for saved in self.checkpoints.saved:
            self.receipt.checkpoint(saved.step, saved.state["run"]["tokens"], saved.path, saved.manifest_sha256)

    def _finish_saving(self, state: State) -> None:
        """Raises OSError unless this very step is on the disk: what follows claims that it is."""
        problem = self.checkpoints.wait()
        self._list_checkpoints()
        if problem or not self.checkpoints.saved or self.checkpoints.saved[-1].step != state.step:
            raise OSError(f"the last checkpoint (step {state.step}) could not be saved: {problem}")

    def stop(self, state: State, status: str) -> None:
        """Saves and raises Stopped (exit code 4). status: stopped or preempted."""
        self._save(state)
        self._finish_saving(state)
        raise Stopped(f"{status} at step {state.step}; the same command continues {self.folder.path}")

    def finish(self, state: State) -> None:
        """Waits for the last checkpoint, closes the receipt and says what to type next."""
        self._finish_saving(state)
        if self.config.stp.enabled and not self.objective.is_control and not state.live_tokens:
            raise PreflightError("STP is on but was never live: the gate opened on no step with a valid triple")
        self.receipt.finish("finished", steps=state.step, skipped_steps=state.skipped_steps)
        metrics, live = self.receipt.content["metrics"], state.live_tokens
        say = self.progress.message
        say(f"finished: {state.step:,} steps, {state.tokens:,} tokens, {metrics['tokens_per_second']:,.0f} tokens/s")
        if self.config.stp.enabled:
            say(f"STP live over tokens {live}" if live else "STP: control, no live tokens")
        say(f"run folder: {self.folder.path}")
        path, again = self.folder.path, f"run_id={self.folder.run_id}-more init_from={self.folder.run_id}"
        say(f"next: python -m scripts.plot_run {path}   (draw its curves)")
        say(f"      python train.py {path}/config.yaml {again}   (train on from these weights)")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.checkpoints.wait()
        if isinstance(error, Stopped):
            self.receipt.finish("preempted" if str(error).startswith("preempted") else "stopped", str(error))
        elif isinstance(error, PreflightError):
            self.receipt.finish("refused", str(error))
        elif isinstance(error, (InputError, KeyboardInterrupt)):
            self.receipt.finish("stopped", str(error) or "interrupted")
        elif error is not None:
            self.receipt.finish("crashed", "".join(traceback.format_exception(error)))
        self.tracker.close(self.receipt.content["metrics"])
        self.progress.__exit__()
