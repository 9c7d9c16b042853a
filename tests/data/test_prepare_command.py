"""scripts.prepare_data: the config and overrides of a run prepare, or verify, what that run looks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.prepare import prepared_folder
from errors import exit_with
from scripts.prepare_data import main
from training.config import load_config

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs/smoke.yaml"


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The command as a person calls it, without a new process: exit code, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["prepare_data", *arguments])
        exit_with(main)
    assert isinstance(stop.value.code, int)
    return stop.value.code, *capsys.readouterr()


def test_the_command(texts_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(SMOKE), f"data.path={texts_folder}/*.txt", "data.tokenizer.vocab_size=330", "--workers", "1"]
    code, out, err = command(capsys, *arguments, "--verify")
    assert code == 0 and "verified" in out and "bytes/token" in out and "tokenising" in err
    code, out, err = command(capsys, *arguments)
    assert code == 0 and err == ""
    (folder,) = (path for path in Path("artifacts").iterdir() if path.is_dir())
    (shard,) = folder.rglob("train*.bin")
    raw = bytearray(shard.read_bytes())
    raw[9] ^= 1
    shard.write_bytes(raw)
    assert command(capsys, *arguments)[0] == 0  # the size is right
    code, _, err = command(capsys, *arguments, "--verify")
    assert code == 2 and "train-00000.bin: the shard is damaged: sha256" in err
    for bad in ("data.source=instaled_python", f"data.path={tmp_path}/absent.txt", "data.mixture=x", "--workers=0"):
        code, _, err = command(capsys, str(SMOKE), bad)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_the_command_prepares_what_the_run_looks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Whatever names the folder: each of these settings is in its hash."""
    monkeypatch.chdir(tmp_path)
    overrides = [
        *("data.source=nlrx", "data.nlrx.pairs=300", "data.nlrx.seed=5", "data.test_fraction=0.2"),
        *("data.train_fraction=0.5", "data.tokenizer.vocab_size=330", "data.tokenizer.sample_bytes=9000"),
    ]
    code, out, _ = command(capsys, str(SMOKE), *overrides[:3], "--workers", "1", *overrides[3:])
    assert code == 0 and "nlrx test: " in out
    folder = prepared_folder(load_config(SMOKE, overrides).data)
    assert folder.is_dir() and [path for path in Path("artifacts").iterdir() if path.is_dir()] == [folder]


def test_bad_input_ends_the_process_with_2_and_one_line(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "scripts.prepare_data", str(SMOKE), f"data.path={tmp_path}/absent.txt"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
