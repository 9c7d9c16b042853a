"""The layout of 64 ranks, on one process and without memory."""

import json

import pytest
from jobs import ROOT, run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "shards", "overrides"),
    [
        ("nam56r_4b", 64, []),
        ("hybrid_150m", 8, ["parallel.data=hsdp", "parallel.shard_ranks=8"]),
    ],
)
def test_64_ranks_build_cut_and_take_a_step(tmp_path, config, shards, overrides):
    job = run(0, "simulation_worker.py", ROOT / f"configs/scale/{config}.yaml", 5, *overrides, cwd=tmp_path)
    assert job.returncode == 0, job.stderr[-3000:]
    found = json.loads(job.stdout)
    assert found["local"] == pytest.approx(found["parameters"] / shards, rel=0.02)
    assert found["gradients"] and found["optimizer"]
    assert len(found["states"]) == (53 if config == "nam56r_4b" else len(found["states"]))
    assert set(found["states"]) == {"torch.float32"}
    assert found["megabytes"] < 2000
