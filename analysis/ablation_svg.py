"""The paired dot plot as a plain SVG file, for pages that show pictures only. One file, no script, no fonts."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from analysis.ablation import Comparison, Outcomes, is_number
from analysis.ablation_figures import ARM_COLOURS, arm_colour, seed_differences

WIDTH, ROW, LEFT, RIGHT, TOP, BOTTOM = 860, 22, 300, 24, 56, 40


def paired_svg(outcomes: Outcomes, comparisons: Sequence[Comparison], metric: str) -> str:
    """Rows: where and arm; a dot per seed, mean and Student's 95% interval."""
    mine = [c for c in comparisons if c.metric == metric and c.kind != "contrast"]
    height = TOP + ROW * len(mine) + BOTTOM
    dots = [[value for _, value in seed_differences(outcomes, c)] for c in mine]
    ends = [x for c in mine for x in (c.result.low, c.result.high) if is_number(x)]
    reach = max([abs(x) for x in [*ends, *(d for row in dots for d in row)]] or [1.0]) * 1.08 or 1.0

    def place(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value + reach) / (2 * reach)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(12, 20, f"{outcomes.name}: {metric}, arm minus {outcomes.baseline} of the same seed", size=14),
        _text(12, 38, "dots: seeds; diamond and bar: mean, 95% interval (Student, uncorrected)", colour="#667"),
    ]
    for tick in _ticks(reach):
        x = place(tick)
        dash = "" if tick == 0 else ' stroke-dasharray="2 4"'
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - BOTTOM}" stroke="#99a"{dash}/>')
        parts.append(_text(x, height - BOTTOM + 18, f"{tick:+.3g}" if tick else "0", anchor="middle", colour="#667"))
    for number, (comparison, values) in enumerate(zip(mine, dots)):
        y = TOP + ROW * number + ROW / 2
        colour = ARM_COLOURS[arm_colour(outcomes, comparison.arm)[1:]][0]
        parts.append(_text(LEFT - 10, y + 4, f"{comparison.where}   {comparison.arm}", anchor="end"))
        low, high = comparison.result.low, comparison.result.high
        if is_number(low):
            parts.append(
                f'<line x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{y}" y2="{y}" stroke="{colour}" '
                f'stroke-width="2"/>'
            )
        parts += [f'<circle cx="{place(v):.1f}" cy="{y}" r="3" fill="{colour}" fill-opacity="0.45"/>' for v in values]
        x = place(comparison.result.mean)
        parts.append(
            f'<path d="M{x - 6:.1f} {y}L{x:.1f} {y - 6}L{x + 6:.1f} {y}L{x:.1f} {y + 6}Z" '
            f'fill="{colour}" stroke="#fff"/>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(reach: float) -> list[float]:
    step = 10 ** math.floor(math.log10(reach))
    step = next(s for s in (step, step / 2, step / 5) if reach / s >= 2)
    n = int(reach / step)
    return [round(i * step, 12) for i in range(-n, n + 1)]


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#223", size: int = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}" font-size="{size}">{html.escape(text)}</text>'
