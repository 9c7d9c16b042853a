"""Values at the corners, continuity, and that no schedule leaves [0, 1]."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import InputError
from training.schedule import KINDS, ScheduleConfig, learning_rate_factor

fractions = st.floats(0.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_is_linear_and_ends_at_one(kind):
    config = ScheduleConfig(kind, warmup_fraction=0.2)
    assert learning_rate_factor(config, 0.0) == 0.0
    assert learning_rate_factor(config, 0.05) == pytest.approx(0.25)
    assert learning_rate_factor(config, 0.2) == 1.0


@pytest.mark.parametrize(
    ("kind", "progress", "expected"),
    [
        ("cosine", 0.6, 0.55),
        ("cosine", 1.0, 0.1),
        ("cosine", 0.4, 0.1 + 0.9 * (0.5 + 0.25 * 2**0.5)),  # a quarter of the way: (1 + cos(pi / 4)) / 2
        ("linear", 0.6, 0.55),
        ("linear", 0.4, 0.775),
        ("linear", 1.0, 0.1),
        ("wsd", 0.6, 1.0),
        ("wsd", 0.75, 1.0),
        ("wsd", 0.875, 0.55),
        ("wsd", 1.0, 0.1),
        ("constant", 1.0, 1.0),
        ("cosine", 1.7, 0.1),
        ("cosine", -0.1, 0.0),
    ],
)
def test_values(kind, progress, expected):
    config = ScheduleConfig(kind, warmup_fraction=0.2, decay_fraction=0.25, final_fraction=0.1)
    assert learning_rate_factor(config, progress) == pytest.approx(expected, rel=1e-12)


@given(st.sampled_from(KINDS), fractions, fractions, fractions, fractions)
def test_never_outside_zero_and_one(kind, warmup, decay, final, progress):
    config = ScheduleConfig(kind, warmup, min(decay, 1.0 - warmup), final)
    assert 0.0 <= learning_rate_factor(config, progress) <= 1.0 + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_continuous_and_falling_after_the_warmup(kind, warmup):
    config = ScheduleConfig(kind, warmup, decay_fraction=0.3, final_fraction=0.0)
    grid = [learning_rate_factor(config, i / 2000) for i in range(2001)]
    peak = int(warmup * 2000)
    assert all(abs(a - b) < 0.006 for a, b in pairwise(grid))
    assert all(a >= b for a, b in pairwise(grid[peak:]))


def test_no_warmup_and_no_decay_divide_by_nothing():
    assert learning_rate_factor(ScheduleConfig("wsd", 0.0, 0.0, 0.1), 0.0) == 1.0
    assert learning_rate_factor(ScheduleConfig("cosine", 1.0), 1.0) == 1.0


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"kind": "cosin"}, "schedule.kind"),
        ({"warmup_fraction": -0.1}, "schedule.warmup_fraction"),
        ({"final_fraction": float("nan")}, "schedule.final_fraction"),
        ({"kind": "wsd", "warmup_fraction": 0.5, "decay_fraction": 0.6}, "schedule.decay_fraction"),
    ],
)
def test_bad_config_names_its_key(values, key):
    with pytest.raises(InputError, match=f"^{key}: "):
        ScheduleConfig(**values).validate()
