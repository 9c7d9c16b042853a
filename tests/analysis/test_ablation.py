"""Comparisons, tables, page and SVG of a grid from its rows, against hand-made results."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from analysis.ablation import Outcomes, compare, read_rows
from analysis.ablation_page import page
from analysis.ablation_svg import paired_svg
from analysis.ablation_text import findings, markdown
from analysis.statistics import minimum_detectable_effect
from errors import InputError

NASTY = "</script><b>&\"'"


def outcomes(**changes):
    rows, curves, costs = [], [], []
    noise = [0.01, -0.02, 0.03, 0.0, -0.01]
    for seed in range(5):
        for fraction in (1.0, 0.25):
            for arm in ("none", "good", "placebo", NASTY):
                gain = {"good": 0.1 if fraction == 1 else 0.2, NASTY: 0.0}.get(arm, 0.0)
                wobble = {"good": 0.1, NASTY: 1.0}.get(arm, 0.0) * noise[seed]
                run = {"run_id": f"{arm}-{fraction}-s{seed}", "arm": arm, "train_fraction": fraction, "seed": seed}
                same = f"w{fraction}{seed}" + ("" if arm in ("none", "placebo") else arm)
                value = 0.5 + noise[-seed] + gain + wobble
                numbers = {"exact": value, "curvature/degrees/A": 90.0, "curvature/effective_rank/A": 30.0}
                rows.append({**run, **numbers, "weights_sha256": same})
                curves += [{**run, "tokens": tokens, "val_loss": 3 - tokens / 100} for tokens in (50, 100 + seed)]
                costs.append({**run, "seconds": 10 + seed, "starts": 1})
    settings = [{"arm": arm, "stp.form": "triple"} for arm in ("none", "good", "placebo", NASTY)]
    given = {"name": "g", "question": NASTY, "baseline": "none", "arms": ("none", "good", "placebo", NASTY)}
    given |= {"axes": ("train_fraction",), "metrics": {"exact": "higher"}, "rows": rows, "curves": curves}
    given |= {"placebos": ("placebo",)}
    return Outcomes(**{**given, "costs": costs, "settings": settings, "planned": 40, **changes})


def find(comparisons, arm, kind, where=""):
    return next(c for c in comparisons if c.arm == arm and c.kind == kind and where in c.where)


def test_differences_are_those_of_pairs():
    found = compare(outcomes())
    good = find(found, "good", "point", "0.25")
    assert good.result.n == 5 and good.result.mean == pytest.approx(0.2 + 0.1 * 0.002)
    assert good.verdict("higher") == "better" and good.verdict("lower") == "worse"
    assert good.baseline_mean + good.result.mean == pytest.approx(good.arm_mean)
    assert find(found, NASTY, "point").verdict("higher") == "no difference shown"
    assert find(found, "good", "mean").result.mean == pytest.approx(0.15 + 0.0002)
    assert find(found, "good", "contrast").result.mean == pytest.approx(0.1)


def test_a_placebo_is_identical_only_if_its_weights_are():
    found = compare(outcomes())
    placebo = find(found, "placebo", "point")
    assert placebo.verdict("higher") == "identical, bit for bit" and math.isnan(placebo.p_holm)
    # and takes no part in the correction: two others at two points
    others = [c for c in found if c.kind == "point" and c.arm != "placebo"]
    assert find(found, "good", "point", "0.25").p_holm == pytest.approx(4 * min(c.result.p_t for c in others))


def test_a_placebo_that_is_not_identical_breaks_the_pairs_and_is_said_first():
    """One pair of ten suffices; another arm that differs is an arm."""
    rows = [dict(row) for row in outcomes().rows]
    next(row for row in rows if row["run_id"] == "placebo-0.25-s3")["weights_sha256"] = "other"
    result = outcomes(rows=rows, notes=("a note",))
    found = compare(result)
    broken = find(found, "placebo", "point", "0.25")
    assert broken.verdict("higher") == "NOT IDENTICAL: pairs are broken" and broken.as_row("higher")["p_flip"] == 1.0
    assert find(found, "placebo", "point", "1").verdict("higher") == "identical, bit for bit"
    assert find(found, "placebo", "mean").verdict("higher") == broken.verdict("higher")
    assert "broken" not in find(found, NASTY, "point").verdict("higher")
    first, *others = findings(result, found)
    assert first.startswith("placebo: NOT IDENTICAL: pairs are broken") and "a note" in others
    assert 'class="NOT"' in page(result, found, "x")
    # a run whose weights are not known says nothing, and without a placebo among the arms it is an arm like others
    for row in rows:
        row["weights_sha256"] = row["weights_sha256"] if row["arm"] == "none" else None
    assert not any(c.broken for c in compare(outcomes(rows=rows)))
    assert not any(c.broken for c in compare(outcomes(rows=result.rows, placebos=())))


def test_a_pair_that_was_trained_on_different_data_is_no_pair():
    rows = [{**row, "manifest_sha256": f"m{row['train_fraction']}"} for row in outcomes().rows]
    assert compare(outcomes(rows=rows))  # of different points they may differ
    next(row for row in rows if row["run_id"] == "good-0.25-s3")["manifest_sha256"] = "another"
    with pytest.raises(InputError, match=r"none-0\.25-s3 and good-0\.25-s3 are a pair but .*different data .*another"):
        compare(outcomes(rows=rows))


def test_runs_of_different_code_are_said():
    rows = [{**row, "git": "aaa" if row["seed"] < 3 else "bbb"} for row in outcomes().rows]
    assert not any("code" in line for line in findings(outcomes(), compare(outcomes())))
    (line,) = (line for line in findings(outcomes(rows=rows), compare(outcomes(rows=rows))) if "code" in line)
    assert "2 states of the code (aaa: 24 runs, bbb: 16 runs); in 0 of 10 sets" in line
    next(row for row in rows if row["run_id"] == "good-0.25-s0")["git"] = "aaa+dirty.12345678"
    (line,) = (line for line in findings(outcomes(rows=rows), compare(outcomes(rows=rows))) if "code" in line)
    assert "3 states of the code" in line and "in 1 of 10 sets" in line


def test_what_holm_leaves_detectable_is_what_is_said():
    """Four comparisons of one table take part: the first step asks for 5% / 4."""
    result = outcomes(placebos=())
    found = [c for c in compare(result) if c.kind == "point" and not c.identical]
    assert len(found) == 4
    for comparison in found:
        sd, n = comparison.result.sd, comparison.result.n
        assert comparison.detectable_holm == pytest.approx(minimum_detectable_effect(sd, n, 0.05 / 4))
        assert comparison.detectable_holm > comparison.result.detectable
    open_ones = [c for c in compare(result) if c.verdict("higher") == "no difference shown"]
    (line,) = (line for line in findings(result, compare(result)) if line.startswith("No difference"))
    sizes = [c.detectable_holm for c in open_ones]
    assert f"differences below {min(sizes):.4g} to {max(sizes):.4g} would" in line
    assert "| detectable | detectable (Holm) | verdict |" in markdown(result, compare(result))


def test_pairs_that_are_all_equal_are_no_perfect_precision():
    """Exact match 0 in every run: nothing was seen, and nothing says how much could have been."""
    rows = [{**row, "exact": 0.0} for row in outcomes().rows if row["train_fraction"] == 1]
    result = outcomes(rows=rows)
    good, equal = (find(compare(result), arm, "point") for arm in ("good", "placebo"))
    assert good.verdict("higher") == "no difference shown" and good.result.p_t == 1.0
    assert math.isnan(good.result.low) and math.isnan(good.result.detectable) and math.isnan(good.detectable_holm)
    assert equal.verdict("higher") == "identical, bit for bit"
    (line,) = (line for line in findings(result, compare(result)) if line.startswith("No difference"))
    assert line == (
        "No difference in exact was shown in 2 of 3 comparisons; in 2 of them all pairs differ by one number, so "
        "nothing can be said about what was missed."
    )


def test_unfinished_grids_pair_what_is_there():
    rows = [row for row in outcomes().rows if row["run_id"] not in ("good-0.25-s4", "none-1.0-s3")]
    found = compare(outcomes(rows=rows))
    assert find(found, "good", "point", "0.25").result.n == 4
    assert find(found, "good", "point", "1").result.n == 4
    assert find(found, "good", "mean").result.n == 3
    only = [row for row in rows if row["arm"] == "good"]
    with pytest.raises(InputError, match="no run of arm none is finished"):
        compare(outcomes(rows=only))
    with pytest.raises(InputError, match=r"exakt is no column of the results .did you mean 'exact'"):
        compare(outcomes(metrics={"exakt": "higher"}))


def test_text_says_what_can_be_said():
    result = outcomes(planned=60)
    text = markdown(result, compare(result))
    assert "40 of 60 planned runs" in text and "cannot be below 0.0625" in text
    assert "identical, bit for bit" in text and "difference of differences" in text
    lines = findings(result, compare(result))
    assert any(line.startswith("good, train_fraction 0.25: exact +0.2") for line in lines)
    assert any("placebo ended with the weights of none" in line for line in lines)
    assert sum("No difference in exact was shown in" in line for line in lines) == 1


def test_the_page_holds_everything_and_escapes_what_people_wrote():
    result = outcomes(planned=60)
    text = page(result, compare(result), "python -m scripts.ablate x")
    assert NASTY not in text and text.count("plotly.js v") == 1 and "This grid is not finished" in text
    data = json.loads(re.search(r'id="page-data">(.*?)</script>', text, flags=re.S).group(1))
    figures = {figure["key"]: figure for figure in data["figures"]}
    assert {"paired", "held", "cost", "degrees", "rank"} <= set(figures)
    assert "train" not in figures  # no such records
    dots = figures["paired"]["views"][0]["data"][0]
    assert len(dots["y"]) == 5 * 3  # seeds x (two points and their mean)
    assert len(figures["held"]["views"]) == 2
    names = set(re.findall(r'"@([A-Za-z]+)', json.dumps(data["figures"])))
    assert names <= set(data["colours"])


def test_the_picture_is_well_formed_and_has_a_dot_per_seed():
    result = outcomes()
    tree = ElementTree.fromstring(paired_svg(result, compare(result), "exact"))
    circles = [node for node in tree.iter() if node.tag.endswith("circle")]
    assert len(circles) == 5 * 3 * 3
    assert all(0 <= float(node.get("cx")) <= 860 for node in circles)


def test_rows_come_back_as_they_were_written(tmp_path):
    (tmp_path / "r.csv").write_text("run_id,x,y,git,weights_sha256\na,1,0.5,0123456,12e4567890123456\nb,,nan,,\n")
    rows = read_rows(tmp_path / "r.csv")
    assert rows[0] == {"run_id": "a", "x": 1, "y": 0.5, "git": "0123456", "weights_sha256": "12e4567890123456"}
    assert rows[1]["x"] is None and rows[1]["git"] is None
    assert read_rows(tmp_path / "none.csv") == []


def test_names_stay_names_whatever_they_look_like(tmp_path):
    """An arm may be called by its weight: the grid knows it as text."""
    arms = ("0.02", "0", "1e-3", "nan", "007")
    lines = [f"{arm},{arm},{seed},{seed}" for arm in arms for seed in range(2)]
    (tmp_path / "r.csv").write_text("\n".join(["run_id,arm,seed,exact", *lines]))
    rows = read_rows(tmp_path / "r.csv")
    assert [row["arm"] for row in rows[::2]] == [row["run_id"] for row in rows[::2]] == list(arms)
    found = compare(outcomes(baseline="0", arms=arms, axes=(), rows=rows))
    assert [(c.arm, c.result.n) for c in found] == [(arm, 2) for arm in arms if arm != "0"]
