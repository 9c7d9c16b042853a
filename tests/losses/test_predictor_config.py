"""stp.predictor: linear, from the config to the gradient of its weight."""

import pytest
import torch

from data.batch import Batch
from errors import InputError
from losses.objective import Objective, STPConfig
from losses.stp import compute_stp_loss
from model.hybrid import HybridLM, ModelConfig
from training.optimizer import OptimizerConfig, build_optimizer
from training.preflight import Preflight

VOCAB = 61


def setup(attached=True, **changes):
    config = ModelConfig(pattern="AEM", d_model=32)
    config.mamba2.head_dim, config.mamba2.d_state = 16, 8
    config.moe.n_experts, config.moe.expert_ff = 4, 16
    model = HybridLM(config, VOCAB)
    model.init_weights(torch.Generator().manual_seed(0))
    objective = Objective(STPConfig(predictor="linear", n_spans=8, **changes), model.letters, seed=3)
    if attached:
        model.stp_predictor = objective.make_predictor(32)
    ids = torch.repeat_interleave(torch.arange(2), torch.tensor([30, 18])).int().expand(3, 48).contiguous()
    tokens = torch.randint(VOCAB, (3, 48), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens, tokens.roll(-1, 1), ids, torch.arange(3))
    return model, objective, batch, objective.draw(ids, batch.row_ids, 0)


def test_the_term_uses_it_and_training_moves_it():
    model, objective, batch, triples = setup()
    from model.context import SequenceContext

    output = model(batch.tokens, SequenceContext.from_document_ids(batch.document_ids))
    loss = objective(output, model.head.weight, batch.labels, triples, stp_weight=torch.tensor(0.5))
    plain = compute_stp_loss(output.hidden_states, triples=triples, predictor=objective.predictor)
    assert float(loss.stp.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert float(loss.stp.detach()) != pytest.approx(
        float(compute_stp_loss(output.hidden_states, triples=triples).detach()), abs=1e-3
    )
    loss.total.backward()
    weight = model.stp_predictor.weight
    before = weight.detach().clone()
    optimizer = build_optimizer(model, OptimizerConfig())
    optimizer.step()
    assert weight.grad.norm() > 0 and not torch.equal(weight, before)
    assert "stp_predictor.weight" in model.state_dict()
    again = Objective(objective.config, model.letters, seed=3).make_predictor(32)
    assert torch.equal(again.weight, before)  # of the seed alone


def proof(model, objective, batch, triples):
    def autocast():
        return torch.autocast("cpu", enabled=False)

    return Preflight.of(model, objective, autocast, torch.float32, 0).run(batch, triples)


def test_preflight_looks_at_it():
    parts = setup()
    report = proof(*parts)
    assert report.ok and report.checks["predictor"] is None, report.failures()
    del parts[0].stp_predictor
    assert "neither trained nor saved" in proof(*parts).checks["predictor"]
    report = proof(*setup(variant="detached"))
    assert report.checks["control_sends_nothing"] is None


def test_without_one_it_is_bad_input_not_silence():
    _, objective, _, triples = setup(attached=False)
    with pytest.raises(InputError, match=r"stp\.predictor: linear was asked for"):
        objective.measure([torch.randn(3, 48, 32)] * 4, torch.randn(3, 48, 32), triples)
    with pytest.raises(InputError, match=r"stp\.predictor: .*did you mean 'linear'"):
        STPConfig(predictor="liner").validate("stp", "AEM")
    assert Objective(STPConfig(), "AEM").make_predictor(32) is None
