"""A run on a tiny corpus, in a folder of its own: what the tests of whole runs share."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

import train
from training.lifecycle import Run

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TINY = """
model:
  pattern: AMER
  d_model: 32
  attention: {n_heads: 4, n_kv_heads: 2}
  mamba2: {head_dim: 16, d_state: 8, chunk_size: 16}
  moe: {n_experts: 4, top_k: 2, expert_ff: 16}
data:
  path: texts/*.txt
  sequence_length: 48
  validation_fraction: 0.1
  tokenizer: {vocab_size: 300}
stp:
  weight: 0.1
  n_spans: 4
  boundaries: [all, final]
  gate: {start_tokens: 700, ramp_tokens: 1500}
train: {tokens: 2200, batch_rows: 4, accumulation: 2, log_every: 2, probe_every: 3, curvature_every: 4}
optimizer: {learning_rate: 3.0e-3}
validation: {rows: 8, sample_tokens: 8, every_fraction: 0.5}
checkpoint: {every_steps: 4}
wandb: {mode: disabled}
threads: 1
"""


def write_corpus(folder, seed=0, longest=11):
    """40 texts of 1 to `longest` lines of code, in `folder`/texts."""
    words = random.Random(seed)
    (folder / "texts").mkdir()
    for number in range(40):
        n_lines = words.randrange(1, longest + 1)
        lines = [f"def f{words.randrange(9)}(x): return x * {words.randrange(99)}" for _ in range(n_lines)]
        (folder / "texts" / f"{number}.txt").write_text("\n".join(lines))


def make_place(tmp_path, monkeypatch):
    """A folder with a small corpus and a config, as the working directory."""
    write_corpus(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(monkeypatch, *overrides):
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny.yaml", *overrides])
    return train.main()


def stop_at(monkeypatch, step, wish=signal.SIGTERM):
    """A signal while the given step is recorded."""
    honest = Run.record

    def record(self, state, *args):
        honest(self, state, *args)
        if state.step == step:
            os.kill(os.getpid(), wish)

    monkeypatch.setattr(Run, "record", record)


def receipt(run_id):
    return json.loads(Path(f"runs/{run_id}/receipt.json").read_text())


def losses(run_id):
    records = [json.loads(line) for line in Path(f"runs/{run_id}/metrics.jsonl").read_text().splitlines()]
    timings = ("tokens_per_second", "gemm_share")
    return [{k: v for k, v in record.items() if k not in timings} for record in records]


def last_weights(run_id):
    folder = max(Path(f"runs/{run_id}/checkpoints").glob("step-*"))
    tensors = {}
    for shard in sorted(folder.glob("tensors/*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def command(*arguments, cwd):
    line = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(line, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
