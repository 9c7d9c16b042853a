"""Curvature in metrics.jsonl: at its cadence, for every family, and of the states that the step really had."""

import pytest
import torch
from tiny_run import losses, make_place, start

from analysis.curvature import curvature_degrees
from data.prepare import prepare
from data.stream import TrainStream
from errors import InputError
from model.context import SequenceContext
from model.hybrid import HybridLM
from training.config import load_config

NAMES = ("degrees", "stp_consecutive", "state_norm", "step_norm", "effective_rank")
FAMILIES = ("embedding", "A", "M", "E", "R", "final")


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def first_states(config):
    """Boundaries and document ids of the first micro-batch of an untrained model, made anew."""
    data = prepare(config.data)
    model = HybridLM(config.model, data.vocab_size)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    stream = TrainStream(data, config.data.sequence_length, config.train.batch_rows, seed=config.seed)
    batch = stream.batch(0)
    rows = slice(0, config.train.batch_rows // config.train.accumulation)
    ids = batch.document_ids[rows]
    output = model.train()(batch.tokens[rows], SequenceContext.from_document_ids(ids))
    return [*output.hidden_states, output.final], ids


def measured(run_id):
    return {record["step"]: record for record in losses(run_id) if "curvature/degrees/M" in record}


def test_it_is_logged_at_its_cadence_for_every_family(place, monkeypatch):
    start(monkeypatch, "run_id=a")
    records = measured("a")
    assert list(records) == list(range(4, losses("a")[-1]["step"] + 1, 4)) and len(records) > 1
    for record in records.values():
        assert all(record[f"curvature/{name}/{family}"] > 0 for name in NAMES for family in FAMILIES)
    assert len({record["curvature/degrees/R"] for record in records.values()}) == len(records)  # the model moves


def test_it_is_that_of_the_states_of_the_step(place, monkeypatch):
    overrides = ["precision=fp32", "train.curvature_every=1", "train.tokens=200"]
    start(monkeypatch, "run_id=a", "stp.weight=0", *overrides)
    states, ids = first_states(load_config("tiny.yaml", overrides))
    for family, state in zip(FAMILIES, states, strict=True):
        angles = curvature_degrees(state.detach().double(), ids)
        assert measured("a")[1][f"curvature/degrees/{family}"] == pytest.approx(float(angles.nanmean()), abs=1e-3)


def test_measuring_changes_nothing_of_the_run(place, monkeypatch):
    for run_id, every in (("often", 1), ("never", 1000)):
        start(monkeypatch, f"run_id={run_id}", f"train.curvature_every={every}")

    def rest(run_id):
        keys = ("step", "loss/total", "grad_norm", "stp/raw", "val/bits_per_byte")
        return [{key: record.get(key) for key in keys} for record in losses(run_id) if record["step"] % 2 == 0]

    assert rest("often") == rest("never")


def test_a_cadence_below_one_is_refused(place, monkeypatch):
    with pytest.raises(InputError, match=r"^train.curvature_every: "):
        start(monkeypatch, "train.curvature_every=0")
