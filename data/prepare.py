"""Text -> tokenizer, token shards and a manifest, made once and cached under `artifacts/`.

A preparation is written to a hidden temporary folder, brought to the disk and renamed: it is there as a whole or not
at all, whenever the process was killed. What was tokenised by then stays in that folder and is not done again. A lock
file lets several processes ask for the same one at once.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data import parts
from data.config import ANSWER_SOURCES, CorpusSpec, DataConfig
from data.corpora import open_corpus
from data.megatron import external_shards, external_split
from data.prepared import FORMAT, MANIFEST, Prepared, open_prepared
from data.shards import bin_path, idx_path
from data.split import TEST, TRAIN, VALIDATION, Survey, sample, survey
from data.split_writer import SplitWriter, sync_folder
from data.tokenizer import Tokenizer, recorded_sha256, train_tokenizer
from data.workers import Workers, cores
from errors import InputError

# (stage, done, total): called often; total 0 = unknown.
Progress = Callable[[str, int, int], None]

PARTS = "parts"
_SHARD_TOKENS = 1 << 29
# Raise when a change here or in what it calls makes other tokens out of the same text.
_RECIPE = 1


@dataclass(frozen=True)
class _Manner:
    """How tokens are made; the same ones come of any."""

    progress: Progress
    workers: int
    shard_tokens: int
    part_bytes: int


def prepare(
    config: DataConfig,
    artifacts_dir: str | Path = "artifacts",
    progress: Progress | None = None,
    *,
    workers: int | None = None,
    shard_tokens: int = _SHARD_TOKENS,
    part_bytes: int = parts.PART_BYTES,
) -> Prepared:
    """The corpus that a validated config names, from the cache or made now. workers: processes that tokenise; None =
    one per core. Killed and called again, it goes on behind the parts that are done.

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
            _keep_parts(temporary)  # of a killed process: the lock is ours
            temporary.mkdir(exist_ok=True)
            try:
                _write(config, temporary, _Manner(progress or _silent, workers or cores(), shard_tokens, part_bytes))
                sync_folder(temporary)
                temporary.rename(folder)
                sync_folder(folder.parent)
            except BaseException as error:
                if isinstance(error, InputError) and not _is_looked_for(config, artifacts_dir, folder):
                    shutil.rmtree(temporary / PARTS, ignore_errors=True)
                _keep_parts(temporary)
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
    described = []
    for spec in specs:
        if spec.source == "megatron":
            stats = [path.stat() for s in external_shards(spec) for path in (bin_path(s.prefix), idx_path(s.prefix))]
            described.append([spec.label, spec.weight, [[stat.st_size, stat.st_mtime_ns] for stat in stats]])
        else:
            part = [spec.label, spec.weight, open_corpus(spec, config).fingerprint()]
            described.append([*part, _test_fraction(config, spec)] if spec.source in ANSWER_SOURCES else part)
    settings = [_RECIPE, FORMAT, described, tokenizer, config.validation_fraction]
    if config.train_fraction < 1:
        settings.append(config.train_fraction)
    key = json.dumps(settings)
    label = "mixture" if len(specs) > 1 else specs[0].label
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", label).strip("-")[:40]
    return Path(artifacts_dir) / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _is_looked_for(config: DataConfig, artifacts_dir: str | Path, folder: Path) -> bool:
    """Whether the next call goes on in the same place: a file that was written to gives the preparation another name,
    and a disk that is away comes back with the same files. What it finds there it knows by the text itself."""
    try:
        return prepared_folder(config, artifacts_dir) == folder
    except (InputError, OSError):
        return True


def _test_fraction(config: DataConfig, spec: CorpusSpec) -> float:
    """Only answers are scored after training, and rows that are given for it replace a share."""
    if spec.source not in ANSWER_SOURCES or (spec.source == "jsonl" and config.test_path is not None):
        return 0.0
    return config.test_fraction


def _write(config: DataConfig, folder: Path, manner: _Manner) -> None:
    specs = config.corpora()
    notes: list[str] = []
    surveys: dict[str, Survey] = {}
    for spec in specs:
        if spec.source != "megatron":
            report = partial(_report, manner.progress, f"reading {spec.label}")
            surveys[spec.label] = survey(
                open_corpus(spec, config),
                spec.label,
                config.validation_fraction,
                report,
                test_fraction=_test_fraction(config, spec),
                train_fraction=config.train_fraction,
            )
            notes += surveys[spec.label].notes
    tokenizer = _tokenizer(config, specs, surveys, manner.progress)
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
            entry |= _tokenise(surveys[spec.label], spec, tokenizer, folder, prefix, manner)
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
    shutil.rmtree(folder / PARTS, ignore_errors=True)
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
    progress("learning the vocabulary", 0, 0)
    texts: list[str] = []
    for spec in specs:
        texts += sample(surveys[spec.label], int(config.tokenizer.sample_bytes * spec.weight))
    return train_tokenizer(texts, config.tokenizer.vocab_size)


def _tokenise(
    source: Survey, spec: CorpusSpec, tokenizer: Tokenizer, folder: Path, prefix: str, manner: _Manner
) -> dict[str, Any]:
    """Writes the shards of all splits and returns their entry in the manifest."""
    paths = _tokenise_parts(source, spec.label, tokenizer, folder, prefix, manner)
    entry: dict[str, Any] = {"duplicates": source.duplicates, "exact": True}
    has_answers = spec.source in ANSWER_SOURCES
    names = [TRAIN, VALIDATION] + ([TEST] if source.test_bytes else [])
    splits = {
        name: SplitWriter(folder, f"{prefix}/{name}", tokenizer, manner.shard_tokens, has_answers) for name in names
    }
    try:
        for path in paths:
            found = parts.load(path)
            entry["exact"] &= bool(found["exact"])
            for name, writer in splits.items():
                for document in parts.documents(found, name):
                    writer.add(*document)
            manner.progress(f"writing shards of {spec.label}", 0, 0)
        for name, writer in splits.items():
            entry[name] = writer.close()
            if entry[name]["documents"] == 0:
                shutil.rmtree(folder / PARTS)  # the same text has too little again, and more of it has another name
                raise InputError(f"data.path: {spec.label} holds too little text for a {name} split")
    finally:
        for writer in splits.values():
            writer.abort()
    return entry


def _tokenise_parts(
    source: Survey, label: str, tokenizer: Tokenizer, folder: Path, prefix: str, manner: _Manner
) -> list[Path]:
    """Tokenises what is not there yet, here (a corpus of one part) or in processes; the parts' files in order."""
    total = source.train_bytes + source.validation_bytes + source.test_bytes
    count = min(manner.workers, -(-total // manner.part_bytes))
    if source.train_fraction < 1:
        total = 0  # unknown before it is read
    (folder / PARTS).mkdir(exist_ok=True)
    paths: list[Path] = []
    done = 0
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(Workers(count, folder / "tokenizer.model")) if count > 1 else None
        for part in parts.cut(source.documents(), manner.part_bytes):
            path, digest = folder / PARTS / f"{prefix}-{part.number:06d}.npz", part.digest(tokenizer)
            paths.append(path)
            if parts.is_done(path, digest):
                done += part.n_bytes
            elif workers is not None:
                workers.give(part, path, digest)
            else:
                parts.save(path, parts.tokenise(part.items, tokenizer, manner.workers), digest)
                done += part.n_bytes
            manner.progress(f"tokenising {label}", done + (workers.finished_bytes if workers else 0), total)
        while workers is not None and workers.wait():
            manner.progress(f"tokenising {label}", done + workers.finished_bytes, total)
    sync_folder(folder / PARTS)
    return paths


def _keep_parts(folder: Path) -> None:
    """Removes all of a preparation but its finished parts; all of it if there is none."""
    if not any((folder / PARTS).glob("*.npz")):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        if path.is_dir() and path.name != PARTS:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    for path in (folder / PARTS).glob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Held by one process at a time, given back by the system when it dies."""
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _report(progress: Progress, stage: str, done: int) -> None:
    progress(stage, done, 0)


def _silent(stage: str, done: int, total: int) -> None:
    pass
