"""What the launcher makes of runs without a process here: their receipts, notes of owners, and the word of Slurm."""

import json
import os
import shutil
import subprocess

import psutil
import pytest
from launch_cases import launch, write_run
from tiny_run import make_place, start

from errors import InputError
from scripts.launch import __main__ as command
from scripts.launch import slurm
from scripts.launch import status as status_module
from scripts.launch.collect import verify_run
from scripts.launch.job import Job
from scripts.launch.status import describe
from training.ownership import live_owner, process_identity
from training.receipt import read_receipt

INVALID = "slurm_load_jobs error: Invalid job id specified"
DOWN = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def test_states_without_a_process(tmp_path):
    assert describe(write_run(tmp_path / "a", status="running")).state == "killed"
    assert read_receipt(tmp_path / "a")["status"] == "killed"
    assert describe(write_run(tmp_path / "b", status="crashed", reason="Traceback\nValueError: x")).state == "crashed"
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.yaml").write_text("")
    assert describe(tmp_path / "d").state == "new"


def test_a_gate_that_is_closed_says_when_it_opens(tmp_path):
    status = describe(write_run(tmp_path / "a", status="stopped", tokens=10))
    assert not status.stp_live and "opens at token" in status.stp


def slurm_says(monkeypatch, answers):
    """answers: job id -> squeue's word for it, or an error. node9 is one of its machines. Returns what was asked."""
    asked = []

    def answer(*command):
        asked.append(command)
        if command[:3] == ("scontrol", "show", "node"):
            said = "NodeName=node9" if command[3] == "node9" else InputError(f"scontrol: Node {command[3]} not found")
        else:
            job = command[2].removeprefix("--jobs=") if command[0] == "squeue" else ""
            said = answers.get(job, InputError(f"squeue: {INVALID}"))
        if isinstance(said, Exception):
            raise said
        return said + "\n"

    monkeypatch.setattr(slurm, "slurm_command", answer)
    return asked


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("RUNNING", "running"),
        (InputError(f"squeue: {DOWN}"), "running"),
        (slurm.NotInstalledError("squeue: not installed here"), "running"),
        (InputError(f"squeue: {INVALID}"), "killed"),
        ("", "killed"),
        ("OUT_OF_MEMORY", "killed"),
    ],
    ids=str,
)
def test_slurm_knows_of_an_owner_on_another_node_whether_it_is_dead(place, monkeypatch, said, state):
    folder = write_run(place / "runs" / "c", status="running", tokens=10, stp={"live_tokens": [[5, 10]]})
    owner = {"pid": 3, "host": "node9.cluster", "slurm_job": "8"}
    (folder / "owner.json").write_text(json.dumps(owner))
    slurm_says(monkeypatch, {"8": said})
    status = describe(folder)
    alive = state == "running"
    assert status.state == state and status.stp_live and (folder / "owner.json").exists() == alive
    assert status.owner == ("process 3 on node9.cluster (Slurm job 8)" if alive else None)
    assert read_receipt(folder)["status"] == state
    if alive:
        assert "is running (process 3 on node9" in launch("resume", "c", code=2)
    else:
        begun = []
        monkeypatch.setattr(command, "start_local", lambda folder, job: begun.append(job))
        monkeypatch.setattr(command, "_say_where", lambda *_: None)
        launch("resume", "c")
        assert len(begun) == 1


def test_a_dead_owner_of_another_cluster_or_without_a_job_is_not_slurms_to_judge(tmp_path, monkeypatch):
    asked = slurm_says(monkeypatch, {})
    for number, owner in enumerate(({"host": "elsewhere", "slurm_job": "8"}, {"host": "node9", "slurm_job": None})):
        folder = write_run(tmp_path / str(number), status="running")
        (folder / "owner.json").write_text(json.dumps({"pid": 3, **owner}))
        assert describe(folder).state == "running" and (folder / "owner.json").exists()
    assert ("scontrol", "show", "node", "elsewhere") in asked


def test_a_note_of_a_dead_job_does_not_stand_in_the_way_of_the_one_that_waits(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a", status="running")
    (folder / "owner.json").write_text(json.dumps({"pid": 3, "host": "node9", "slurm_job": "8"}))
    Job("slurm", slurm_job="9").write(folder)
    slurm_says(monkeypatch, {"9": "PENDING"})
    assert describe(folder).state == "queued" and not (folder / "owner.json").exists()
    assert read_receipt(folder)["status"] == "killed"


def test_a_note_that_changed_hands_meanwhile_is_kept(tmp_path):
    """Between the answer of Slurm and the lock another job began."""
    folder = write_run(tmp_path / "a", status="running")
    new = {"pid": 4, "host": "node8", "slurm_job": "9"}
    (folder / "owner.json").write_text(json.dumps(new))
    assert not status_module._bury(folder, {"pid": 3, "host": "node9", "slurm_job": "8"})
    assert live_owner(folder) == new and read_receipt(folder)["status"] == "running"


def test_a_slurm_that_does_not_answer_ends_nothing(place, monkeypatch):
    waiting = write_run(place / "runs" / "new")
    (waiting / "receipt.json").unlink()
    stopped = write_run(place / "runs" / "stopped", status="preempted")
    for folder in (waiting, stopped):
        Job("slurm", slurm_job="8").write(folder)
    asked = slurm_says(monkeypatch, {"8": InputError(f"squeue: {DOWN}")})
    for folder in (waiting, stopped):
        status = describe(folder)
        assert status.state == "unknown" and status.is_alive and "Unable to contact slurm" in status.reason
        assert "Unable to contact" in launch("stop", folder.name, code=2)
        assert "is unknown" in (said := launch("resume", folder.name, code=2)) and "Unable to contact" in said
        assert "unknown" in launch("status", folder.name)
    assert not [line for line in asked if line[0] in ("sbatch", "scancel")]
    slurm_says(monkeypatch, {"8": "PENDING"})
    assert describe(waiting).state == "queued"
    slurm_says(monkeypatch, {"8": slurm.NotInstalledError("squeue: not installed here")})
    assert (describe(waiting).state, describe(stopped).state) == ("failed", "preempted")


def test_a_run_of_slurm_is_resumed_here_and_there_again(place, monkeypatch):
    folder = write_run(place / "runs" / "a", status="preempted")
    size = {"nodes": 4, "processes": 1, "cpus_per_task": 3, "time_limit": "1:00:00"}
    Job("slurm", **size, sbatch=["--partition=big"], slurm_job="8").write(folder)
    slurm_says(monkeypatch, {})
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda line, **_: started.append(line) or psutil.Process())
    said = launch("resume", "a", "--backend", "local")
    assert len(started) == 1 and f"(process {os.getpid()}," in said and "Slurm job" not in said
    job = Job.read(folder)
    assert (job.backend, job.nodes, job.sbatch, job.time_limit, job.slurm_job) == ("local", 1, [], None, None)
    assert job.cpus_per_task is None
    job.process = {}
    job.write(folder)
    assert "need --backend slurm" in launch("resume", "a", "--time", "2:00:00", code=2)
    asked = slurm_says(monkeypatch, {"": "10"})
    options = ["--backend", "slurm", "--time", "2:00:00", "--sbatch=--partition=small", "--cpus-per-task", "2"]
    assert "(Slurm job 10," in launch("resume", "a", *options)
    assert "#SBATCH --time=2:00:00\n#SBATCH --partition=small\n" in (folder / "job.sh").read_text()
    assert asked[-1][0] == "sbatch"
    launch("resume", "a")  # what is not given again stays
    job = Job.read(folder)
    assert (job.sbatch, job.time_limit, job.slurm_job) == (["--partition=small"], "2:00:00", "10")
    assert job.cpus_per_task == 2
    launch("resume", "a", "--sbatch=--cpus-per-task=6")
    assert "#SBATCH --cpus-per-task=2\n" not in (folder / "job.sh").read_text()


def test_a_checkpoint_that_a_living_run_prunes_meanwhile_is_no_fault(place, monkeypatch):
    start(monkeypatch, "run_id=a", "train.tokens=900", "checkpoint.every_steps=2")
    folder = place / "runs" / "a"
    receipt = read_receipt(folder)
    gone, kept = (entry["folder"] for entry in receipt["checkpoints"])
    shutil.rmtree(folder / "checkpoints" / gone)
    shutil.copytree(folder / "checkpoints" / kept, folder / "checkpoints" / "step-00000099")
    found = {check.what: check for check in verify_run(folder, receipt, alive=True)}
    assert found[gone].ok is None and found[gone].note == "pruned meanwhile" and found[kept].ok
    assert found["step-00000099"].ok is None and found["step-00000099"].note.endswith("after the receipt was read")
    found = {check.what: check for check in verify_run(folder, receipt)}
    assert found[gone].ok is False and found["step-00000099"].ok is None and found[kept].ok
    (folder / "owner.json").write_text(json.dumps(process_identity()))
    said = launch("collect", "a")
    assert "pruned meanwhile" in said and "DIFFERS" not in said
    (folder / "checkpoints" / kept / "state.json").write_text("{}")
    assert "DIFFERS" in launch("collect", "a", code=1)  # damage is one, alive or not
