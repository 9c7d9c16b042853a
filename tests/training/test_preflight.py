"""The proof must hold on the real model, and fail when the wire is cut: each fault here is cut into the real code."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from data.batch import Batch
from errors import PreflightError
from losses.objective import Objective, STPConfig
from model.hybrid import HybridLM, HybridOutput, ModelConfig
from training.preflight import Preflight, require_ok

VOCAB = 97


def setup(pattern="AMER", seed=0, **stp):
    config = ModelConfig(pattern=pattern, d_model=32)
    config.attention.n_heads, config.attention.n_kv_heads = 4, 2
    config.mamba2.head_dim, config.mamba2.d_state, config.mamba2.chunk_size = 16, 8, 16
    config.moe.n_experts, config.moe.expert_ff = 4, 16
    model = HybridLM(config, VOCAB)
    model.init_weights(torch.Generator().manual_seed(seed))
    objective = Objective(STPConfig(n_spans=8, **stp), model.letters)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (3, 48), generator=generator)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([20, 17, 11])).int().expand(3, 48).contiguous()
    batch = Batch(tokens, tokens.roll(-1, 1), ids, torch.arange(3))
    triples = objective.draw(ids, batch.row_ids, step=0)
    return model, objective, batch, triples


def prove(model, objective, batch, triples, seed=0, autocast=contextlib.nullcontext, dtype=torch.float32):
    return Preflight(model, objective, autocast, dtype, VOCAB, chunk=16, seed=seed).run(batch, triples)


@pytest.mark.parametrize("seed", range(5))
def test_a_sound_model_passes_and_no_trace_is_left(seed):
    model, objective, batch, triples = setup(seed=seed, boundaries=["all", "final"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    random_state = torch.get_rng_state()
    report = prove(model, objective, batch, triples, seed)
    assert report.ok, report.failures()
    assert [b.index for b in report.boundaries] == [0, 1, 2, 3, 4, "final"]
    assert all(b.grad_norm > 0 for b in report.boundaries)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_passes_in_bfloat16_autocast():
    model, objective, batch, triples = setup()
    report = prove(
        model, objective, batch, triples, autocast=lambda: torch.autocast("cpu", torch.bfloat16), dtype=torch.bfloat16
    )
    assert report.ok, report.failures()


def test_rounding_of_a_large_gradient_of_the_language_model_is_no_fault():
    """In bfloat16 sums round as a whole, so STP's part of a gradient must be told from its rounding."""
    for seed in range(3):
        model, objective, batch, triples = setup(seed=seed)
        with torch.no_grad():
            model.head.weight.mul_(100)
        half = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "dtype": torch.bfloat16}
        report = prove(model, objective, batch, triples, **half)
        assert report.ok, report.failures()


def loop(change):
    """A layer loop like HybridLM's, with `change(index, hidden, stream) -> (collected, carried)` cut into it."""

    def forward(self, tokens, context):
        hidden = self.embedding(tokens)
        states = [hidden]
        for index, block in enumerate(self.blocks):
            collected, hidden = change(self, index, block(hidden, context))
            states += [] if collected is None else [collected]
        return HybridOutput(states, self.final_norm(hidden))

    return forward


FAULTS = {
    "list detached": loop(lambda m, i, h: (h.detach() if i == 1 else h, h)),
    "list detached, grad required again": loop(lambda m, i, h: (h.detach().requires_grad_() if i == 1 else h, h)),
    "stream cut": loop(lambda m, i, h: (h, h.detach().requires_grad_() if i == 1 else h)),
    "collector in evaluation only": loop(lambda m, i, h: (None if m.training else h, h)),
    "collector in training only": loop(lambda m, i, h: (h if m.training else None, h)),
    "one family left out": loop(lambda m, i, h: (None if m.letters[i] == "E" else h, h)),
    "rolled time axis in the list": loop(lambda m, i, h: (h.roll(1, 1) if i == 2 else h, h)),
    "rolled time axis in the stream": loop(lambda m, i, h: (h, h.roll(1, 1) if i == 2 else h)),
    "cloned list": loop(lambda m, i, h: (h.clone() if i == 2 else h, h)),
    "list in bfloat16": loop(lambda m, i, h: (h.bfloat16(), h)),
    "future leaks": loop(lambda m, i, h: (h + 0.01 * h.flip(1), h + 0.01 * h.flip(1)) if i == 2 else (h, h)),
    "earlier documents leak": loop(lambda m, i, h: ((h + 0.01 * h.cumsum(1),) * 2) if i == 2 else (h, h)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cut_wire_is_refused(fault, monkeypatch):
    model, objective, batch, triples = setup()
    monkeypatch.setattr(HybridLM, "forward", FAULTS[fault])
    report = prove(model, objective, batch, triples)
    assert not report.ok
    with pytest.raises(PreflightError, match="preflight"):
        require_ok(report, "before the first step")


def test_the_uncut_copy_of_the_loop_passes(monkeypatch):
    monkeypatch.setattr(HybridLM, "forward", loop(lambda m, i, h: (h, h)))
    report = prove(*setup())
    assert report.ok, report.failures()


def test_permuted_and_repeated_lists_are_refused(monkeypatch):
    honest = HybridLM.forward

    def with_list(change):
        def forward(self, tokens, context):
            output = honest(self, tokens, context)
            return HybridOutput(change(output.hidden_states), output.final)

        return forward

    for change in (
        lambda s: [s[0], s[2], s[1], *s[3:]],
        lambda s: [s[0], *s[:-1]],
        lambda s: [*s[1:], s[-1]],
        lambda s: [s[-1]] * len(s),
    ):
        monkeypatch.setattr(HybridLM, "forward", with_list(change))
        assert not prove(*setup()).ok


@pytest.mark.parametrize("part", ["lane", "branch"])
def test_a_cut_inside_the_residual_sum_is_refused(part, monkeypatch):
    from blocks.block import Block

    def forward(self, hidden, context):
        if self.letter != "M":
            return hidden + self.mixer(self.norm(hidden), context)
        lane = hidden.detach() if part == "lane" else hidden
        branch = hidden.detach() if part == "branch" else hidden
        return lane + self.mixer(self.norm(branch), context)

    monkeypatch.setattr(Block, "forward", forward)
    report = prove(*setup())
    assert any("boundary 2" in failure for failure in report.failures())


def test_a_frozen_block_and_a_dead_parameter_are_refused():
    model, objective, batch, triples = setup()
    model.blocks[1].mixer.in_proj.weight.requires_grad_(False)
    assert "frozen" in " ".join(prove(model, objective, batch, triples).failures())
    model.blocks[1].mixer.in_proj.weight.requires_grad_(True)
    with torch.no_grad():
        model.blocks[3].mixer.out_proj.weight.zero_()
    assert any("boundary 4" in failure for failure in prove(model, objective, batch, triples).failures())


@pytest.mark.parametrize(
    "total",
    [
        lambda out, weight: out.lm,
        lambda out, weight: out.lm + weight * out.stp.detach(),
        lambda out, weight: out.lm + 0.5 * weight * out.stp,
        lambda out, weight: out.lm + weight * out.stp_per_boundary[:-1].mean(),
    ],
    ids=["dropped", "detached", "halved", "one boundary left out"],
)
def test_a_term_that_is_not_in_the_total_is_refused(total, monkeypatch):
    model, objective, batch, triples = setup()
    honest = Objective.__call__

    def dishonest(self, *args, stp_weight=None, **kwargs):
        out = honest(self, *args, stp_weight=stp_weight, **kwargs)
        return SimpleNamespace(total=total(out, stp_weight))

    monkeypatch.setattr(Objective, "__call__", dishonest)
    assert "total" in " ".join(prove(model, objective, batch, triples).failures())


def test_triples_across_documents_are_refused():
    model, objective, batch, triples = setup()
    other = Batch(batch.tokens, batch.labels, (torch.arange(48) // 3).int().expand(3, 48).contiguous(), batch.row_ids)
    assert "cross a document" in " ".join(prove(model, objective, other, triples).failures())


def test_the_placebo_must_send_nothing():
    model, objective, batch, triples = setup(variant="detached")
    report = prove(model, objective, batch, triples)
    assert report.ok and all(b.grad_norm == 0 for b in report.boundaries)
