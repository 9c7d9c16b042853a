"""metrics.jsonl has neither gap nor duplicate whatever happens to the process or the disk; wandb hurts nobody."""

import builtins
import json
import resource
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from errors import InputError
from training.metrics import Tracker, WandbConfig, read_metrics, truncate_metrics

OFF = WandbConfig(mode="disabled")


def tracker(folder, resume_step=None, wandb=OFF):
    messages: list[str] = []
    return Tracker(folder, "run-1", wandb, {"seed": 1}, resume_step, messages.append), messages


def write(folder, steps):
    writer, messages = tracker(folder)
    for step in steps:
        writer.log(step, {"loss": 1 / step})
    writer.close()
    assert messages == []
    return folder / "metrics.jsonl"


def test_one_flat_json_object_a_line(tmp_path):
    writer, _ = tracker(tmp_path)
    writer.log(3, {"loss": torch.tensor(0.5), "n": np.int64(4), "bad": float("nan"), "worse": torch.tensor(torch.inf)})
    writer.log(3, {"sample": "é\n<b>", "skipped": True, "none": None})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # there before close
    assert [json.loads(line) for line in lines] == [
        {"step": 3, "loss": 0.5, "n": 4, "bad": None, "worse": None},
        {"step": 3, "sample": "é\n<b>", "skipped": True, "none": None},
    ]
    with pytest.raises(TypeError, match="metric loss: "):
        writer.log(4, {"loss": [1.0]})
    writer.close()


def test_floats_come_back_to_the_last_bit(tmp_path):
    writer, _ = tracker(tmp_path)
    values = torch.rand(100, dtype=torch.float64).tolist()
    for step, value in enumerate(values):
        writer.log(step, {"loss": value})
    writer.close()
    assert [record["loss"] for record in read_metrics(tmp_path)] == values


def test_resume_drops_what_lies_beyond_the_checkpoint(tmp_path):
    path = write(tmp_path, range(1, 11))
    writer, messages = tracker(tmp_path, resume_step=6)
    for step in range(7, 13):
        writer.log(step, {"loss": 1 / step})
    writer.close()
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 13))
    assert messages == ["metrics.jsonl: dropped 4 records after step 6, 0 damaged lines"]


def test_a_resumed_file_equals_the_undisturbed_one_byte_for_byte(tmp_path):
    undisturbed = write(tmp_path / "a", range(1, 20)).read_bytes()
    whole = write(tmp_path / "b", range(1, 15)).read_bytes()
    for cut in range(len(whole) - 60, len(whole) + 1):  # killed at any byte of the last two records
        (tmp_path / "b" / "metrics.jsonl").write_bytes(whole[:cut])
        writer, _ = tracker(tmp_path / "b", resume_step=11)
        for step in range(12, 20):
            writer.log(step, {"loss": 1 / step})
        writer.close()
        assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == undisturbed, cut


@pytest.mark.parametrize("junk", [b'{"step": 3, "lo', b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n', b"[" * 9999 + b"\n"])
def test_damaged_lines_are_dropped_and_named(tmp_path, junk):
    path = write(tmp_path, [1, 2])
    good = path.read_bytes()
    path.write_bytes(good + junk)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    messages: list[str] = []
    truncate_metrics(path, 2, messages.append)
    assert path.read_bytes() == good and "1 damaged lines" in messages[0]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_record_that_lacks_only_its_newline_is_kept(tmp_path):
    path = write(tmp_path, [1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    writer, messages = tracker(tmp_path, resume_step=2)
    writer.log(3, {"loss": 1 / 3})
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3] and messages == []
    assert path.read_bytes().startswith(whole)


def test_nothing_to_drop_leaves_the_file_alone(tmp_path):
    path = write(tmp_path, [1, 2])
    before = path.stat()
    truncate_metrics(path, 2, pytest.fail)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_missing_file_on_resume_is_said(tmp_path):
    _, messages = tracker(tmp_path, resume_step=5)
    assert len(messages) == 1 and "missing" in messages[0] and read_metrics(tmp_path) == []


def test_a_full_disk_loses_no_record_and_leaves_no_half_line(tmp_path):
    """A file size limit cuts a line in the middle, for real; room comes back later."""
    writer, messages = tracker(tmp_path)
    writer.log(1, {"loss": 0.5})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        for step in (2, 3):
            writer.log(step, {"loss": 0.5})
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(messages) == 1 and "not written" in messages[0]
    writer.log(4, {"loss": 0.5})
    writer.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert len(messages) == 2 and "nothing is lost" in messages[1]


# wandb


class FakeRun:
    def __init__(self, fail_at: int | None = None, starting_step: int = 0) -> None:
        self.logged: list[tuple[int, dict]] = []
        self.summary: dict = {}
        self.finished = 0
        self.fail_at = fail_at
        self.starting_step = starting_step

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, metrics: dict, step: int) -> None:
        if step == self.fail_at:
            raise RuntimeError("server gone\nlong story")
        self.logged.append((step, metrics))

    def finish(self, **_: object) -> None:
        self.finished += 1


def fake_wandb(monkeypatch, run: FakeRun | Exception):
    calls: list[dict] = []

    def init(**arguments: object) -> FakeRun:
        calls.append(arguments)
        if isinstance(run, Exception):
            raise run
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **k: k))
    return calls


def test_wandb_gets_what_the_file_gets(tmp_path, monkeypatch):
    run = FakeRun()
    calls = fake_wandb(monkeypatch, run)
    writer, messages = tracker(tmp_path, wandb=WandbConfig(mode="offline", project="p", tags=["a"]))
    writer.log(1, {"loss": 0.5, "bad": float("nan")})
    writer.close({"val": torch.tensor(2.0)})
    assert run.logged == [(1, {"step": 1, "loss": 0.5})] and run.summary == {"val": 2.0} and run.finished == 1
    assert calls[0]["id"] == "run-1" and calls[0]["mode"] == "offline" and calls[0]["project"] == "p"
    assert calls[0]["config"] == {"seed": 1} and messages == []


@pytest.mark.parametrize("failure", [RuntimeError("no\nway"), OSError("disk"), ImportError("no wandb")])
def test_wandb_that_cannot_start_is_said_once(tmp_path, monkeypatch, failure):
    fake_wandb(monkeypatch, failure)
    writer, messages = tracker(tmp_path, wandb=WandbConfig())
    for step in (1, 2):
        writer.log(step, {"loss": 0.5})
    writer.close({"x": 1})
    assert len(messages) == 1 and messages[0].startswith(f"wandb: {type(failure).__name__}: ")
    assert "\n" not in messages[0] and len(read_metrics(tmp_path)) == 2


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    real = builtins.__import__

    def refusing(name, *arguments, **keywords):
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refusing)
    writer, messages = tracker(tmp_path, wandb=WandbConfig())
    writer.log(1, {"loss": 0.5})
    writer.close()
    assert "No module named 'wandb'" in messages[0] and len(read_metrics(tmp_path)) == 1


def test_wandb_that_breaks_on_the_way(tmp_path, monkeypatch):
    run = FakeRun(fail_at=2)
    fake_wandb(monkeypatch, run)
    writer, messages = tracker(tmp_path, wandb=WandbConfig())
    for step in (1, 2, 3, 4):
        writer.log(step, {"loss": 0.5})
    writer.close()
    assert [step for step, _ in run.logged] == [1] and run.finished == 1
    assert messages == ["wandb: RuntimeError: server gone; the run goes on with metrics.jsonl alone"]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("mode", "known", "expected"), [("offline", 0, [1, 2, 3, 4]), ("online", 3, [3, 4])])
def test_a_resumed_wandb_run_has_no_gap_and_no_duplicate(tmp_path, monkeypatch, mode, known, expected):
    """offline: a new folder with the whole history, the old ones gone; online: what the server lacks."""
    write(tmp_path, range(1, 7))
    old = tmp_path / "wandb" / "offline-run-20260101_000000-run-1"
    old.mkdir(parents=True)
    run = FakeRun(starting_step=known)
    calls = fake_wandb(monkeypatch, run)
    writer, _ = tracker(tmp_path, resume_step=3, wandb=WandbConfig(mode=mode))
    writer.log(4, {"loss": 0.25})
    writer.close()
    assert [step for step, _ in run.logged] == expected
    assert calls[0]["resume"] == ("allow" if mode == "online" else None)
    assert old.exists() == (mode == "online")


def test_real_wandb_offline_needs_no_network_and_no_account(tmp_path):
    """The real package in a process without home, key or reachable server."""
    script = """
        import sys, time
        from training.metrics import Tracker, WandbConfig
        for resume in (None, 2):
            tracker = Tracker(sys.argv[1], "run-1", WandbConfig(), {"seed": 1}, resume, print)
            for step in range((resume or 0) + 1, 5):
                tracker.log(step, {"loss": 1 / step})
            tracker.close({"val": 1.0})
            time.sleep(1.0)  # wandb names its folders by the second
    """
    environment = {"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    environment["PYTHONPATH"] = ":".join(path for path in sys.path if path)
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines() == ["metrics.jsonl: dropped 2 records after step 2, 0 damaged lines"]
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-run-1.wandb")
    assert wandb_history(file) == [(step, str(1 / step).removesuffix(".0")) for step in (1, 2, 3, 4)]


def wandb_history(file):
    """(step, loss) of each history record. The file is a leveldb log of less than one block: 7 bytes, then records of
    4 bytes checksum, 2 bytes length, 1 byte kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found = file.read_bytes(), 7, []
    while at < len(data):
        end = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little")
        record = Record()
        record.ParseFromString(data[at + 7 : end])
        if record.WhichOneof("record_type") == "history":
            values = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            found.append((record.history.step.num, values["loss"]))
        at = end
    return found


def test_importing_training_loads_no_wandb():
    script = "import sys, training.metrics, training.receipt, training.checkpoint; print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(("values", "key"), [({"mode": "of"}, "wandb.mode"), ({"project": " "}, "wandb.project")])
def test_bad_config_names_its_key(values, key):
    with pytest.raises(InputError, match=f"^{key}: "):
        WandbConfig(**values).validate()
