"""The training step's cheap gradients on the real stack: every boundary joins, and nothing differs from autograd."""

import pytest
import torch

from losses.objective import Objective, STPConfig
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig

V, B, T = 64, 2, 48


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
def test_hybrid_stack(autocast):
    config = ModelConfig(pattern="AEMR", d_model=32)
    config.attention.n_heads, config.attention.n_kv_heads = 2, 1
    model = HybridLM(config, V)
    model.init_weights(torch.Generator().manual_seed(0))
    objective = Objective(STPConfig(boundaries=["all", "final"]), model.letters)
    tokens = torch.randint(V, (B, T))
    ids = torch.tensor([[0] * 20 + [1] * 28, [0] * 44 + [-1] * 4], dtype=torch.int32)
    labels = torch.where(ids >= 0, tokens.roll(-1, 1), -100)
    triples = objective.draw(ids, torch.arange(B), 0)
    weight = torch.tensor(5.0)

    def run(cheap):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(tokens, SequenceContext.from_document_ids(ids))
            if cheap:
                assert objective.join(output).joined == [True] * 6
                total = objective(output, model.head.weight, labels, triples, stp_weight=weight).total
            else:
                lm = objective(output, model.head.weight, labels).total
                terms = objective.stp_terms(output.hidden_states, output.final, triples)
                total = lm + weight * torch.stack(list(terms.values())).mean()
        total.backward()
        return total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (total, cheap), (expected_total, plain) = run(True), run(False)
    torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=1e-6)
    assert cheap.keys() == plain.keys()
    for name, gradient in plain.items():
        # The additions at a boundary come in another order; bfloat16 products below it round that to one of theirs.
        error = (cheap[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < (2e-2 if autocast else 1e-4), f"{name}: {error:.1e}"
