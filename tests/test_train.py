"""The whole run on a tiny corpus: finishes with its proof, refuses cut wires and bad input."""

import sys

import pytest
from tiny_run import command, losses, make_place, receipt, start

import train
from errors import InputError, PreflightError
from model.hybrid import HybridLM, HybridOutput


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def test_a_run_finishes_with_its_proof(place, monkeypatch, capsys):
    start(monkeypatch, "run_id=a")
    proof = receipt("a")
    assert proof["status"] == "finished" and proof["tokens"] >= 2200
    assert proof["preflight"]["ok"] and proof["preflight_at_opening"]["ok"]
    assert [b["index"] for b in proof["preflight"]["boundaries"]] == [0, 1, 2, 3, 4, "final"]
    assert all(b["grad_norm"] > 0 for b in proof["preflight"]["boundaries"])
    (interval,) = proof["stp"]["live_tokens"]
    assert 700 < interval[0] < 1000 and interval[1] == proof["tokens"]
    assert 0 < proof["metrics"]["val_bits_per_byte"] < 20 and proof["metrics"]["unigram_bits_per_byte"] > 0
    assert set(proof["kernels"]) >= {"attention", "mamba2", "grouped_experts", "m2rnn"}
    weights = [record["stp/weight"] for record in losses("a") if "stp/weight" in record]
    assert weights[0] == 0 and 0 < weights[-1] <= 0.1 and weights == sorted(weights)
    assert all("stp/raw/R" in record for record in losses("a") if "stp/weight" in record)  # also while it is closed
    evidence = [record for record in losses("a") if "stp/grad_ratio/M" in record]
    assert evidence and all(record["stp/grad_norm/M"] > 0 for record in evidence)
    printed = capsys.readouterr().out
    assert "python train.py runs/a/config.yaml run_id=a-more init_from=a" in printed
    with pytest.raises(InputError, match="is finished"):
        start(monkeypatch, "run_id=a")
    monkeypatch.setattr(sys, "argv", ["train.py", "runs/a/config.yaml", "run_id=a-more", "init_from=a"])
    train.main()
    assert losses("a-more")[0]["loss/lm"] < losses("a")[0]["loss/lm"]


def cut(kind):
    def forward(self, tokens, context):
        hidden = self.embedding(tokens)
        states = [hidden]
        for block in self.blocks:
            hidden = block(hidden, context)
            if kind == "detach" or not self.training:
                states.append(hidden.detach() if kind == "detach" else hidden)
        return HybridOutput(states, self.final_norm(hidden))

    return forward


@pytest.mark.parametrize("kind", ["detach", "not training"])
def test_a_cut_wire_refuses_to_start(place, monkeypatch, kind):
    monkeypatch.setattr(HybridLM, "forward", cut(kind))
    with pytest.raises(PreflightError):
        start(monkeypatch, "run_id=cut")
    assert receipt("cut")["status"] == "refused" and not receipt("cut")["preflight"]["ok"]
    assert losses("cut") == []


def test_a_wire_that_dies_before_the_gate_opens_stops_the_run(place, monkeypatch):
    honest, steps = HybridLM.forward, []

    def forward(self, tokens, context):
        steps.append(1)
        return (honest if len(steps) < 12 else cut("detach"))(self, tokens, context)

    monkeypatch.setattr(HybridLM, "forward", forward)
    with pytest.raises(PreflightError, match="opening"):
        start(monkeypatch, "run_id=cut", "stp.gate.start_tokens=1500", "stp.gate.ramp_tokens=0")
    assert receipt("cut")["status"] == "refused"


def test_a_gate_that_no_step_reaches_is_a_dead_stp(place, monkeypatch):
    with pytest.raises(PreflightError, match="never live"):
        start(monkeypatch, "run_id=late", "stp.gate.start_tokens=2190", "stp.gate.ramp_tokens=0")
    assert receipt("late")["status"] == "refused"


def test_bad_input_is_one_line_and_exit_code_2_with_nothing_written(place, monkeypatch):
    for override, part in (("stp.wieght=1", "stp.weight"), ("data.path=nothing/*.txt", "nothing")):
        with pytest.raises(InputError, match=part):
            start(monkeypatch, override)
    (place / "texts" / "binary.txt").write_bytes(b"\x00\x01\x02")
    done = command("tiny.yaml", cwd=place)
    assert done.returncode == 2 and done.stdout == "", done
    error = [line for line in done.stderr.splitlines() if not line.startswith("data:")]
    assert len(error) == 1 and "binary.txt" in error[0] and "Traceback" not in done.stderr
    assert not (place / "runs").exists() and not list(place.glob("artifacts/*/manifest.json"))


def test_dry_run_prints_the_plan_and_writes_nothing(place, monkeypatch, capsys):
    before = sorted(place.rglob("*"))
    start(monkeypatch, "--dry-run", "stp.weight=0.25")
    out = capsys.readouterr().out
    assert "weight: 0.25" in out and "STP gate opens at" in out and "token 701" in out and "mamba2" in out
    start(monkeypatch, "--print-layout")
    assert "FLOPs/token" in capsys.readouterr().out
    assert sorted(place.rglob("*")) == before
