"""A grid's results as Markdown: means per arm, paired comparisons, verdicts, and the power that is left."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from analysis.ablation import BROKEN, MIN_PAIRS, Comparison, Outcomes, is_number, number
from analysis.statistics import smallest_sign_flip_p

KINDS = {
    "point": "Arm minus baseline of the same seed",
    "mean": "Mean over all points per seed, arm minus baseline",
    "contrast": "Does the effect change from the first point to the last? (difference of differences)",
}


def markdown(outcomes: Outcomes, comparisons: Sequence[Comparison]) -> str:
    planned = f" of {outcomes.planned} planned" if outcomes.planned else ""
    seeds = ", ".join(map(str, outcomes.seeds))
    parts = [f"{len(outcomes.rows)}{planned} runs are finished; seeds {seeds}; baseline `{outcomes.baseline}`."]
    parts.append("\n".join(f"- {sentence}" for sentence in findings(outcomes, comparisons)))
    parts.append("What differs between the arms:\n\n" + table(outcomes.settings))
    for metric, direction in outcomes.metrics.items():
        mine = [comparison for comparison in comparisons if comparison.metric == metric]
        parts.append(
            f"### `{metric}` ({direction} is better)\n\nMean over the seeds that every arm has there, and their "
            f"standard deviation:\n\n" + means_table(outcomes, metric)
        )
        for kind, title in KINDS.items():
            rows = [comparison_row(c, direction) for c in mine if c.kind == kind]
            if rows:
                parts.append(f"{title}:\n\n" + table(rows))
    if guards := guards_table(outcomes):
        parts.append(
            "### Curvature and collapse\n\nStates after the final norm on a few held-out rows, means over points "
            "and seeds that all these arms share (degrees: 90 random walk, 120 no coherence; effective rank: of 128 "
            "tokens):"
            f"\n\n{guards}"
        )
    n = max((c.result.n for c in comparisons), default=0)
    smallest = f"{smallest_sign_flip_p(n):.3g}"
    parts.append(
        f"95% intervals and p values are Student's (paired); Holm corrects them over all comparisons of one table. The "
        f"sign-flip test needs no normal distribution, but with {n} pairs it cannot be below {smallest}. Detectable: "
        f"the true difference that this number of seeds would find with 80% probability at 5%, without the correction; "
        f"detectable (Holm): at 5% divided by the number of comparisons in the table, Holm's first step. "
        f"A verdict needs {MIN_PAIRS} pairs and p (Holm) below 0.05; no difference shown does not mean no difference. "
        f"Seeds are the only thing that varies: nothing here speaks of other data, sizes or schedules."
    )
    return "\n\n".join(parts) + "\n"


def means_table(outcomes: Outcomes, metric: str) -> str:
    """Of seeds that all arms share at a point: means over different seeds would differ by the seeds."""
    found = {(arm, point): outcomes.values(metric, arm, point) for arm in outcomes.arms for point in outcomes.points}
    rows = []
    for arm in outcomes.arms:
        row: dict[str, Any] = {"arm": f"`{arm}`"}
        for point in outcomes.points:
            present = [set(found[other, point]) for other in outcomes.arms if found[other, point]]
            values = [value for seed, value in found[arm, point].items() if all(seed in seeds for seeds in present)]
            spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
            row[outcomes.label(point)] = f"{short(statistics.mean(values))}{spread} (n={len(values)})" if values else ""
        rows.append(row)
    return table(rows)


def guards_table(outcomes: Outcomes) -> str:
    """Curvature and collapse of the final states, means over the (point, seed) that all arms but partial ones share."""
    columns = {name: f"curvature/{name}/final" for name in ("degrees", "step_norm", "state_norm", "effective_rank")}
    keys: dict[str, dict[Any, dict[str, Any]]] = {}
    for row in outcomes.rows:
        point = tuple(row[name] for name in outcomes.axes)
        if all(is_number(row.get(column)) for column in columns.values()):
            keys.setdefault(row["arm"], {})[point, row["seed"]] = row
    full = {arm: rows for arm, rows in keys.items() if len({point for point, _ in rows}) == len(outcomes.points)}
    if not full:
        return ""
    shared = [key for key in next(iter(full.values())) if all(key in rows for rows in full.values())]
    lines = []
    for arm in outcomes.arms:
        if arm in full and shared:
            means = {n: statistics.mean(full[arm][key][c] for key in shared) for n, c in columns.items()}
            lines.append(
                {"arm": f"`{arm}`", "runs": len(shared), **{name: short(mean) for name, mean in means.items()}}
            )
    return table(lines) if lines else ""


def comparison_row(comparison: Comparison, direction: str) -> dict[str, Any]:
    result = comparison.result
    interval = f"{signed(result.low)} .. {signed(result.high)}" if is_number(result.low) else ""
    return {
        "where": comparison.where,
        "arm": f"`{comparison.arm}`",
        "pairs": result.n,
        "difference": signed(result.mean),
        "95% interval": interval,
        "p": p_text(result.p_t),
        "p (Holm)": p_text(comparison.p_holm),
        "p (sign flips)": p_text(result.p_flip),
        "detectable": short(result.detectable),
        "detectable (Holm)": short(comparison.detectable_holm),
        "verdict": comparison.verdict(direction),
    }


def findings(outcomes: Outcomes, comparisons: Sequence[Comparison]) -> list[str]:
    """Sentences for the top of the page: what makes the rest worthless, what was shown by the primary metric, and what
    could not have been."""
    primary, direction = next(iter(outcomes.metrics.items()))
    mine = [c for c in comparisons if c.metric == primary]
    found = [
        f"{arm}: {BROKEN}. Its STP term sends no gradient, yet its weights are not those of {outcomes.baseline}: runs "
        f"of one seed differ by more than their arms, and no difference below can be trusted."
        for arm in dict.fromkeys(c.arm for c in comparisons if c.broken)
    ]
    found += [*_code(outcomes), *outcomes.notes]
    for comparison in mine:
        verdict = comparison.verdict(direction)
        if verdict in ("better", "worse"):
            result = comparison.result
            interval = f"95% {signed(result.low)} .. {signed(result.high)}, {result.n} pairs"
            found.append(
                f"{comparison.arm}, {comparison.where}: {primary} {signed(result.mean)} ({interval}): {verdict}."
            )
    open_ones = [c for c in mine if c.verdict(direction) == "no difference shown"]
    if open_ones:
        sizes = [c.detectable_holm for c in open_ones if is_number(c.detectable_holm)]
        missed = (
            f"; true differences below {short(min(sizes))} to {short(max(sizes))} would mostly have been missed"
            if sizes
            else ""
        )
        if unknown := len(open_ones) - len(sizes):
            missed += (
                f"; in {unknown} of them all pairs differ by one number, so nothing can be said about what was missed"
            )
        found.append(f"No difference in {primary} was shown in {len(open_ones)} of {len(mine)} comparisons{missed}.")
    few = [c for c in mine if c.verdict(direction).startswith("no verdict")]
    if few:
        sizes = [abs(c.result.mean) for c in few]
        found.append(
            f"{len(few)} of {len(mine)} comparisons have fewer than {MIN_PAIRS} pairs, too few for a verdict; their "
            f"differences in {primary} are between {short(min(sizes))} and {short(max(sizes))} in size."
        )
    for arm in dict.fromkeys(c.arm for c in mine if c.identical):
        found.append(f"{arm} ended with the weights of {outcomes.baseline}, bit for bit, in every pair.")
    return found or ["No pair is finished."]


def _code(outcomes: Outcomes) -> list[str]:
    """Said where not all runs came from the same code."""
    states = Counter(str(row["git"]) for row in outcomes.rows if row.get("git"))
    if len(states) < 2:
        return []
    families = outcomes.families.values()
    mixed = sum(len({row["git"] for row in rows if row.get("git")}) > 1 for rows in families)
    listed = ", ".join(f"{state}: {n} runs" for state, n in states.most_common(4))
    more = f" and {len(states) - 4} more" if len(states) > 4 else ""
    return [
        f"Runs come from {len(states)} states of the code ({listed}{more}); in {mixed} of {len(families)} sets of runs "
        f"that are compared (same seed and point) they are mixed, so differences there need not be the arms' alone."
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """GitHub Markdown; every row has the keys of the first."""
    if not rows:
        return "(none)"
    lines = [list(map(str, rows[0])), ["---"] * len(rows[0])]
    lines += [[number(row.get(name)).replace("|", "\\|") for name in rows[0]] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed(value: float) -> str:
    return "" if not is_number(value) else f"{value:+.3g}" if abs(value) > 1e-12 else "0"


def short(value: float) -> str:
    return f"{value:.4g}" if is_number(value) else ""


def p_text(p: float) -> str:
    return "" if math.isnan(p) else f"{p:.2g}" if p >= 0.001 else "< 0.001"
