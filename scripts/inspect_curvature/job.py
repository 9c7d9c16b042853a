"""The work behind the command: which subjects are measured on what, in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from analysis.inspection import About, Comparison, Inspection
from analysis.measure import MeasureSettings
from analysis.trajectory import Trajectory, project
from errors import InputError
from scripts.inspect_curvature.passes import Advance, measure, measure_random_rows, total_tokens
from scripts.inspect_curvature.pieces import Pieces
from scripts.inspect_curvature.subject import Subject

# Pieces on which the checkpoints of the timeline are measured.
TIMELINE_PIECES = 64
# Tokens of a piece, behind those that are left out: three have one turn.
MIN_STATES = 3


@dataclass(frozen=True)
class Job:
    """What is measured. twin: the untrained model, the control. start: the model before its first step (None: the
    twin). checkpoints: oldest first, each made when its turn comes, so that one is in memory at a time; comparisons
    likewise."""

    subject: Subject
    twin: Callable[[], Subject]
    pieces: Pieces
    settings: MeasureSettings
    skip_first: int = 1
    start: Callable[[], Subject] | None = None
    checkpoints: tuple[Callable[[], Subject], ...] = ()
    comparisons: tuple[Callable[[], Subject], ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""


Stage = Callable[[str, int], Advance]


def run(job: Job, stage: Stage) -> Inspection:
    """stage(name, tokens): announces a pass and returns what is called with the tokens that are done."""
    settings, skip = job.settings, job.skip_first
    pieces = job.pieces.at_least(skip + MIN_STATES)
    whole = total_tokens(pieces)
    subject = job.subject

    def full(name: str, of: Subject, shuffle: bool = False) -> Any:
        return measure(of, pieces, settings, skip_first=skip, shuffle=shuffle, advance=stage(name, whole))

    model = full("model", subject)
    trajectory = _trajectory(subject, pieces)
    controls = {"untrained": full("untrained twin", job.twin()), "shuffled": full("shuffled tokens", subject, True)}
    noise = stage("noise and walks", pieces.n_tokens)
    random = measure_random_rows(pieces, subject.d_model, settings, skip_first=skip, advance=noise)
    comparisons = []
    for make in job.comparisons:
        other = make()
        comparisons.append(Comparison(about(other), full(f"compare {other.name}", other)))
    timeline, left_out = _timeline(job, pieces, stage)
    return Inspection(
        subject=about(subject),
        model=model,
        random=random,
        controls=controls,
        timeline=timeline,
        comparisons=comparisons,
        trajectory=trajectory,
        records=list(job.records),
        data={
            "source": pieces.source,
            "documents": pieces.n_documents,
            "pieces": len(pieces.items),
            "tokens": pieces.n_tokens,
            "longest": pieces.longest,
            "skip_first": skip,
        },
        notes=[*job.notes, *pieces.notes, *subject.notes, *left_out],
        command=job.command,
    )


def about(subject: Subject) -> About:
    return About(
        subject.name,
        subject.letters,
        subject.d_model,
        subject.step,
        subject.tokens,
        subject.trained_length,
        subject.stp,
    )


def check_comparable(subject: Subject, name: str, vocab_size: int, tokenizer_sha256: str | None) -> None:
    """Before anything is measured. Raises InputError: the other model does not read the same tokens."""
    if vocab_size != subject.vocab_size or tokenizer_sha256 != subject.tokenizer_sha256:
        raise InputError(f"--compare: {name} is of another tokenizer than {subject.name}: not the same tokens")


def _timeline(job: Job, pieces: Pieces, stage: Stage) -> tuple[list[tuple[About, Any]], list[str]]:
    """The model before its first step, the kept checkpoints, and the subject, on the same few pieces; and a note for
    each one that cannot be read: the rest is worth showing without it."""
    if not job.checkpoints:
        return [], []
    few = pieces.spread(TIMELINE_PIECES)
    found, notes = [], []
    for make in (job.start or job.twin, *job.checkpoints, lambda: job.subject):
        try:
            subject = make()
        except InputError as error:
            notes.append(f"left out of the timeline: {error}")
            continue
        advance = stage(f"timeline, step {subject.step}", total_tokens(few, calibrate=False))
        measured = measure(subject, few, job.settings, skip_first=job.skip_first, calibrate=False, advance=advance)
        found.append((about(subject), measured))
    return sorted(found, key=lambda entry: entry[0].step or 0), notes


def _trajectory(subject: Subject, pieces: Pieces) -> Trajectory:
    """Of the first piece of a document that is as long as they get."""
    piece = max(pieces.items, key=lambda item: (len(item.tokens), -item.offset))
    tokens = torch.from_numpy(piece.tokens)[None]
    states = subject.forward(tokens, torch.tensor([tokens.shape[1]]))
    ids = piece.tokens.tolist()
    texts = [pieces.decode([i]) if pieces.decode else f"token {i}" for i in ids]
    texts = [text if text else f"<{i}>" for text, i in zip(texts, ids, strict=True)]
    return project([hidden[0] for hidden in states], subject.boundaries, texts)
