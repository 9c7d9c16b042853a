"""How many runs of a grid stand side by side, and on what: cores that this process may use, and GPUs, one for each."""

import os
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from ablate_runs import GRID, ablate, make_grid, use_stand_ins

from errors import InputError
from scripts.ablate import slurm
from training.config import load_config

# As a run sees it, and from when to when.
NOTED = """
import os, time
began = time.monotonic()
time.sleep(0.4)
noted = f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {began} {time.monotonic()}"
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    use_stand_ins(monkeypatch, before=NOTED, after='(folder / "gpu").write_text(noted)')
    return make_grid(tmp_path, monkeypatch)


def machine_with(monkeypatch, gpus, cores=8, visible=None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def noted():
    """(entry, began, ended) of every run."""
    lines = [path.read_text().split(" ") for path in Path("ablations/g/runs").glob("*/gpu")]
    assert len(lines) == 6
    return [(gpu, float(began), float(ended)) for gpu, began, ended in lines]


def test_by_default_each_gpu_has_one_run_at_a_time(grid, monkeypatch, capsys):
    machine_with(monkeypatch, gpus=2)
    code, shown = ablate(monkeypatch, capsys, jobs=None)
    assert code == 0 and "2 at a time with 1 thread each, a GPU for each (0, 1);" in shown
    found = noted()
    assert set(Counter(gpu for gpu, _, _ in found)) == {"0", "1"}
    for (gpu, began, ended), (other, start, end) in combinations(found, 2):
        assert gpu != other or ended < start or end < began


def test_more_jobs_than_gpus_go_round_them_and_a_list_that_is_there_is_kept(grid, monkeypatch, capsys):
    machine_with(monkeypatch, gpus=2, visible="GPU-8e2f, 3")
    code, shown = ablate(monkeypatch, capsys, jobs=6)
    assert code == 0 and "6 at a time with 1 thread each, on GPUs GPU-8e2f, 3 in turn;" in shown
    assert Counter(gpu for gpu, _, _ in noted()) == {"GPU-8e2f": 3, "3": 3}


def test_what_torch_does_not_see_is_not_given_away(grid, monkeypatch, capsys):
    machine_with(monkeypatch, gpus=1, visible="3,7")  # CUDA ends the list at the first entry that is not there
    assert (
        "1 at a time with 1 thread each, a GPU for each (3);" in ablate(monkeypatch, capsys, "--dry-run", jobs=None)[1]
    )


def test_runs_on_the_processor_have_the_cores_of_this_process(grid, monkeypatch, capsys):
    Path("g.yaml").write_text(yaml.safe_dump({**GRID, "overrides": {**GRID["overrides"], "device": "cpu"}}))
    machine_with(monkeypatch, gpus=2, cores=3)
    code, shown = ablate(monkeypatch, capsys, jobs=None)
    assert code == 0 and "3 at a time with 1 thread each, on the processor;" in shown
    assert {gpu for gpu, _, _ in noted()} == {"None"}
    leave_threads_open()
    Path("ablations").rename("first")
    assert "2 at a time with 1 thread each" in ablate(monkeypatch, capsys, "--dry-run", jobs=2)[1]
    machine_with(monkeypatch, gpus=2, cores=5)
    assert "2 at a time with 2 threads each" in ablate(monkeypatch, capsys, "--dry-run", jobs=2)[1]


def leave_threads_open():
    Path("tiny.yaml").write_text(Path("tiny.yaml").read_text().replace("threads: 1", ""))


def test_what_slurm_places_is_not_of_this_machine(grid, monkeypatch, capsys):
    """Neither its GPUs nor its cores: how many threads a run has is decided where it runs."""
    machine_with(monkeypatch, gpus=2, cores=8)
    shown = ablate(monkeypatch, capsys, "--launcher=slurm", "--dry-run", jobs=None)[1]
    assert "one job per run with 1 thread each, where Slurm puts it;" in shown  # as its config says
    leave_threads_open()
    shown = ablate(monkeypatch, capsys, "--launcher=slurm", "--sbatch=--cpus-per-task=8", "--dry-run", jobs=None)[1]
    assert "one job per run with as many threads as CPUs, where Slurm puts it;" in shown
    with pytest.raises(InputError, match="--jobs: Slurm runs as many at a time as it has room for"):
        ablate(monkeypatch, capsys, "--launcher=slurm", "--dry-run", jobs=2)


@pytest.mark.parametrize(
    ("options", "cpus"),
    [
        ([], ["1"]),
        (["--gpus-per-node=1"], ["4"]),
        (["--gres=gpu:a100:1"], ["4"]),
        (["--gpus=1", "--cpus-per-task=8"], ["8"]),
        (["--gpus=1", "--cpus-per-gpu=8"], []),
    ],
)
def test_a_job_asks_for_the_cpus_that_a_run_needs(grid, monkeypatch, capsys, options, cpus):
    monkeypatch.setattr(slurm.slurm, "slurm_command", lambda *_: "1")
    leave_threads_open()
    assert ablate(monkeypatch, capsys, "--launcher=slurm", *(f"--sbatch={o}" for o in options), jobs=None)[0] == 0
    folder = Path("ablations/g/runs/none-s0")
    script = (folder / "job.sh").read_text()
    assert re.findall(r"^#SBATCH --cpus-per-task=(\d+)$", script, flags=re.M) == cpus
    assert load_config(folder / "config.yaml").threads is None  # what it is given there is not known here


def test_a_grid_that_slurm_began_goes_on_here(grid, monkeypatch, capsys):
    """Its runs keep their config, and here their threads are a share of the cores all the same."""
    monkeypatch.setattr(slurm.slurm, "slurm_command", lambda *_: "1")
    leave_threads_open()
    ablate(monkeypatch, capsys, "--launcher=slurm", jobs=None)
    note = '(folder / "threads").write_text(os.environ["OMP_NUM_THREADS"])'
    use_stand_ins(monkeypatch, after=note)
    machine_with(monkeypatch, gpus=0, cores=8)
    code, shown = ablate(monkeypatch, capsys, jobs=2)
    assert code == 0 and "2 at a time with 4 threads each" in shown
    assert {path.read_text() for path in Path("ablations/g/runs").glob("*/threads")} == {"4"}
    assert {load_config(path).threads for path in Path("ablations/g/runs").glob("*/config.yaml")} == {None}
    assert ablate(monkeypatch, capsys, "--report", jobs=None)[0] == 0
