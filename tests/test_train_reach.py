"""What the config says reaches the step: rates, clipping, seeds, compilation, and nothing of a placebo."""

import pytest
import torch
from tiny_run import last_weights, losses, make_place, receipt, start

import train


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


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


def test_the_placebo_equals_no_stp_bit_for_bit(place, monkeypatch):
    start(monkeypatch, "run_id=without", "stp.weight=0")
    start(monkeypatch, "run_id=placebo", "stp.variant=detached")
    off, placebo = last_weights("without"), last_weights("placebo")
    assert all(torch.equal(off[name], placebo[name]) for name in off)
    assert receipt("placebo")["stp"]["live_tokens"] == [] and receipt("placebo")["status"] == "finished"
    start(monkeypatch, "run_id=with")
    live = last_weights("with")
    assert not all(torch.equal(off[name], live[name]) for name in off)
