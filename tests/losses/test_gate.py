"""The gate counts tokens: nothing but tokens may move it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import InputError
from losses.gate import GateConfig, TokenGate


def test_hard_switch_opens_at_exactly_n_on():
    gate = TokenGate(GateConfig(start_tokens=1000), 0.05)
    assert [gate.weight(n) for n in (0, 999, 1000, 1001)] == [0.0, 0.0, 0.05, 0.05]
    assert gate.opens_at_token == 1000 and gate.full_at_token == 1000


def test_ramp():
    gate = TokenGate(GateConfig(start_tokens=1000, ramp_tokens=400), 0.02)
    assert [gate.fraction(n) for n in (999, 1000, 1100, 1200, 1400, 10**9)] == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    assert gate.weight(1200) == 0.01
    # Open means the first non-zero weight, which is one token later than N_on.
    assert gate.opens_at_token == 1001
    assert gate.weight(1000) == 0 < gate.weight(1001)


@given(st.integers(0, 10**12), st.integers(0, 10**9), st.integers(0, 10**12), st.integers(0, 10**9))
def test_monotone_bounded_and_opening_where_it_says(start, ramp, n, more):
    gate = TokenGate(GateConfig(start_tokens=start, ramp_tokens=ramp))
    assert 0.0 <= gate.fraction(n) <= gate.fraction(n + more) <= 1.0
    assert (gate.fraction(n) > 0) == (n >= gate.opens_at_token)
    assert (gate.fraction(n) == 1.0) == (n >= gate.full_at_token)


def weights(tokens_per_step, steps, gate):
    """weight by N over a run; N counts the tokens before each step."""
    return {step * tokens_per_step: gate.weight(step * tokens_per_step) for step in range(steps)}


def test_batch_size_accumulation_and_ranks_cannot_move_it():
    """All of them change only the tokens per step, so at equal N the weight is equal."""
    gate = TokenGate(GateConfig(start_tokens=4096, ramp_tokens=4096), 0.02)
    base = weights(512, 64, gate)
    for tokens_per_step in (128, 1024, 4096):
        other = weights(tokens_per_step, 64 * 512 // tokens_per_step, gate)
        common = base.keys() & other.keys()
        assert len(common) >= 8 and all(base[n] == other[n] for n in common)


def test_reference_steps_become_tokens():
    config = GateConfig(start_steps=10_000, reference_tokens_per_step=256 * 4096)
    config.validate("stp.gate", 10**11)
    gate = TokenGate(config)
    assert gate.start_tokens == 10_485_760_000
    assert gate.opens_at_step(131_072) == 80_000


def test_defaults_are_open_from_the_first_token():
    config = GateConfig()
    assert config.validate("stp.gate", 1000) == []
    assert TokenGate(config).weight(0) == 1.0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GateConfig(start_steps=100), "stp.gate.start_steps: steps alone"),
        (GateConfig(start_steps=1, start_tokens=1, reference_tokens_per_step=1), "give one of them"),
        (GateConfig(start_tokens=1, reference_tokens_per_step=1), "stp.gate.reference_tokens_per_step: is only used"),
        (GateConfig(start_steps=1, reference_tokens_per_step=0), "stp.gate.reference_tokens_per_step: .* at least 1"),
        (GateConfig(start_tokens=-1), "stp.gate.start_tokens: .* at least 0, got -1"),
        (GateConfig(ramp_tokens=-5), "stp.gate.ramp_tokens: .* at least 0"),
        (GateConfig(start_tokens=float("nan")), "stp.gate.start_tokens: .*finite"),
        (GateConfig(start_tokens=1000), "stp.gate.start_tokens: the gate opens at token 1,000.*ends at token 1,000"),
        (GateConfig(start_tokens=999, ramp_tokens=5), "opens at token 1,000"),
        (GateConfig(start_steps=10, reference_tokens_per_step=200), "stp.gate.start_steps: the gate opens"),
    ],
)
def test_bad_input_is_one_line_with_the_key(config, words):
    with pytest.raises(InputError, match=words) as error:
        config.validate("stp.gate", 1000)
    assert "\n" not in str(error.value)


def test_late_opening_and_unfinished_ramp_warn():
    assert GateConfig(start_tokens=500).validate("stp.gate", 1000) == []
    (late,) = GateConfig(start_tokens=501).validate("stp.gate", 1000)
    assert "later than half" in late
    (unfinished,) = GateConfig(start_tokens=100, ramp_tokens=1800).validate("stp.gate", 1000)
    assert "50%" in unfinished
    assert GateConfig(start_tokens=999).validate("stp.gate", 1000)  # opens for the very last token


def test_state_survives_a_checkpoint_and_refuses_another_rule():
    gate = TokenGate(GateConfig(start_tokens=100, ramp_tokens=50), 0.02)
    state = gate.state_dict()
    assert state == {"start_tokens": 100, "ramp_tokens": 50} and all(type(v) is int for v in state.values())
    gate.load_state_dict(state)
    moved = TokenGate(GateConfig(start_tokens=200, ramp_tokens=50), 0.02)
    with pytest.raises(InputError, match=r"stp\.gate\.start_tokens"):
        moved.load_state_dict(state)
    with pytest.raises(InputError, match=r"stp\.gate\.ramp_tokens"):
        gate.load_state_dict({"start_tokens": 100})
