from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from data import corpora
from data.config import CorpusSpec, DataConfig
from data.corpora import HuggingFace, InstalledCpp, InstalledPython, open_corpus
from errors import InputError


def make_tree(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library and a small torch in place of the installed ones."""
    make_tree(
        tmp_path / "lib",
        {
            "json/decoder.py": "d",
            "json/tool.py": "t",
            "csv.py": "c",
            "notes.txt": "no source",
            "latin.py": b"# -*- coding: latin-1 -*- \xe9",
            "_sysconfigdata_x.py": "made at build time",
            "test/test_csv.py": "a test",
            "idlelib/editor.py": "e",
            "idlelib/idle_test/test_editor.py": "a test",
            "unittest/test/test_case.py": "a test",
            "site-packages/other/x.py": "not the library",
            "dist-packages/other/x.py": "not the library",
            "json/__pycache__/x.py": "compiled",
        },
    )
    make_tree(
        tmp_path / "torch",
        {
            "functional.py": "f",
            "nn/modules/linear.py": "l",
            "nn/init.py": "i",
            "testing/_internal/common.py": "tests",
            "include/ATen/Tensor.h": "T",
            "include/ATen/ops/abs.h": "generated",
            "include/c10/util/Half.h": "H",
            "include/c10/util/Half-inl.h": "Hi",
            "include/torch/csrc/jit/ir/ir.h": "ir",
            "include/torch/csrc/autograd/engine.h": "e",
        },
    )
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setattr(corpora, "_torch_folder", lambda: tmp_path / "torch")
    return tmp_path


def test_installed_python_without_tests_and_foreign_packages(installed: Path) -> None:
    documents = {document.key: document.group for document in InstalledPython().documents()}
    assert documents == {
        "python/csv.py": "python/csv.py",
        "python/idlelib/editor.py": "python/idlelib",
        "python/json/decoder.py": "python/json",
        "python/json/tool.py": "python/json",
        "torch/functional.py": "torch/functional.py",
        "torch/nn/init.py": "torch/nn",
        "torch/nn/modules/linear.py": "torch/nn",
    }


def test_installed_cpp_without_generated_operators(installed: Path) -> None:
    documents = {document.key: document.group for document in InstalledCpp().documents()}
    assert documents == {
        "include/ATen/Tensor.h": "include/ATen",
        "include/c10/util/Half-inl.h": "include/c10/util",
        "include/c10/util/Half.h": "include/c10/util",
        "include/torch/csrc/autograd/engine.h": "include/torch/csrc/autograd",
        "include/torch/csrc/jit/ir/ir.h": "include/torch/csrc/jit",
    }


def test_the_real_sources_are_there_and_in_a_fixed_order() -> None:
    for corpus, first in ((InstalledPython(), "python/"), (InstalledCpp(), "include/")):
        documents = corpus.documents()
        keys = [next(documents).key for _ in range(5)]
        assert keys == sorted(keys) and all(key.startswith(first) for key in keys)
        assert all(isinstance(item, str) for item in corpus.fingerprint())


def test_files_notice_a_change(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    spec = CorpusSpec("files", (str(path),), 1.0)
    before = open_corpus(spec, DataConfig()).fingerprint()
    assert open_corpus(spec, DataConfig()).fingerprint() == before
    path.write_text("three")
    assert open_corpus(spec, DataConfig()).fingerprint() != before


def test_huggingface_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"^data.source: huggingface needs the datasets package: .*pip install datasets$"
    ):
        next(HuggingFace(("x",), "text").documents())


def test_huggingface_rows_columns_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list):
        column_names = ["text", "label"]

    def load_dataset(path: str, subset: str | None, split: str) -> Rows:
        if path == "absent":
            raise ConnectionError("\n  no network\nmore")
        return Rows([{"text": f"{path} {subset} {split}", "label": 1}])

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: module)
    monkeypatch.setitem(sys.modules, "datasets", module)
    documents = list(HuggingFace(("org/a", "b:small"), "text").documents())
    assert [document.text for document in documents] == ["org/a None train", "b small train"]
    with pytest.raises(InputError, match=r"data.path: the data set absent cannot be loaded: .*no network$"):
        list(HuggingFace(("absent",), "text").documents())
    with pytest.raises(InputError, match=r"data.text_field: b has no column 'body'; expected one of text, label"):
        list(HuggingFace(("b",), "body").documents())
