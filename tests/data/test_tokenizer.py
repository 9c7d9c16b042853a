from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.documents import chunks
from data.prepared import Prepared
from data.tokenizer import Tokenizer, train_tokenizer
from errors import InputError

CORPUS = ["def f(x):\n    return x + 1\n", "the quick brown fox jumps over the lazy dog\n" * 3, "naïve ▁ café 🙂\n"]
TOKENIZER = train_tokenizer(CORPUS, 300)
TOKEN_BYTES = TOKENIZER.token_bytes()


@settings(max_examples=300, deadline=None)
@given(st.text())
@example("")
@example("  leading and trailing  ")
@example("\ttabs\r\nand\x00NUL and \ufeffBOM \u2028")
@example("▁")
@example("a▁ ▁▁b ⁇ <s></s><unk><0x41>")
@example("👩‍👩‍👧 e\u0301 ﬁ １ İ")
def test_round_trip_is_exact_and_bytes_add_up(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert int(TOKEN_BYTES[ids].sum()) == len(text.encode())


def test_special_ids_hold_no_bytes_and_do_not_decode() -> None:
    assert TOKEN_BYTES[[TOKENIZER.bos_id, TOKENIZER.eos_id]].tolist() == [0, 0]
    assert TOKENIZER.decode([TOKENIZER.bos_id, *TOKENIZER.encode("a b"), TOKENIZER.eos_id]) == "a b"
    assert TOKENIZER.bos_id != TOKENIZER.eos_id


def test_batch_equals_single_whatever_the_threads() -> None:
    texts = [*CORPUS, "", "▁x▁", "\n" * 50]
    single = [TOKENIZER.encode(text) for text in texts]
    for threads in (1, 2, 3):
        assert [ids.tolist() for ids in TOKENIZER.encode_batch(texts, threads)] == single


def test_long_text_is_cut_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tokenizer._ENCODE_CHARACTERS", 7)
    text = "no newline here at all\nand\n\n a second ▁ line" * 5
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert int(TOKEN_BYTES[ids].sum()) == len(text.encode())


@given(st.text(alphabet="ab\n", max_size=60), st.integers(1, 9))
def test_chunks_are_the_text_in_bounded_pieces(text: str, limit: int) -> None:
    pieces = list(chunks(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_training_twice_gives_the_same_bytes() -> None:
    assert train_tokenizer(CORPUS, 300).model == TOKENIZER.model


def test_vocabulary_has_the_asked_size_and_learned_something() -> None:
    assert TOKENIZER.vocab_size == 300
    assert int(TOKEN_BYTES.max()) > 2
    text = CORPUS[1]
    assert len(TOKENIZER.encode(text)) < 0.9 * len(text)


def test_vocabulary_too_large_names_the_largest_that_works() -> None:
    with pytest.raises(
        InputError, match=r"^data.tokenizer.vocab_size: 5000 is more .* largest that works is (\d+)$"
    ) as e:
        train_tokenizer(CORPUS, 5000)
    largest = int(str(e.value).rsplit(" ", 1)[1])
    assert train_tokenizer(CORPUS, largest).vocab_size == largest
    with pytest.raises(InputError):
        train_tokenizer(CORPUS, largest + 1)


def test_vocabulary_too_small_names_the_smallest_that_works() -> None:
    with pytest.raises(InputError, match=r"smallest that works is (\d+)$") as e:
        train_tokenizer(CORPUS, 262)
    smallest = int(str(e.value).rsplit(" ", 1)[1])
    assert train_tokenizer(CORPUS, smallest).vocab_size == smallest


def test_nothing_to_learn_from() -> None:
    with pytest.raises(InputError, match="empty"):
        train_tokenizer([], 300)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    sha256 = hashlib.sha256(TOKENIZER.model).hexdigest()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(TOKENIZER.model), 40):
        damaged = bytearray(TOKENIZER.model)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"tokenizer.model: the tokenizer is damaged"):
            Tokenizer.load(path, sha256)
    path.write_bytes(TOKENIZER.model)
    assert Tokenizer.load(path, sha256).sha256 == sha256


@pytest.mark.parametrize("content", [b"", b"not a model at all, just text", bytes(range(256)) * 9])
def test_other_files_are_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x.model: not a sentencepiece model"):
        Tokenizer.load(path)
    with pytest.raises(InputError, match="no such tokenizer file"):
        Tokenizer.load(tmp_path / "absent.model")


def test_prepared_text_comes_back_byte_for_byte(prepared: Prepared, texts_folder: Path) -> None:
    originals = {path.read_bytes().decode() for path in texts_folder.iterdir()}
    decoded = set()
    for corpus in prepared.corpora:
        for stream in (corpus.train, corpus.validation):
            ids = stream.tokens(0, stream.n_tokens)
            starts = stream.document_starts(0, stream.n_tokens).tolist()
            for begin, end in zip(starts, [*starts[1:], stream.n_tokens]):
                assert ids[begin] == prepared.tokenizer.bos_id
                assert ids[end - 1] == prepared.tokenizer.eos_id
                decoded.add(prepared.tokenizer.decode(ids[begin:end].tolist()))
    assert decoded == originals
