"""python -m scripts.preflight: proves on the real model and batch, says what failed, writes no run folder."""

import sys
from pathlib import Path

import pytest

from errors import InputError, PreflightError
from scripts import preflight
from tests.mutants.collector_faults import APPEND, loop
from tests.mutants.trial import Trial, applied


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["preflight", "tiny.yaml", *overrides])
        code = preflight.main()
        return code, capsys.readouterr().out

    with Trial():
        yield run
        assert not Path("runs").exists()


def test_a_sound_config_is_proven_boundary_by_boundary(command):
    code, out = command()
    assert code == 0 and "preflight: ok in" in out
    for family in ("embedding", "A", "M", "E", "R", "final"):
        assert any(f"│ {family}" in line and "ok" in line for line in out.splitlines()), family
    elsewhere = ("control_sends_nothing", "control_as_declared", "predictor")
    assert all(name in out for name in preflight.MEANING if name not in elsewhere)


def test_a_cut_wire_is_exit_3_with_the_check_in_the_table(command, capsys):
    with applied(loop(APPEND, "hidden_states.append(hidden.detach().requires_grad_())")):
        with pytest.raises(PreflightError, match="stream_below") as error:
            command()
    assert error.value.exit_code == 3
    out = capsys.readouterr().out
    assert "FAILED" in out and "the stream is cut" in " ".join(out.split())


def test_a_control_is_proven_to_send_nothing(command):
    code, out = command("stp.variant=detached")
    assert code == 0 and "control_sends_nothing" in out and "state_gradient" not in out


def test_a_control_that_acts_is_proven_to_be_what_it_declares(command):
    code, out = command("stp.variant=gradient_noise")
    assert code == 0 and "control_as_declared" in out and "state_gradient" in out


def test_bad_input_is_exit_2(command):
    for override, words in (("stp.weight=0", "nothing to prove"), ("stp.wieght=1", "stp.weight")):
        with pytest.raises(InputError, match=words) as error:
            command(override)
        assert error.value.exit_code == 2
    with pytest.raises(InputError, match="the gate opens at token"):
        command("stp.gate.start_tokens=99999")
