"""The triples that a run's steps use are the same in every arm of an ablation, at any accumulation, after a resume."""

import pytest
import torch

import train
import training.hardware
from losses.objective import Objective
from tests.mutants.trial import Trial, quiet
from training.config import load_config
from training.lifecycle import Run

OPEN = ("stp.gate.start_tokens=0", "stp.gate.ramp_tokens=0", "train.tokens=800")


class _KilledError(Exception):
    pass


@pytest.fixture
def used(monkeypatch):
    """Runs train.py and returns {step: (s, r, t, valid)} as its objective was given them, all micro-batches."""
    steps, current = {}, {}
    call, record = Objective.__call__, Run.record
    kill_after = []

    def spy(self, output, head, labels, triples=None, *, lm_divisor=None, **rest):
        if lm_divisor is not None:  # a training step; preflight and checks give none
            current.setdefault("parts", []).append(triples)
        return call(self, output, head, labels, triples, lm_divisor=lm_divisor, **rest)

    def recorded(self, state, *rest):
        parts = current.pop("parts")
        fields = ("s", "r", "t", "valid")
        steps[state.step] = tuple(torch.cat([getattr(part, name) for part in parts]) for name in fields)
        record(self, state, *rest)
        if kill_after and state.step == kill_after[0]:
            raise _KilledError

    monkeypatch.setattr(Objective, "__call__", spy)
    monkeypatch.setattr(Run, "record", recorded)
    monkeypatch.setattr(training.hardware, "gemm_gflops", lambda *args, **kwargs: 1.0)

    def run(name, *overrides, kill=None):
        steps.clear()
        kill_after[:] = [kill] if kill else []
        config = load_config("tiny.yaml", [*OPEN, f"run_id={name}", *overrides])
        with quiet():
            train.train(config, "tiny", config.validate())
        return dict(steps)

    with Trial():
        run.seen = steps
        yield run


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for step in a for x, y in zip(a[step], b[step], strict=True))


def test_shared_by_arms_accumulation_and_resume(used):
    whole = used("whole")
    assert len(whole) >= 4 and all(bool(valid.any()) for *_, valid in whole.values())
    assert not torch.equal(whole[0][1], whole[1][1])
    arms = {
        "another weight": ["stp.weight=0.3"],
        "another form": ["stp.form=patch_complement"],
        "consecutive": ["stp.form=consecutive"],
        "placebo": ["stp.variant=detached"],
        "wrong order": ["stp.variant=shuffled_order"],
        "noise": ["stp.variant=gradient_noise"],
        "one boundary": ["stp.boundaries=[last]"],
        "another model": ["model.pattern=AEM"],
        "no accumulation": ["train.accumulation=1"],
        "four micro-batches": ["train.accumulation=4"],
    }
    for number, (name, overrides) in enumerate(arms.items()):
        assert same(used(f"arm{number}", *overrides), whole), name
    assert not same(used("other", "seed=1"), whole)
    with pytest.raises(_KilledError):
        used("parts", "checkpoint.every_steps=2", kill=3)
    before = dict(used.seen)
    after = used("parts", "checkpoint.every_steps=2")
    assert sorted(before) == [0, 1, 2] and min(after) == 2  # from the checkpoint at step 2
    assert same(before | after, whole)
