"""Sentencepiece BPE with byte fallback, made lossless: decode(encode(text)) == text for every text.

Two things that sentencepiece does not give by itself: the character U+2581, which it uses inside for a space, is
written as its three bytes; and no prefix space or normalisation touches the text. So the bytes of the tokens of a
document add up to its UTF-8 length exactly, and bits per byte are bits per original byte.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from data.documents import chunks
from errors import InputError

SPACE_MARK = "\u2581"
# Longest stretch that is encoded at once (characters); longer texts are cut behind a newline.
_ENCODE_CHARACTERS = 1 << 20
# The trainer's embedded settings hold the number of threads, so it must not follow the machine.
_TRAINER_THREADS = 2


class Tokenizer:
    """A sentencepiece model and the numbers a run needs from it.

    vocab_size: V. bos_id, eos_id: begin and end of a document. sha256: of the model's bytes.
    """

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        try:
            processor = sentencepiece.SentencePieceProcessor()
            processor.LoadFromSerializedProto(model)
        except Exception:  # it raises RuntimeError, and may raise others on damaged bytes
            raise InputError(f"{name}: not a sentencepiece model (damaged, or another kind of file)") from None
        self.model = model
        self.name = name
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = processor
        self.vocab_size: int = processor.vocab_size()
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        if self.eos_id < 0:
            raise InputError(f"{name}: the sentencepiece model has no end-of-document token (eos_id)")
        self._space_mark_ids = self._ids_of_bytes(SPACE_MARK.encode())

    @classmethod
    def load(cls, path: str | Path, sha256: str | None = None) -> Tokenizer:
        """Raises InputError: no such file, not a model, or not the file whose hash is expected."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such tokenizer file")
        model = path.read_bytes()
        found = hashlib.sha256(model).hexdigest()
        if sha256 is not None and found != sha256:
            raise InputError(f"{path}: the tokenizer is damaged: sha256 {found[:12]}, expected {sha256[:12]}")
        return cls(model, str(path))

    def encode(self, text: str) -> list[int]:
        """Ids without begin and end."""
        return self.encode_batch([text], threads=1)[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[NDArray[np.int32]]:
        """Ids of each text, without begin and end; the texts are spread over threads."""
        pieces: list[str] = []
        layout: list[list[int]] = []  # per text: index of a piece, or -1 for a literal space mark
        for text in texts:
            parts: list[int] = []
            for number, stretch in enumerate(text.split(SPACE_MARK)):
                if number:
                    parts.append(-1)
                for chunk in chunks(stretch, _ENCODE_CHARACTERS):
                    parts.append(len(pieces))
                    pieces.append(chunk)
            layout.append(parts)
        encoded = self._processor.encode(pieces, out_type=int, num_threads=threads) if pieces else []
        mark = np.asarray(self._space_mark_ids, np.int32)
        arrays = [np.asarray(ids, np.int32) for ids in encoded]
        return [_join([arrays[part] if part >= 0 else mark for part in parts]) for parts in layout]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special ids are left out, and bytes that are no UTF-8 become U+FFFD."""
        special = {self._processor.unk_id(), self.bos_id, self.eos_id, self._processor.pad_id()}
        return self._processor.decode([int(i) for i in ids if int(i) not in special])

    def token_bytes(self) -> NDArray[np.int64]:
        """(V,) UTF-8 bytes that each id stands for; 0 for special ids."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for index in range(self.vocab_size):
            if self._processor.is_byte(index):
                lengths[index] = 1
            elif not (self._processor.is_control(index) or self._processor.is_unknown(index)):
                lengths[index] = len(self._processor.id_to_piece(index).replace(SPACE_MARK, " ").encode())
        return lengths

    def _ids_of_bytes(self, raw: bytes) -> list[int]:
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in raw]
        return [] if self._processor.unk_id() in ids else ids


def recorded_sha256(path: str | Path) -> str | None:
    """The hash that stands beside a model (`X.sha256`, as sha256sum writes it); None if there is no such file."""
    words = beside.read_text().split() if (beside := Path(f"{path}.sha256")).is_file() else []
    return words[0] if words else None


def train_tokenizer(texts: Iterable[str], vocab_size: int, key: str = "data.tokenizer.vocab_size") -> Tokenizer:
    """Learns the vocabulary. The same texts in the same order give the same bytes on any machine.

    Raises InputError naming the largest (or smallest) workable vocab_size.
    """
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            max_sentence_length=1 << 24,
            num_threads=_TRAINER_THREADS,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise InputError(f"{key}: {_why(str(error), vocab_size)}") from None
    return Tokenizer(writer.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for stretch in text.replace(SPACE_MARK, "\n").split("\0"):
            yield from chunks(stretch, 1 << 14)


def _join(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _why(message: str, vocab_size: int) -> str:
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"{vocab_size} is more than the corpus supports; the largest that works is {found[1]}"
    if found := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message):
        return f"{vocab_size} is too small for this corpus; the smallest that works is {found[1]}"
    if "sentences_.empty" in message:
        return "the training text is empty"
    return f"sentencepiece could not train on this text: {message.splitlines()[0]}"
