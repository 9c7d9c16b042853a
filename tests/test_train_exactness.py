"""What a run must not depend on: interruptions, micro-batches, a bad step."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny_run import last_weights, losses, make_place, receipt, start, stop_at

import train
from errors import Stopped
from training.lifecycle import Run


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("stop_after", "wish", "status"), [(5, signal.SIGTERM, "stopped"), (7, signal.SIGUSR1, "preempted")]
)
def test_resume_is_exact(place, monkeypatch, stop_after, wish, status):
    """All four letters, the ramp in progress, accumulation 2, a validation on the way: equal to the last bit."""
    start(monkeypatch, "run_id=whole")
    stop_at(monkeypatch, stop_after, wish)
    with pytest.raises(Stopped):
        start(monkeypatch, "run_id=parts")
    assert receipt("parts")["status"] == status and receipt("parts")["checkpoints"][-1]["step"] == stop_after
    monkeypatch.undo()
    monkeypatch.chdir(place)
    start(monkeypatch, "run_id=parts")
    assert losses("parts") == losses("whole")
    whole, parts = last_weights("whole"), last_weights("parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert receipt("parts")["stp"]["live_tokens"] == receipt("whole")["stp"]["live_tokens"]


@pytest.mark.parametrize("stop_after", [4, 5])
def test_resume_skips_the_outliers_that_the_undisturbed_run_skips(place, monkeypatch, stop_after):
    window = ["health.outliers=skip", "health.outlier_sigmas=1", "health.outlier_window=8"]
    plan = [*window, "optimizer.learning_rate=0.1", "train.tokens=3000"]  # wild enough to have some
    start(monkeypatch, "run_id=whole", *plan)
    assert receipt("whole")["skipped_steps"] >= 2
    stop_at(monkeypatch, stop_after)
    with pytest.raises(Stopped):
        start(monkeypatch, "run_id=parts", *plan)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    start(monkeypatch, "run_id=parts", *plan)
    assert losses("parts") == losses("whole")
    assert receipt("parts")["skipped_steps"] == receipt("whole")["skipped_steps"]


def test_a_kill_between_the_last_save_and_the_end_adds_no_step(place, monkeypatch):
    def die(self, state):
        self.saver.wait()
        raise KeyboardInterrupt

    start(monkeypatch, "run_id=whole")
    honest = Run.finish
    monkeypatch.setattr(Run, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        start(monkeypatch, "run_id=parts")
    monkeypatch.setattr(Run, "finish", honest)
    start(monkeypatch, "run_id=parts")
    assert losses("parts") == losses("whole")
    for key in ("status", "step", "tokens"):
        assert receipt("parts")[key] == receipt("whole")[key]


def test_a_run_that_lost_its_checkpoints_begins_from_the_same_weights_again(place, monkeypatch):
    start(monkeypatch, "run_id=teacher")
    start(monkeypatch, "run_id=whole", "init_from=teacher", "train.tokens=900")
    stop_at(monkeypatch, 2)
    with pytest.raises(Stopped):
        start(monkeypatch, "run_id=parts", "init_from=teacher", "train.tokens=900")
    monkeypatch.undo()
    monkeypatch.chdir(place)
    shutil.rmtree("runs/parts/checkpoints")
    start(monkeypatch, "run_id=parts", "init_from=teacher", "train.tokens=900")
    assert losses("parts") == losses("whole") and receipt("parts")["init_from"] == receipt("whole")["init_from"]


def test_accumulation_changes_nothing_but_rounding(place, monkeypatch):
    for parts in (1, 2, 4):
        start(monkeypatch, f"run_id=acc{parts}", f"train.accumulation={parts}", "train.tokens=1000", "precision=fp32")
    columns = [[record["loss/total"] for record in losses(f"acc{n}") if "loss/total" in record] for n in (1, 2, 4)]
    for other in columns[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(columns[0]), rtol=1e-5, atol=1e-5)


def test_a_skipped_step_is_counted_and_too_many_end_the_run(place, monkeypatch):
    honest = train.clip_gradients
    calls = []

    def poison(parameters, limit):
        calls.append(1)
        parameters = list(parameters)
        for parameter in parameters if len(calls) in bad else []:
            parameter.grad.fill_(torch.nan)
        return honest(parameters, limit)

    monkeypatch.setattr(train, "clip_gradients", poison)
    bad = {3}
    start(monkeypatch, "run_id=a", "train.tokens=900")
    assert receipt("a")["skipped_steps"] == 1
    assert all(bool(torch.isfinite(value).all()) for value in last_weights("a").values())
    calls.clear()
    bad = set(range(2, 1000))
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        start(monkeypatch, "run_id=b", "train.max_skipped_steps=2")
    assert receipt("b")["status"] == "crashed" and "FloatingPointError" in receipt("b")["reason"]
    assert receipt("b")["reason"].startswith("Traceback (most recent call last)")
    assert Path("runs/b/offending_batch.safetensors").is_file()
