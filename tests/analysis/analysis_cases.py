"""Documents and what several test files read from them."""

import torch

from analysis.measure import Measurement, MeasureSettings
from analysis.paths import Path
from analysis.positions import PositionMeans

LENGTHS = (4, 70, 33, 5, 120, 12, 90, 28, 64, 41, 7, 100)


def documents(dtype=torch.float32, d_model=12, seed=0):
    """Random walks with noise and a shared mean, of all sorts of lengths; one stands still for a step."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in LENGTHS:
        walk = torch.randn(n, d_model, generator=generator, dtype=torch.float64).cumsum(0)
        noise = torch.randn(n, d_model, generator=generator, dtype=torch.float64)
        found.append(0.3 * walk + noise + 1.5)
    found[1][20] = found[1][19]
    return [document.to(dtype) for document in found]


def pad(rows):
    """(N, T, D) and lengths (N,); what pads is garbage that must not be read."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.full((len(rows), int(lengths.max()), rows[0].shape[1]), 1e3, dtype=rows[0].dtype)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded, lengths


def measure(boundaries, names=None, centred=True, **settings):
    """boundaries: lists of documents, one per boundary, each a list of (n, D). One batch, one document a row."""
    padded = [pad(rows)[0] for rows in boundaries]
    lengths = pad(boundaries[0])[1]
    names = names or list(range(len(boundaries)))
    T, D = padded[0].shape[1:]
    means = None
    runs = torch.where(torch.arange(T) < lengths[:, None], 0, -1)
    if centred:
        means = []
        for states in padded:
            sums = PositionMeans(T, D)
            sums.update(Path(states.float(), runs))
            means.append(sums.means())
    measurement = Measurement(names, D, T, MeasureSettings(**settings), means)
    measurement.update(padded, lengths, torch.arange(len(lengths)))
    return measurement.result()
