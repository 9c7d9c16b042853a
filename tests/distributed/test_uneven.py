"""What one rank alone meets: the others must hear of it, or the job waits for its timeout without a word."""

import json

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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bad_input_of_one_rank_ends_the_job_with_its_line(place):
    """Long before parallel.timeout_seconds, and the line is not lost: nobody else knows it."""
    alone = job(place, "fsdp2", "alone:1", "a", "parallel.timeout_seconds=3000")
    assert alone.returncode != 0
    assert "rank 1: error: texts: a file\\nof this machine alone" in alone.stderr.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_folder_that_rank_0_cannot_open_is_one_line(place):
    """Rank 0 alone writes there, so the others have to hear of it."""
    (place / "runs").write_text("a file where the folder should be")
    refused = job(place, "fsdp2", "none", "a", "parallel.timeout_seconds=3000")
    lines = [line for line in refused.stderr.splitlines() if "error:" in line and "torch" not in line]
    assert refused.returncode != 0 and lines == ["error: runs/a: the run cannot begin: Not a directory"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_weights_that_are_not_there_are_one_line(place):
    refused = job(place, "fsdp2", "none", "a", "init_from=gone", "parallel.timeout_seconds=3000")
    lines = [line for line in refused.stderr.splitlines() if line.startswith(("error:", "rank "))]
    assert refused.returncode != 0 and lines == ["error: init_from: no run or checkpoint gone"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_was_killed_after_its_last_save_is_closed_by_all(place):
    assert job(place, "fsdp2", "none", "a").returncode == 0
    path = place / "runs/a/receipt.json"
    path.write_text(json.dumps(receipt("a") | {"status": "running", "ended": None}))
    closed = job(place, "fsdp2", "none", "a")
    assert closed.returncode == 0, closed.stderr[-3000:]
    assert receipt("a")["status"] == "finished" and receipt("a")["starts"][-1]["after"] == "killed"
