"""Documents out of files: plain text, .jsonl and .parquet, each refusal naming the file (and the line)."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from errors import InputError, nearest

_WILDCARDS = "*?["


@dataclass(frozen=True)
class Segment:
    """A stretch of a document. part: "prompt" is read only; "answer" bears loss, and the end token follows it."""

    text: str
    part: str


@dataclass(frozen=True)
class Document:
    """One document.

    key: where it is from, unique in its corpus. group: what the split keeps together (empty: the document itself, by
    its content). segments: prompts and answers whose texts, joined, are `text`; empty: all of the text bears loss.
    split: "test" for a document that its corpus has set aside; empty: decided by hash.
    """

    key: str
    text: str
    group: str = ""
    segments: tuple[Segment, ...] = ()
    split: str = ""


def find_files(paths: tuple[str, ...], key: str = "data.path") -> list[Path]:
    """Files of paths, folders (all files below, hidden ones left out) and globs (** allowed), sorted, each once.

    Raises InputError: nothing there, or a glob or folder without files.
    """
    found: dict[Path, None] = {}
    for name in paths:
        pattern = str(Path(name).expanduser())
        path = Path(pattern)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            below = (p for p in path.rglob("*") if p.is_file())
            matches = sorted(p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts))
            if not matches:
                raise InputError(f"{key}: {name} is a folder without files")
        elif any(wildcard in pattern for wildcard in _WILDCARDS):
            matches = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())  # noqa: PTH207
            if not matches:
                raise InputError(f"{key}: {name} matches no file{_near(path)}")
        else:
            raise InputError(f"{key}: {name}: no such file, folder or glob{_near(path)}")
        found |= dict.fromkeys(matches)
    return list(found)


def _near(path: Path) -> str:
    """The nearest existing name: of the first missing part of a path, or a pattern by its suffix."""
    existing = path.parent
    while not existing.is_dir() and existing != existing.parent:
        path, existing = existing, existing.parent
    if not existing.is_dir():
        return ""
    siblings = sorted(p.name for p in existing.iterdir() if not p.name.startswith("."))[:1000]
    hint = nearest(path.name, siblings)
    if hint or not siblings:
        return f"{hint} in {existing}" if hint else ""
    return f"; {existing} holds {', '.join(siblings[:3])}{', ...' if len(siblings) > 3 else ''}"


def read_file(path: Path, text_field: str = "text") -> Iterator[Document]:
    """The documents of one file. Raises InputError naming it."""
    try:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, text_field)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, text_field)
        else:
            yield Document(str(path), read_text(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_text(path: Path) -> str:
    """A file as text, to the last byte. Raises InputError if it is binary: NUL bytes, or not UTF-8."""
    raw = path.read_bytes()
    if (offset := raw.find(b"\0")) >= 0:
        raise InputError(f"{path}: is a binary file (NUL byte at {offset}); {_ADVICE}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); {_ADVICE}") from None


_ADVICE = "expected text, .jsonl or .parquet: narrow data.path, e.g. my_texts/*.txt"


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    name = str(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{name}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # also UnicodeDecodeError
                raise InputError(f"{where}: not JSON ({error})") from None
            if not isinstance(row, dict) or text_field not in row:
                names = [name for name in row if isinstance(name, str)] if isinstance(row, dict) else []
                raise InputError(f"{where}: no field {text_field!r}{nearest(text_field, names)}{_fields(names)}")
            yield Document(where, checked_text(row[text_field], f"{where}: field {text_field!r}"))


def _read_parquet(path: Path, column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError):
        raise InputError(f"{path}: not a parquet file (damaged, or another kind of file)") from None
    with file:
        names = file.schema_arrow.names
        if column not in names:
            raise InputError(f"{path}: no column {column!r}{nearest(column, names)}{_fields(names)}")
        number = 0
        for batch in file.iter_batches(columns=[column], batch_size=1024):
            for value in batch.column(0).to_pylist():
                where = f"{path}:{number}"
                number += 1
                if value is not None:
                    yield Document(where, checked_text(value, f"{where}: column {column!r}"))


def _fields(names: list[str]) -> str:
    return f"; set data.text_field to one of {', '.join(names[:8])}" if names else "; expected an object per line"


def checked_text(value: object, where: str) -> str:
    """value as text that has a UTF-8 form. Raises InputError."""
    if not isinstance(value, str):
        raise InputError(f"{where}: expected text, got {type(value).__name__}")
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: half a surrogate pair at character {error.start}, which has no UTF-8 form"
        ) from None
    return value


def chunks(text: str, limit: int) -> Iterator[str]:
    """Cuts text into pieces of at most `limit` characters, behind a newline where there is one."""
    start = 0
    while start < len(text):
        end = start + limit
        if end < len(text):
            newline = text.rfind("\n", start, end)
            end = newline + 1 if newline >= start else end
        yield text[start:end]
        start = end
