"""stp.predictor: linear is a part of training, not of the language model: what reads weights alone leaves it out."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_run import TINY, last_weights, make_place, start

from data.prepare import prepare
from model.hybrid import HybridLM
from scripts.ablate import arm
from scripts.inspect_curvature.native import load_subject, open_run
from training.config import load_config
from training.weights import export_weights, load_weights

PREDICTOR = "model.stp_predictor.weight"


def test_every_reader_of_weights_takes_a_run_that_has_one(tmp_path, monkeypatch):
    make_place(tmp_path, monkeypatch)
    folder = Path("runs/triple_predictor-s0")
    folder.mkdir(parents=True)
    short = TINY.replace("tokens: 2200", "tokens: 600").replace(
        "start_tokens: 700, ramp_tokens: 1500", "ramp_tokens: 0"
    )
    (folder / "config.yaml").write_text(short.replace("stp:", "stp:\n  predictor: linear"))
    config = load_config(folder / "config.yaml")
    assert config.stp.predictor == "linear"

    monkeypatch.setattr(sys, "argv", ["scripts.ablate.arm", str(folder), "--curvature-rows=2"])
    assert arm.main() == 0
    weights = last_weights(folder.name)
    assert weights[PREDICTOR].shape == (32, 32) and not torch.equal(weights[PREDICTOR], torch.eye(32))
    found = json.loads((folder / "evaluation.json").read_text())["metrics"]
    model = HybridLM(config.model, prepare(config.data).vocab_size)
    load_weights(folder.name, model)
    assert all(torch.equal(tensor, weights[f"model.{name}"]) for name, tensor in model.state_dict().items())
    assert found["weights_sha256"] == arm.weights_sha256(model)

    # the model here may have one of its own: it is not touched
    model.stp_predictor = torch.nn.Linear(32, 32, bias=False)
    before = model.stp_predictor.weight.detach().clone()
    names = export_weights(next((folder / "checkpoints").glob("step-*")), Path("w.safetensors"), {})
    assert names == sorted(load_file("w.safetensors")) and not any("predictor" in name for name in names)
    for source in (str(folder), "w.safetensors"):
        load_weights(source, model)
        assert torch.equal(model.stp_predictor.weight, before)

    source = open_run(str(folder))
    assert load_subject(source, prepare(config.data).vocab_size, torch.device("cpu")).name.startswith("triple")
    for run_id, more in {"without": "none", "with": "linear"}.items():
        shorter = ("train.tokens=200", "stp.gate.start_tokens=0", "stp.gate.ramp_tokens=0")
        start(monkeypatch, f"run_id={run_id}", f"init_from={folder.name}", f"stp.predictor={more}", *shorter)
        assert (PREDICTOR in last_weights(run_id)) is (more == "linear")
