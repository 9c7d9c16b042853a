"""What one rank alone meets: the others must hear of it, or the job waits for its timeout without a word."""

import pytest
from test_jobs import job
from tiny_run import losses, make_place, receipt

ONE_ROW_EACH = ("train.batch_rows=2", "train.probe_every=1", "train.log_every=1", "train.tokens=1500")


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_rank_without_a_valid_triple_probes_with_the_others(place):
    """One triple per row over packed short documents: most cross a document, so ranks differ at nearly every probe."""
    done = job(place, "fsdp2", "none", "a", "stp.sampler=uniform", "stp.n_spans=1", *ONE_ROW_EACH)
    assert done.returncode == 0, done.stderr[-3000:]
    probed = [record for record in losses("a") if "stp/raw" in record and record["stp/weight"] > 0]
    told = [record for record in probed if any(name.startswith("stp/grad_norm") for name in record)]
    assert receipt("a")["status"] == "finished" and 0 < len(told) < len(probed)


@pytest.mark.slow
def test_a_gradient_that_dies_on_one_rank_refuses_all(place):
    dead = job(place, "fsdp2", "dead:1", "a", *ONE_ROW_EACH, "train.tokens=2200")
    assert dead.returncode != 0
    assert "STP died: the gradient of its term at boundary 0 (embedding) has norm 0.0 on rank 1" in dead.stderr
    assert receipt("a")["status"] == "refused" and "STP died" in receipt("a")["reason"]
