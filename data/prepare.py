"""Text -> tokenizer, token shards and a manifest, made once and cached under `artifacts/`.

A preparation is written to a hidden temporary folder, brought to the disk and renamed: it is there as a whole or not
at all, whenever the process was killed. A lock file lets several processes ask for the same one at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.config import CorpusSpec, DataConfig
from data.corpora import open_corpus
from data.documents import Document
from data.megatron import external_shards, external_split
from data.prepared import FORMAT, MANIFEST, Prepared, open_prepared, sha256_file
from data.shards import ShardWriter, bin_path, dtype_for, idx_path
from data.split import Survey, sample, survey
from data.tokenizer import Tokenizer, recorded_sha256, train_tokenizer
from errors import InputError

# (stage, done, total): called often; total 0 = unknown.
Progress = Callable[[str, int, int], None]

_SHARD_TOKENS = 1 << 29
_BATCH_BYTES = 4 << 20
# Raise when a change here or in what it calls makes other tokens out of the same text.
_RECIPE = 1


def prepare(
    config: DataConfig,
    artifacts_dir: str | Path = "artifacts",
    progress: Progress | None = None,
    *,
    threads: int | None = None,
    shard_tokens: int = _SHARD_TOKENS,
) -> Prepared:
    """The corpus that a config names, from the cache or made now. threads: for tokenising; None = all cores.

    Raises InputError: nothing to read, binary file, vocabulary too large for the text, damaged tokenizer or shard.
    """
    folder = prepared_folder(config, artifacts_dir)
    if folder.is_dir():
        return open_prepared(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder.parent}: cannot be used as the folder of artifacts: {error.strerror}") from None
    with _lock(folder):
        if not folder.is_dir():  # another process may have made it while we waited
            temporary = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process: the lock is ours
            temporary.mkdir()
            try:
                _write(config, temporary, progress or _silent, threads or os.cpu_count() or 1, shard_tokens)
                _sync_folder(temporary)
                temporary.rename(folder)
                _sync_folder(folder.parent)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    return open_prepared(folder)


def prepared_folder(config: DataConfig, artifacts_dir: str | Path = "artifacts") -> Path:
    """Where `prepare` keeps this corpus: a readable name and a hash of all that its tokens depend on.

    Reads no text. Raises InputError if a path or glob names nothing.
    """
    specs = config.corpora()
    tokenizer: dict[str, Any] = {"vocab_size": config.tokenizer.vocab_size, "sample": config.tokenizer.sample_bytes}
    if config.tokenizer.path is not None:
        tokenizer = {"sha256": Tokenizer.load(config.tokenizer.path, recorded_sha256(config.tokenizer.path)).sha256}
    parts = []
    for spec in specs:
        if spec.source == "megatron":
            stats = [path.stat() for s in external_shards(spec) for path in (bin_path(s.prefix), idx_path(s.prefix))]
            parts.append([spec.label, spec.weight, [[stat.st_size, stat.st_mtime_ns] for stat in stats]])
        else:
            parts.append([spec.label, spec.weight, open_corpus(spec, config).fingerprint()])
    key = json.dumps([_RECIPE, FORMAT, parts, tokenizer, config.validation_fraction])
    label = "mixture" if len(specs) > 1 else specs[0].label
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", label).strip("-")[:40]
    return Path(artifacts_dir) / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _write(config: DataConfig, folder: Path, progress: Progress, threads: int, shard_tokens: int) -> None:
    specs = config.corpora()
    notes: list[str] = []
    surveys: dict[str, Survey] = {}
    for spec in specs:
        if spec.source != "megatron":
            report = partial(_report, progress, f"reading {spec.label}")
            surveys[spec.label] = survey(open_corpus(spec, config), spec.label, config.validation_fraction, report)
            notes += surveys[spec.label].notes
    tokenizer = _tokenizer(config, specs, surveys, progress)
    model = folder / "tokenizer.model"
    model.write_bytes(tokenizer.model)
    (folder / "tokenizer.model.sha256").write_text(f"{tokenizer.sha256}  tokenizer.model\n")
    corpora = []
    for number, spec in enumerate(specs):
        entry: dict[str, Any] = {"label": spec.label, "weight": spec.weight}
        if spec.source == "megatron":
            entry |= external_split(spec, config.validation_fraction)
        else:
            prefix = f"{number}-{spec.source}"
            entry |= _tokenise(surveys[spec.label], spec, tokenizer, folder, prefix, progress, threads, shard_tokens)
            if not entry.pop("exact"):
                notes.append(f"{spec.label}: this tokenizer changes the text, so bits per byte are of its own output")
        corpora.append(entry)
    manifest = {
        "format": FORMAT,
        "recipe": _RECIPE,
        "config": {name: value for name, value in dataclasses.asdict(config).items() if name != "sequence_length"},
        "tokenizer": {
            "file": model.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        "corpora": corpora,
        "notes": notes,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _tokenizer(
    config: DataConfig, specs: list[CorpusSpec], surveys: dict[str, Survey], progress: Progress
) -> Tokenizer:
    if config.tokenizer.path is not None:
        return Tokenizer.load(config.tokenizer.path, recorded_sha256(config.tokenizer.path))
    if len(surveys) < len(specs):
        raise InputError("data.tokenizer.path: is missing; a megatron corpus needs the tokenizer that made it")
    progress("learning the vocabulary", 0, 0)
    texts: list[str] = []
    for spec in specs:
        texts += sample(surveys[spec.label], int(config.tokenizer.sample_bytes * spec.weight))
    return train_tokenizer(texts, config.tokenizer.vocab_size)


def _tokenise(
    source: Survey,
    spec: CorpusSpec,
    tokenizer: Tokenizer,
    folder: Path,
    prefix: str,
    progress: Progress,
    threads: int,
    shard_tokens: int,
) -> dict[str, Any]:
    """Writes the shards of both splits and returns their entry in the manifest."""
    splits = {
        name: _SplitWriter(folder, f"{prefix}/{name}", tokenizer, shard_tokens) for name in ("train", "validation")
    }
    token_bytes = tokenizer.token_bytes()
    total, done, exact = source.train_bytes + source.validation_bytes, 0, True
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    try:
        for documents in _batches(source.documents()):
            for (document, is_held_out), ids in zip(
                documents, tokenizer.encode_batch([document.text for document, _ in documents], threads)
            ):
                size = len(document.text.encode())
                exact = exact and int(token_bytes[ids].sum()) == size
                whole = np.concatenate([begin, ids, [tokenizer.eos_id]]).astype(np.int32)
                splits["validation" if is_held_out else "train"].add(whole, size)
                done += size
            progress(f"tokenising {spec.label}", done, total)
        entry: dict[str, Any] = {"duplicates": source.duplicates, "exact": exact}
        for name, split in splits.items():
            entry[name] = split.close()
            if entry[name]["documents"] == 0:
                raise InputError(f"data.path: {spec.label} holds too little text for a {name} split")
    finally:
        for split in splits.values():
            split.abort()
    return entry


class _SplitWriter:
    """One split as a series of shards."""

    def __init__(self, folder: Path, prefix: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.folder, self.prefix, self.shard_tokens = folder, prefix, shard_tokens
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.shards: list[dict[str, Any]] = []
        self.counts = {"documents": 0, "bytes": 0, "tokens": 0}
        self._writer: ShardWriter | None = None

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        if self._writer is None:
            self._writer = ShardWriter(self.folder / f"{self.prefix}-{len(self.shards):05d}", self.dtype)
        self._writer.add(ids)
        self.counts["documents"] += 1
        self.counts["bytes"] += n_bytes
        self.counts["tokens"] += len(ids)
        if self._writer.n_tokens >= self.shard_tokens:
            self._finish()

    def close(self) -> dict[str, Any]:
        self._finish()
        return {**self.counts, "shards": self.shards, "begin": 0, "end": self.counts["tokens"]}

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()

    def _finish(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        prefix = self._writer.prefix
        entry: dict[str, Any] = {"prefix": str(prefix.relative_to(self.folder))}
        for kind, path in (("bin", bin_path(prefix)), ("idx", idx_path(prefix))):
            entry |= {f"{kind}_bytes": path.stat().st_size, f"{kind}_sha256": sha256_file(path)}
        _sync_folder(prefix.parent)
        self.shards.append(entry)
        self._writer = None


def _batches(documents: Iterator[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    batch: list[tuple[Document, bool]] = []
    size = 0
    for item in documents:
        batch.append(item)
        size += len(item[0].text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Held by one process at a time, given back by the system when it dies."""
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _report(progress: Progress, stage: str, done: int) -> None:
    progress(stage, done, 0)


def _silent(stage: str, done: int, total: int) -> None:
    pass
