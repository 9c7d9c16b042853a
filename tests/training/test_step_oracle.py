"""What the loop in train.py differentiates, against the same step written plainly.

The run goes its real way (micro-batches, gate with a ramp, joined gradients). At every step, just before clipping, its
accumulated gradients are compared with those of one plain formula at the same weights: the whole batch at once, logits
in full, autograd's own way back, tokens counted here. A step that reads other documents, other triples, another
weight, or leaves a micro-batch or a term out, has other gradients.
"""

import itertools
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiny_run import write_corpus

import train
from losses.stp import compute_stp_loss
from losses.triples import draw
from model.context import SequenceContext
from training.config import load_config
from training.schedule import learning_rate_factor

TINY = """
model:
  pattern: AMER
  d_model: 32
  attention: {n_heads: 4, n_kv_heads: 2}
  mamba2: {head_dim: 16, d_state: 8, chunk_size: 16}
  moe: {n_experts: 4, top_k: 2, expert_ff: 16}
data: {path: texts/*.txt, sequence_length: 48, validation_fraction: 0.1, tokenizer: {vocab_size: 300}}
stp: {weight: 0.5, n_spans: 4, window: 8, boundaries: [all, final], gate: {start_tokens: 300, ramp_tokens: 400}}
train: {tokens: 1100, batch_rows: 4, accumulation: 2, log_every: 2, probe_every: 3}
optimizer: {learning_rate: 3.0e-3, grad_clip: null}
validation: {rows: 2, sample_tokens: 0}
wandb: {mode: disabled}
precision: fp32
threads: 1
run_id: oracle
seed: 5
"""
STEPS = 5


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_corpus(tmp_path, seed=1, longest=8)
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)


def stp_weight_at(tokens):
    return 0.5 * min(max((tokens - 300) / 400, 0.0), 1.0)


def plain_gradients(model, batch, step, tokens):
    """{name: gradient} of cross-entropy + weight x STP over the whole batch, with nothing clever."""
    documents = batch.document_ids
    output = model(batch.tokens, SequenceContext.from_document_ids(documents))
    logits = output.final @ model.head.weight.T
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    if weight := stp_weight_at(tokens):
        triples = draw("anchor", documents, 4, seed=5, step=step, row_ids=batch.row_ids, window=8)
        total = total + weight * compute_stp_loss([*output.hidden_states, output.final], triples=triples)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))


def test_every_step_has_the_gradients_of_the_plain_formula(place, monkeypatch):
    seen, made = [], {}

    def spy(name):
        real = getattr(train, name)

        def make(*args, **kwargs):
            made[name] = real(*args, **kwargs)
            return made[name]

        monkeypatch.setattr(train, name, make)

    for name in ("HybridLM", "TrainStream", "build_optimizer"):
        spy(name)
    clip = train.clip_gradients

    def before_clipping(parameters, max_norm):
        model, step = made["HybridLM"], len(seen)
        batches = [made["TrainStream"].batch(number) for number in range(step + 1)]
        tokens = sum(int((batch.labels != -100).sum()) for batch in batches[:-1])
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        expected = plain_gradients(model, batches[-1], step, tokens)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        errors = {}
        for name, parameter in model.named_parameters():
            scale = expected[name].norm() + 1e-6
            errors[name] = float((parameter.grad - expected[name]).norm() / scale)
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        rate = 3e-3 * learning_rate_factor(config.schedule, (tokens + batches[-1].loss_tokens) / config.train.tokens)
        seen.append((tokens, max(errors.items(), key=lambda item: item[1]), weights, rate))
        return clip(parameters, max_norm)

    monkeypatch.setattr(train, "clip_gradients", before_clipping)
    config = load_config("tiny.yaml")
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny.yaml"])
    train.main()

    assert len(seen) >= STEPS, asdict(config.train)
    weights = [stp_weight_at(tokens) for tokens, *_ in seen]
    assert weights[0] == 0 and 0 < weights[2] < 0.5 and weights[-1] == 0.5  # closed, in the ramp, open
    for step, (_, (name, error), *_) in enumerate(seen):
        assert error < 2e-4, f"step {step}: the gradient of {name} is off by {error:.1e}"
    # And the update uses them: AdamW moves every parameter by about the learning rate, none stays where it was.
    for (*_, before, rate), (*_, after, _) in itertools.pairwise(seen):
        for name in before:
            moved = float((after[name] - before[name]).abs().max())
            assert 0 < moved < 30 * rate, f"{name} moved by {moved:.1e} at a rate of {rate:.1e}"
    assert Path("runs/oracle/receipt.json").is_file()
