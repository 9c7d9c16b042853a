"""A training step waits for its device a few times, however many micro-batches and blocks it has."""

from itertools import pairwise

import pytest
import torch
from tiny_run import make_place, start
from torch.utils._python_dispatch import TorchDispatchMode

from training.lifecycle import Run

QUIET = (
    "stp.gate.start_tokens=0",
    "stp.gate.ramp_tokens=0",
    "validation.every_fraction=1",
    "train.tokens=1300",
    "train.log_every=1000",
    "train.probe_every=1000",
    "train.curvature_every=1000",
)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a value of the device."""

    def __init__(self):
        super().__init__()
        self.now = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.now += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pattern", ["AMER", "AEMEAERE"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_reads_of_a_step(tmp_path, monkeypatch, pattern, accumulation):
    make_place(tmp_path, monkeypatch)
    reads, marks = Reads(), []
    honest = Run.record

    def record(*arguments):
        honest(*arguments)
        marks.append(reads.now)

    monkeypatch.setattr(Run, "record", record)
    with reads:
        start(monkeypatch, *QUIET, f"model.pattern={pattern}", f"train.accumulation={accumulation}")
    steps = [after - before for before, after in pairwise(marks[1:-1])]
    assert len(steps) >= 3 and max(steps) <= 4, steps
