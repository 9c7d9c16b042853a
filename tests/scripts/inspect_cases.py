"""A tiny run on disk, as train.py leaves it (config, receipt, metrics, checkpoints), without training."""

import json
import random
import sys

import torch

import scripts.inspect_curvature.__main__ as command
from data.config import TokenizerConfig
from data.prepare import prepare
from errors import exit_with
from model.hybrid import HybridLM
from training.checkpoint import CheckpointConfig, Checkpointer
from training.config import RunConfig
from training.saving import data_identity

NASTY = "</script><img src=x onerror=alert(1)> {{<b>&amp;"


def write_texts(folder, count, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(60)]
    for number in range(count):
        lines = (" ".join(rng.choices(lexicon, k=8)) for _ in range(rng.randint(3, 30)))
        (folder / f"{number:03d}.txt").write_text(f"{NASTY} {number}\n" + "\n".join(lines) + "\n")
    return folder


def make_run(root, name="tiny", texts="texts", pattern="AEM", steps=(10, 20), seed=0, keep_every=0):
    """runs/<name> below root. The weights of later checkpoints are those of the first, moved."""
    config = RunConfig(run_id=name, seed=seed)
    config.model.pattern, config.model.d_model = pattern, 32
    config.model.attention.n_heads = config.model.attention.n_kv_heads = 2
    config.model.mamba2.d_state = config.model.mamba2.head_dim = config.model.mamba2.chunk_size = 16
    config.model.moe.n_experts, config.model.moe.expert_ff = 2, 16
    config.data.path, config.data.sequence_length = f"{root / texts}/*.txt", 32
    config.data.validation_fraction = 0.4
    config.data.tokenizer = TokenizerConfig(vocab_size=330)
    data = prepare(config.data, root / "artifacts")
    folder = root / "runs" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    about = {"tokenizer_sha256": data.tokenizer.sha256, "manifest_sha256": data.manifest_sha256}
    (folder / "receipt.json").write_text(json.dumps({"run_id": name, "status": "finished", "data": about}))
    records = [{"step": step, "curvature/degrees/A": 110.0 + step} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    generator = torch.Generator().manual_seed(seed)
    model = HybridLM(config.model, data.vocab_size)
    model.init_weights(generator)
    saver = Checkpointer(folder / "checkpoints", CheckpointConfig(keep_every=keep_every))
    for step in steps:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        stored = {"run": {"step": step, "tokens": 100 * step}, "data": data_identity(data)}
        saver.save(step, {"model": model.state_dict()}, stored)
        assert saver.wait() is None
    return folder


def inspect(monkeypatch, root, *arguments):
    """Runs the command inside root. Returns its exit code."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["inspect_curvature", *map(str, arguments), "--threads", "1"])
    try:
        exit_with(command.main)
    except SystemExit as stop:
        return stop.code
