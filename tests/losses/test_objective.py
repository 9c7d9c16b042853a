"""The objective: what is summed, what is divided by what, and that a closed gate changes nothing."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch

from errors import InputError
from losses.gate import GateConfig
from losses.objective import Objective, STPConfig
from losses.stp import compute_stp_loss

D, V, T = 16, 32, 24
LETTERS = tuple("AEMR")


@dataclass
class Output:
    hidden_states: list
    final: torch.Tensor


class Model(torch.nn.Module):
    """A residual stack of four blocks, as the objective sees one."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.embedding = torch.nn.Embedding(V, D, dtype=dtype)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(D, D, dtype=dtype) for _ in LETTERS)
        self.norm = torch.nn.RMSNorm(D, dtype=dtype)
        self.head = torch.nn.Linear(D, V, bias=False, dtype=dtype)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        states = [hidden]
        for branch in self.branches:
            hidden = hidden + branch(hidden).tanh()
            states.append(hidden)
        return Output(states, self.norm(hidden))


@dataclass
class Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor
    row_ids: torch.Tensor

    def rows(self, part):
        return Batch(self.tokens[part], self.labels[part], self.document_ids[part], self.row_ids[part])


def make_batch(n_rows=8, seed=0):
    """Ragged rows: one is mostly padding, one has no document of three tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (n_rows, T), generator=generator)
    ids = torch.tensor([[0] * 10 + [1] * 14, [0] * 5 + [-1] * 19, [0, 1] * 12] * n_rows)[:n_rows]
    labels = torch.where(ids >= 0, tokens.roll(-1, 1), -100)
    return Batch(tokens, labels, ids, torch.arange(100, 100 + n_rows))


def config(**changes):
    return replace(STPConfig(weight=0.3, window=6, n_spans=3), **changes)


def step(model, objective, batch, stp_weight, micro_batches=1, number=5, measure=True):
    """Gradients and metrics of one optimizer step, as the training loop makes them."""
    model.zero_grad()
    triples = objective.draw(batch.document_ids, batch.row_ids, number) if measure else None
    stp_divisor = objective.divisor(triples) if measure else None
    lm_divisor = int((batch.labels != -100).sum())
    total = lm = 0.0
    per_boundary = 0.0
    for part in torch.arange(len(batch.tokens)).chunk(micro_batches):
        small = batch.rows(part)
        out = objective(
            model(small.tokens),
            model.head.weight,
            small.labels,
            triples.select(part) if measure else None,
            stp_weight=None if stp_weight is None else torch.tensor(stp_weight),
            lm_divisor=lm_divisor,
            stp_divisor=stp_divisor,
        )
        out.total.backward()
        total, lm = total + out.total.item(), lm + out.lm.item()
        per_boundary = per_boundary + out.stp_per_boundary.detach() if measure else None
    return total, lm, per_boundary, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_total_is_lm_plus_weight_times_mean_over_boundaries():
    model, batch, objective = (
        Model(),
        make_batch(),
        Objective(config(boundaries=["family:M", "last", "final"]), LETTERS),
    )
    assert objective.boundaries == [3, 4, "final"] and objective.families == ["M", "R", "final"]
    triples = objective.draw(batch.document_ids, batch.row_ids, 5)
    output = model(batch.tokens)
    out = objective(output, model.head.weight, batch.labels, triples, stp_weight=torch.tensor(0.3))
    logits = output.final @ model.head.weight.T
    lm = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    each = [compute_stp_loss(h, triples=triples) for h in (*output.hidden_states[3:], output.final)]
    assert out.lm.item() == pytest.approx(lm.item(), abs=1e-6)
    torch.testing.assert_close(out.stp_per_boundary, torch.stack(each))
    assert out.stp.item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-12)
    assert out.total.item() == pytest.approx(out.lm.item() + 0.3 * out.stp.item(), abs=1e-6)
    assert list(out.terms) == ["lm", "stp"]
    assert out.total.item() == pytest.approx(sum((t.weight * t.value).item() for t in out.terms.values()), abs=1e-7)
    assert out.n_tokens.item() == (batch.labels != -100).sum().item()
    named = objective.stp_terms(output.hidden_states, output.final, triples)
    assert list(named) == [3, 4, "final"]
    torch.testing.assert_close(torch.stack(list(named.values())), torch.stack(each))


@pytest.mark.parametrize("form", ["triple", "consecutive", "patch_complement"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_accumulation_splits_agree(form, dtype):
    """1, 2, 4 and 8 micro-batches of uneven content: the same gradients, losses and triples."""
    model, batch = Model(dtype), make_batch()
    objective = Objective(config(form=form, length_weighting="jaccard_like", boundaries=["all", "final"]), LETTERS)
    whole = step(model, objective, batch, 0.3)
    tolerance = {"rtol": 1e-10, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for n in (2, 4, 8):
        parts = step(model, objective, batch, 0.3, n)
        assert parts[0] == pytest.approx(whole[0], rel=1e-5) and parts[1] == pytest.approx(whole[1], rel=1e-5)
        torch.testing.assert_close(parts[2], whole[2], **tolerance)
        for name, gradient in whole[3].items():
            torch.testing.assert_close(parts[3][name], gradient, **tolerance)


def test_training_path_equals_plain_autograd():
    """The total's gradient is that of LM + weight x the mean of the per-boundary terms, built by hand."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        model, batch, objective = Model(dtype), make_batch(), Objective(config(boundaries=["all", "final"]), LETTERS)
        found = step(model, objective, batch, 0.3)[3]
        model.zero_grad()
        output = model(batch.tokens)
        triples = objective.draw(batch.document_ids, batch.row_ids, 5)
        lm = objective(output, model.head.weight, batch.labels).total
        terms = objective.stp_terms(output.hidden_states, output.final, triples)
        (lm + torch.tensor(0.3) * torch.stack(list(terms.values())).mean()).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=tolerance, atol=tolerance)


def weights_after(objective, stp_weight, measure=True, steps=5):
    torch.manual_seed(1)
    model = Model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for number in range(steps):
        gradients = step(model, objective, make_batch(seed=number), stp_weight, 2, number, measure)[3]
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def test_closed_gate_and_placebo_equal_no_stp_bit_for_bit():
    plain = weights_after(Objective(config(), LETTERS), None, measure=False)
    cases = {
        "measured while closed": (Objective(config(), LETTERS), None),
        "weight zero": (Objective(config(), LETTERS), 0.0),
        "detached": (Objective(config(variant="detached"), LETTERS), 0.3),
    }
    for name, (objective, weight) in cases.items():
        found = weights_after(objective, weight)
        assert all(torch.equal(found[k], plain[k]) for k in plain), name
    opened = weights_after(Objective(config(), LETTERS), 0.3)
    assert not torch.equal(opened["embedding.weight"], plain["embedding.weight"])


def test_measuring_takes_no_gradient():
    model, batch, objective = Model(), make_batch(), Objective(config(), LETTERS)
    triples = objective.draw(batch.document_ids, batch.row_ids, 0)
    out = objective(model(batch.tokens), model.head.weight, batch.labels, triples)
    assert out.total is out.lm and not out.stp.requires_grad and not out.stp_per_boundary.requires_grad
    assert out.stp_terms.n_valid.item() == triples.valid.sum().item()
    assert "stp" not in out.terms
    assert objective(model(batch.tokens), model.head.weight, batch.labels).stp is None


def test_a_batch_without_room_is_a_zero_not_a_nan():
    model, batch, objective = Model(), make_batch(), Objective(config(), LETTERS)
    batch = replace(batch, document_ids=torch.arange(T).expand(8, T))
    total, lm, per_boundary, gradients = step(model, objective, batch, 0.3)
    assert total == pytest.approx(lm) and torch.equal(per_boundary, torch.zeros_like(per_boundary))
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_draws_depend_on_seed_step_and_row_alone():
    batch = make_batch()
    objective = Objective(config(), LETTERS, seed=3)
    whole = objective.draw(batch.document_ids, batch.row_ids, 7)
    part = torch.tensor([5, 2])
    again = objective.draw(batch.document_ids[part], batch.row_ids[part], 7)
    assert torch.equal(again.s, whole.s[part]) and torch.equal(again.t, whole.t[part])
    # Arms of an ablation see the same triples, whatever their form, weight, boundaries or control.
    for arm in (
        config(form="consecutive"),
        config(form="patch_complement"),
        config(weight=0.01, boundaries="last", variant="detached"),
        config(variant="shuffled_order", distance="mse"),
    ):
        assert torch.equal(Objective(arm, LETTERS, seed=3).draw(batch.document_ids, batch.row_ids, 7).r, whole.r)
    assert not torch.equal(Objective(config(), LETTERS, seed=4).draw(batch.document_ids, batch.row_ids, 7).r, whole.r)
    assert not torch.equal(objective.draw(batch.document_ids, batch.row_ids, 8).r, whole.r)


def test_spans_per_1024_tokens_keep_exposure():
    objective = Objective(config(spans_per_1024_tokens=64.0), LETTERS)
    for length, spans in ((256, 16), (512, 32)):
        assert objective.draw(torch.zeros(2, length), torch.arange(2), 0).s.shape == (2, spans)


def test_control_variants():
    model, batch = Model(), make_batch()
    assert Objective(config(variant="detached"), LETTERS).is_control
    for variant in ("standard", "shuffled_order", "negative"):
        assert not Objective(config(variant=variant), LETTERS).is_control
    # A negative weight pushes exactly the other way.
    objective = Objective(config(variant="negative", weight=-0.3), LETTERS)
    plus = step(model, Objective(config(), LETTERS), batch, 0.3)[3]
    minus = step(model, objective, batch, -0.3)[3]
    none = step(model, objective, batch, None)[3]
    for name in plus:
        torch.testing.assert_close(plus[name] - none[name], none[name] - minus[name], rtol=1e-6, atol=1e-9)


def test_family_means():
    objective = Objective(config(boundaries=["all", "final"]), tuple("AAE"))
    means = objective.family_means(torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0]))
    assert means == {"embedding": 0.5, "A": 1.5, "E": 3.0, "final": 4.0}


# --- configuration ------------------------------------------------------------------------------------------------


def test_defaults_are_valid():
    assert STPConfig().validate("stp", LETTERS, 10**6, 512) == []
    assert STPConfig().enabled and not STPConfig(weight=0).enabled


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": float("nan")}, r"stp\.weight: .*finite"),
        ({"weight": float("inf")}, r"stp\.weight: .*finite"),
        ({"weight": -0.1}, r"stp\.weight: expected at least 0, .*stp\.variant=negative"),
        ({"weight": 0.1, "variant": "negative"}, r"stp\.weight: variant negative needs a weight below 0"),
        ({"form": "tripel"}, r"stp\.form: .*did you mean 'triple'"),
        ({"sampler": "anchr"}, r"stp\.sampler: .*did you mean 'anchor'"),
        ({"sampler": "patch"}, r"stp\.sampler: patch draws spans"),
        ({"variant": "detach"}, r"stp\.variant: .*did you mean 'detached'"),
        ({"variant": "shuffled_order", "form": "patch_complement"}, r"stp\.variant: shuffled_order"),
        ({"distance": "l2"}, r"stp\.distance"),
        ({"length_weighting": "dice"}, r"stp\.length_weighting"),
        ({"normalize": "layer"}, r"stp\.normalize"),
        ({"n_spans": 0}, r"stp\.n_spans: .*at least 1"),
        ({"spans_per_1024_tokens": -1.0}, r"stp\.spans_per_1024_tokens"),
        ({"window": 0}, r"stp\.window: .*at least 1"),
        ({"boundaries": []}, r"stp\.boundaries: an empty list"),
        ({"boundaries": "family:X"}, r"stp\.boundaries: "),
        ({"boundaries": [9]}, r"stp\.boundaries: boundary 9 does not exist"),
        ({"gate": GateConfig(start_steps=5)}, r"stp\.gate\.start_steps"),
        ({"gate": GateConfig(start_tokens=10**6)}, r"stp\.gate\.start_tokens: the gate opens"),
    ],
)
def test_bad_config_is_one_line_with_the_key(changes, words):
    with pytest.raises(InputError, match=words) as error:
        config(**changes).validate("stp", LETTERS, 10**6, 512)
    assert "\n" not in str(error.value)


def test_short_sequences_and_warnings():
    with pytest.raises(InputError, match=r"data\.sequence_length: .*at least 3"):
        STPConfig().validate("stp", LETTERS, 10**6, 2)
    (warning,) = config(gate=GateConfig(start_tokens=600_000)).validate("stp", LETTERS, 10**6, 512)
    assert "later than half" in warning
    # Off: what only matters with STP on does not stop a run.
    off = config(weight=0, gate=GateConfig(start_tokens=10**9))
    assert off.validate("stp", LETTERS, 10**6, 2) == []


def test_objective_refuses_an_empty_or_unknown_selection():
    for boundaries in ([], "family:M", [4]):
        with pytest.raises(InputError, match=r"stp\.boundaries"):
            Objective(config(boundaries=boundaries), tuple("AER"))
