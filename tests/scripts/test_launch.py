"""Detached runs, by the commands that people type: start, leave, look, stop, continue, collect."""

import contextlib
import errno
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
from launch_cases import launch, write_run
from tiny_run import ROOT, make_place

from errors import InputError
from scripts.launch import slurm
from scripts.launch.collect import verify_run
from scripts.launch.job import Job, local_processes, stop_local
from scripts.launch.status import describe
from training.ownership import live_owner, process_identity
from training.receipt import read_receipt

LONG = ["train.tokens=4000000", "checkpoint.every_steps=20", "train.log_every=5"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A test that fails half-way leaves no run behind: they outlive what starts them, that is the point of them."""
    yield make_place(tmp_path, monkeypatch)
    for folder in (tmp_path / "runs").glob("*"):
        stop_local([p for p in local_processes(folder, Job.read(folder)) if p["pid"] != os.getpid()], now=True)


def as_typed(*arguments, **environment):
    typed = [sys.executable, "-m", "scripts.launch", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(typed, env=environment, capture_output=True, text=True, timeout=100)


def until(ready, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_outlives_its_caller_and_is_stopped_continued_killed_and_collected(place):
    started = as_typed("start", "tiny.yaml", "run_id=away", *LONG)  # its starter is gone now
    assert started.returncode == 0 and started.stdout.startswith("away  (process "), started
    folder = place / "runs" / "away"
    job = Job.read(folder)
    pid = job.process["pid"]
    try:
        assert os.getsid(pid) == pid != os.getsid(0)  # no terminal can hang it up
        assert launch("start", "tiny.yaml", "run_id=away", code=2).count("\n") == 1
        until(lambda: read_receipt(folder).get("checkpoints") or [])
        status = describe(folder)
        assert status.state == "running" and status.last_checkpoint_step >= 20 and f"process {pid}" in status.owner
        assert status.total_tokens == 4_000_000 and status.seconds_left > 0 and status.tokens_per_second > 0
        assert "is running" in launch("resume", "away", code=2)
        assert [run["state"] for run in json.loads(launch("list", "--json"))] == ["running"]
        follow = [sys.executable, "-m", "scripts.launch", "logs", "away", "-f", "-n", "1"]
        follower = subprocess.Popen(follow, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
        shown = launch("stop", "away")
        assert "stopped at step" in shown
        followed = follower.communicate(timeout=60)[0].decode()  # it ends with the run, and misses nothing of it
        log = (folder / "output.log").read_text()
        assert log.endswith(followed) and "stopped: stopped at step" in followed
    finally:
        with_luck_gone(pid)
    receipt = read_receipt(folder)
    assert receipt["status"] == "stopped" and receipt["checkpoints"][-1]["step"] == receipt["step"]
    assert "saving and stopping" in (folder / "output.log").read_text()

    launch("resume", "away")
    pid = Job.read(folder).process["pid"]
    until(lambda: read_receipt(folder)["step"] > receipt["step"] or len(read_receipt(folder)["starts"]) == 2)
    os.kill(pid, signal.SIGKILL)
    until(lambda: describe(folder).state == "killed")
    killed = read_receipt(folder)
    assert killed["status"] == "killed" and "found dead" in killed["reason"]
    assert "everything that was checked matches" in launch("collect", "away")
    assert "away" in launch("list") and "killed" in launch("status", "away")
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    shown = launch("collect", "away", code=1)
    assert "config.yaml" in shown and "DIFFERS" in shown and "1 of" in shown


def with_luck_gone(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_logs_shows_the_last_lines_and_refuses_a_number_below_zero(place):
    folder = write_run(place / "runs" / "said", status="finished")
    (folder / "output.log").write_text("one\ntwo\nthree\n")
    assert launch("logs", "said") == launch("logs", "said", "-n", "0") == "one\ntwo\nthree\n"
    assert launch("logs", "said", "-n", "2") == "two\nthree\n"
    assert launch("logs", "said", "-n", "-3", code=2).startswith("--lines: expected a finite number at least 0")


def test_a_start_that_fails_says_so_and_its_status_too(place):
    assert "stp.weight" in launch("start", "tiny.yaml", "stp.wieght=1", code=2)
    assert not (place / "runs").exists()
    launch("start", "tiny.yaml", "run_id=bad", "data.path=nothing/*.txt")
    folder = place / "runs" / "bad"
    until(lambda: describe(folder).state == "failed")
    assert "nothing" in describe(folder).reason
    assert "did you mean 'bad'" in launch("status", "bda", code=2)


@pytest.mark.slow
def test_closing_the_terminal_ends_nothing(place):
    """A real terminal with a shell in the foreground is closed: the shell is hung up, the run is not."""
    typed = shlex.join([sys.executable, "-m", "scripts.launch", "start", "tiny.yaml", "run_id=night", *LONG])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shell, terminal = pty.fork()
    if shell == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored in all that runs under nohup
        os.execve("/bin/sh", ["sh", "-c", f"{typed}; exec sleep 1000"], environment)
    folder = place / "runs" / "night"
    until(lambda: live_owner(folder) and read_receipt(folder).get("checkpoints"), 120)
    assert b"scripts.launch status night" in os.read(terminal, 65536)
    os.close(terminal)
    assert os.WTERMSIG(os.waitpid(shell, 0)[1]) == signal.SIGHUP
    seen = describe(folder).step
    until(lambda: describe(folder).step > seen)
    assert "stopped at step" in launch("stop", "night")


def test_a_launch_that_cannot_be_written_down_leaves_nothing_running(place, monkeypatch):
    def full(self, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "launch.json"))

    started = []
    honest = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(honest(*a, **k)) or started[-1])
    monkeypatch.setattr(Job, "write", full)
    with pytest.raises(OSError, match="No space left"):
        launch("start", "tiny.yaml", "run_id=unseen", *LONG)
    assert len(started) == 1 and started[0].returncode == -signal.SIGKILL
    assert not (place / "runs" / "unseen").exists()  # the id is free again


def test_take_over_is_for_machines_that_are_gone(place):
    folder = write_run(place / "runs" / "mine", status="running")
    owner = process_identity()  # this very process: alive, and here
    (folder / "owner.json").write_text(json.dumps(owner))
    assert "is running" in launch("resume", "mine", "--take-over", code=2)
    assert json.loads((folder / "owner.json").read_text()) == owner


@pytest.mark.parametrize("key", ["config_sha256", "checkpoints", "metrics_file", "data", "metrics"])
def test_a_receipt_that_was_edited_does_not_match(place, monkeypatch, key):
    from tiny_run import start

    start(monkeypatch, "run_id=a", "train.tokens=900")
    folder = place / "runs" / "a"
    receipt = read_receipt(folder)
    assert [check for check in verify_run(folder, receipt) if check.ok is not True] == []
    edited = {
        "config_sha256": "0" * 64,
        "checkpoints": [{**receipt["checkpoints"][-1], "manifest_sha256": "0" * 64}],
        "metrics_file": {"bytes": 1, "sha256": "0" * 64},
        "data": {**receipt["data"], "manifest_sha256": "0" * 64},
        "metrics": {**receipt["metrics"], "val_bits_per_byte": 0.1},
    }[key]
    wrong = [check for check in verify_run(folder, receipt | {key: edited}) if check.ok is False]
    assert len(wrong) == 1


@pytest.mark.parametrize("broken", ["no hashes", "[" * 100_000])
def test_a_manifest_of_the_corpus_that_is_none_is_said(place, monkeypatch, broken):
    from tiny_run import start

    start(monkeypatch, "run_id=a", "train.tokens=400", "stp.weight=0")
    receipt = read_receipt(place / "runs" / "a")
    manifest = place / receipt["data"]["folder"] / "manifest.json"
    text = manifest.read_text().replace("bin_sha256", "bin_sha2") if broken == "no hashes" else broken
    manifest.write_text(text)
    wrong = [check for check in verify_run(place / "runs" / "a", receipt) if check.ok is False]
    assert len(wrong) == 2 and "the manifest is damaged" in wrong[1].note  # its hash, and what it says


def test_batch_scripts_are_valid_and_quote_what_they_are_given(tmp_path):
    folder = tmp_path / "a folder; rm -rf x" / "run"
    folder.mkdir(parents=True)
    for gpus, nodes, processes in ((0, 1, 0), (1, 1, 0), (8, 4, 0), (0, 2, 3)):
        command = ["python", "train.py", "x y.yaml"]
        job = Job("slurm", gpus, nodes, processes, ["--partition=big"], "24:00:00", command=command, cwd=str(folder))
        script = slurm.render(folder, job)
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr
        for line in ("--requeue", "--signal=USR1@", f"--nodes={nodes}", "--partition=big", "--time=24:00:00"):
            assert f"#SBATCH {line}" in script
        assert ("MASTER_ADDR" in script) == (job.ranks > 1) and "'x y.yaml'" in script
        per_node = max(1, gpus, processes)
        assert f"#SBATCH --ntasks-per-node={per_node}\n" in script
        assert (f"#SBATCH --gpus-per-node={gpus}\n" in script) == (gpus > 0)
        # hsdp cuts the weights over the ranks of a node
        assert job.ranks == 1 or f"WORLD_SIZE={nodes * per_node} LOCAL_WORLD_SIZE={per_node}\n" in script
    with pytest.raises(InputError, match="--sbatch"):
        slurm.check_options(["--wrap=x\nrm"])


@pytest.mark.parametrize(
    ("gpus", "given", "options", "asked"),
    [
        (0, None, [], "--cpus-per-task=1"),  # no more than any node has
        (8, None, [], "--cpus-per-task=4"),
        (8, 12, [], "--cpus-per-task=12"),
        (8, None, ["--cpus-per-task=6"], "--cpus-per-task=6"),
        (8, None, ["--cpus-per-gpu=6"], "--cpus-per-gpu=6"),  # which Slurm does not take beside the other
        (8, 12, ["--cpus-per-task=6"], "--cpus-per-task=12"),  # the later word: of a resume
    ],
)
def test_a_task_has_the_cpus_that_were_asked_for_and_srun_hands_them_on(tmp_path, gpus, given, options, asked):
    job = Job("slurm", gpus, cpus_per_task=given, sbatch=options, command=["python"], cwd="/")
    script = slurm.render(tmp_path, job)
    cpus = [line for line in script.splitlines() if line.startswith("#SBATCH --cpus-per")]
    assert cpus[-1] == f"#SBATCH {asked}"  # Slurm obeys the last of several
    assert len(cpus) == 1 or given
    assert 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"' in script.split("srun --kill")[0]


def test_options_of_slurm_need_slurm(place):
    assert "--backend slurm" in launch("start", "tiny.yaml", "--nodes", "2", code=2)
    done = as_typed("start", "tiny.yaml", "run_id=x", "--backend", "slurm", PATH="/nowhere")
    assert done.returncode == 2 and "sbatch: not installed" in done.stderr and "Traceback" not in done.stderr
    assert not (place / "runs" / "x").exists()


def test_a_size_that_cannot_be_is_refused_before_anything_starts(place, monkeypatch):
    pair = ("parallel.data=fsdp", "train.accumulation=1")
    for arguments, words in (
        (("--processes", "2"), "parallel.data: none is for one process, and there are 2"),
        (("--processes", "3", *pair), "train.batch_rows: 4 rows do not split over 3 ranks"),
        (("--gpus", "2", "--processes", "2", *pair), "give one of them"),
        (("--gpus", "0", *pair), "--gpus: expected at least 1"),
        (("--gpus", "2", "device=cpu", *pair), "--processes 2 starts as many"),
        (("--nodes", "2", *pair), "need --backend slurm"),
        (("--cpus-per-task", "2"), "need --backend slurm"),
        (("--backend", "slurm", "--cpus-per-task", "0"), "--cpus-per-task: expected at least 1"),
        (("--backend", "slurm", "--cpus-per-task", "2", "--sbatch=--cpus-per-gpu=2"), "give one of them"),
    ):
        assert words in launch("start", "tiny.yaml", "run_id=x", *arguments, code=2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "torch sees 1 here" in launch("start", "tiny.yaml", "run_id=x", "--gpus", "2", *pair, code=2)
    assert not (place / "runs").exists()


@pytest.mark.slow
def test_a_run_of_two_processes_stops_as_one_and_leaves_none_behind(place):
    folder = place / "runs" / "pair"
    plan = [*LONG, "parallel.data=ddp", "train.accumulation=1"]
    launch("start", "tiny.yaml", "run_id=pair", "--nodes", "1", "--processes", "2", *plan)
    until(lambda: read_receipt(folder).get("checkpoints"), 200)  # kernels may be compiled first
    assert "stopped at step" in launch("stop", "pair")
    assert "Traceback" not in (folder / "output.log").read_text()  # torchrun saw a clean end
    parallel = read_receipt(folder)["parallel"]
    assert (parallel["data"], parallel["ranks"]) == ("ddp", 2)
    launch("resume", "pair")
    until(lambda: len(read_receipt(folder).get("starts", [])) == 2)
    workers = [
        process for process in psutil.process_iter(["cmdline"]) if "run_id=pair" in (process.info["cmdline"] or [])
    ]
    assert len(workers) >= 3
    assert "killed at step" in launch("stop", "pair", "--now")
    assert not [process for process in workers if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
