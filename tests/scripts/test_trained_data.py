"""A model is scored on the data it was trained on: tokens and splits of texts that changed since are refused."""

import json
import sys

import pytest
import torch
from inspect_cases import make_run, write_texts

from data.prepare import prepare
from errors import InputError
from scripts import evaluate_nlrx
from scripts.ablate import arm
from scripts.ablate.grid import Evaluation
from scripts.trained_data import require_same_data
from training.checkpoint import Checkpointer
from training.config import load_config
from training.run import find_checkpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run; the working directory is the one it was started in."""
    write_texts(tmp_path / "texts", 40)
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path)


def by_the_grid(folder, monkeypatch):
    return arm.evaluate(folder, load_config(folder / "config.yaml"), Evaluation())


def by_the_command(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate_nlrx", str(folder)])
    return evaluate_nlrx.main()


def add_a_text(folder):
    text = "a document that no run has seen, of some words and one line\n" * 9
    (folder.parents[1] / "texts" / "one_more.txt").write_text(text)


@pytest.mark.parametrize("evaluate", [by_the_grid, by_the_command])
def test_a_model_is_not_scored_on_texts_that_changed(folder, monkeypatch, evaluate):
    add_a_text(folder)
    with pytest.raises(InputError, match=r"runs/tiny: its data were \w{12} .* are now \w{12}") as caught:
        evaluate(folder, monkeypatch)
    assert "\n" not in str(caught.value)


def test_the_same_texts_are_the_same_data(folder, monkeypatch):
    assert by_the_grid(folder, monkeypatch)["curvature/degrees/A"] > 0
    data = prepare(load_config(folder / "config.yaml").data)
    data.manifest["notes"].append("said otherwise by a later version")
    object.__setattr__(data, "manifest_sha256", "f" * 64)
    require_same_data(data, folder, find_checkpoint(str(folder)))  # the tokens are equal


def test_the_receipt_knows_the_data_of_a_checkpoint_that_does_not(folder):
    saver = Checkpointer(folder / "checkpoints")
    saver.save(30, {"model": {"x": torch.zeros(1)}}, {"run": {"step": 30}})
    assert saver.wait() is None
    checkpoint = find_checkpoint(str(folder))
    config = load_config(folder / "config.yaml").data
    require_same_data(prepare(config), folder, checkpoint)
    add_a_text(folder)
    with pytest.raises(InputError, match="its data were"):
        require_same_data(prepare(config), folder, checkpoint)
    (folder / "receipt.json").write_text(json.dumps({}))
    require_same_data(prepare(config), folder, checkpoint)  # nothing says what they were
