"""The whole run on a tiny corpus: finishes with its proof, resumes to the last bit, refuses cut wires and bad input."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from errors import InputError, PreflightError, Stopped
from model.hybrid import HybridLM, HybridOutput
from training.lifecycle import Run

ROOT = Path(__file__).parents[1]
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
train: {tokens: 2200, batch_rows: 4, accumulation: 2, log_every: 2, probe_every: 3}
optimizer: {learning_rate: 3.0e-3}
validation: {rows: 8, sample_tokens: 8, every_fraction: 0.5}
checkpoint: {every_steps: 4}
wandb: {mode: disabled}
threads: 1
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a small corpus and a config, as the working directory."""
    words = random.Random(0)
    (tmp_path / "texts").mkdir()
    for number in range(40):
        lines = (
            f"def f{words.randrange(9)}(x): return x * {words.randrange(99)}" for _ in range(words.randrange(1, 12))
        )
        (tmp_path / "texts" / f"{number}.txt").write_text("\n".join(lines))
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(monkeypatch, *overrides):
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny.yaml", *overrides])
    return train.main()


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


def test_a_run_finishes_with_its_proof(place, monkeypatch, capsys):
    start(monkeypatch, "run_id=a")
    proof = receipt("a")
    assert proof["status"] == "finished" and proof["tokens"] >= 2200
    assert proof["preflight"]["ok"] and proof["preflight_at_opening"]["ok"]
    assert [b["index"] for b in proof["preflight"]["boundaries"]] == [0, 1, 2, 3, 4, "final"]
    assert all(b["grad_norm"] > 0 for b in proof["preflight"]["boundaries"])
    (interval,) = proof["stp"]["live_tokens"]
    assert 700 < interval[0] < 1000 and interval[1] == proof["tokens"]
    assert 0 < proof["metrics"]["val_bits_per_byte"] < 20 and proof["metrics"]["unigram_bits_per_byte"] > 0
    assert set(proof["kernels"]) >= {"attention", "mamba2", "grouped_experts", "m2rnn"}
    weights = [record["stp/weight"] for record in losses("a") if "stp/weight" in record]
    assert weights[0] == 0 and 0 < weights[-1] <= 0.1 and weights == sorted(weights)
    assert all("stp/raw/R" in record for record in losses("a") if "stp/weight" in record)  # also while it is closed
    evidence = [record for record in losses("a") if "stp/grad_ratio/M" in record]
    assert evidence and all(record["stp/grad_norm/M"] > 0 for record in evidence)
    printed = capsys.readouterr().out
    assert "python train.py runs/a/config.yaml run_id=a-more init_from=a" in printed
    with pytest.raises(InputError, match="is finished"):
        start(monkeypatch, "run_id=a")
    monkeypatch.setattr(sys, "argv", ["train.py", "runs/a/config.yaml", "run_id=a-more", "init_from=a"])
    train.main()
    assert losses("a-more")[0]["loss/lm"] < losses("a")[0]["loss/lm"]


@pytest.mark.parametrize("stop_after", [5, 7])
def test_resume_is_exact(place, monkeypatch, stop_after):
    """All four letters, the ramp in progress, accumulation 2, a validation on the way: equal to the last bit."""
    start(monkeypatch, "run_id=whole")
    honest = Run.record

    def record(self, state, *args):
        honest(self, state, *args)
        if state.step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "record", record)
    with pytest.raises(Stopped):
        start(monkeypatch, "run_id=parts")
    assert receipt("parts")["status"] == "stopped"
    monkeypatch.setattr(Run, "record", honest)
    start(monkeypatch, "run_id=parts")
    assert losses("parts") == losses("whole")
    whole, parts = last_weights("whole"), last_weights("parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert receipt("parts")["stp"]["live_tokens"] == receipt("whole")["stp"]["live_tokens"]


def test_accumulation_changes_nothing_but_rounding(place, monkeypatch):
    for parts in (1, 2, 4):
        start(monkeypatch, f"run_id=acc{parts}", f"train.accumulation={parts}", "train.tokens=1000", "precision=fp32")
    columns = [[record["loss/total"] for record in losses(f"acc{n}") if "loss/total" in record] for n in (1, 2, 4)]
    for other in columns[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(columns[0]), rtol=1e-5, atol=1e-5)


def test_a_skipped_step_is_counted_and_too_many_end_the_run(place, monkeypatch):
    honest = HybridLM.forward
    calls = []

    def forward(self, tokens, context):
        output = honest(self, tokens, context)
        if self.training and torch.is_grad_enabled():
            calls.append(1)
            if len(calls) in bad:
                output.final = output.final * torch.nan
        return output

    monkeypatch.setattr(HybridLM, "forward", forward)
    bad = {6}  # the first is preflight's, then two a step
    start(monkeypatch, "run_id=a", "train.tokens=900")
    assert receipt("a")["skipped_steps"] == 1
    assert all(bool(torch.isfinite(value).all()) for value in last_weights("a").values())
    calls.clear()
    bad = set(range(2, 1000))
    with pytest.raises(FloatingPointError):
        start(monkeypatch, "run_id=b", "train.max_skipped_steps=2")
    assert receipt("b")["status"] == "crashed" and "FloatingPointError" in receipt("b")["reason"]
    assert Path("runs/b/offending_batch.safetensors").is_file()


def cut(kind):
    def forward(self, tokens, context):
        hidden = self.embedding(tokens)
        states = [hidden]
        for block in self.blocks:
            hidden = block(hidden, context)
            if kind == "detach" or not self.training:
                states.append(hidden.detach() if kind == "detach" else hidden)
        return HybridOutput(states, self.final_norm(hidden))

    return forward


@pytest.mark.parametrize("kind", ["detach", "not training"])
def test_a_cut_wire_refuses_to_start(place, monkeypatch, kind):
    monkeypatch.setattr(HybridLM, "forward", cut(kind))
    with pytest.raises(PreflightError):
        start(monkeypatch, "run_id=cut")
    assert receipt("cut")["status"] == "refused" and not receipt("cut")["preflight"]["ok"]
    assert losses("cut") == []


def test_a_wire_that_dies_before_the_gate_opens_stops_the_run(place, monkeypatch):
    honest, steps = HybridLM.forward, []

    def forward(self, tokens, context):
        steps.append(1)
        return (honest if len(steps) < 12 else cut("detach"))(self, tokens, context)

    monkeypatch.setattr(HybridLM, "forward", forward)
    with pytest.raises(PreflightError, match="opening"):
        start(monkeypatch, "run_id=cut", "stp.gate.start_tokens=1500", "stp.gate.ramp_tokens=0")
    assert receipt("cut")["status"] == "refused"


def test_the_placebo_equals_no_stp_bit_for_bit(place, monkeypatch):
    start(monkeypatch, "run_id=without", "stp.weight=0")
    start(monkeypatch, "run_id=placebo", "stp.variant=detached")
    off, placebo = last_weights("without"), last_weights("placebo")
    assert all(torch.equal(off[name], placebo[name]) for name in off)
    assert receipt("placebo")["stp"]["live_tokens"] == [] and receipt("placebo")["status"] == "finished"
    start(monkeypatch, "run_id=with")
    live = last_weights("with")
    assert not all(torch.equal(off[name], live[name]) for name in off)


def test_a_gate_that_no_step_reaches_is_a_dead_stp(place, monkeypatch):
    with pytest.raises(PreflightError, match="never live"):
        start(monkeypatch, "run_id=late", "stp.gate.start_tokens=2190", "stp.gate.ramp_tokens=0")
    assert receipt("late")["status"] == "refused"


def test_learning_rate_and_clipping_reach_the_update(place, monkeypatch):
    start(monkeypatch, "run_id=base", "train.log_every=1")
    rates = [record["learning_rate"] for record in losses("base") if "learning_rate" in record]
    assert max(rates) > 2.5e-3 and rates[-1] == pytest.approx(3e-4) and len(set(rates)) > 5
    start(monkeypatch, "run_id=clipped", "train.log_every=1", "optimizer.grad_clip=1e-8")
    base, clipped = ([r["loss/lm"] for r in losses(name) if "loss/lm" in r] for name in ("base", "clipped"))
    assert clipped[0] == base[0] and clipped[-1] > base[-1] + 0.2  # far below AdamW's eps nothing is learned


def test_the_seed_reaches_weights_order_and_triples(place, monkeypatch):
    seen = {}

    def spy(name, read):
        real = getattr(train, name)

        def make(*args, **kwargs):
            made = real(*args, **kwargs)
            seen[name] = (made, read(made))
            return made

        monkeypatch.setattr(train, name, make)

    spy("Objective", lambda objective: objective.seed)
    spy("TrainStream", lambda stream: stream.batch(0).tokens)
    spy("build_optimizer", lambda optimizer: [p.detach().clone() for g in optimizer.param_groups for p in g["params"]])
    found = []
    for seed in (3, 4):
        start(monkeypatch, f"run_id=seed{seed}", f"seed={seed}", "train.tokens=900")
        found.append({name: value for name, (_, value) in seen.items()})
    assert [f["Objective"] for f in found] == [3, 4]
    assert not torch.equal(found[0]["TrainStream"], found[1]["TrainStream"])
    weights = zip(found[0]["build_optimizer"], found[1]["build_optimizer"], strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)


@pytest.mark.slow
def test_compiled_blocks_train_alike(place, monkeypatch):
    plan = ["train.tokens=1400", "train.accumulation=1", "model.pattern=AEMER"]
    start(monkeypatch, "run_id=eager", *plan)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    start(monkeypatch, "run_id=compiled", *plan, "train.compile=blocks")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    eager, compiled = ([r["loss/total"] for r in losses(name) if "loss/total" in r] for name in ("eager", "compiled"))
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager), rtol=2e-2, atol=2e-2)
    assert receipt("compiled")["stp"]["live_tokens"] == receipt("eager")["stp"]["live_tokens"]


def command(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


def test_bad_input_is_one_line_and_exit_code_2_with_nothing_written(place, monkeypatch):
    for override, part in (("stp.wieght=1", "stp.weight"), ("data.path=nothing/*.txt", "nothing")):
        with pytest.raises(InputError, match=part):
            start(monkeypatch, override)
    (place / "texts" / "binary.txt").write_bytes(b"\x00\x01\x02")
    done = command("tiny.yaml", cwd=place)
    assert done.returncode == 2 and done.stdout == "", done
    error = [line for line in done.stderr.splitlines() if not line.startswith("data:")]
    assert len(error) == 1 and "binary.txt" in error[0] and "Traceback" not in done.stderr
    assert not (place / "runs").exists() and not list(place.glob("artifacts/*/manifest.json"))


def test_dry_run_prints_the_plan_and_writes_nothing(place, monkeypatch, capsys):
    before = sorted(place.rglob("*"))
    start(monkeypatch, "--dry-run", "stp.weight=0.25")
    out = capsys.readouterr().out
    assert "weight: 0.25" in out and "STP gate opens at" in out and "token 701" in out and "mamba2" in out
    start(monkeypatch, "--print-layout")
    assert "FLOPs/token" in capsys.readouterr().out
    assert sorted(place.rglob("*")) == before
