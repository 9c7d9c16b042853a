"""The layout of 64 ranks, on one process and without memory."""

import json

import pytest
from jobs import ROOT, run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "shards", "blocks", "experts", "overrides"),
    [
        ("nam56r_4b", 64, 52, 22, []),
        ("hybrid_150m", 8, 12, 5, ["parallel.data=hsdp", "parallel.shard_ranks=8"]),
    ],
)
def test_64_ranks_build_cut_and_take_a_step(tmp_path, config, shards, blocks, experts, overrides):
    """The first and the last: forward, backward, clipping, update and the experts' balance."""
    path = ROOT / f"configs/scale/{config}.yaml"
    job = run(0, "simulation_worker.py", path, "0,63", *overrides, cwd=tmp_path)
    assert job.returncode == 0, job.stderr[-3000:]
    ranks = json.loads(job.stdout)
    assert len(ranks) == 2
    for found in ranks:
        assert found["local"] == pytest.approx(found["parameters"] / shards, rel=0.02)
        assert found["gradients"] and found["optimizer"]
        assert found["states"] == ["torch.float32"] * (blocks + 1)
        assert found["norm"] == [[], False]  # one number for all ranks, not a part of it
        assert len(found["experts"]) == experts and all(len(shape) == 1 for shape in found["experts"])
        assert found["megabytes"] < 2000
    first, last = (found["rows"] for found in ranks)
    assert len(first) == len(last) and (first[0], last[-1]) == (0, 64 * len(first) - 1)
