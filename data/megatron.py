"""Corpora that were tokenised elsewhere: Megatron `.bin/.idx` pairs, used in place and never copied or changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.config import CorpusSpec
from data.documents import find_files
from data.packing import TokenStream
from data.shards import Shard, bin_path, idx_path
from errors import InputError

# Enough for any loss to three digits; a share of a terabyte would be read by nobody.
_MOST_VALIDATION_TOKENS = 20_000_000


def external_shards(spec: CorpusSpec) -> list[Shard]:
    """The pairs that prefixes or globs name (with or without .bin or .idx). Raises InputError."""
    prefixes: dict[Path, None] = {}
    for name in spec.paths:
        bare = name.removesuffix(".bin").removesuffix(".idx")
        key = "data.path" if name.endswith(".idx") else f"data.path: {name}"
        for index in find_files((f"{bare}.idx",), key):
            prefixes[index.with_suffix("").absolute()] = None
    return [Shard(prefix) for prefix in prefixes]


def external_split(spec: CorpusSpec, validation_fraction: float) -> dict[str, Any]:
    """Entry of the manifest: the last documents are held out (a range, as Megatron does), so nothing is read."""
    shards = external_shards(spec)
    stream = TokenStream(shards)
    held_out = min(int(stream.n_tokens * validation_fraction), _MOST_VALIDATION_TOKENS)
    cut = stream.document_boundary(max(0, stream.n_tokens - max(1, held_out)))
    if cut == 0:
        raise InputError(f"data.path: {spec.label} holds a single document; at least two are needed to hold one out")
    entries = [
        {
            "prefix": str(shard.prefix),
            "bin_bytes": bin_path(shard.prefix).stat().st_size,
            "idx_bytes": idx_path(shard.prefix).stat().st_size,
            "bin_sha256": None,
            "idx_sha256": None,
        }
        for shard in shards
    ]
    return {
        "train": {"shards": entries, "begin": 0, "end": cut, "tokens": cut},
        "validation": {"shards": entries, "begin": cut, "end": stream.n_tokens, "tokens": stream.n_tokens - cut},
    }
