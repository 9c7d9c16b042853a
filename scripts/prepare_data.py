"""Prepares a corpus ahead of a run, or checks one: `python -m scripts.prepare_data [--verify] [--path GLOB]`.

The settings must equal those of the run's `data:` section, as they name the cached folder; a run prepares by itself
what is not there.
"""

from __future__ import annotations

import argparse
import sys
import time

from data.config import DataConfig, TokenizerConfig
from data.prepare import prepare
from data.prepared import Prepared, verify
from data.progress import show_progress
from errors import InputError, exit_with, require


def main() -> int:
    defaults = DataConfig()
    parser = argparse.ArgumentParser(prog="python -m scripts.prepare_data", description=__doc__.split("\n")[0])
    parser.add_argument("--source", default=defaults.source, help="installed_python, installed_cpp, files, ...")
    parser.add_argument("--path", nargs="+", help="files, folders or globs (alone: selects source files)")
    parser.add_argument(
        "--mixture", nargs="+", metavar="CORPUS=WEIGHT", help="e.g. installed_python=0.7 installed_cpp=0.3"
    )
    parser.add_argument("--text-field", default=defaults.text_field)
    parser.add_argument("--vocab-size", type=int, default=defaults.tokenizer.vocab_size)
    parser.add_argument("--tokenizer", metavar="FILE", help="use this sentencepiece model instead of training one")
    parser.add_argument("--validation-fraction", type=float, default=defaults.validation_fraction)
    parser.add_argument("--artifacts", default="artifacts", help="where it is cached")
    parser.add_argument("--workers", type=int, help="processes that tokenise (default: one per core)")
    parser.add_argument("--verify", action="store_true", help="read everything again and compare sha256")
    args = parser.parse_args()
    config = DataConfig(
        source=args.source,
        path=args.path,
        text_field=args.text_field,
        mixture=_mixture(args.mixture or []),
        validation_fraction=args.validation_fraction,
        tokenizer=TokenizerConfig(vocab_size=args.vocab_size, path=args.tokenizer),
    )
    config.validate("data")
    require(args.workers is None or args.workers > 0, "--workers", f"expected at least 1, got {args.workers}")
    start = time.monotonic()
    with show_progress() as progress:
        prepared = prepare(config, args.artifacts, progress, workers=args.workers)
        by_size = verify(prepared.folder, progress) if args.verify else []
    _describe(prepared)
    for line in by_size:
        print(line)
    if args.verify:
        print("verified: every recorded sha256 agrees")
    print(f"{prepared.folder} ready in {time.monotonic() - start:.1f} s")
    return 0


def _mixture(items: list[str]) -> dict[str, float]:
    mixture = {}
    for item in items:
        name, equals, weight = item.rpartition("=")
        try:
            mixture[name] = float(weight)
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(f"--mixture: expected CORPUS=WEIGHT, e.g. installed_cpp=0.3, got {item!r}")
    return mixture


def _describe(prepared: Prepared) -> None:
    for corpus in prepared.manifest["corpora"]:
        for split in ("train", "validation"):
            part = corpus[split]
            counts = f"{part['tokens']:,} tokens"
            if "bytes" in part:
                ratio = part["bytes"] / part["tokens"]
                counts = f"{part['documents']:,} documents, {part['bytes']:,} bytes, {counts}, {ratio:.2f} bytes/token"
            print(f"{corpus['label']} {split}: {counts}")
    for note in prepared.notes:
        print(f"note: {note}")
    print(f"manifest sha256 {prepared.manifest_sha256}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    exit_with(main)
