"""The controls that act, in preflight and in whole runs: live as STP is, proven, and exact over a stop and a resume."""

import os
import signal

import pytest
import torch
from test_preflight import prove, setup
from tiny_run import last_weights, losses, make_place, receipt, start

from errors import Stopped
from losses import controls
from tests.mutants.patching import Replace, Rewrite
from tests.mutants.trial import applied
from training.lifecycle import Run

CONTROLS = ("gradient_noise", "norm_penalty")


@pytest.mark.parametrize("variant", CONTROLS)
def test_a_control_is_proven_like_stp_and_to_be_what_it_says(variant):
    model, objective, batch, triples = setup(variant=variant, boundaries=["all", "final"])
    state = torch.get_rng_state()
    report = prove(model, objective, batch, triples)
    assert report.ok, report.failures()
    assert "control_as_declared" in report.checks and "control_sends_nothing" not in report.checks
    assert {"state_gradient", "stream_below", "block_parameters", "blocks_above", "block_link"} <= set(report.checks)
    assert all(0 < b.grad_norm < float("inf") for b in report.boundaries)
    assert torch.equal(torch.get_rng_state(), state)
    if variant == "gradient_noise":  # the very norms of STP
        standard = prove(*setup(boundaries=["all", "final"]))
        for mine, theirs in zip(report.boundaries, standard.boundaries, strict=True):
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    ("variant", "patch", "words"),
    [
        ("gradient_noise", Replace(controls, "noise_like", lambda _: lambda g, *_: g), "points where STP's gradient"),
        ("gradient_noise", Replace(controls, "noise_like", lambda f: lambda *a: 2 * f(*a)), "norms of its noise"),
        (
            "norm_penalty",
            Rewrite(controls.relative_spread, "(rows - rows.mean(1, keepdim=True))", "rows.diff(dim=1)"),
            "changes the angle",
        ),
    ],
)
def test_a_control_that_is_not_what_it_says_is_refused(variant, patch, words):
    with applied([patch]):
        report = prove(*setup(variant=variant))
    assert report.failed() == ["control_as_declared"] and words in report.failures()[0]


@pytest.mark.slow
@pytest.mark.parametrize("variant", CONTROLS)
def test_live_tokens_accumulation_and_a_resume_that_is_exact(tmp_path, monkeypatch, variant):
    place = make_place(tmp_path, monkeypatch)
    plan = [f"stp.variant={variant}", "stp.gate.start_tokens=0", "stp.gate.ramp_tokens=0", "precision=fp32"]
    start(monkeypatch, "run_id=whole", *plan)
    whole = receipt("whole")
    assert whole["status"] == "finished" and whole["stp"]["live_tokens"] == [[0, whole["tokens"]]]
    assert whole["preflight"]["checks"]["control_as_declared"]
    for parts in (1, 4):
        start(monkeypatch, f"run_id=acc{parts}", f"train.accumulation={parts}", "train.tokens=1000", *plan)
    columns = [[record["loss/total"] for record in losses(f"acc{n}") if "loss/total" in record] for n in (1, 4)]
    torch.testing.assert_close(*map(torch.tensor, columns), rtol=1e-5, atol=1e-5)
    start(monkeypatch, "run_id=stp", *plan, "stp.variant=standard")
    assert any(not torch.equal(value, last_weights("whole")[name]) for name, value in last_weights("stp").items())

    honest = Run.record

    def record(self, state, *args):
        honest(self, state, *args)
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "record", record)
    with pytest.raises(Stopped):
        start(monkeypatch, "run_id=parts", *plan)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    start(monkeypatch, "run_id=parts", *plan)
    assert losses("parts") == losses("whole")
    resumed = last_weights("parts")
    assert all(torch.equal(value, resumed[name]) for name, value in last_weights("whole").items())
