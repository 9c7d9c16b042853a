"""What one rank alone meets: the others must hear of it, or the job waits for its timeout without a word."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_jobs import job
from tiny_run import losses, make_place, receipt

from blocks.mblock import Mamba2Config
from model.hybrid import HybridLM, ModelConfig
from training.distributed import ParallelConfig, World
from training.evaluate import sample_text

ONE_ROW_EACH = ("train.batch_rows=2", "train.probe_every=1", "train.log_every=1", "train.tokens=1500")


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def test_a_sample_takes_as_many_steps_on_every_rank_and_reads_the_same():
    """Where a rank draws the end of a text is its own rounding's affair; each step gathers the weights of all."""
    small = Mamba2Config(head_dim=16, d_state=8, chunk_size=16)
    model = HybridLM(ModelConfig(pattern="AM", d_model=32, mamba2=small), 12)
    model.init_weights(torch.Generator().manual_seed(0))
    step, steps = model.step, []
    model.step = lambda *given: steps.append(1) or step(*given)
    tokenizer = SimpleNamespace(bos_id=0, eos_id=1, encode=lambda text: [2, 3], decode=str)
    found = {}
    for size in (1, 2):
        world = World(ParallelConfig(), torch.device("cpu"), 0, size, None)
        texts, counts = [], []
        for seed in range(4):
            steps.clear()
            texts.append(sample_text(model, tokenizer, "", 40, 1.0, seed, world))
            counts.append(len(steps))
        found[size] = texts, counts
    assert found[1][0] == found[2][0]
    assert len(set(found[1][1])) > 1 and set(found[2][1]) == {3 + 40}


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
