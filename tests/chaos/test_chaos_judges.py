"""The judges of the chaos suite: what they compare, they can also find different."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.chaos.__main__ import report
from scripts.chaos.disk import one_line
from scripts.chaos.faults import JUMPS, HalfWriter, jumping
from scripts.chaos.kills import Quota
from scripts.chaos.mishaps import refused_cleanly
from scripts.chaos.pickles import Payload
from scripts.chaos.place import Tally, difference


@pytest.fixture
def pair(tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000005"
    (checkpoint / "tensors").mkdir(parents=True)
    save_file({"model.a": torch.tensor([1.0, 0.0, torch.nan])}, checkpoint / "tensors" / "shard.safetensors")
    (checkpoint / "state.json").write_text(json.dumps({"step": 5, "state": {"run": {"recent": [[1.5, 2.0]]}}}))
    record = {"step": 5, "loss/lm": 2.5, "tokens_per_second": 9.0}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    receipt = {"status": "finished", "step": 5, "tokens": 50, "skipped_steps": 1, "stp": {"live_tokens": [[10, 50]]}}
    (run / "receipt.json").write_text(json.dumps(receipt))
    shutil.copytree(run, tmp_path / "reference")
    return run, tmp_path / "reference"


def test_equal_runs_are_equal_whatever_their_speed(pair):
    run, reference = pair
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("9.0", "1.0"))
    assert difference(run, reference) is None


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        ("metrics.jsonl", "2.5", "2.5000000000000004", "metrics"),
        ("metrics.jsonl", "\n", '\n{"step": 6}\n', "metrics"),
        ("receipt.json", '"finished"', '"running"', "status"),
        ("receipt.json", "[[10, 50]]", "[[10, 49]]", "live tokens"),
        ("receipt.json", '"skipped_steps": 1', '"skipped_steps": 0', "skipped_steps"),
        ("checkpoints/step-00000005/state.json", "1.5", "1.6", "state.json"),
    ],
)
def test_any_difference_in_the_books_is_found(pair, file, old, new, named):
    run, reference = pair
    text = (run / file).read_text()
    assert old in text
    (run / file).write_text(text.replace(old, new))
    assert named in difference(run, reference)


@pytest.mark.parametrize(("index", "value"), [(0, 1.0000001), (1, -0.0), (2, 0.0)])
def test_one_bit_of_one_weight_is_found(pair, index, value):
    run, reference = pair
    file = next((run / "checkpoints").glob("*/tensors/*"))
    tensors = load_file(file)
    tensors["model.a"][index] = value
    save_file(tensors, file)
    assert difference(run, reference) == "tensor model.a"


def test_refusals():
    assert refused_cleanly(2, "error: key: wrong\n") and not refused_cleanly(1, "error: key: wrong\n")
    assert not refused_cleanly(2, "") and not refused_cleanly(2, "error: a\nerror: b\n")
    assert not refused_cleanly(2, "Traceback (most recent call last):\nerror: x")
    assert one_line(1, "step 3\nerror: the disk\n") and not one_line(1, "Traceback\nerror: x") and not one_line(1, "x")


def test_the_last_line_counts_and_failures_fail():
    tally = Tally()
    for kind in ("continued", "damage", "input"):
        tally.add(kind, "g", True)
    assert tally.passed
    assert tally.line() == (
        "chaos: 1 undisturbed-identical of 1 continued, 1 of 1 damages detected, 1 of 1 bad inputs clean"
    )
    tally.add("damage", "g", False, "not noticed")
    assert not tally.passed and "1 of 2 damages" in tally.line() and tally.failures == ["g: not noticed"]
    other = Tally()
    other.add("damage", "g", True)
    other.note("g", kills=3)
    other.merge(json.loads(json.dumps(dataclasses.asdict(tally))))
    assert "2 of 3 damages" in other.line() and other.groups["g"]["damage"] == [2, 3] and not other.passed
    page = report(other, "nightly", 0)
    assert "| g | 1 / 1 | 2 / 3 | 1 / 1 | kills: 3 |" in page and "FAILED: g: not noticed" in page


def test_a_third_of_the_kills_must_hit_a_save():
    quota = Quota(6, share_during_save=1 / 3)
    for _ in range(6):
        quota.count(during_save=False)
    assert quota.open
    for _ in range(3):
        quota.count(during_save=True)
    assert not quota.open


def test_the_payload_is_armed(tmp_path):
    marker = tmp_path / "executed"
    function, arguments = Payload(marker).__reduce__()
    function(*arguments)
    assert marker.read_text() == "executed"


def test_the_clock_jumps():
    ticks = jumping(lambda: 100.0)
    assert [ticks() - 100.0 for _ in JUMPS] == list(JUMPS) and min(JUMPS) < 0 < max(JUMPS)
    code = "from scripts.chaos.faults import let_clocks_jump; let_clocks_jump(); from training.progress import"
    code += " SpeedMeter; m = SpeedMeter(9, 1, 1); a = [m._clock() for _ in range(9)]; print(max(a) - min(a) > 1e7)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout == "True\n" and time.monotonic() - began < 60, done


def test_a_writer_dies_with_half_a_line(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr("os.kill", lambda pid, number: killed.append(number))
    with (tmp_path / "metrics.jsonl").open("ab", buffering=0) as file:
        writer = HalfWriter(file, 2)
        for record in (b"one\n", b"two\n"):
            assert writer.write(record) == 4
        assert not killed and writer.fileno() == file.fileno()
        writer.write(b"three\n")
    assert killed == [signal.SIGKILL] and (tmp_path / "metrics.jsonl").read_bytes().startswith(b"one\ntwo\nthr")
