"""Weights out and in: the same bits, the config beside them, no pickle, and damage is noticed."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import last_weights, losses, make_place, receipt, start

from errors import InputError
from scripts import export as command
from training.weights import load_weights


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def export(*arguments, code=0):
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["scripts.export", *arguments])
        try:
            ended = command.main()
        except InputError as error:
            ended = error.exit_code
            said.write(f"{error}\n")
    assert ended == code, said.getvalue()
    return said.getvalue()


def test_export_and_init_from(place, monkeypatch):
    start(monkeypatch, "run_id=a", "train.tokens=900")
    assert "tensors of" in export("a", "out.safetensors")
    stored = load_file("out.safetensors")
    trained = {k.removeprefix("model."): v for k, v in last_weights("a").items() if k.startswith("model.")}
    assert stored.keys() == trained.keys() and all(torch.equal(stored[name], trained[name]) for name in stored)
    with safe_open("out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["amer_config"])["model"]["pattern"] == "AMER" and metadata["amer_run"] == "a"
    assert subprocess.run(["sha256sum", "--check", "out.safetensors.sha256"], capture_output=True).returncode == 0
    assert "exists already" in export("a", "out.safetensors", code=2)
    start(monkeypatch, "run_id=from-file", "init_from=out.safetensors", "train.tokens=900")
    start(monkeypatch, "run_id=from-run", "init_from=a", "train.tokens=900")
    assert losses("from-file") == losses("from-run") != losses("a")
    from_file, from_run = receipt("from-file")["init_from"], receipt("from-run")["init_from"]
    assert from_file["sha256"] == Path("out.safetensors.sha256").read_text().split()[0]
    newest = receipt("a")["checkpoints"][-1]
    assert Path(from_run["path"]).name == newest["folder"] and from_run["sha256"] == newest["manifest_sha256"]
    assert receipt("a")["init_from"] is None

    data = bytearray((place / "out.safetensors").read_bytes())
    data[-9] ^= 1
    (place / "out.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"damaged: its sha256 is not the one in out.safetensors.sha256"):
        start(monkeypatch, "run_id=damaged", "init_from=out.safetensors")
    assert not (place / "runs" / "damaged").exists()
    (place / "out.safetensors").write_bytes(b"\x80\x04payload")
    (place / "out.safetensors.sha256").unlink()
    with pytest.raises(InputError, match="not a safetensors file"):
        start(monkeypatch, "run_id=damaged", "init_from=out.safetensors")


def test_weights_of_another_model_are_refused_and_fill_nothing(tmp_path):
    from safetensors.torch import save_file

    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    for name, tensors in {
        "weight is \\[3, 2\\]": {"weight": torch.ones(3, 2), "bias": torch.ones(2)},
        "no tensor bias": {"weight": torch.ones(2, 3)},
        "lacks": {"weight": torch.ones(2, 3), "bias": torch.ones(2), "gain": torch.ones(1)},
        "float64": {"weight": torch.ones(2, 3).double(), "bias": torch.ones(2)},
    }.items():
        save_file(tensors, tmp_path / "w.safetensors")
        with pytest.raises(InputError, match=name):
            load_weights(str(tmp_path / "w.safetensors"), model)
        assert torch.equal(model.weight, before)


@pytest.mark.parametrize("arguments", [["nothing", "x.safetensors"], ["nothing", "x.bin"], [".", "no/x.safetensors"]])
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert export(*arguments, code=2).count("\n") == 1
