"""Which folder a run lives in: continue, start, or refuse."""

import json

import pytest

from errors import InputError, Stopped
from training.config import RunConfig
from training.ownership import process_identity
from training.run import choose_run, find_checkpoint


@pytest.fixture
def make(tmp_path):
    def make(run_id, config=None, status="running", process=None):
        config = config or RunConfig()
        folder = tmp_path / run_id
        folder.mkdir()
        (folder / "config.yaml").write_text(config.to_yaml())
        (folder / "receipt.json").write_text(json.dumps({"status": status, "config_sha256": config.sha256}))
        if process:
            (folder / "owner.json").write_text(json.dumps(process))
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


def test_one_process_claims_a_folder_and_a_second_start_is_refused(make):
    first, second = choose(make, run_id="new"), choose(make, run_id="new")
    owner = first.claim(RunConfig())
    with pytest.raises(InputError, match="another process is starting it"):
        second.claim(RunConfig())
    with pytest.raises(InputError, match=r"process \d+ on .* is running it"):
        choose(make, run_id="new")
    owner.release()
    again = choose(make, run_id="new")
    assert again.known and not again.resumes
    again.claim(RunConfig()).release()


def test_what_changed_between_choosing_and_claiming_is_judged_again(make):
    make("x", status="stopped")
    folder = choose(make, run_id="x")
    receipt = make.root / "x" / "receipt.json"
    receipt.write_text(json.dumps({"status": "finished"}))
    with pytest.raises(InputError, match="is finished"):
        folder.claim(RunConfig())
    receipt.write_text(json.dumps({"status": "stopped"}))
    folder.claim(RunConfig()).release()  # the refused claim kept nothing


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".owner.json.7.tmp", ".config.yaml.7.tmp"]])
def test_a_kill_right_after_the_start_leaves_the_id_usable(make, left):
    folder = make.root / "dead"
    folder.mkdir()
    for name in left:
        (folder / name).write_text("half")
    chosen = choose(make, run_id="dead")
    chosen.claim(RunConfig()).release()
    assert not chosen.resumes and {path.name for path in folder.iterdir()} == {".lock"}


def test_a_foreign_folder_is_no_run(make):
    (make.root / "photos").mkdir()
    (make.root / "photos" / "cat.png").write_text("x")
    with pytest.raises(InputError, match=r"no config.yaml, so this is no run"):
        choose(make, run_id="photos")


def test_a_prepared_folder_is_begun_and_one_with_checkpoints_is_continued(make):
    folder = make.root / "prepared"
    folder.mkdir()
    (folder / "config.yaml").write_text(RunConfig().to_yaml())
    assert not choose(make, run_id="prepared").resumes
    (folder / "checkpoints").mkdir()
    assert choose(make, run_id="prepared").resumes


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


def again(make, **keys):
    return choose_run(RunConfig(**keys), "demo", make.root, again=True)


@pytest.mark.parametrize("resume", ["auto", "never", "mine"])
def test_a_job_that_is_started_again_continues_what_it_began(make, resume):
    make("older", status="stopped")
    make("mine", status="running")
    found = again(make, resume=resume)
    assert found.run_id == "mine" and found.resumes
    assert again(make, resume="never", run_id="older").run_id == "older"


def test_a_job_that_is_started_again_before_it_began_a_run_begins_one(make):
    make("other", RunConfig(seed=9), status="stopped")
    assert not again(make).resumes
    assert again(make, resume="never", run_id="new").run_id == "new"


@pytest.mark.parametrize("keys", [{}, {"resume": "never"}, {"run_id": "done"}])
def test_a_job_that_is_started_again_after_its_end_does_nothing(make, keys):
    make("older", status="stopped")
    make("done", status="finished")
    with pytest.raises(Stopped, match="done is finished"):
        again(make, **keys)


def test_a_run_on_another_machine_is_named_and_never_begun_anew_by_a_restart(make):
    make("away", process=process_identity() | {"host": "elsewhere"})
    found = choose(make)
    assert not found.resumes and "away, a run of this config, is left alone" in found.notes[0]
    assert "scripts.launch resume away --take-over" in found.notes[0]
    running = r"process .* on elsewhere is running it; .*resume away --take-over.*grid: remove .*away/owner.json"
    with pytest.raises(InputError, match=running):
        again(make)
