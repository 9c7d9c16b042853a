"""Sound models are not refused: a few of the seeds that `python -m scripts.false_alarms` goes through."""

import json
import sys

import pytest
import torch

from scripts import false_alarms
from tests.mutants.collector_faults import APPEND, loop
from tests.mutants.trial import applied


@pytest.mark.parametrize("seeds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_no_false_alarm(monkeypatch, capsys, seeds):
    monkeypatch.setattr(sys, "argv", ["false_alarms", "--seeds", str(seeds), "--json"])
    code = false_alarms.main()
    counts = json.loads(capsys.readouterr().out)
    assert code == 0 and counts == {name: {"proofs": seeds, "alarms": 0} for name in ("float32", "bfloat16")}


def test_an_alarm_would_be_counted(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["false_alarms", "--seeds", "2", "--first", "5"])
    with applied(loop(APPEND, "hidden_states.append(hidden.detach())")):
        assert false_alarms.main() == 1
    printed = capsys.readouterr()
    assert "float32: 2 false alarms in 2 proofs" in printed.out and "seed 6, bfloat16: collector" in printed.err


def test_seeds_differ_and_repeat():
    patterns, norms = set(), []
    for seed in range(6):
        report = false_alarms.prove(seed, torch.float32)
        patterns.add(tuple(b.family for b in report.boundaries))
        norms.append([b.grad_norm for b in report.boundaries])
    assert len(patterns) > 2
    assert norms[0] == [b.grad_norm for b in false_alarms.prove(0, torch.float32).boundaries]
