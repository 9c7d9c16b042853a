from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from data import prepare as module
from data.config import DataConfig, TokenizerConfig
from data.prepare import prepare, prepared_folder
from data.prepared import Prepared, open_prepared, verify
from data.progress import show_progress
from data.stream import TrainStream, validation_batches
from errors import InputError

ROOT = Path(__file__).parents[2]


def copy_of(prepared: Prepared, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(prepared.folder, folder / "copy"))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_second_call_is_instant_and_equal(prepared: Prepared, text_config: DataConfig) -> None:
    def never(stage: str, done: int, total: int) -> None:
        raise AssertionError("a cached corpus was prepared again")

    start = time.perf_counter()
    again = prepare(text_config, prepared.folder.parent, never)
    assert time.perf_counter() - start < 0.5
    assert again.manifest_sha256 == prepared.manifest_sha256
    assert again.folder == prepared.folder == prepared_folder(text_config, prepared.folder.parent)


def test_prepared_twice_is_the_same_to_the_byte(prepared: Prepared, text_config: DataConfig, tmp_path: Path) -> None:
    again = prepare(text_config, tmp_path, workers=1, shard_tokens=1500)
    assert again.manifest_sha256 == prepared.manifest_sha256
    assert len(again.manifest["corpora"][0]["train"]["shards"]) > 2
    assert verify(again.folder) == []


def test_counts_of_the_manifest(prepared: Prepared, texts_folder: Path) -> None:
    (corpus,) = prepared.manifest["corpora"]
    texts = [path.read_bytes() for path in texts_folder.iterdir()]
    splits = [corpus["train"], corpus["validation"]]
    assert sum(split["documents"] for split in splits) == len(texts)
    assert sum(split["bytes"] for split in splits) == sum(map(len, texts))
    for split, stream in zip(splits, (prepared.corpora[0].train, prepared.corpora[0].validation)):
        assert stream.n_tokens == split["tokens"] == split["end"]
        assert int(prepared.token_bytes[stream.tokens(0, stream.n_tokens)].sum()) == split["bytes"]
        assert len(stream.document_starts(0, stream.n_tokens)) == split["documents"]
    assert prepared.manifest["tokenizer"]["sha256"] == prepared.tokenizer.sha256
    assert prepared.vocab_size == 330 and prepared.notes == []


def test_rows_length_does_not_ask_for_new_tokens_but_the_rest_does(text_config: DataConfig, tmp_path: Path) -> None:
    base = prepared_folder(text_config, tmp_path)
    assert prepared_folder(replace(text_config, sequence_length=99), tmp_path) == base
    others = [
        replace(text_config, validation_fraction=0.1),
        replace(text_config, tokenizer=TokenizerConfig(vocab_size=331)),
        replace(text_config, tokenizer=TokenizerConfig(vocab_size=330, sample_bytes=99)),
    ]
    assert len({base, *(prepared_folder(other, tmp_path) for other in others)}) == 4


def test_changed_files_are_prepared_anew(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text(f"some words {number} and some more words\n" * 9)
    config = DataConfig(path=str(texts), validation_fraction=0.3, tokenizer=TokenizerConfig(vocab_size=280))
    first = prepare(config, tmp_path / "artifacts")
    (texts / "0.txt").write_text("other words entirely, and some more of them\n" * 9)
    second = prepare(config, tmp_path / "artifacts")
    assert second.folder != first.folder and second.manifest_sha256 != first.manifest_sha256


def assert_parts_alone(folder: Path) -> list[Path]:
    """The hidden folder of an interrupted preparation holds finished parts and nothing else; they are returned."""
    (left,) = entries(folder)
    assert left.startswith(".") and left.endswith(".partial")
    assert [path.name for path in (folder / left).iterdir()] == ["parts"]
    return sorted((folder / left / "parts").iterdir())


@pytest.mark.parametrize("where", ["train_tokenizer", "_tokenise", "sync_folder"])
def test_a_failure_midway_leaves_nothing_but_finished_parts(
    text_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, where, fail)
    with pytest.raises(OSError, match="disk full"):
        prepare(text_config, tmp_path)
    if where == "sync_folder":
        assert_parts_alone(tmp_path)
    else:
        assert entries(tmp_path) == []
    monkeypatch.undo()
    assert prepare(text_config, tmp_path).train_tokens > 0


def test_a_kill_midway_leaves_nothing_that_is_taken_for_whole(text_config: DataConfig, tmp_path: Path) -> None:
    script = f"""
import os
from data import prepare as module
from data.config import DataConfig, TokenizerConfig
class Killed(module.SplitWriter):
    def add(self, *args):
        super().add(*args)
        if self.counts["documents"] == 5:
            os._exit(9)
module.SplitWriter = Killed
config = DataConfig(path={text_config.path!r}, validation_fraction=0.2, tokenizer=TokenizerConfig(vocab_size=330))
module.prepare(config, {str(tmp_path)!r})
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60)
    assert result.returncode == 9
    (left,) = entries(tmp_path)
    assert left.startswith(".") and left.endswith(".partial")
    prepared = prepare(text_config, tmp_path)
    assert entries(tmp_path) == [prepared.folder.name]
    assert verify(prepared.folder) == []


def test_several_at_once_make_it_once(text_config: DataConfig, tmp_path: Path) -> None:
    """The lock is held by an open file, so threads stand for processes."""
    stages: list[list[str]] = [[], [], []]

    def one(number: int) -> str:
        return prepare(text_config, tmp_path, lambda stage, *_: stages[number].append(stage)).manifest_sha256

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(one, range(3)))) == 1
    assert sum(bool(seen) for seen in stages) == 1


def test_damage_is_noticed_at_the_start(prepared: Prepared, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    shard = folder / f"{prepared.manifest['corpora'][0]['train']['shards'][1]['prefix']}.bin"
    model, manifest = folder / "tokenizer.model", folder / "manifest.json"

    def refused(path: Path, raw: bytes | None, line: str) -> None:
        good = path.read_bytes()
        if raw is None:
            path.unlink()
        else:
            path.write_bytes(raw)
        with pytest.raises(InputError, match=line) as error:
            open_prepared(folder)
        assert str(folder) in str(error.value) and "delete" in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(good)

    raw = shard.read_bytes()
    refused(shard, raw[:-2], r"00001.bin: the shard is damaged: it has [\d,]+ bytes, expected")
    refused(shard, raw + b"xx", r"00001.bin: the shard is damaged")
    refused(shard, None, r"00001.bin: the shard is damaged: it is missing")
    index = shard.with_suffix(".idx")
    refused(index, b"Y" + index.read_bytes()[1:], r"00001.idx: not a Megatron token index")
    damaged = bytearray(model.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    refused(model, bytes(damaged), r"tokenizer.model: the tokenizer is damaged: sha256")
    refused(model, None, r"tokenizer.model")
    refused(manifest, manifest.read_bytes()[:-30], "the manifest is damaged")
    refused(manifest, b"[]", "the manifest is damaged")
    refused(manifest, manifest.read_bytes().replace(b'"format": 1', b'"format": 9'), "format 9, expected 1")
    refused(manifest, None, "missing")
    assert open_prepared(folder).manifest_sha256 == prepared.manifest_sha256


def test_verify_finds_a_flipped_bit(prepared: Prepared, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    assert verify(folder) == []
    for split, kind in (("train", "bin"), ("validation", "bin"), ("train", "idx")):
        path = folder / f"{prepared.manifest['corpora'][0][split]['shards'][0]['prefix']}.{kind}"
        good = path.read_bytes()
        place = len(good) // 2
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(InputError, match=f"{path.name}: the shard is damaged: sha256"):
            verify(folder)
        path.write_bytes(good)


def test_vocabulary_larger_than_the_corpus_supports(text_config: DataConfig, tmp_path: Path) -> None:
    config = replace(text_config, tokenizer=TokenizerConfig(vocab_size=50_000))
    with pytest.raises(InputError, match=r"data.tokenizer.vocab_size: 50000 is more .* largest that works is \d+$"):
        prepare(config, tmp_path)
    assert entries(tmp_path) == []


def test_artifacts_that_are_a_file(text_config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("a file")
    with pytest.raises(InputError, match=r"artifacts: cannot be used as the folder of artifacts"):
        prepare(text_config, tmp_path / "artifacts")


def test_a_binary_file_among_the_texts_is_named(texts_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    config = DataConfig(path=[str(texts_folder), str(tmp_path / "*.png")])
    with pytest.raises(InputError, match=r"picture.png: is a binary file"):
        prepare(config, tmp_path / "artifacts")


def test_a_single_text_file_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {number} of a book with words in it\n" for number in range(400)))
    prepared = prepare(DataConfig(path=str(path), tokenizer=TokenizerConfig(vocab_size=290)), tmp_path / "artifacts")
    assert prepared.notes == [f"files:{path} is a single document: its last lines are held out"]
    assert TrainStream(prepared, 32, 4).batch(0).loss_tokens > 0
    assert next(iter(validation_batches(prepared, 32, 4))).loss_tokens > 0


def test_mixture_shares_one_tokenizer(prepared_mixture: Prepared) -> None:
    assert [corpus.weight for corpus in prepared_mixture.corpora] == [0.7, 0.3]
    assert prepared_mixture.folder.name.startswith("mixture-")
    assert verify(prepared_mixture.folder) == []


def test_progress_lines_and_bars(text_config: DataConfig, tmp_path: Path) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for number, stream in enumerate((io.StringIO(), Terminal())):
        with show_progress(stream) as progress:
            prepare(text_config, tmp_path / str(number), progress)
        shown = stream.getvalue()
        assert "reading" in shown and "learning the vocabulary" in shown and "tokenising" in shown

    with pytest.raises(ZeroDivisionError), show_progress(Terminal()):
        raise ZeroDivisionError


def test_manifest_holds_no_time_and_is_plain_json(prepared: Prepared) -> None:
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert set(manifest) == {"format", "recipe", "config", "tokenizer", "corpora", "notes"}
    assert "sequence_length" not in manifest["config"]
