from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.documents import find_files, read_file, read_text
from errors import InputError


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in read_file(path, field)]


def test_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "sub/c.txt", "sub/d.py", ".hidden/e.txt", "sub/.f"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*paths: str) -> list[str]:
        found = find_files(tuple(str(tmp_path / path) for path in paths))
        return [path.relative_to(tmp_path).as_posix() for path in found]

    assert names("b.txt") == ["b.txt"]
    assert names("*.txt") == ["a.txt", "b.txt"]
    assert names("**/*.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert names("") == ["a.txt", "b.txt", "sub/c.txt", "sub/d.py"]
    assert names("sub", "*.txt", "a.txt") == ["sub/c.txt", "sub/d.py", "a.txt", "b.txt"]


def test_nothing_there_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "poems.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, line in (
        ("texts/poem.txt", r"no such file, folder or glob \(did you mean 'poems.txt'\?\) in .*/texts$"),
        ("text/poems.txt", r"no such file.*did you mean 'texts'\?\) in "),
        ("texts/*.md", r"matches no file; .*texts holds poems.txt$"),
        ("empty", r"empty is a folder without files"),
        ("empty/*.txt", r"matches no file$"),
    ):
        with pytest.raises(InputError, match=line) as error:
            find_files((str(tmp_path / path),))
        assert str(error.value).startswith("data.path: ") and "\n" not in str(error.value)


def test_text_is_kept_to_the_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    raw = "\ufeff first\r\nsecond\tnaïve 🙂  \n\n".encode()
    path.write_bytes(raw)
    assert read_text(path).encode() == raw


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"text\0more", r"x.txt: is a binary file \(NUL byte at 4\)"),
        (b"caf\xe9 latin", r"x.txt: is not UTF-8 text \(byte 3\)"),
        (b"\x89PNG\r\n\x1a\n\xff", r"x.txt: is not UTF-8 text \(byte 0\)"),
        (b"\xed\xa0\x80", r"x.txt: is not UTF-8 text"),
    ],
)
def test_binary_files_are_refused_by_name(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(InputError, match=line):
        texts(tmp_path / "x.txt")


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = ["plain", "two\nlines", "NUL \0 and 🙂", ""]
    path.write_text("\n".join(json.dumps({"id": 1, "text": row}) for row in rows) + "\n\n")
    assert texts(path) == rows
    assert [document.key for document in read_file(path)][1] == f"{path}:2"
    path.write_text('{"content": "a"}\n')
    assert texts(path, "content") == ["a"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"txt": "x"}', r"x.jsonl:2: no field 'text' \(did you mean 'txt'\?\); set data.text_field to one of txt"),
        ('"just text"', r"x.jsonl:2: no field 'text'; expected an object per line"),
        ('{"text": 3}', r"x.jsonl:2: field 'text': expected text, got int"),
        ('{"text": null}', r"x.jsonl:2: field 'text': expected text, got NoneType"),
        ('{"text": "half \\ud83d"}', r"x.jsonl:2: field 'text': half a surrogate pair at character 5"),
        ('{"text": ', r"x.jsonl:2: not JSON"),
        ("\udcff", r"x.jsonl:2: not JSON"),
    ],
)
def test_bad_jsonl_rows_name_file_and_line(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(InputError, match=problem) as error:
        texts(path)
    assert "\n" not in str(error.value)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rows = ["one", "two 🙂\n", None, "three"]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows, "n": [1, 2, 3, 4]}), path, row_group_size=2)
    assert texts(path) == ["one", "two 🙂\n", "three"]
    with pytest.raises(InputError, match=r"x.parquet: no column 'txt' \(did you mean 'text'\?\)"):
        texts(path, "txt")
    with pytest.raises(InputError, match=r"x.parquet:0: column 'n': expected text, got int"):
        texts(path, "n")
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match=r"x.parquet: not a parquet file"):
        texts(path)
