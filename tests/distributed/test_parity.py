"""Two and four processes compute what one does: losses, STP, gradient norms and weights."""

import json

import pytest
import torch
from jobs import run

# float64 takes the plain torch references of every block; float32 their fused kernels
BOUND = {"float64": (20, 1e-9), "float32": (3, 1e-6)}


def found(tmp_path, ranks, *arguments):
    out = tmp_path / f"{ranks}-{'-'.join(map(str, arguments))}.json"
    job = run(ranks, "parity_worker.py", out, *arguments, cwd=tmp_path)
    assert job.returncode == 0, job.stderr[-3000:]
    return json.loads(out.read_text())


def assert_same(one, many, bound):
    for a, b in zip(one["steps"], many["steps"], strict=True):
        assert b == pytest.approx(a, rel=bound)
    assert one["weights"].keys() == many["weights"].keys()
    for name, weights in one["weights"].items():
        a, b = torch.tensor(weights), torch.tensor(many["weights"][name])
        # by their norm: AdamW divides a gradient near zero by its own size, so one such weight shows its rounding
        assert (a - b).norm() <= 10 * bound * a.norm() + bound, name


def test_fsdp_on_two_processes(tmp_path):
    dtype = "float64"
    steps, bound = BOUND[dtype]
    one = found(tmp_path, 0, "none", "none", dtype, steps)
    assert_same(one, found(tmp_path, 2, "fsdp", "none", dtype, steps), bound)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("ranks", "kind", "recompute"),
    [
        (2, "fsdp", "none"),
        (2, "ddp", "none"),
        (2, "fsdp", "full"),
        (4, "hsdp", "selective"),
        (1, "fsdp", "none"),
        (0, "fsdp", "selective"),
    ],
)
def test_every_kind(tmp_path, dtype, ranks, kind, recompute):
    steps, bound = BOUND[dtype]
    one = found(tmp_path, 0, "none", "none", dtype, steps)
    assert_same(one, found(tmp_path, ranks, kind, recompute, dtype, steps), bound)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_keep_their_hidden_states_when_sharded(tmp_path):
    one = found(tmp_path, 0, "none", "none", "float32", 3)
    assert_same(one, found(tmp_path, 2, "fsdp", "full", "float32", 3, "blocks"), 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_teardowns(tmp_path):
    for attempt in range(20):
        out = tmp_path / f"{attempt}.json"
        job = run(2, "parity_worker.py", out, "fsdp", "none", "float64", 1, cwd=tmp_path)
        assert job.returncode == 0, f"attempt {attempt}: {job.stderr[-2000:]}"
