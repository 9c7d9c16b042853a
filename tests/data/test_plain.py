"""Whatever a receipt or a report holds, what is written is JSON in the strict sense."""

import json
from pathlib import Path

import numpy as np
import torch

from data.plain import strict


def test_everything_becomes_plain_json():
    value = {
        1: (True, None, "x", 2, 0.5),
        "not finite": [float("nan"), float("-inf"), np.float32("nan"), torch.tensor(float("inf"))],
        "numpy": {"scalar": np.int64(3), "flag": np.bool_(True), "array": np.array([[1.0, np.nan]])},
        "torch": [torch.tensor(4), torch.tensor([1.5, float("nan")])],
        "other": Path("a/b"),
    }
    found = strict(value)
    assert found == {
        "1": [True, None, "x", 2, 0.5],
        "not finite": [None] * 4,
        "numpy": {"scalar": 3, "flag": True, "array": [[1.0, None]]},
        "torch": [4, [1.5, None]],
        "other": "a/b",
    }
    assert found["numpy"]["flag"] is True and json.loads(json.dumps(found, allow_nan=False)) == found
