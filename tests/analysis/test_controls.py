"""Controls: shuffles and random rows are functions of the document, and read what they should."""

import torch
from analysis_cases import measure

from analysis.controls import random_rows, shuffle_tokens


def test_shuffles_keep_the_words_of_each_document_and_its_padding():
    tokens = torch.arange(40).view(2, 20)
    lengths, index = torch.tensor([20, 13]), torch.tensor([5, 9])
    found = shuffle_tokens(tokens, lengths, index, 0)
    assert not torch.equal(found, tokens)
    assert found[0].sort().values.tolist() == tokens[0].tolist()
    assert found[1, :13].sort().values.tolist() == tokens[1, :13].tolist() and torch.equal(
        found[1, 13:], tokens[1, 13:]
    )
    alone = shuffle_tokens(tokens[1:], lengths[1:], index[1:], 0)
    assert torch.equal(alone[0], found[1])
    assert not torch.equal(shuffle_tokens(tokens, lengths, index, 1), found)


def test_random_rows_read_their_table():
    lengths, index = torch.full((24,), 150), torch.arange(24)
    iid, walk = random_rows(lengths, index, 150, 192, 0)
    assert torch.equal(random_rows(lengths[3:4], index[3:4], 150, 192, 0)[0][0], iid[3])
    found = measure([list(iid), list(walk)], ["iid", "walk"], centred=False)
    for metric, noise, brown, tolerance in (
        ("curvature", 120, 90, 0.3),
        ("stp_triple", 1.5, 1.0, 0.03),
        ("stp_consecutive", 1.5, 1.0, 0.01),
        ("tangent_correlation_1", -0.5, 0.0, 0.01),
        ("tangent_correlation_2", 0.0, 0.0, 0.01),
        ("tube_radius_mean_25-64", 0.866, 0.41, 0.03),
        ("forecast_transition_1", 3.0, 2.0, 0.03),
    ):
        values = found.get(metric).value
        assert abs(values[0] - noise) < tolerance and abs(values[1] - brown) < tolerance, (metric, values)
