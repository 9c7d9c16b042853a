"""Where text comes from: one class per source, each an iterable of documents in a fixed order.

(`megatron` is not here: it is tokens already, see `prepare.py`.)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from data.chat import as_document, read_chat
from data.config import CorpusSpec, DataConfig, NLRXConfig
from data.documents import Document, checked_text, find_files, read_file, read_text
from data.nlrx.generate import generate_pairs
from errors import InputError

_NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Corpus(Protocol):
    def fingerprint(self) -> list[object]:
        """What a cached preparation depends on, cheap to compute (JSON values)."""
        ...

    def documents(self) -> Iterator[Document]:
        """All documents, in the same order every time. Raises InputError for what is no text."""
        ...


def open_corpus(spec: CorpusSpec, config: DataConfig) -> Corpus:
    """Raises InputError if there is nothing to read."""
    if spec.source == "installed_python":
        return InstalledPython()
    if spec.source == "installed_cpp":
        return InstalledCpp()
    if spec.source == "files":
        return Files(spec.paths, config.text_field)
    if spec.source == "huggingface":
        return HuggingFace(spec.paths, config.text_field)
    if spec.source == "jsonl":
        return ChatRows(spec.paths, config.test_paths())
    if spec.source == "nlrx":
        return NLRX(config.nlrx)
    raise ValueError(f"{spec.source} is no source of text")


class InstalledPython:
    """Python source installed beside the project: the standard library and torch, without their tests."""

    def fingerprint(self) -> list[object]:
        return [sys.version.split()[0], importlib.metadata.version("torch")]

    def documents(self) -> Iterator[Document]:
        library = Path(sysconfig.get_path("stdlib"))
        not_torch = _NOT_THE_LIBRARY | {"testing", "include"}
        yield from _source_tree(library, "python", (".py",), _NOT_THE_LIBRARY, _module)
        yield from _source_tree(_torch_folder(), "torch", (".py",), not_torch, _module)


class InstalledCpp:
    """torch's C++ headers, without the generated ones of `ATen/ops` (thousands of twins)."""

    def fingerprint(self) -> list[object]:
        return [importlib.metadata.version("torch")]

    def documents(self) -> Iterator[Document]:
        folder = _torch_folder() / "include"
        yield from _source_tree(folder, "include", (".h", ".hpp", ".cuh", ".inc"), {"ATen/ops"}, _subpackage)


class Files:
    """Files that a person names: text (one file one document), .jsonl and .parquet (one row one document)."""

    def __init__(self, paths: tuple[str, ...], text_field: str) -> None:
        self.files = find_files(paths)
        self.text_field = text_field

    def fingerprint(self) -> list[object]:
        return [*_file_marks(self.files), self.text_field]

    def documents(self) -> Iterator[Document]:
        for path in self.files:
            yield from read_file(path, self.text_field)


class ChatRows:
    """.jsonl files of conversations, one row one document. Rows of test files come first and are set aside."""

    def __init__(self, paths: tuple[str, ...], test_paths: tuple[str, ...]) -> None:
        self.files = find_files(paths)
        self.test_files = find_files(test_paths, "data.test_path")

    def fingerprint(self) -> list[object]:
        return [_file_marks(self.files), _file_marks(self.test_files)]

    def documents(self) -> Iterator[Document]:
        for path in self.test_files:
            yield from read_chat(path, split="test")
        for path in self.files:
            yield from read_chat(path)


class NLRX:
    """Generated pairs of a description and its regex (Locascio et al. 2016): prompt and answer."""

    # Raise when the generator or the grammar gives other pairs for the same settings.
    recipe = 1

    def __init__(self, config: NLRXConfig) -> None:
        self.config = config

    def fingerprint(self) -> list[object]:
        return [self.recipe, self.config.pairs, self.config.seed]

    def documents(self) -> Iterator[Document]:
        for number, pair in enumerate(generate_pairs(self.config.pairs, self.config.seed)):
            messages = [("user", pair.description), ("assistant", pair.regex)]
            yield as_document(f"nlrx:{number}", messages)


class HuggingFace:
    """Data sets by name (`name` or `name:subset`), their `train` split, through the `datasets` package."""

    def __init__(self, names: tuple[str, ...], text_field: str) -> None:
        self.names = names
        self.text_field = text_field

    def fingerprint(self) -> list[object]:
        return [*self.names, self.text_field]

    def documents(self) -> Iterator[Document]:
        if importlib.util.find_spec("datasets") is None:
            raise InputError("data.source: huggingface needs the datasets package: .venv/bin/pip install datasets")
        import datasets

        for name in self.names:
            path, _, subset = name.partition(":")
            try:
                rows = datasets.load_dataset(path, subset or None, split="train")
            except Exception as error:  # network, name, subset, script: it raises many kinds
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise InputError(f"data.path: the data set {name} cannot be loaded: {reason}") from None
            if self.text_field not in rows.column_names:
                columns = ", ".join(rows.column_names)
                raise InputError(
                    f"data.text_field: {name} has no column {self.text_field!r}; expected one of {columns}"
                )
            for number, row in enumerate(rows):
                where = f"{name}:{number}"
                yield Document(where, checked_text(row[self.text_field], where))


def _file_marks(files: list[Path]) -> list[object]:
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


Parts = tuple[str, ...]


def _source_tree(
    root: Path, prefix: str, suffixes: tuple[str, ...], without: set[str], group: Callable[[Parts], str]
) -> Iterator[Document]:
    """Source files below a folder, by path. without: names or relative paths of folders that are not entered.

    Files that are not UTF-8 (a few with encoding cookies) are no documents, nor are those that building Python left
    (_sysconfigdata*, full of paths of that machine).
    """
    found = []
    for folder, names, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        names[:] = [name for name in names if name not in without and (relative / name).as_posix() not in without]
        wanted = (name for name in files if name.endswith(suffixes) and not name.startswith("_sysconfigdata"))
        found += [(*relative.parts, name) for name in wanted]
    for parts in sorted(found):
        path = root.joinpath(*parts)
        if not path.is_file():  # a dangling link
            continue
        try:
            text = read_text(path)
        except InputError:
            continue
        yield Document("/".join((prefix, *parts)), text, f"{prefix}/{group(parts)}")


def _module(parts: Parts) -> str:
    """The package or module right below the root: json/decoder.py and json/tool.py are one group."""
    return parts[0]


def _subpackage(parts: Parts) -> str:
    """The folder, two levels deep (three where nearly everything lies under torch/csrc); X.h and X-inl.h together."""
    return "/".join(parts[:-1][: 3 if parts[:2] == ("torch", "csrc") else 2])


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise InputError("data.source: the torch package is not installed; run `make setup`")
    return Path(spec.origin).parent
