"""Tokenising in parts: the same bytes from any number of processes and after any interruption; nothing done twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from data import parts, split
from data.config import DataConfig, TokenizerConfig
from data.documents import Document, Segment
from data.prepare import prepare
from data.prepared import Prepared, verify
from data.workers import Workers
from errors import InputError

ROOT = Path(__file__).parents[2]
SMALL = {"shard_tokens": 1500, "part_bytes": 2000}


def hidden(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.partial/parts/*.npz"))


def written(prepared: Prepared) -> dict[str, bytes]:
    paths = [path for path in prepared.folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(prepared.folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_processes_writes_the_same_bytes(
    prepared: Prepared, text_config: DataConfig, tmp_path: Path, workers: int
) -> None:
    seen: list[tuple[str, int, int]] = []
    again = prepare(text_config, tmp_path, lambda *event: seen.append(event), workers=workers, **SMALL)
    assert written(again) == written(prepared)  # whose text was one part
    stages = [(done, total) for stage, done, total in seen if stage.startswith("tokenising")]
    assert len(stages) > 5 and stages == sorted(stages) and stages[-1][0] == stages[-1][1]


def start_and_kill(config: DataConfig, folder: Path, after: int) -> None:
    """A preparation by two processes, killed with the first `after` parts on the disk; all of it is gone then."""
    script = f"""
import sys, time
from data import parts, prepare as module
from data.config import DataConfig, TokenizerConfig
give = module.Workers.give
def slowly(self, part, path, digest):
    give(self, part, path, digest)
    if part.number == {after}:
        time.sleep(100)
module.Workers.give = slowly
config = DataConfig(path={config.path!r}, validation_fraction=0.2, tokenizer=TokenizerConfig(vocab_size=330))
module.prepare(config, {str(folder)!r}, workers=2, shard_tokens=1500, part_bytes=2000)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as process:
        end = time.monotonic() + 60
        while len(hidden(folder)) <= after:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 2
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_a_killed_preparation_goes_on_behind_its_finished_parts(
    prepared: Prepared, text_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_and_kill(text_config, tmp_path, after=3)
    found = {path.name: path.read_bytes() for path in hidden(tmp_path)}
    assert len(found) == 4
    damaged = hidden(tmp_path)[2]
    damaged.write_bytes(found[damaged.name][:-99])  # as after a power cut
    done: list[str] = []
    save = parts.save
    monkeypatch.setattr(parts, "save", lambda path, *rest: (done.append(path.name), save(path, *rest)))
    again = prepare(text_config, tmp_path, workers=1, **SMALL)
    assert written(again) == written(prepared) and verify(again.folder) == []
    assert done[0] == damaged.name and not set(done[1:]) & found.keys()
    assert hidden(tmp_path) == []


def interrupted(config: DataConfig, folder: Path, act: Callable[[], object], kept: pytest.MonkeyPatch) -> str:
    """What is said where `act` happens to the files behind four parts, of a corpus that is too large to be kept."""
    kept.setattr(split, "_KEEP_BYTES", 0)
    actions = [act]

    def progress(stage: str, *_: int) -> None:
        if len(hidden(folder)) == 4 and actions:
            actions.pop()()

    with pytest.raises(InputError) as caught:
        prepare(config, folder, progress, workers=1, **SMALL)
    return str(caught.value)


def test_an_input_that_was_away_costs_no_finished_part(
    prepared: Prepared, texts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(texts_folder, tmp_path / "here")
    config = DataConfig(
        path=f"{tmp_path}/here/*.txt", validation_fraction=0.2, tokenizer=TokenizerConfig(vocab_size=330)
    )
    said = interrupted(config, tmp_path / "out", lambda: (tmp_path / "here").rename(tmp_path / "away"), monkeypatch)
    assert "cannot be read" in said
    found = {path.name for path in hidden(tmp_path / "out")}
    assert len(found) >= 4
    (tmp_path / "away").rename(tmp_path / "here")
    done: list[str] = []
    save = parts.save
    monkeypatch.setattr(parts, "save", lambda path, *rest: (done.append(path.name), save(path, *rest)))
    again = prepare(config, tmp_path / "out", workers=1, **SMALL)
    assert {name: data for name, data in written(again).items() if name != "manifest.json"} == {
        name: data for name, data in written(prepared).items() if name != "manifest.json"
    }
    assert done and not set(done) & found


def test_parts_of_an_input_that_became_another_are_not_kept(
    texts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its preparation has another name: nobody would look for them."""
    shutil.copytree(texts_folder, tmp_path / "here")
    config = DataConfig(path=f"{tmp_path}/here", validation_fraction=0.2, tokenizer=TokenizerConfig(vocab_size=330))
    said = interrupted(
        config, tmp_path / "out", lambda: (tmp_path / "here" / "029.txt").write_bytes(b"\0"), monkeypatch
    )
    assert "is a binary file" in said
    assert list((tmp_path / "out").glob(".*.partial")) == []


def test_parts_of_a_text_that_is_too_small_are_not_kept(text_config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too little text for a train split"):
        prepare(replace(text_config, train_fraction=1e-9), tmp_path, workers=1, **SMALL)
    assert list(tmp_path.glob(".*.partial")) == []


def test_parts_of_another_text_are_not_taken(text_config: DataConfig, tmp_path: Path) -> None:
    """A source may change behind a name that stays (a data set of the hub): parts are known by their text."""
    model = prepare(text_config, tmp_path).tokenizer
    part, other = (parts.Part(0, [("train", [(text, True)])], 5) for text in ("some ", "other"))
    parts.save(tmp_path / "0.npz", parts.tokenise(part.items, model), part.digest(model))
    assert parts.is_done(tmp_path / "0.npz", part.digest(model))
    assert not parts.is_done(tmp_path / "0.npz", other.digest(model))
    assert not parts.is_done(tmp_path / "1.npz", part.digest(model))


def test_a_part_with_a_flipped_bit_is_made_again(prepared: Prepared, tmp_path: Path) -> None:
    """Wherever it is: in the tokens, which the digest is not of, as in the archive's own tables."""
    part, path = parts.Part(0, [("train", [("some text", True)])], 9), tmp_path / "0.npz"
    digest = part.digest(prepared.tokenizer)
    parts.save(path, parts.tokenise(part.items, prepared.tokenizer), digest)
    whole, arrays = path.read_bytes(), parts.load(path)
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        if parts.is_done(path, digest):  # a byte that carries nothing, as a time of day
            assert all(parts.load(path)[name].tobytes() == array.tobytes() for name, array in arrays.items())


def test_a_process_gets_the_very_items() -> None:
    texts = ["", "\n", '"quoted"\n', "é 🙂 \u2028", "x" * 99]
    items = [("train", [(text, True)]) for text in texts] + [("test", [("ask\n", False), ("tell", True), ("", False)])]
    part = parts.Part(3, items, 99)
    assert parts.unpack(part.payload) == items
    assert parts.unpack(parts.Part(0, [], 0).payload) == []


def test_prompts_are_read_and_answers_learned(prepared: Prepared) -> None:
    model = prepared.tokenizer
    document = Document("x", "ask tell", segments=(Segment("ask ", "prompt"), Segment("tell", "answer")))
    (part,) = parts.cut([(document, "test"), (Document("y", "plain"), "train")])
    found = parts.tokenise(part.items, model)
    (ids, size, learned), *none = parts.documents(found, "test")
    assert ids.tolist() == [model.bos_id, *model.encode("ask "), *model.encode("tell"), model.eos_id] and not none
    assert learned.sum() == len(model.encode("tell")) + 1 and size == 8 and learned[-1]
    assert list(parts.documents(found, "validation")) == [] and bool(found["exact"])


def test_a_disk_that_is_full_for_a_process_is_said_by_the_one_that_feeds_it(prepared: Prepared, tmp_path: Path) -> None:
    part = parts.Part(0, [("train", [("text", True)])], 4)
    with pytest.raises(OSError, match="No such file"), Workers(1, prepared.folder / "tokenizer.model") as workers:
        workers.give(part, tmp_path / "nowhere" / "0.npz", "digest")
        workers.wait()


def test_a_process_that_dies_is_an_error(prepared: Prepared, tmp_path: Path) -> None:
    model = prepared.folder / "tokenizer.model"
    part = parts.Part(0, [("train", [("text", True)])], 4)
    with pytest.raises(RuntimeError, match="ended with -9"), Workers(1, model) as workers:
        os.kill(workers._idle[0].pid, signal.SIGKILL)
        time.sleep(0.1)
        workers.give(part, tmp_path / "0.npz", "digest")
        workers.wait()


def test_a_tokenizer_of_another_name_makes_other_parts(text_config: DataConfig, tmp_path: Path) -> None:
    one = prepare(text_config, tmp_path).tokenizer
    two = prepare(replace(text_config, tokenizer=replace(text_config.tokenizer, vocab_size=320)), tmp_path).tokenizer
    part = parts.Part(0, [("train", [("text", True)])], 4)
    assert part.digest(one) != part.digest(two)
