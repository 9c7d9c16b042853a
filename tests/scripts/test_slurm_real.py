"""A run under a real Slurm: warned before its limit, saved, requeued, continued, stopped, collected."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_daemons
from tiny_run import ROOT, TINY

from errors import InputError
from scripts.launch import slurm
from scripts.launch.job import Job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("slurm"),  # one cluster at a time
    pytest.mark.skipif(slurm_daemons.missing() is not None, reason=f"Slurm: {slurm_daemons.missing()}"),
]


def until(ready, what, seconds=100):
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.5)
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_preempted_requeued_continued_stopped_and_collected(tmp_path, processes):
    words = random.Random(0)
    (tmp_path / "texts").mkdir()
    for number in range(40):
        text = "\n".join(f"def f{words.randrange(9)}(x): return x * {words.randrange(99)}" for _ in range(8))
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    (tmp_path / "tiny.yaml").write_text(TINY)
    run = tmp_path / "runs" / "cluster"
    with slurm_daemons.slurm() as environment:
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

        def call(*command):
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done
            return done.stdout

        def launch(*arguments):
            return call(sys.executable, "-m", "scripts.launch", *arguments)

        def receipt():
            return json.loads((run / "receipt.json").read_text()) if (run / "receipt.json").exists() else {}

        # a limit of four minutes, warned of 130 s earlier (Slurm: or up to a minute before that): at least 50 s for a
        # busy machine to begin training
        plan = ["train.tokens=4000000", "checkpoint.every_steps=1000", "train.log_every=50"]
        if processes > 1:
            plan += ["parallel.data=fsdp", "train.accumulation=1", "--nodes", "1", "--processes", str(processes)]
        limits = ["--time=4", "--sbatch=--signal=USR1@130"]
        launch("start", "tiny.yaml", "run_id=cluster", *plan, "--backend", "slurm", *limits)
        until(lambda: receipt().get("status") == "preempted", "the warning", seconds=240)
        first = receipt()
        assert first["parallel"]["ranks"] == processes
        assert f"step-{first['step']:08d}" in [path.name for path in (run / "checkpoints").iterdir()]
        waiting = until(lambda: "PENDING" in call("squeue", "-h", "-o", "%T"), "the requeue")
        assert waiting and json.loads(launch("status", "cluster", "--json"))["state"] == "queued"
        job = json.loads((run / "launch.json").read_text())["slurm_job"]
        call("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes otherwise
        until(lambda: "step" in (receipt().get("starts", [{}])[1:] or [{}])[0], "the second start")
        assert receipt()["starts"][1]["after"] == "preempted" and receipt()["starts"][1]["step"] == first["step"]
        launch("stop", "cluster")
        last = receipt()
        assert last["status"] in ("stopped", "preempted") and last["step"] >= first["step"]
        assert call("squeue", "-h").strip() == ""
        assert "everything that was checked matches" in launch("collect", "cluster")
        log = launch("logs", "cluster")
        assert "SIGUSR1: saving" in log and f"continued from step {first['step']}" in log
        steps = [json.loads(line)["step"] for line in Path(run / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a node of one CPU")
def test_each_task_has_the_cpus_that_were_asked_for(tmp_path, monkeypatch):
    names = "os.environ.get('SLURM_CPUS_PER_TASK'), os.environ['OMP_NUM_THREADS']"
    seen = f"import os; print('has', len(os.sched_getaffinity(0)), {names}, flush=True)"
    cases = {
        "default": (Job("slurm"), ["has 1 1 1"]),
        "own": (Job("slurm", cpus_per_task=2), ["has 2 2 2"]),
        "of sbatch": (Job("slurm", sbatch=["--cpus-per-task=2"]), ["has 2 2 2"]),
        "two tasks": (Job("slurm", processes=2), ["has 1 1 1"] * 2),
    }
    with slurm_daemons.slurm() as environment:
        for name in environment:
            monkeypatch.setenv(name, environment[name])
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # which is obeyed
        for name, (job, expected) in cases.items():
            folder = tmp_path / name.replace(" ", "-")
            folder.mkdir()
            job.command, job.cwd = [sys.executable, "-c", seen], str(tmp_path)
            # what srun itself says to its tasks, not what they would inherit from the batch script
            script = slurm.render(folder, job).replace("\nsrun ", "\nenv -u SLURM_CPUS_PER_TASK srun ")
            (folder / "job.sh").write_text(script)
            number = slurm.slurm_command("sbatch", "--parsable", str(folder / "job.sh")).strip()
            until(lambda: slurm.state(number) is None, "the end")  # noqa: B023
            lines = (folder / "output.log").read_text().splitlines()
            assert [line for line in lines if line.startswith("has")] == expected, (name, lines)


def test_the_words_of_a_slurm_that_answers_and_of_one_that_does_not(tmp_path, monkeypatch):
    """What `status` tells apart: a job that is over, one that never was, a machine of another cluster, no answer."""
    with slurm_daemons.slurm() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert slurm.has_node(socket.gethostname()) and slurm.has_node(f"{socket.gethostname()}.some.domain")
        assert not slurm.has_node("node-of-another-cluster")
        assert slurm.state("4242") is None
        script = tmp_path / "job.sh"
        script.write_text("#!/bin/bash\nsleep 600\n")
        job = slurm.slurm_command("sbatch", "--parsable", f"--output={tmp_path}/log", str(script)).strip()
        until(lambda: slurm.state(job) == "RUNNING", "the start")
        slurm.stop(job, now=True)
        until(lambda: slurm.state(job) is None, "the end")
        conf = Path(environment["SLURM_CONF"]).read_text()
        (tmp_path / "slurm.conf").write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1", conf))
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
        for ask in (lambda: slurm.state(job), lambda: slurm.has_node("node-of-another-cluster")):
            with pytest.raises(InputError, match=r"Unable to contact slurm controller|no answer from Slurm") as caught:
                ask()
            assert not isinstance(caught.value, slurm.NotInstalledError)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(slurm.NotInstalledError):
        slurm.state("1")
