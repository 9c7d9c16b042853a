"""Prompts and answers as data: what is learned, rows that never cut a pair, splits, shares, and bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.chat import as_document, read_chat
from data.config import DataConfig, NLRXConfig, TokenizerConfig
from data.packing import TokenStream, WholeDocuments, row_maker
from data.prepare import prepare, prepared_folder
from data.prepared import Prepared, verify
from data.shards import Shard, ShardWriter
from data.stream import TrainStream, validation_batches
from errors import InputError


def nlrx(**values: Any) -> DataConfig:
    return DataConfig(
        source="nlrx",
        validation_fraction=0.1,
        test_fraction=0.1,
        nlrx=NLRXConfig(pairs=800),
        tokenizer=TokenizerConfig(vocab_size=330),
        **values,
    )


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def pairs(artifacts: Path) -> Prepared:
    return prepare(nlrx(), artifacts, shard_tokens=7000)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant") if len(turns) % 2 == 0 else ("assistant", "user")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    if len(turns) % 2:
        messages[0]["role"] = "system"
    return {"messages": messages}


def texts_of(prepared: Prepared, split: str) -> set[tuple[str, str]]:
    return {(prepared.tokenizer.decode(a.prompt), a.text) for a in prepared.answers(split)}


def test_loss_is_on_the_answer_and_its_end_token_alone(pairs: Prepared) -> None:
    """Every row, pair by pair: bos prompt newline answer, labels = answer then eos, and nothing else is learned."""
    tokenizer, T = pairs.tokenizer, 160
    maker = row_maker(pairs.corpora[0].train, T, "nlrx")
    tokens, labels, document_ids = maker(np.arange(maker.n_rows))
    seen = []
    for row in range(maker.n_rows):
        used = document_ids[row] >= 0
        assert not used[np.argmin(used) :].any() or used.all()  # padding at the end alone
        assert (tokens[row][~used] == 0).all() and (labels[row][~used] == -100).all()
        for document in range(document_ids[row].max() + 1):
            place = document_ids[row] == document
            ids, wanted = tokens[row][place], labels[row][place]
            learned = wanted != -100
            first = int(np.argmax(learned))
            assert learned[first:].all() and not learned[:first].any()
            assert ids[0] == tokenizer.bos_id and (ids[1:] != tokenizer.bos_id).all()
            assert wanted[-1] == tokenizer.eos_id and not (ids == tokenizer.eos_id).any()
            assert (wanted[first:-1] == ids[first + 1 :]).all()
            prompt, answer = tokenizer.decode(ids[: first + 1]), tokenizer.decode(wanted[first:])
            assert prompt.startswith("lines ") and prompt.endswith("\n")
            seen.append((prompt, answer))
    assert len(seen) == len(set(seen)) == pairs.manifest["corpora"][0]["train"]["documents"]
    assert set(seen) == texts_of(pairs, "train")
    learned_tokens = int((labels != -100).sum())
    assert learned_tokens == pairs.manifest["corpora"][0]["train"]["answer_tokens"]


def test_rows_hold_as_many_whole_documents_as_fit(pairs: Prepared) -> None:
    maker = WholeDocuments(pairs.corpora[0].train, 160)
    _, _, document_ids = maker(np.arange(maker.n_rows))
    sizes = (maker.ends - maker.begins - 1).tolist()
    used = (document_ids >= 0).sum(axis=1)
    assert used.sum() == sum(sizes)
    first = np.cumsum(document_ids.max(axis=1) + 1)[:-1]  # the document with which each following row begins
    assert all(used[row] + sizes[document] > 160 for row, document in enumerate(first))
    with pytest.raises(InputError, match=f"^data.sequence_length: expected at least {max(sizes)}, got 8: nlrx"):
        WholeDocuments(pairs.corpora[0].train, 8, "nlrx")


def test_rows_are_a_pure_function_of_their_index(pairs: Prepared) -> None:
    stream = TrainStream(pairs, 160, batch_rows=6, seed=3)
    whole = stream.batch(7)
    part = TrainStream(pairs, 160, batch_rows=6, seed=3).rows(np.arange(7 * 6 + 2, 7 * 6 + 5))
    for name in ("tokens", "labels", "document_ids", "row_ids"):
        assert (getattr(whole, name)[2:5] == getattr(part, name)).all()
    epoch = stream.rows(np.arange(stream.rows_per_epoch[0]))
    assert epoch.loss_tokens == pairs.manifest["corpora"][0]["train"]["answer_tokens"]
    validation = sum(batch.loss_tokens for batch in validation_batches(pairs, 160, 4))
    assert validation == pairs.manifest["corpora"][0]["validation"]["answer_tokens"]


def test_the_splits_share_no_description_and_no_regex(pairs: Prepared) -> None:
    splits = [texts_of(pairs, split) for split in ("train", "validation", "test")]
    assert sum(map(len, splits)) == 800 and all(50 < len(split) < 120 for split in splits[1:])
    for side in (0, 1):
        values = [{pair[side] for pair in split} for split in splits]
        assert sum(map(len, values)) == len(set.union(*values)) == 800


def test_smaller_shares_are_nested_and_change_nothing_else(pairs: Prepared, artifacts: Path) -> None:
    larger = texts_of(pairs, "train")
    for power in range(1, 6):
        share = prepare(nlrx(train_fraction=0.5**power), artifacts)
        smaller = texts_of(share, "train")
        assert smaller < larger
        assert len(smaller) == pytest.approx(640 * 0.5**power, abs=4 * (640 * 0.5**power) ** 0.5)
        assert share.tokenizer.sha256 == pairs.tokenizer.sha256
        for split in ("validation", "test"):
            assert texts_of(share, split) == texts_of(pairs, split)
        larger = smaller


def test_token_shards_stay_megatrons_and_the_loss_shards_are_verified(artifacts: Path) -> None:
    prepared = prepare(nlrx(train_fraction=0.9), artifacts, shard_tokens=7000)
    entries = prepared.manifest["corpora"][0]["train"]["shards"]
    assert len(entries) > 1
    for entry in entries:
        tokens, mask = Shard(prepared.folder / entry["prefix"]), Shard(prepared.folder / entry["loss"]["prefix"])
        assert tokens.dtype == np.uint16 and mask.dtype == np.uint8
        assert tokens.n_documents == mask.n_documents and tokens.n_tokens == mask.n_tokens
        assert set(mask.tokens.tolist()) == {0, 1}
    assert verify(prepared.folder) == []
    path = prepared.folder / (entries[0]["loss"]["prefix"] + ".bin")
    raw = bytearray(path.read_bytes())
    raw[50] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"-loss\.bin: the shard is damaged"):
        verify(prepared.folder)


def test_plain_text_beside_answers_learns_every_token(artifacts: Path, texts_folder: Path) -> None:
    config = nlrx(mixture={"nlrx": 0.5, f"files:{texts_folder}": 0.5})
    config.tokenizer.vocab_size = 360
    prepared = prepare(config, artifacts)
    batch = TrainStream(prepared, 160, batch_rows=8).batch(0)
    shares = (batch.labels != -100).float().mean(dim=1)
    assert sorted((shares > 0.9).tolist()) == [False] * 4 + [True] * 4
    assert prepared.corpora[1].test is None and len(prepared.answers("test")) > 50


def test_conversations_learn_each_answer(tmp_path: Path) -> None:
    (document,) = read_chat(Path(write_rows(tmp_path / "a.jsonl", [chat("be kind", "hello", "hi!", "bye", "see you")])))
    assert [(s.text, s.part) for s in document.segments] == [
        ("be kind\n", "prompt"),
        ("hello\n", "prompt"),
        ("hi!", "answer"),
        ("bye\n", "prompt"),
        ("see you", "answer"),
    ]
    assert document.text == "be kind\nhello\nhi!bye\nsee you" and document.group == "be kind\nhello\nhi!bye\n"
    rows = [chat(f"question {n} {n * n}", f"answer {n}", f"again {n}", f"word {n % 7}") for n in range(60)]
    path = write_rows(tmp_path / "b.jsonl", rows)
    config = DataConfig(source="jsonl", path=path, validation_fraction=0.1, tokenizer=TokenizerConfig(vocab_size=290))
    prepared = prepare(config, tmp_path / "artifacts")
    batch = TrainStream(prepared, 256, batch_rows=1).batch(0)
    row_labels = batch.labels[0][batch.document_ids[0] == 0]
    decoded = prepared.tokenizer.decode(row_labels[row_labels != -100].tolist())
    assert decoded.startswith("answer ") and "word" in decoded and "again" not in decoded
    assert int((row_labels == prepared.tokenizer.eos_id).sum()) == 2  # each answer has its end
    for answer in prepared.answers("test"):
        assert answer.text.startswith("word ") and "again" in prepared.tokenizer.decode(answer.prompt)
        assert answer.n_tokens == len(prepared.tokenizer.encode(answer.text)) + 1


def test_prompt_and_completion_are_a_conversation_of_two(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a", "id": 3}])
    (document,) = read_chat(Path(path))
    assert document.segments == as_document("x", [("user", "q"), ("assistant", "a")]).segments


def test_given_test_rows_are_kept_out_of_training(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "completion": f"answer {n * n}"} for n in range(80)]
    train = write_rows(tmp_path / "train.jsonl", [*rows[10:], {"prompt": "question 3", "completion": "another answer"}])
    test = write_rows(tmp_path / "test.jsonl", rows[:20])
    config = DataConfig(
        source="jsonl", path=train, test_path=test, validation_fraction=0.1, tokenizer=TokenizerConfig(vocab_size=285)
    )
    config.validate()
    prepared = prepare(config, tmp_path / "artifacts")
    assert texts_of(prepared, "test") == {(f"question {n}\n", f"answer {n * n}") for n in range(20)}
    learned = texts_of(prepared, "train") | texts_of(prepared, "validation")
    assert learned == {(f"question {n}\n", f"answer {n * n}") for n in range(20, 80)}
    assert any("1 documents left out of training" in note for note in prepared.notes)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([1], "got list"),
        ({"message": []}, r"did you mean 'message'"),
        ({"messages": []}, "expected"),
        ({"messages": ["hello"]}, "message 0: expected an object with role and content"),
        ({"messages": [{"role": "user"}]}, "message 0: expected an object"),
        (
            {"messages": [{"role": "usr", "content": "x"}]},
            r"message 0: unknown role 'usr' \(did you mean 'user'\?\); expected",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0: content: expected text, got int"),
        (chat("be kind", "hello", "hi", "bye", "x") | {}, ""),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last message is of role user"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "an answer without a prompt"),
        ({"prompt": "x", "completion": None}, "field 'completion': expected text, got NoneType"),
        ({"prompt": "x"}, "the row has prompt"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: Any, problem: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, row])
    if not problem:
        assert len(list(read_chat(Path(path)))) == 2
        return
    with pytest.raises(InputError, match=rf"rows.jsonl:2: .*{problem}") as error:
        list(read_chat(Path(path)))
    assert "\n" not in str(error.value)


def test_lines_that_are_no_json_and_files_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"prompt": "a", "completion"\n')
    with pytest.raises(InputError, match=r"rows.jsonl:2: not JSON"):
        list(read_chat(path))
    with pytest.raises(InputError, match=r"^data.test_path: .*no such file"):
        prepared_folder(DataConfig(source="jsonl", path=str(path), test_path=str(tmp_path / "rows.json")))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"test_fraction": -0.1}, "^data.test_fraction: "),
        ({"train_fraction": 0.0}, "^data.train_fraction: .*above 0"),
        ({"train_fraction": 1.5}, "^data.train_fraction: .*at most 1"),
        ({"source": "megatron", "path": "x", "train_fraction": 0.5}, "^data.train_fraction: a megatron corpus is used"),
        ({"source": "nlrx", "path": "x"}, "^data.source: source nlrx takes no path"),
        ({"source": "jsonl"}, "^data.path: is missing; source jsonl needs it"),
        ({"source": "nlrx", "test_path": "x"}, "^data.test_path: is only read with data.source=jsonl"),
        ({"source": "jsonl", "path": "x", "test_path": ""}, "^data.test_path: is empty"),
        ({"source": "nlrx", "nlrx": NLRXConfig(pairs=3)}, "^data.nlrx.pairs: .*at least 10"),
        ({"source": "nlrx", "nlrx": NLRXConfig(seed=-1)}, "^data.nlrx.seed: "),
    ],
)
def test_bad_settings(values: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        DataConfig(**values).validate("data")


def test_text_has_no_answers(prepared: Prepared) -> None:
    with pytest.raises(InputError, match=r"has no test split with answers; expected data.source=nlrx or jsonl"):
        prepared.answers("test")


def test_other_settings_are_other_folders_and_text_keeps_its_own() -> None:
    folders = {
        prepared_folder(config).name
        for config in (
            nlrx(),
            nlrx(train_fraction=0.5),
            DataConfig(source="nlrx"),
            DataConfig(source="nlrx", test_fraction=0.2),
        )
    }
    assert len(folders) == 4
    assert prepared_folder(DataConfig(test_fraction=0.2)) == prepared_folder(DataConfig())


def test_masks_are_read_over_shards(tmp_path: Path) -> None:
    shards: list[Shard] = []
    masks: list[Shard] = []
    for number, sizes in enumerate(([3, 4], [5], [2, 6])):
        for kind, found, dtype in (("t", shards, np.int32), ("m", masks, np.uint8)):
            writer = ShardWriter(tmp_path / f"{kind}{number}", dtype)
            for size in sizes:
                writer.add(np.arange(size) + 10 * number if kind == "t" else (np.arange(size) % 2))
            writer.close()
            found.append(Shard(tmp_path / f"{kind}{number}"))
    stream = TokenStream(shards, masks=masks)
    assert stream.document_bounds()[0].tolist() == [0, 3, 7, 12, 14]
    assert stream.loss_mask(5, 15).tolist() == [False, True, False, True, False, True, False, False, True, False]
    assert TokenStream(shards).loss_mask(5, 15).all()
