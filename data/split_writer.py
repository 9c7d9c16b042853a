"""One split of a corpus as a series of token shards, with the shards that say which tokens are learned."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from data.prepared import sha256_file
from data.shards import ShardWriter, bin_path, dtype_for, idx_path
from data.tokenizer import Tokenizer


class SplitWriter:
    """Writes documents to shards of about shard_tokens; `close` returns their entry in the manifest.

    has_answers: which tokens are learned goes into a shard of its own beside each token shard (one byte a token, the
    same index), so that token shards stay what Megatron reads and any layout of prompts and answers serves.
    """

    def __init__(self, folder: Path, prefix: str, tokenizer: Tokenizer, shard_tokens: int, has_answers: bool) -> None:
        self.folder, self.prefix, self.shard_tokens = folder, prefix, shard_tokens
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.shards: list[dict[str, Any]] = []
        self.counts = {"documents": 0, "bytes": 0, "tokens": 0}
        self._kinds = {"": self.dtype, "-loss": np.uint8} if has_answers else {"": self.dtype}
        self._writers: dict[str, ShardWriter] = {}
        if has_answers:
            self.counts["answer_tokens"] = 0

    def add(self, ids: np.ndarray, n_bytes: int, mask: np.ndarray) -> None:
        if not self._writers:
            prefix = self.folder / f"{self.prefix}-{len(self.shards):05d}"
            self._writers = {
                kind: ShardWriter(prefix.with_name(prefix.name + kind), dtype) for kind, dtype in self._kinds.items()
            }
        self._writers[""].add(ids)
        if "-loss" in self._writers:
            self._writers["-loss"].add(mask)
            self.counts["answer_tokens"] += int(mask.sum())
        self.counts["documents"] += 1
        self.counts["bytes"] += n_bytes
        self.counts["tokens"] += len(ids)
        if self._writers[""].n_tokens >= self.shard_tokens:
            self._finish()

    def close(self) -> dict[str, Any]:
        self._finish()
        return {**self.counts, "shards": self.shards, "begin": 0, "end": self.counts["tokens"]}

    def abort(self) -> None:
        for writer in self._writers.values():
            writer.abort()

    def _finish(self) -> None:
        if not self._writers:
            return
        entries = {kind: self._entry(writer) for kind, writer in self._writers.items()}
        sync_folder(self._writers[""].prefix.parent)
        self.shards.append(entries[""] | ({"loss": entries["-loss"]} if "-loss" in entries else {}))
        self._writers = {}

    def _entry(self, writer: ShardWriter) -> dict[str, Any]:
        writer.close()
        entry: dict[str, Any] = {"prefix": str(writer.prefix.relative_to(self.folder))}
        for kind, path in (("bin", bin_path(writer.prefix)), ("idx", idx_path(writer.prefix))):
            entry |= {f"{kind}_bytes": path.stat().st_size, f"{kind}_sha256": sha256_file(path)}
        return entry


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
