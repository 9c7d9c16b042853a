import pytest
import torch

from model.context import SequenceContext
from model.generate import generate
from model.hybrid import HybridLM, ModelConfig

SMALL = dict(d_model=32)
VOCAB = 50


def small_model(pattern: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> HybridLM:
    config = ModelConfig(pattern=pattern, d_model=32)
    config.attention.n_heads, config.attention.n_kv_heads = 4, 2
    config.mamba2.head_dim, config.mamba2.d_state, config.mamba2.chunk_size = 16, 8, 8
    config.moe.n_experts, config.moe.expert_ff = 4, 16
    model = HybridLM(config, VOCAB)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.to(dtype)


def test_collects_every_boundary_in_every_mode():
    model = small_model("AMER", dtype=torch.float32)
    tokens = torch.randint(VOCAB, (2, 12))
    context = SequenceContext.single_documents(tokens)
    for training in (True, False):
        model.train(training)
        for autocast in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = model(tokens, context)
            assert len(output.hidden_states) == 5
            assert {state.dtype for state in [*output.hidden_states, output.final]} == {torch.float32}
            assert all(state.shape == (2, 12, 32) and state.requires_grad for state in output.hidden_states)


def test_boundaries_are_the_residual_stream():
    model = small_model("AMER")
    tokens = torch.randint(VOCAB, (1, 9))
    context = SequenceContext.single_documents(tokens)
    states = model(tokens, context).hidden_states
    for block, before, after in zip(model.blocks, states[:-1], states[1:], strict=True):
        torch.testing.assert_close(after, before + block.mixer(block.norm(before), context), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", ["A", "M", "E", "R", "AMER", "AEMEAEMEAEMR"])
def test_packed_equals_alone(pattern):
    model = small_model(pattern)
    lengths = [1, 7, 8, 13, 2]
    documents = [torch.randint(VOCAB, (1, n)) for n in lengths]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    packed = model(torch.cat(documents, dim=1), SequenceContext.from_document_ids(ids))
    alone = [model(tokens, SequenceContext.single_documents(tokens)) for tokens in documents]
    for boundary, state in enumerate(packed.hidden_states):
        together = torch.cat([output.hidden_states[boundary] for output in alone], dim=1)
        torch.testing.assert_close(state, together, rtol=0, atol=1e-10)

    weights = torch.randn_like(packed.final)
    parameters = list(model.parameters())
    grads_packed = torch.autograd.grad((packed.final * weights).sum(), parameters, allow_unused=True)
    joined = torch.cat([output.final for output in alone], dim=1)
    grads_alone = torch.autograd.grad((joined * weights).sum(), parameters, allow_unused=True)
    for a, b in zip(grads_packed, grads_alone, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pattern", ["A", "M", "E", "R", "AMER"])
def test_causal(pattern):
    model = small_model(pattern)
    tokens = torch.randint(VOCAB, (1, 21))
    changed = tokens.clone()
    changed[0, 11] = (tokens[0, 11] + 1) % VOCAB
    context = SequenceContext.single_documents(tokens)
    before, after = model(tokens, context).hidden_states, model(changed, context).hidden_states
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a[:, :11], b[:, :11], rtol=0, atol=1e-12)
        assert float((a[:, 11] - b[:, 11]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("pattern", ["A", "M", "E", "R", "AEMEAEMEAEMR"])
@pytest.mark.parametrize("length", [5, 17])
def test_step_decode_equals_parallel_forward(pattern, length):
    model = small_model(pattern).eval()
    tokens = torch.randint(VOCAB, (2, length))
    parallel = model.logits(model(tokens, SequenceContext.single_documents(tokens)).final)
    states = model.init_state(2, length)
    for position in range(length):
        logits, states = model.step(tokens[:, position], states)
        torch.testing.assert_close(logits, parallel[:, position], rtol=0, atol=1e-9)


def test_same_seed_same_weights_and_head_variants():
    a, b, c = small_model("AMER"), small_model("AMER"), small_model("AMER", seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embedding.weight, c.embedding.weight)
    tied = HybridLM(ModelConfig(pattern="E", d_model=32, head="tied"), VOCAB)
    assert tied.head.weight is tied.embedding.weight


def test_every_parameter_is_initialised():
    with torch.device("meta"):
        model = HybridLM(ModelConfig(pattern="AMER", d_model=64), VOCAB)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights(torch.Generator().manual_seed(0))
    assert [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())] == []
    out_of_blocks = [p for name, p in model.named_parameters() if "out_proj" in name or "down_proj" in name]
    assert out_of_blocks and all(bool(p.any()) for p in out_of_blocks)


def test_generate_stops_and_is_greedy_at_temperature_zero():
    model = small_model("AMER", dtype=torch.float32)
    prompt = torch.randint(VOCAB, (2, 3))
    first = generate(model, prompt, 6, temperature=0.0)
    assert torch.equal(first, generate(model, prompt, 6, temperature=0.0)) and first.shape == (2, 9)
    context = SequenceContext.single_documents(prompt)
    expected = model.logits(model(prompt, context).final[:, -1]).argmax(-1)
    assert torch.equal(first[:, 3], expected)
    stop = int(first[0, 3])
    stopped = generate(model, prompt[:1], 6, temperature=0.0, stop_token=stop)
    assert stopped.shape == (1, 4)


def test_layout_counts_all_parameters():
    model = small_model("AEMR")
    in_blocks = sum(row["parameters"] for row in model.layout(64))
    rest = model.embedding.weight.numel() + model.head.weight.numel() + model.final_norm.weight.numel()
    assert in_blocks + rest == sum(p.numel() for p in model.parameters())
    assert [row["letter"] for row in model.layout(64)] == list("AEMR")
    assert all(row["flops_per_token"] > 0 for row in model.layout(64))
