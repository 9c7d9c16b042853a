"""The memory of a rank, measured: two ranks over gloo against the plan of a CPU."""

import json

import pytest
from jobs import FREED, ROOT, run

SIZES = [
    "model.pattern=AEMRAEMR",
    "model.d_model=256",
    "model.attention.n_heads=4",
    "model.moe.expert_ff=512",
    "data.sequence_length=512",
    "train.batch_rows=4",
    "train.accumulation=1",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_a_rank_of_two_needs_what_is_planned_within_a_tenth(tmp_path, kind):
    job = run(2, "memory_worker.py", ROOT / "configs/demo.yaml", kind, *SIZES, cwd=tmp_path, **FREED)
    assert job.returncode == 0, job.stderr[-3000:]
    found = json.loads(job.stdout)
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.1), found
