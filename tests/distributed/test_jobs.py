"""Whole runs under torchrun: their proof, their stop, their loss of a process, and another number of processes."""

import json
import os
import signal
import socket
import subprocess
import time

import pytest
from jobs import ENVIRONMENT, PATIENCE, command, run
from tiny_run import last_weights, losses, make_place, receipt, write_corpus

from data.prepare import prepare
from training.config import load_config

FP32 = ("precision=fp32", "validation.sample_tokens=4")
WORLDS = {"one": (0, ()), **{f"{k}{n}": (n, (f"parallel.data={k}",)) for k in ("fsdp", "ddp") for n in (1, 2, 4)}}
WORLDS["hsdp4"] = (4, ("parallel.data=hsdp", "parallel.shard_ranks=2"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def job(place, world, mishap, run_id, *overrides):
    ranks, parallel = WORLDS[world]
    arguments = (
        mishap,
        "tiny.yaml",
        f"run_id={run_id}",
        *FP32,
        "train.accumulation=1",
        PATIENCE,
        *parallel,
        *overrides,
    )
    return run(ranks, "train_worker.py", *arguments, cwd=place)


def without_evidence(records):
    """Without evidence and curvature: of a step's first micro-batch on rank 0, so of other rows in another world."""
    local = ("stp/grad_", "curvature/")
    return [{k: v for k, v in record.items() if not k.startswith(local)} for record in records]


def assert_close(found, expected, bound):
    for a, b in zip(without_evidence(found), without_evidence(expected), strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == pytest.approx(value, rel=bound, abs=bound), (b["step"], name)


@pytest.mark.slow
def test_two_processes_prove_train_and_stop_together(place):
    # selective recomputation too: the live evidence goes through a graph that can be gone through once only
    stopped = job(place, "fsdp2", "stop:6", "a", "parallel.recompute=selective")
    assert stopped.returncode == 0, stopped.stderr[-3000:]  # torchrun would take any other code for a failure
    proof = receipt("a")
    assert proof["status"] == "stopped" and proof["step"] == 7  # the wish travels with the next step's sums
    assert proof["preflight"]["ok"] and proof["preflight"]["checks"]["ranks_agree"]
    parallel = proof["parallel"]
    assert (parallel["data"], parallel["ranks"]) == ("fsdp", 2)
    assert len(parallel["agreement_sha256"]) == 64
    assert job(place, "fsdp2", "none", "a", "parallel.recompute=selective").returncode == 0
    assert job(place, "fsdp2", "none", "b").returncode == 0
    assert losses("a") == losses("b")  # to the last bit
    whole, parts = last_weights("b"), last_weights("a")
    assert whole.keys() == parts.keys() and all(whole[name].equal(parts[name]) for name in whole)
    assert receipt("a")["stp"]["live_tokens"] == receipt("b")["stp"]["live_tokens"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_groups_of_two_continue_to_the_last_bit(place):
    one_each = ("train.tokens=1500", "validation.sample_tokens=0")
    assert job(place, "hsdp4", "none", "whole", *one_each).returncode == 0
    assert job(place, "hsdp4", "stop:6", "half", *one_each).returncode == 0
    assert receipt("half")["status"] == "stopped"
    assert job(place, "hsdp4", "none", "half", *one_each).returncode == 0
    assert losses("whole") == losses("half")
    whole, parts = last_weights("whole"), last_weights("half")
    assert whole.keys() == parts.keys() and all(whole[name].equal(parts[name]) for name in whole)


@pytest.mark.slow
def test_a_wire_cut_on_one_rank_refuses_all(place):
    refused = job(place, "fsdp2", "cut:1", "cut")
    assert refused.returncode != 0
    assert receipt("cut")["status"] == "refused" and not (place / "runs/cut/metrics.jsonl").read_text()
    assert "rank 1: failed" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("mishap", "what"), [("other:1", "config"), ("code:1", "code")])
def test_a_rank_with_another_config_or_checkout_refuses_all(place, mishap, what):
    refused = job(place, "fsdp2", mishap, "odd")
    assert refused.returncode != 0 and f"rank 1: has another {what} than rank 0" in refused.stderr


@pytest.fixture
def mixed(place):
    """The place with a mixture of two corpora of several shards each."""
    (place / "second").mkdir()
    write_corpus(place / "second", seed=1)
    config = (place / "tiny.yaml").read_text()
    mixture = "mixture: {'files:texts/*.txt': 0.7, 'files:second/texts/*.txt': 0.3}"
    (place / "tiny.yaml").write_text(config.replace("path: texts/*.txt", mixture))
    data = prepare(load_config("tiny.yaml").data, shard_tokens=2000)
    assert len(list(data.folder.glob("*/train-*.bin"))) == 4
    return place


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resharding(mixed):
    """Begun in one world and finished in another, each of them in both places: all end where one process ends.

    tests/distributed/test_parity.py has every pair of them; here it is the whole run, its books and its data."""
    assert job(mixed, "one", "none", "whole").returncode == 0
    for begun, world in (("one", "fsdp2"), ("fsdp2", "fsdp4"), ("fsdp4", "ddp2"), ("ddp2", "one")):
        name = f"{begun}-{world}"
        assert job(mixed, begun, "stop:6", name).returncode == (4 if begun == "one" else 0)
        finished = job(mixed, world, "none", name)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert_close(losses(name), losses("whole"), 1e-4)
        assert_close(losses(name)[:3], losses("whole")[:3], 1e-6)


@pytest.mark.slow
def test_another_accumulation_after_a_stop(place):
    assert job(place, "one", "none", "whole").returncode == 0
    assert job(place, "one", "stop:6", "half").returncode == 4
    assert job(place, "one", "none", "half", "train.accumulation=4").returncode == 0
    assert_close(losses("half"), losses("whole"), 1e-4)


def wait_for(condition, seconds=100):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.1)


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("restarts", [0, 1])
def test_the_loss_of_a_process(place, restarts):
    """The whole job is down within 60 seconds; under --max-restarts it goes on from the last checkpoint."""
    assert job(place, "fsdp2", "none", "whole", "train.tokens=6000").returncode == 0
    overrides = ("run_id=hurt", *FP32, "train.accumulation=1", "parallel.data=fsdp", "train.tokens=6000")
    line = command(2, "train_worker.py", "none", "tiny.yaml", *overrides, restarts=restarts)
    with subprocess.Popen(
        line, cwd=place, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        wait_for(lambda: (place / "runs/hurt/checkpoints/step-00000004").is_dir())
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        since = time.monotonic()
        process.communicate(timeout=150)
        if restarts == 0:
            assert process.returncode != 0 and time.monotonic() - since < 60
            assert job(place, "fsdp2", "none", "hurt", "train.tokens=6000").returncode == 0
        else:
            assert process.returncode == 0
    assert receipt("hurt")["status"] == "finished" and len(receipt("hurt")["starts"]) == 2
    assert losses("hurt") == losses("whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_meet_again_after_one_lost_its_process(place):
    """The node that lost it counts a restart, the other one, which only follows, does not."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run_line = [*FP32, "train.accumulation=1", "parallel.data=fsdp", "train.tokens=6000", "resume=never"]
    line = command(1, "train_worker.py", "none", "tiny.yaml", "run_id=hurt", *run_line, restarts=2)
    at = line.index("--standalone")
    line[at : at + 1] = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with (
        subprocess.Popen(line, cwd=place, env=ENVIRONMENT, **quiet) as one,
        subprocess.Popen(line, cwd=place, env=ENVIRONMENT, **quiet) as other,
    ):
        try:
            wait_for(lambda: (place / "runs/hurt/checkpoints/step-00000004").is_dir())
            os.kill(children(other.pid)[-1], signal.SIGKILL)
            assert (one.wait(250), other.wait(60)) == (0, 0)
        finally:
            one.terminate()
            other.terminate()
    assert receipt("hurt")["status"] == "finished" and len(receipt("hurt")["starts"]) == 2
    assert receipt("hurt")["starts"][1]["step"] >= 4


def test_torchrun_and_the_config_must_agree(place):
    found = run(2, "train_worker.py", "none", "tiny.yaml", "run_id=x", cwd=place)
    assert found.returncode != 0 and "parallel.data: none is for one process, and there are 2" in found.stderr
    found = run(
        2, "train_worker.py", "none", "tiny.yaml", "run_id=x", "train.batch_rows=6", "parallel.data=fsdp", cwd=place
    )
    assert "train.batch_rows: 6 rows do not split over 2 ranks" in found.stderr and not (place / "runs").exists()


@pytest.mark.slow
def test_books_are_kept_by_one(place):
    assert job(place, "fsdp2", "none", "a").returncode == 0
    steps = [json.loads(line)["step"] for line in (place / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and len(receipt("a")["starts"]) == 1
