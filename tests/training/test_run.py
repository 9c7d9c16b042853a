"""Which folder a run lives in: continue, start, or refuse."""

import json

import pytest

from errors import InputError
from training.config import RunConfig
from training.run import choose_run, find_checkpoint, process_identity


@pytest.fixture
def make(tmp_path):
    def make(run_id, config=None, status="running", process=None):
        config = config or RunConfig()
        folder = tmp_path / run_id
        folder.mkdir()
        (folder / "config.yaml").write_text(config.to_yaml())
        receipt = {"status": status, "config_sha256": config.sha256, "process": process or {"pid": 1, "host": "x"}}
        (folder / "receipt.json").write_text(json.dumps(receipt))
        return folder

    make.root = tmp_path
    return make


def choose(make, **keys):
    return choose_run(RunConfig(**keys), "demo", make.root)


def test_starts_a_new_folder_and_creates_nothing(make):
    folder = choose(make)
    assert folder.run_id.startswith("demo-") and not folder.resumes and not folder.path.exists()


def test_auto_continues_the_newest_unfinished_run_of_this_config_only(make):
    make("done", status="finished")
    make("other", RunConfig(seed=9), status="stopped")
    assert not choose(make).resumes
    make("mine", status="stopped")
    assert choose(make).run_id == "mine" and choose(make).resumes
    assert not choose(make, resume="never").resumes


def test_a_run_whose_process_is_alive_is_left_alone(make):
    make("busy", process=process_identity())
    assert not choose(make).resumes
    with pytest.raises(InputError, match="is running it"):
        choose(make, run_id="busy")


def test_a_recycled_pid_is_not_the_owner(make):
    make("stale", process=process_identity() | {"started": "1"})
    assert choose(make).run_id == "stale"


def test_a_different_config_names_the_keys(make):
    make("old", RunConfig(seed=3), status="stopped")
    with pytest.raises(InputError, match=r"different config \(seed\)"):
        choose(make, run_id="old")


def test_finished_runs_missing_runs_and_taken_names(make):
    make("done", status="finished")
    with pytest.raises(InputError, match=r"is finished.*init_from=done"):
        choose(make, run_id="done")
    with pytest.raises(InputError, match="did you mean 'done'"):
        choose(make, resume="dome")
    with pytest.raises(InputError, match="exists already"):
        choose(make, run_id="done", resume="never")


def test_init_from_needs_a_valid_checkpoint(make):
    make("empty")
    with pytest.raises(InputError, match="no valid checkpoint"):
        find_checkpoint("empty", make.root)
    with pytest.raises(InputError, match=r"no run or checkpoint emtpy.*did you mean 'empty'"):
        find_checkpoint("emtpy", make.root)
