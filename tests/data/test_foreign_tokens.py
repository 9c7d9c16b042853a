"""Tokenizers and token shards that were made elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig, TokenizerConfig
from data.prepare import prepare
from data.prepared import Prepared, verify
from data.shards import ShardWriter
from data.stream import TrainStream, validation_batches
from errors import InputError


def test_another_runs_tokenizer(prepared: Prepared, texts_folder: Path, tmp_path: Path) -> None:
    model = prepared.folder / "tokenizer.model"
    config = DataConfig(
        path=str(texts_folder.parent / "second"),
        validation_fraction=0.2,
        tokenizer=TokenizerConfig(path=str(model)),
    )
    other = prepare(config, tmp_path / "artifacts")
    assert other.tokenizer.sha256 == prepared.tokenizer.sha256 and other.vocab_size == 330
    damaged = tmp_path / "tokenizer.model"
    raw = bytearray(model.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    (tmp_path / "tokenizer.model.sha256").write_bytes((prepared.folder / "tokenizer.model.sha256").read_bytes())
    with pytest.raises(InputError, match="the tokenizer is damaged"):
        prepare(replace(config, tokenizer=TokenizerConfig(path=str(damaged))), tmp_path / "artifacts")


def test_megatron_corpus_is_used_in_place(prepared: Prepared, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(2):
        writer = ShardWriter(tmp_path / f"corpus_{number}", np.uint16)
        for _ in range(50):
            writer.add(rng.integers(3, 330, rng.integers(5, 40)))
        writer.close()
    model = str(prepared.folder / "tokenizer.model")
    config = DataConfig(
        source="megatron",
        path=str(tmp_path / "corpus_*"),
        validation_fraction=0.1,
        tokenizer=TokenizerConfig(path=model),
    )
    before = {path: path.read_bytes() for path in tmp_path.glob("corpus_*")}
    foreign = prepare(config, tmp_path / "artifacts")
    assert not list(foreign.folder.rglob("*.bin"))
    train, validation = foreign.corpora[0].train, foreign.corpora[0].validation
    everything = np.concatenate([np.fromfile(tmp_path / f"corpus_{n}.bin", np.uint16) for n in range(2)])
    split = np.concatenate([train.tokens(0, train.n_tokens), validation.tokens(0, validation.n_tokens)])
    assert (split == everything).all()
    assert 0.1 <= validation.n_tokens / len(everything) < 0.14
    assert validation.document_starts(0, validation.n_tokens)[0] == 0  # cut between documents
    labels = sum(batch.loss_tokens for batch in validation_batches(foreign, 16, 8))
    assert labels == validation.n_tokens - len(validation.document_starts(0, validation.n_tokens))
    assert TrainStream(foreign, 16, 4).batch(3).loss_tokens > 40
    assert len(verify(foreign.folder)) == 4
    assert {path: path.read_bytes() for path in tmp_path.glob("corpus_*")} == before
    (tmp_path / "corpus_1.bin").write_bytes(b"short")
    with pytest.raises(InputError, match=r"corpus_1.bin: the shard is damaged"):
        prepare(config, tmp_path / "artifacts")
    with pytest.raises(InputError, match=r"matches no file|no such file"):
        prepare(replace(config, path=str(tmp_path / "absent")), tmp_path / "artifacts")
    given = f"{tmp_path}/absent*.bin"
    with pytest.raises(InputError) as caught:
        prepare(replace(config, path=given), tmp_path / "artifacts")
    assert str(caught.value).startswith(f"data.path: {given}: {tmp_path}/absent*.idx matches no file")
