"""A rate four times the default for 200 steps: nothing overflows in the dtype that a run trains in."""

import math

import pytest
from tiny_run import losses, make_place, receipt, start

from training.optimizer import OptimizerConfig

HOT = 4 * OptimizerConfig().learning_rate
# 200 steps of 4 rows of 48 tokens; warm up as long runs do, STP open from the start
LONG = (
    "train.tokens=37_000",
    "stp.gate.start_tokens=0",
    "checkpoint.every_steps=1000",
    "validation.every_fraction=1.0",
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_hundred_steps_at_four_times_the_rate_stay_finite(tmp_path, monkeypatch, precision):
    make_place(tmp_path, monkeypatch)
    start(monkeypatch, "run_id=hot", f"optimizer.learning_rate={HOT}", f"precision={precision}", *LONG)
    records = losses("hot")
    lm = [record["loss/lm"] for record in records if "loss/lm" in record]
    assert records[-1]["step"] >= 195 and receipt("hot")["skipped_steps"] == 0
    assert all(math.isfinite(loss) for loss in lm) and max(lm[20:]) < lm[0]
    assert all(math.isfinite(record["grad_norm"]) for record in records if "grad_norm" in record)
