"""The receipt is whole at every moment, keeps its keys, and counts live tokens exactly."""

import json
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import InputError
from training.receipt import STATUSES, Receipt, read_receipt

GIT = {"commit": "abc", "dirty_sha256": None}


def start(folder, **fields):
    messages: list[str] = []
    clock = fields.pop("clock", lambda: 0.0)
    receipt = Receipt.start(
        folder, "run-1", "c0ffee", git=GIT, environment={"torch": "2"}, message=messages.append, clock=clock, **fields
    )
    return receipt, messages


def on_disk(folder) -> dict:
    return json.loads((Path(folder) / "receipt.json").read_text())


def test_every_promised_key_is_there_from_the_start(tmp_path):
    start(tmp_path / "run", data={"manifest_sha256": "d"}, stp={"enabled": True, "boundaries": [0, "final"]})
    content = on_disk(tmp_path / "run")
    assert content["status"] == "running" and content["run_id"] == "run-1" and content["config_sha256"] == "c0ffee"
    assert content["git"] == GIT and content["data"] == {"manifest_sha256": "d"} and content["tokens"] == 0
    assert set(content["metrics"]) == {"val_bits_per_byte", "unigram_bits_per_byte", "tokens_per_second", "gemm_share"}
    assert content["stp"] == {"enabled": True, "boundaries": [0, "final"], "live_tokens": []}
    assert set(content["preflight"]) == {"ok", "seconds", "boundaries", "checks"}


def test_updates_merge_and_lists_are_replaced(tmp_path):
    receipt, _ = start(tmp_path)
    receipt.update(metrics={"val_bits_per_byte": 2.5}, preflight={"boundaries": [{"index": 0}]})
    receipt.update(metrics={"gemm_share": float("nan")}, preflight={"boundaries": [{"index": 1}], "ok": True})
    content = on_disk(tmp_path)
    assert content["metrics"]["val_bits_per_byte"] == 2.5 and content["metrics"]["gemm_share"] is None
    assert content["preflight"]["boundaries"] == [{"index": 1}] and content["preflight"]["ok"] is True


@pytest.mark.parametrize("status", [name for name in STATUSES if name != "running"])
def test_finish(tmp_path, status):
    receipt, _ = start(tmp_path)
    receipt.finish(status, "because", metrics={"val_bits_per_byte": 1.0})
    content = on_disk(tmp_path)
    assert content["status"] == status and content["reason"] == "because" and content["ended"] is not None
    assert content["metrics"]["val_bits_per_byte"] == 1.0


def test_finish_needs_a_known_status(tmp_path):
    receipt, _ = start(tmp_path)
    with pytest.raises(InputError, match="did you mean 'finished'"):
        receipt.finish("finishd")
    with pytest.raises(InputError):
        receipt.finish("running")


def test_a_reader_never_sees_half_a_receipt(tmp_path):
    receipt, _ = start(tmp_path)
    stop = threading.Event()
    broken: list[str] = []

    def read() -> None:
        while not stop.is_set():
            text = (tmp_path / "receipt.json").read_text()
            if not text.endswith("}\n") or json.loads(text)["kernels"].get("x", "") != "y" * json.loads(text)["step"]:
                broken.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    for size in range(1, 150):
        receipt.content["step"] = size
        receipt.update(kernels={"x": "y" * size})
    stop.set()
    reader.join()
    assert broken == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_receipt_and_is_said_once(tmp_path, monkeypatch, call):
    receipt, messages = start(tmp_path)
    before = (tmp_path / "receipt.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync", full) if call == "fsync" else (Path, "replace", full)))
        receipt.update(tokens=5)
        receipt.update(tokens=6)
        assert (tmp_path / "receipt.json").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["receipt.json"], "no temporary is left"
    assert len(messages) == 1 and "No space left" in messages[0]
    receipt.update()
    assert on_disk(tmp_path)["tokens"] == 6


def test_progress_is_written_every_ten_seconds(tmp_path):
    now = [0.0]
    receipt, _ = start(tmp_path, clock=lambda: now[0])
    receipt.progress(1, 100)
    assert on_disk(tmp_path)["tokens"] == 0
    now[0] = 10.0
    receipt.progress(2, 200)
    assert (on_disk(tmp_path)["step"], on_disk(tmp_path)["tokens"]) == (2, 200)


# live tokens


def test_intervals_that_touch_are_one(tmp_path):
    receipt, _ = start(tmp_path)
    for begin, end in ((10, 20), (20, 30), (30, 30), (40, 50)):
        receipt.stp_live(begin, end)
    receipt.update()
    assert on_disk(tmp_path)["stp"]["live_tokens"] == [[10, 30], [40, 50]]


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=40))
def test_the_intervals_are_exactly_the_live_tokens(steps):
    """Against a plain set of token numbers."""
    receipt = Receipt(Path("unwritten"), {"stp": {"live_tokens": []}})
    tokens, live = 0, set()
    for size, is_live in steps:
        if is_live:
            receipt.stp_live(tokens, tokens + size)
            live.update(range(tokens, tokens + size))
        tokens += size
    intervals = receipt.live_tokens
    assert {token for begin, end in intervals for token in range(begin, end)} == live
    assert all(a[1] < b[0] for a, b in pairwise(intervals)), "sorted and none touching"


@pytest.mark.parametrize(("begin", "end"), [(5, 4), (15, 25)])
def test_impossible_intervals(tmp_path, begin, end):
    receipt, _ = start(tmp_path)
    receipt.stp_live(10, 20)
    with pytest.raises(ValueError, match="stp_live"):
        receipt.stp_live(begin, end)


# continuing


def test_a_resumed_run_counts_no_token_twice(tmp_path):
    receipt, _ = start(tmp_path)
    receipt.stp_live(100, 200)
    (tmp_path / "step-00000002").mkdir()
    receipt.checkpoint(2, 200, tmp_path / "step-00000002", "m2")
    saved = receipt.live_tokens
    receipt.stp_live(200, 300)  # lost: the process is killed here
    (tmp_path / "step-00000003").mkdir()
    receipt.checkpoint(3, 300, tmp_path / "step-00000003", "m3")
    again, _ = start(tmp_path)
    assert again.live_tokens == [[100, 300]]
    again.resume(2, 200, saved)
    again.stp_live(200, 400)
    again.finish("finished")
    content = on_disk(tmp_path)
    assert content["stp"]["live_tokens"] == [[100, 400]]
    assert [entry["step"] for entry in content["checkpoints"]] == [2]
    assert [entry["tokens"] for entry in content["starts"]] == [0, 200]


def test_restarting_keeps_the_past_and_reopens(tmp_path):
    receipt, _ = start(tmp_path, data={"manifest_sha256": "d"})
    began = receipt.content["started"]
    receipt.finish("stopped", "SIGTERM", metrics={"val_bits_per_byte": 3.0}, note={"mine": 1})
    again, _ = start(tmp_path)
    content = on_disk(tmp_path)
    assert content["status"] == "running" and content["reason"] is None and content["ended"] is None
    assert content["metrics"]["val_bits_per_byte"] == 3.0 and content["started"] == began and content["note"]["mine"]
    assert len(again.content["starts"]) == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"stp": 3, "starts": {}, "metrics": null}', "\x00", "[" * 9999])
def test_a_receipt_that_is_none_is_begun_anew(tmp_path, text):
    (tmp_path / "receipt.json").write_text(text)
    start(tmp_path)
    content = on_disk(tmp_path)
    assert content["stp"]["live_tokens"] == [] and len(content["starts"]) == 1 and len(content["metrics"]) == 4


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".receipt.json.123.tmp").write_text('{"run_id"')
    start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["receipt.json"]


def test_removed_checkpoints_leave_the_list(tmp_path):
    receipt, _ = start(tmp_path)
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}").mkdir()
        receipt.checkpoint(step, step * 10, tmp_path / f"step-{step:08d}", f"m{step}")
    (tmp_path / "step-00000001").rmdir()
    (tmp_path / "step-00000003").mkdir()
    receipt.checkpoint(3, 30, tmp_path / "step-00000003", "m3")
    assert [(entry["step"], entry["manifest_sha256"]) for entry in on_disk(tmp_path)["checkpoints"]] == [
        (2, "m2"),
        (3, "m3"),
    ]


def test_listing_a_checkpoint_again_keeps_its_tokens(tmp_path):
    receipt, _ = start(tmp_path)
    (tmp_path / "step-00000001").mkdir()
    receipt.checkpoint(1, 10, tmp_path / "step-00000001", "m1")
    receipt.checkpoint(1, 99, tmp_path / "step-00000001", "m1")
    assert [entry["tokens"] for entry in on_disk(tmp_path)["checkpoints"]] == [10]
    receipt.checkpoint(2, 20, tmp_path / "step-00000002", "gone")
    assert len(on_disk(tmp_path)["checkpoints"]) == 1


def test_no_receipt_reads_as_empty(tmp_path):
    assert read_receipt(tmp_path) == {}
