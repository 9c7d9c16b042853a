"""Bad steps: not finite, outliers, and what is kept of them."""

import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file

from data.batch import Batch
from errors import InputError
from training import health
from training.health import HealthConfig, StepGuard, is_outlier
from training.measured import Measured, State


def batch():
    tokens = torch.arange(12).reshape(2, 6)
    return Batch(tokens, tokens + 1, torch.zeros(2, 6, dtype=torch.int32), torch.tensor([40, 41]))


def judge(guard, state, loss, norm=1.0):
    return guard.accepts(Measured(total=loss, lm=loss), norm, batch(), state)


def test_not_finite_is_skipped_and_the_limit_counts_in_a_row(tmp_path):
    guard, state = StepGuard(HealthConfig(), 3, tmp_path), State()
    assert judge(guard, state, 2.0)
    for _ in range(4):  # never three in a row
        assert not judge(guard, state, math.nan)
        assert not judge(guard, state, 2.0, torch.tensor(math.inf))
        assert judge(guard, state, 2.0)
    judge(guard, state, math.nan)
    judge(guard, state, -math.inf)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*offending_batch"):
        judge(guard, state, math.nan)
    saved = load_file(tmp_path / "offending_batch.safetensors")
    assert torch.equal(saved["tokens"], batch().tokens) and saved["row_ids"].tolist() == [40, 41]


def test_each_rank_saves_the_rows_that_it_worked_on(tmp_path):
    for rank in (0, 3):
        with pytest.raises(FloatingPointError, match="offending_batch"):
            judge(StepGuard(HealthConfig(), 1, tmp_path, rank), State(), math.nan)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["offending_batch.safetensors", "offending_batch.safetensors.3"]


def test_a_full_disk_does_not_hide_the_finding(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(health, "save_file", full)
    with pytest.raises(FloatingPointError, match=r"rows \[40, 41\].*No space"):
        judge(StepGuard(HealthConfig(), 1, tmp_path), State(), math.nan)


def test_outliers_by_hand():
    config = HealthConfig(outlier_sigmas=6.0, outlier_window=8)
    assert not is_outlier(100.0, (1.0, 2.0, 3.0), config)  # less than half a window: too little to judge by
    earlier = (1.0, 2.0, 3.0, 4.0)  # mean 2.5, standard deviation sqrt(5/3) = 1.29099
    assert not is_outlier(2.5 + 6 * 1.2909, earlier, config) and is_outlier(2.5 + 6 * 1.2910, earlier, config)
    assert not is_outlier(-1e9, earlier, config)  # one-sided: a lower loss is no harm
    assert not is_outlier(9.0, (1.0,) * 8, config)  # no spread, no scale


def test_skip_judges_both_values_and_a_lasting_change_is_accepted_soon(tmp_path):
    noise = random.Random(0)
    guard, state = StepGuard(HealthConfig(outliers="skip", outlier_window=32), 3, tmp_path), State()
    for _ in range(32):
        assert judge(guard, state, noise.gauss(4, 0.1), noise.gauss(1, 0.1))
    assert not judge(guard, state, 9.0) and not judge(guard, state, 4.0, 9.0)
    assert judge(guard, state, 4.0) and len(state.recent) == 32
    skipped = [not judge(guard, state, noise.gauss(20, 0.1)) for _ in range(32)]
    assert any(skipped) and sum(skipped) < 8 and not any(skipped[8:])


def test_keep_judges_nothing_and_keeps_no_state(tmp_path):
    guard, state = StepGuard(HealthConfig(), 3, tmp_path), State()
    assert all(judge(guard, state, loss) for loss in [1.0] * 200 + [1e30]) and state.recent == []


def test_the_window_survives_a_checkpoint_bit_for_bit(tmp_path):
    config = HealthConfig(outliers="skip", outlier_sigmas=1.0, outlier_window=16)
    noise = random.Random(1)
    values = [noise.gauss(3, 1) for _ in range(100)]
    whole, state = StepGuard(config, 3, tmp_path), State()
    expected = [judge(whole, state, value) for value in values]
    assert 5 < expected.count(False) < 60
    found, state = [], State()
    for value in values:  # a new process at every step
        state = State(**json.loads(json.dumps(vars(state))))
        found.append(judge(StepGuard(config, 3, tmp_path), state, value))
    assert found == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("outliers", "perhaps"), ("outlier_sigmas", 0.5), ("outlier_window", 2), ("hung_step_seconds", math.nan)],
)
def test_bad_values_name_the_key(field, value):
    with pytest.raises(InputError, match=f"health.{field}"):
        HealthConfig(**{field: value}).validate()
