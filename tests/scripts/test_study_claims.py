"""What the pages of the studies say in words holds for the committed rows: each sentence with a figure has its line."""

from pathlib import Path

import pytest

from analysis.ablation import compare
from scripts.ablate.grid import load_grid
from scripts.ablate.report import load_outcomes

ROOT = Path(__file__).parents[2]
FORMS = ("triple", "patch_complement", "consecutive")


def study(monkeypatch, grid, name):
    """(outcomes, {(metric, kind, arm): its comparisons})"""
    monkeypatch.chdir(ROOT)
    outcomes = load_outcomes(load_grid(f"configs/ablations/{grid}.yaml"), Path("docs/results") / name)
    found = {}
    for comparison in compare(outcomes):
        found.setdefault((comparison.metric, comparison.kind, comparison.arm), []).append(comparison)
    return outcomes, found


def farthest(comparisons):
    return max(max(-c.result.low, c.result.high) for c in comparisons)


def spread(outcomes, metric, arm, point):
    values = outcomes.values(metric, arm, point).values()
    return max(values) - min(values)


@pytest.fixture
def nlrx(monkeypatch):
    return study(monkeypatch, "nlrx_data_efficiency", "nlrx")


def test_nlrx_accuracy(nlrx):
    outcomes, found = nlrx
    assert len(outcomes.rows) == outcomes.planned == 65
    for form in FORMS:
        verdicts = {c.verdict("higher") for kind in ("point", "mean", "contrast") for c in found["exact", kind, form]}
        assert verdicts == {"no difference shown"}
        assert farthest(found["exact", "point", form]) < 0.02 and farthest(found["exact", "mean", form]) < 0.01
        assert farthest(found["dfa", "point", form]) < 0.03
        assert 0.009 < found["exact", "mean", form][0].detectable_holm < 0.0125
        assert all(0.014 < c.detectable_holm < 0.045 for c in found["exact", "point", form])
        (growth,) = found["exact", "contrast", form]
        assert -0.0121 < growth.result.mean < 0 and growth.result.high < 0.023
    assert all(spread(outcomes, "exact", "none", point) > 0.09 for point in outcomes.points)
    assert {c.verdict("higher") for c in found["exact", "point", "placebo"]} == {"identical, bit for bit"}


def test_nlrx_the_hint(nlrx):
    _, found = nlrx
    (hint,) = found["val_bits_per_byte", "mean", "patch_complement"]
    assert hint.result.wins == 0 and hint.result.high < 0 and hint.p_holm > 0.05
    assert 0.015 < -hint.result.mean / hint.baseline_mean < 0.025


def test_nlrx_geometry(nlrx):
    outcomes, _ = nlrx

    def mean(arm, metric):
        name = f"curvature/{metric}/final"
        values = [row[name] for row in outcomes.rows if row["arm"] == arm]
        return sum(values) / len(values)

    for form in FORMS:
        assert mean(form, "step_norm") < mean("none", "step_norm")
        assert mean(form, "effective_rank") < mean("none", "effective_rank")
    assert 9.5 < mean("none", "degrees") - mean("consecutive", "degrees") < 10.5


def test_pretraining(monkeypatch):
    outcomes, found = study(monkeypatch, "pretraining", "pretraining")
    assert len(outcomes.rows) == outcomes.planned == 45
    every = {arm: c for (metric, kind, arm), (c,) in found.items() if metric == "val_bits_per_byte" and kind == "point"}
    assert len(every) == 8 and all(c.result.mean > 0 for c in every.values())
    strong, last = every.pop("all_w0.5"), every["last"]
    for comparison in every.values():
        assert (
            comparison.result.mean < 0.0005 and comparison.result.low > -0.0003 and comparison.detectable_holm < 0.0011
        )
    assert strong.verdict("lower") == last.verdict("lower") == "worse"
    assert strong.result.wins == last.result.wins == 1
    assert strong.result.mean == pytest.approx(0.013, abs=5e-4)
    assert strong.result.mean / strong.baseline_mean == pytest.approx(0.006, abs=5e-4)
    assert last.result.mean == pytest.approx(0.0005, abs=5e-5)
    others = {arm: c.verdict("lower") for arm, c in every.items() if arm != "last"}
    assert set(others.values()) == {"no difference shown"}
    ends = {row["run_id"]: row["stp/raw"] for row in outcomes.curves if row["stp/raw"] is not None}
    assert len(ends) == 40 and min(ends.values()) > 1.40 and max(ends.values()) < 1.56
    assert all(2.28 < row["val_bits_per_byte"] < 2.33 and row["unigram_bits_per_byte"] > 2.70 for row in outcomes.rows)
