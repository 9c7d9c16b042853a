"""What a run claims about STP: live where it acted, no live token for a placebo, exit code 3 if it dies."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
import training.hardware
from errors import PreflightError
from losses.objective import Objective
from tests.mutants.trial import Trial, quiet
from training.config import load_config
from training.evidence import gradient_evidence


@pytest.fixture
def trial(monkeypatch):
    monkeypatch.setattr(training.hardware, "gemm_gflops", lambda *args, **kwargs: 1.0)
    with Trial() as trial:
        yield trial


def run(name, *overrides):
    config = load_config("tiny.yaml", [f"run_id={name}", *overrides])
    with quiet():
        train.train(config, "tiny", config.validate())
    return receipt(name)


def receipt(name):
    return json.loads(Path(f"runs/{name}/receipt.json").read_text())


def metrics(name):
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def weights(name):
    folder = max(Path(f"runs/{name}/checkpoints").glob("step-*"))
    tensors = {}
    for shard in sorted(folder.rglob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def test_the_receipt_lists_the_tokens_of_open_steps_and_no_others(trial, monkeypatch):
    """The intervals, counted here from the batches: from the first step at or beyond the gate to the last token."""
    counts = []
    batch = train.TrainStream.batch

    def counted(self, step, *args):
        found = batch(self, step, *args)
        counts.append((step, found.loss_tokens))
        return found

    monkeypatch.setattr(train.TrainStream, "batch", counted)
    found = run("a", "stp.gate.start_tokens=500", "train.log_every=1")  # measured while it is closed, too
    before = 0
    opening = None
    for _, n in sorted(set(counts)):
        opening = before if opening is None and before > 500 else opening
        before += n
        if before >= 1700:
            break
    assert opening is not None and opening > 0
    assert found["stp"]["live_tokens"] == [[opening, before]] and found["tokens"] == before


@pytest.mark.parametrize("number", [0, 2, 5], ids=["embedding", "M", "final"])
def test_a_family_whose_gradient_dies_while_the_gate_is_open_stops_the_run(trial, monkeypatch, number):
    honest, calls = Objective.measure, []

    def measure(self, hidden_states, final, triples, join=None):
        calls.append(1)
        states = [h.detach() if len(calls) > 14 and i == number else h for i, h in enumerate(hidden_states)]
        return honest(self, states, final.detach() if len(calls) > 14 and number == 5 else final, triples, None)

    monkeypatch.setattr(Objective, "measure", measure)
    with pytest.raises(PreflightError, match="STP died: the gradient of its term at boundary") as error:
        run("dead")
    assert error.value.exit_code == 3
    found = receipt("dead")
    assert found["status"] == "refused" and "STP died" in found["reason"]
    assert found["preflight"]["ok"] and found["preflight_at_opening"]["ok"]  # it was alive when it was last proven
    assert found["stp"]["live_tokens"][0][1] <= found["tokens"]


def test_fifty_steps_of_a_placebo_equal_fifty_without_stp(trial):
    """Bit for bit, with the gate open nearly all the way; and the receipt claims no live token."""
    plan = ["train.tokens=9600", "stp.gate.start_tokens=0", "stp.gate.ramp_tokens=0", "optimizer.learning_rate=3e-3"]
    run("without", "stp.weight=0", *plan)
    placebo = run("placebo", "stp.variant=detached", *plan)
    assert placebo["steps"] >= 50 and placebo["steps"] == receipt("without")["steps"]
    assert placebo["status"] == "finished" and placebo["stp"]["live_tokens"] == []
    assert placebo["preflight"]["checks"]["control_sends_nothing"] and placebo["preflight"]["checks"]["total"]
    off, on = weights("without"), weights("placebo")
    assert off.keys() == on.keys() and all(torch.equal(off[name], on[name]) for name in off)
    assert any("stp/raw" in record for record in metrics("placebo"))
    assert receipt("without")["stp"]["enabled"] is False


def test_evidence_at_a_cadence_names_norm_ratio_and_cosine_of_every_family(trial):
    run("a", "train.log_every=1")
    found = [record for record in metrics("a") if "stp/grad_norm/M" in record]
    assert len(found) >= 2
    for record in found:
        for family in ("embedding", "A", "M", "E", "R", "final"):
            assert record[f"stp/grad_norm/{family}"] > 0 and record[f"stp/grad_ratio/{family}"] > 0
            assert -1.0001 <= record[f"stp/grad_cosine/{family}"] <= 1.0001
            assert 0 < record[f"stp/raw/{family}"] < 2.5
        assert record["stp/weight"] > 0 and 0 <= record["stp/masked_share"] < 1


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_a_weight_in_the_total_that_is_not_the_given_one_is_dead(factor):
    states = [torch.randn(2, 8, 4, requires_grad=True) for _ in range(2)]
    per_boundary = torch.stack([state.square().mean() for state in states])
    lm = states[1].sum()
    objective = SimpleNamespace(is_control=False, boundaries=[0, 1], families=["A", "E"])
    objective.select = lambda hidden_states, final: hidden_states
    weight = torch.tensor(0.3)
    loss = SimpleNamespace(
        total=lm + factor * weight * per_boundary.mean(),
        lm=lm,
        stp_per_boundary=per_boundary,
        stp_terms=SimpleNamespace(n_valid=torch.tensor(4), n_degenerate=torch.zeros(2, dtype=torch.int64)),
        terms={"stp": SimpleNamespace(weight=weight)},
    )
    output = SimpleNamespace(hidden_states=states, final=None)
    if factor == 1.0:
        assert gradient_evidence(objective, output, loss)["stp/grad_norm/A"] > 0
    else:
        with pytest.raises(PreflightError, match="STP died: its weight in the total"):
            gradient_evidence(objective, output, loss)


@pytest.mark.parametrize(
    ("n_valid", "degenerate", "dies"),
    [
        (0, 0, ""),
        (4, 4, ""),
        (4, 3, r"boundary 0 \(A\) has norm 0.0$"),
        (48, 48, "48 triples at boundary 0 .* collapsed"),
    ],
)
def test_a_boundary_without_a_sound_triple_says_nothing(n_valid, degenerate, dies):
    states = [torch.randn(2, 8, 4, requires_grad=True) for _ in range(2)]
    per_boundary = torch.stack([0 * states[0].sum(), states[1].square().mean()])
    weight = torch.tensor(0.3)
    objective = SimpleNamespace(is_control=False, boundaries=[0, 1], families=["A", "E"])
    objective.select = lambda hidden_states, final: hidden_states
    loss = SimpleNamespace(
        total=states[1].sum() + weight * per_boundary.mean(),
        lm=states[1].sum(),
        stp_per_boundary=per_boundary,
        stp_terms=SimpleNamespace(n_valid=torch.tensor(n_valid), n_degenerate=torch.tensor([degenerate, 0])),
        terms={"stp": SimpleNamespace(weight=weight)},
    )
    output = SimpleNamespace(hidden_states=states, final=None)
    if dies:
        with pytest.raises(PreflightError, match=dies):
            gradient_evidence(objective, output, loss)
    else:
        found = gradient_evidence(objective, output, loss)
        assert not any(name.endswith("/A") for name in found) and ("stp/grad_norm/E" in found) == (n_valid > 0)
