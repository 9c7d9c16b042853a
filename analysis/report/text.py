"""The words of the page: what was measured, what stands out, and the guards."""

from __future__ import annotations

import math

from analysis.accumulate import Curve
from analysis.guards import Guard, guards
from analysis.inspection import Inspection
from analysis.report.figure import boundary_label, escape, family_colour, family_name
from analysis.tables import references


def subtitle(inspection: Inspection) -> str:
    """HTML: which model, on which text."""
    subject, data = inspection.subject, inspection.data
    chips = "".join(_chip(number, letter) for number, letter in enumerate(subject.letters, 1))
    trained = "" if subject.tokens is None else f", {subject.tokens:,} training tokens"
    return (
        f'<p class="chips">{chips}</p>'
        f'<p class="muted">{len(subject.letters)} blocks, width {subject.d_model}{trained}. '
        f"Measured on {data['pieces']:,} pieces of {data['documents']:,} {escape(data['source'])} "
        f"({data['tokens']:,} tokens, at most {data['longest']} a piece; the first {_tokens(data['skip_first'])} of "
        "each left out).</p>"
    )


def _tokens(n: int) -> str:
    return "token" if n == 1 else f"{n} tokens"


def _chip(number: int, letter: str) -> str:
    colour, name = f"--c:var(--f-{family_colour(letter)[1:]})", escape(family_name(letter))
    return f'<span class="chip" style="{colour}" title="block {number}: {name}">{escape(letter)}</span>'


def findings(inspection: Inspection) -> list[str]:
    """Sentences (HTML), each with the numbers that it rests on."""
    return [
        _shape(inspection),
        *_against_controls(inspection),
        *_families(inspection),
        *_other_runs(inspection),
        *_stp(inspection),
    ]


def _shape(inspection: Inspection) -> str:
    curve = inspection.model.get("curvature")
    depth = inspection.depth
    body = curve.value[: depth + 1]
    lowest = int(body.argmin())
    label = boundary_label(inspection.subject, lowest)
    move = curve.at([depth]) - curve.at([0])
    word = _verdict(move, "straighter than", "more bent than", "as bent as")
    return (
        f"Paths enter the stack turning by <b>{body[0]:.1f}°</b> a token and leave the last block at "
        f"<b>{body[depth]:.1f}°</b>: {word} the embedding ({_signed(move)}). The straightest boundary is "
        f"{escape(label)} with {body[lowest]:.1f}°. Noise reads {_random(inspection, 'iid'):.0f}°, a random walk "
        f"{_random(inspection, 'walk'):.0f}°."
    )


def _against_controls(inspection: Inspection) -> list[str]:
    depth = inspection.depth
    sentences = []
    curve = inspection.model.get("curvature")
    for name, what, means in (
        ("untrained", "the same stack before training", "training did this, not the architecture"),
        ("shuffled", "the same tokens in a random order", "the order of the text matters to the path"),
    ):
        gap = (curve - inspection.controls[name].get("curvature")).at([depth])
        low, high = (float(end[0]) for end in gap.interval())
        apart = low > 0 or high < 0
        tail = means if apart else "no difference that these documents could show"
        sentences.append(f"After the last block, the path differs from that of {what} by {_signed(gap)}: {tail}.")
    return sentences


def _families(inspection: Inspection) -> list[str]:
    changes = inspection.families("curvature")
    order = sorted(changes, key=lambda letter: float(changes[letter].change.value[0]))
    parts = []
    for letter in order:
        change = changes[letter].change
        word = _verdict(change, "straightens", "bends", "leaves as it is")
        parts.append(
            f"<b style='color:var(--f-{family_colour(letter)[1:]})'>{escape(letter)}</b> {word} ({_signed(change)} a "
            "block)"
        )
    return ["By family: " + "; ".join(parts) + "."]


def _other_runs(inspection: Inspection) -> list[str]:
    sentences = []
    for other in inspection.comparisons:
        if other.about.letters != inspection.subject.letters:
            sentences.append(f"{escape(other.about.name)} has another stack, so only families are compared.")
            continue
        gap = (inspection.model.get("curvature") - other.measured.get("curvature")).at([inspection.depth])
        word = _verdict(gap, "straighter than", "more bent than", "not distinguishable from")
        sentences.append(f"After the last block this model is {word} {escape(other.about.name)} ({_signed(gap)}).")
    return sentences


def _stp(inspection: Inspection) -> list[str]:
    stp = inspection.subject.stp
    if not stp:
        return []
    if not stp.get("weight"):
        return ["This model was trained without STP."]
    live = sum(end - start for start, end in stp.get("live_tokens", []))
    return [
        f"STP was trained with weight {stp['weight']:g} ({escape(str(stp.get('form')))}, "
        f"{escape(str(stp.get('variant')))}) at {len(stp.get('boundaries', []))} boundaries, live for {live:,} "
        "tokens."
    ]


def guard_table(inspection: Inspection) -> str:
    """HTML table of the guards."""
    same = [c.about.name for c in inspection.comparisons if c.about.letters == inspection.subject.letters]
    against = " and ".join(["the untrained twin", *map(escape, same)])
    body = "".join(_guard_row(guard) for guard in guards(inspection.model, *references(inspection)))
    return (
        '<table class="guards"><thead><tr><th></th><th>cheat</th><th>what is read</th><th>value</th><th>limit</th>'
        f"<th>at</th></tr></thead><tbody>{body}</tbody></table><p class='muted'>Worst boundary of each. Ranks are "
        f"compared with {against}. Limits are conventions, far from what healthy models read: a guard says where to "
        "look, not that something is wrong.</p>"
    )


def _guard_row(guard: Guard) -> str:
    word = {"ok": "ok", "look": "look", "none": "n/a"}[guard.state]
    cells = (guard.name, guard.reads, guard.shown, guard.limit, "" if guard.boundary is None else str(guard.boundary))
    columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr class="{guard.state}"><td><span class="state">{word}</span></td>{columns}</tr>'


def cards(inspection: Inspection) -> list[tuple[str, str, str]]:
    """(label, big number, small line)."""
    depth = inspection.depth
    curve, twin = inspection.model.get("curvature"), inspection.controls["untrained"].get("curvature")
    gap = (curve - twin).at([depth])
    rank = inspection.model.get("effective_rank").value[depth]
    states = [guard.state for guard in guards(inspection.model, *references(inspection))]
    look = states.count("look")
    return [
        ("curvature after the last block", f"{curve.value[depth]:.1f}°", f"embedding {curve.value[0]:.1f}°"),
        (
            "against the untrained twin",
            _signed(gap).split(",")[0],
            _verdict(gap, "training straightened", "training bent", "within the noise of these documents"),
        ),
        ("effective rank, last block", f"{rank:.0f}", f"of {inspection.subject.d_model} dimensions"),
        ("guards", "all quiet" if not look else f"{look} to look at", f"{states.count('ok')} of {len(states)} ok"),
    ]


def _random(inspection: Inspection, name: str) -> float:
    return float(inspection.random.get("curvature").value[inspection.random.boundaries.index(name)])


def _verdict(change: Curve, below: str, above: str, neither: str) -> str:
    low, high = (float(end[0]) for end in change.interval())
    if high < 0:
        return below
    return above if low > 0 else neither


def _signed(change: Curve, unit: str = "°") -> str:
    low, high = (float(end[0]) for end in change.interval())
    value = float(change.value[0])
    text = f"{value:+.1f}{unit}" if abs(value) >= 0.95 else f"{value:+.2f}{unit}"
    return f"{text}, 95% {low:+.2f} to {high:+.2f}" if math.isfinite(low) else text
