"""python -m scripts.inspect_curvature on a tiny run: its files, its numbers, and what it refuses."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from inspect_cases import inspect, make_run, write_texts

from analysis.curvature import curvature_degrees
from data.prepare import prepared_folder
from model.context import SequenceContext
from scripts.inspect_curvature import native
from scripts.inspect_curvature.native import load_subject, open_run, untrained_twin
from scripts.inspect_curvature.pieces import from_prepared
from training.config import load_config
from training.weights import export_weights

ROOT = Path(__file__).parents[2]
SIZE = ("--documents", 24, "--tokens", 64)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two runs of one stack, one of another stack, and one of another tokenizer."""
    root = tmp_path_factory.mktemp("inspect")
    write_texts(root / "texts", 40)
    write_texts(root / "others", 40, seed=1)
    (root / "mine5.txt").write_text("abc def gha")
    make_run(root)
    make_run(root, "twin", seed=3, steps=(20,))
    make_run(root, "short", pattern="AE", steps=(5,))
    make_run(root, "foreign", texts="others", steps=(5,))
    return root


@pytest.fixture(scope="module")
def content(root):
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert not inspect(monkeypatch, root, "tiny", "--compare", "twin", "short", *SIZE, "--out", root / "out")
    return json.loads((root / "out" / "curvature.json").read_text())


def test_everything_is_there(content):
    assert content["subject"]["letters"] == ["A", "E", "M"] and content["subject"]["step"] == 20
    assert content["boundaries"] == [0, 1, 2, 3, "final"]
    assert set(content["sources"]) == {"model", "untrained", "shuffled"}
    assert content["random_rows"]["boundaries"] == ["iid", "walk"]
    curve = content["sources"]["model"]["raw"]["curvature"]
    for low, value, high in zip(curve["low"], curve["value"], curve["high"]):
        assert 0 < low < value < high < 180
    assert [about["about"]["step"] for about in content["timeline"]] == [0, 10, 20]
    by_name = {entry["about"]["name"]: entry for entry in content["comparisons"]}
    assert by_name["twin, step 20"]["difference"] is not None and by_name["short, step 5"]["difference"] is None
    change = content["families"]["model"]["E"]["raw"]["curvature"]["change"]["value"]
    assert change == pytest.approx(curve["value"][2] - curve["value"][1])
    assert len(content["guards"]) == 9 and content["straightening"]["model"]["minimum"] == min(curve["value"][:4])


def test_the_number_is_that_of_the_model_on_its_documents(root, content):
    """The same documents through the model by hand: no accumulator, no pass, no batch."""
    source = open_run("tiny", root / "runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        prepared = source.prepared()
    pieces = from_prepared(prepared, "validation", 64, 24)
    subject = load_subject(source, prepared.vocab_size, torch.device("cpu"))
    means = []
    for piece in pieces.items:
        states = subject.forward(torch.from_numpy(piece.tokens)[None], torch.tensor([len(piece.tokens)]))
        means.append([float(curvature_degrees(hidden[:, 1:])) for hidden in states])
    want = np.nanmean(means, 0)
    assert content["sources"]["model"]["raw"]["curvature"]["value"] == pytest.approx(want.tolist(), rel=1e-4)
    assert content["data"]["documents"] == pieces.n_documents < content["data"]["pieces"]


def test_the_untrained_twin_is_the_run_before_its_first_step(root):
    from model.hybrid import HybridLM

    source = open_run("tiny", root / "runs")
    twin = untrained_twin(source, 330, torch.device("cpu"))
    model = HybridLM(source.config.model, 330)
    model.init_weights(torch.Generator().manual_seed(source.config.seed))
    tokens = torch.randint(0, 330, (1, 20))
    want = model.eval()(tokens, SequenceContext.single_documents(tokens)).final
    assert torch.equal(twin.forward(tokens, torch.tensor([20]))[-1], want)


def test_tables_hold_the_same_numbers(root, content):
    table = pyarrow.parquet.read_table(root / "out" / "curvature.parquet").to_pylist()
    with (root / "out" / "curvature.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(table) > 1000
    wanted = {"source": "model", "kind": "boundary", "variant": "rms", "metric": "stp_triple", "boundary": "2"}
    (found,) = [row for row in table if all(row[key] == value for key, value in wanted.items())]
    assert found["family"] == "E"
    assert found["value"] == pytest.approx(content["sources"]["model"]["rms"]["stp_triple"]["value"][2])
    (line,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert float(line["low"]) == pytest.approx(found["low"])


def test_a_second_call_gives_the_same_numbers(root, content, monkeypatch):
    arguments = ("tiny", "--compare", "twin", "short", *SIZE, "--out", root / "again")
    assert not inspect(monkeypatch, root, *arguments)
    again = json.loads((root / "again" / "curvature.json").read_text())
    del again["command"]
    assert again == {key: value for key, value in content.items() if key != "command"}


def test_a_checkpoint_and_own_text(root, monkeypatch, capsys):
    (root / "mine").mkdir(exist_ok=True)
    for number in range(9):
        (root / "mine" / f"{number}.txt").write_text("abc def gha bcd " * (6 + number))
    path = root / "runs" / "tiny" / "checkpoints" / "step-00000010"
    assert not inspect(monkeypatch, root, path, "--data", "mine/*.txt", *SIZE)
    out = root / "runs" / "tiny" / "curvature-step-00000010"
    content = json.loads((out / "curvature.json").read_text())
    assert content["subject"]["step"] == 10 and content["timeline"] == [] and content["data"]["documents"] == 9
    assert (out / "report.html").is_file()
    assert sorted(path.parent.iterdir()) == [path, path.parent / "step-00000020"]  # nothing was written there
    assert "guards" in capsys.readouterr().out.lower()


def flip_a_bit(checkpoint):
    (shard,) = (checkpoint / "tensors").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def damaged(root):
    folder = make_run(root, "damaged", steps=(7,))
    flip_a_bit(folder / "checkpoints" / "step-00000007")
    return folder


def test_a_damaged_or_pruned_checkpoint_costs_its_point_of_the_timeline_alone(root, monkeypatch):
    """One is damaged from the start; a living run removes another one meanwhile."""
    folder = make_run(root, "living", steps=(10, 20, 30, 40), keep_every=10)
    flip_a_bit(folder / "checkpoints" / "step-00000040")
    load = native.load_weights

    def prune_behind(path, model):
        load(path, model)
        if path.name == "step-00000010":
            shutil.rmtree(folder / "checkpoints" / "step-00000020")

    monkeypatch.setattr(native, "load_weights", prune_behind)
    assert not inspect(monkeypatch, root, "living", *SIZE)
    content = json.loads((folder / "curvature.json").read_text())
    assert content["subject"]["step"] == 30
    assert [about["about"]["step"] for about in content["timeline"]] == [0, 10, 30]
    pruned, broken = content["notes"]
    assert "step-00000020: was removed" in pruned and "step-00000040: damaged" in broken


def test_a_run_that_began_from_weights_starts_its_timeline_there(root, monkeypatch):
    """The receipt says which they were: whatever else is under their name now is no step 0. The control stays fresh."""
    folder = make_run(root, "more", steps=(10, 20))
    config = load_config(folder / "config.yaml")
    config.init_from = "tiny"
    (folder / "config.yaml").write_text(config.to_yaml())
    receipt = json.loads((folder / "receipt.json").read_text())

    def timeline(path, began):
        entry = {"init_from": {"path": str(path), "sha256": hashlib.sha256(began.read_bytes()).hexdigest()}}
        (folder / "receipt.json").write_text(json.dumps(receipt | (entry if path else {})))
        assert not inspect(monkeypatch, root, "more", *SIZE)
        content = json.loads((folder / "curvature.json").read_text())
        assert content["sources"]["untrained"] == twin
        return [about["about"]["name"] for about in content["timeline"]], content

    assert not inspect(monkeypatch, root, "tiny", *SIZE, "--out", root / "alone")
    alone = json.loads((root / "alone" / "curvature.json").read_text())
    twin = alone["sources"]["untrained"]  # the two runs have one seed
    older, newest = (root / "runs" / "tiny" / "checkpoints" / f"step-{step:08d}" for step in (10, 20))
    names, content = timeline(newest, newest / "manifest.json")  # younger than the run, and its own all the same
    assert names == ["more, step 0 (from tiny)", "more, step 10", "more, step 20"] and content["notes"] == []
    assert content["timeline"][0]["raw"]["curvature"] == alone["timeline"][-1]["raw"]["curvature"]
    assert "The change since more, step 0 (from tiny)," in (folder / "report.html").read_text()
    left_out = [
        (newest, older / "manifest.json", f"init_from: {newest} holds other weights than the run began from"),
        (root / "gone", older / "manifest.json", f"no run or checkpoint {root / 'gone'}"),
        ("", older / "manifest.json", "init_from: the receipt does not say which weights of tiny the run began from"),
    ]
    for path, began, note in left_out:
        names, content = timeline(path, began)
        assert names == ["more, step 10", "more, step 20"] and note in content["notes"][0]
    export_weights(newest, root / "out.safetensors", {})
    names, content = timeline(root / "out.safetensors", root / "out.safetensors")
    assert names[0] == "more, step 0 (from tiny)" and content["notes"] == []


def test_a_comparison_of_another_tokenizer_is_refused_before_any_pass(root, monkeypatch, capsys):
    assert inspect(monkeypatch, root, "tiny", "--compare", "twin", "foreign", *SIZE) == 2
    errors = capsys.readouterr().err
    assert "another tokenizer" in errors and "measuring" not in errors


BAD = {
    "no run": (lambda root: ["tiny2"], "no run or checkpoint (did you mean 'tiny'?)"),
    "no model": (lambda root: ["texts"], "is no run"),
    "a file": (lambda root: ["texts/000.txt"], "is a file"),
    "damaged checkpoint": (lambda root: [damaged(root) / "checkpoints" / "step-00000007"], "damaged checkpoint"),
    "only a damaged one": (lambda root: ["damaged"], "no valid checkpoint"),
    "other tokenizer": (lambda root: ["tiny", "--compare", "foreign"], "another tokenizer"),
    "data of another tokenizer": (lambda root: ["tiny", "--data", foreign_corpus(root)], "of tokenizer"),
    "splits of other texts": (lambda root: [resplit(root)], "its data were"),
    "files whatever the splits": (
        lambda root: [resplit(root), "--data", "mine5.txt", "--skip-first", "50"],
        "no piece has",
    ),
    "no documents": (lambda root: ["tiny", "--data", "nowhere/*.txt"], "matches no file"),
    "a split and files": (lambda root: ["tiny", "--data", "validation", "mine5.txt"], "mine5.txt would not be read"),
    "too short": (lambda root: ["tiny", "--data", short_text(root)], "shorter than 4 tokens"),
    "nothing": (lambda root: [], "expected a run"),
    "both": (lambda root: ["tiny", "--hf", "x"], "expected a run"),
    "tokens": (lambda root: ["tiny", "--tokens", "3"], "--tokens"),
    "documents": (lambda root: ["tiny", "--documents", "0"], "--documents"),
    "nothing left": (lambda root: ["tiny", "--data", "mine5.txt", "--skip-first", "50"], "no piece has 53 tokens"),
    "no device": (lambda root: ["tiny", "--device", "tpu"], "device"),
    "no folder to write to": (lambda root: ["tiny", *SIZE, "--out", "texts/000.txt"], "--out"),
}


def foreign_corpus(root):
    source = open_run("foreign", root / "runs")
    return prepared_folder(source.config.data, root / "artifacts")


def resplit(root):
    """Run tiny, with its tokenizer and another share of its texts held out than it was trained without."""
    if not (root / "runs/resplit").exists():
        shutil.copytree(root / "runs/tiny", root / "runs/resplit")
        config = load_config(root / "runs/tiny/config.yaml")
        config.data.tokenizer.path = str(prepared_folder(config.data, root / "artifacts") / "tokenizer.model")
        config.data.validation_fraction = 0.3
        (root / "runs/resplit/config.yaml").write_text(config.to_yaml())
    return "resplit"


def short_text(root):
    (root / "short.txt").write_text("a")
    return "short.txt"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2(name, root, monkeypatch, capsys):
    arguments, says = BAD[name]
    assert inspect(monkeypatch, root, *arguments(root)) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ") and says in errors[-1]
    assert sum(line.startswith("error: ") for line in errors) == 1


def test_it_starts_as_a_module_and_needs_no_optional_package():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.inspect_curvature", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--compare" in done.stdout
