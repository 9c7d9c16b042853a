"""Curvature metrics the slow way: one document at a time, plain loops over tokens, numpy float64.

Written from the definitions alone; shares no code with analysis/. A document is an array (n, D).
"""

import math

import numpy as np

TOO_SHORT = 1e-6


def steps_of(x):
    """(step, has a direction) for every pair of neighbours."""
    found = []
    for k in range(len(x) - 1):
        v = x[k + 1] - x[k]
        size = max(np.linalg.norm(x[k]), np.linalg.norm(x[k + 1]))
        found.append((v, np.linalg.norm(v) > TOO_SHORT * size))
    return found


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def cosine(a, b):
    return float(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))


def angles(x):
    """[(middle token, degrees)]"""
    found = []
    steps = steps_of(x)
    for k in range(len(steps) - 1):
        (a, a_ok), (b, b_ok) = steps[k], steps[k + 1]
        if a_ok and b_ok:
            found.append((k + 1, math.degrees(math.acos(min(1.0, max(-1.0, cosine(a, b)))))))
    return found


def curvature(x, low=0, high=math.inf):
    return mean(degrees for middle, degrees in angles(x) if low <= middle < high)


def tangent_correlation(x, lag):
    steps = steps_of(x)
    pairs = [(steps[k], steps[k + lag]) for k in range(len(steps) - lag)]
    return mean(cosine(a, b) for (a, a_ok), (b, b_ok) in pairs if a_ok and b_ok)


def stp(x, points):
    """points: (s, r, t) triples, or (a, b) spans against the rest of the document."""
    losses = []
    for point in points:
        if len(point) == 3:
            s, r, t = point
            first, second = x[t] - x[r], x[r] - x[s]
        else:
            a, b = point
            first = x[b] - x[a]
            second = (x[-1] - x[0]) - first
        losses.append(1 - cosine(first, second))
    return mean(losses)


def tube(x, spans):
    """spans: (s, t). Returns mean radius, largest radius, path efficiency."""
    means, largest, chords, efficiency = [], [], [], []
    for s, t in spans:
        chord = x[t] - x[s]
        length = np.linalg.norm(chord)
        if length <= TOO_SHORT * max(np.linalg.norm(x[s]), np.linalg.norm(x[t])):
            continue
        distances = []
        for r in range(s + 1, t):
            relative = x[r] - x[s]
            distances.append(np.linalg.norm(relative - (relative @ chord) / length**2 * chord))
        means.append(mean(distances))
        largest.append(max(distances))
        chords.append(length)
        efficiency.append(length / sum(np.linalg.norm(x[k + 1] - x[k]) for k in range(s, t)))
    if not chords:
        return math.nan, math.nan, math.nan
    return mean(means) / mean(chords), mean(largest) / mean(chords), mean(efficiency)


def forecast(x, m):
    """{kind: ratio}"""
    error = copied = size = spread = moved = 0.0
    centre = x.mean(0)
    for k in range(1, len(x) - m):
        guess = x[k] + m * (x[k] - x[k - 1])
        error += np.sum((guess - x[k + m]) ** 2)
        copied += np.sum((x[k] - x[k + m]) ** 2)
        size += np.sum(x[k + m] ** 2)
        spread += np.sum((x[k + m] - centre) ** 2)
        moved += np.sum((x[k + 1] - x[k]) ** 2)
    if size == 0:
        return dict.fromkeys(("plain", "copy_last", "centred", "transition"), math.nan)
    return {"plain": error / size, "copy_last": copied / size, "centred": error / spread, "transition": error / moved}


def norms(x):
    steps = steps_of(x)
    return (
        mean(np.linalg.norm(state) for state in x),
        mean(np.linalg.norm(v) for v, _ in steps),
        mean(float(not ok) for _, ok in steps),
    )


def rms(x):
    return np.stack([state / math.sqrt(np.mean(state**2) + 1e-12) for state in x])


def effective_rank(rows):
    """Entropy of the singular values of the centred rows themselves."""
    singular = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    share = singular / singular.sum()
    return math.exp(-sum(p * math.log(p) for p in share if p > 0))


def participation_ratio(rows):
    eigenvalues = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    return eigenvalues.sum() ** 2 / (eigenvalues**2).sum()


def anisotropy(documents):
    """Mean cosine over all pairs of tokens of different documents."""
    found = []
    for i in range(len(documents)):
        for j in range(len(documents)):
            if i != j:
                found += [cosine(a, b) for a in documents[i] for b in documents[j]]
    return mean(found)


def mean_direction_energy(rows):
    return float(np.sum(rows.mean(0) ** 2) / np.mean(np.sum(rows**2, 1)))


def position_means(documents, length):
    found = []
    for p in range(length):
        there = [document[p] for document in documents if p < len(document)]
        found.append((np.mean(there, 0) if there else None, len(there)))
    return found


def position_explained_share(documents):
    length = max(map(len, documents))
    means = position_means(documents, length)
    rows = np.concatenate(documents)
    total = np.sum((rows - rows.mean(0)) ** 2)
    residual = sum(np.sum((state - means[p][0]) ** 2) for document in documents for p, state in enumerate(document))
    n, n_positions = len(rows), sum(count > 0 for _, count in means)
    return 1 - (residual / total) * (n - 1) / (n - n_positions)
