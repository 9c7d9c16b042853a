"""A pickle that acts, in place of each file of a corpus, of a tokenizer and of a run: nothing ever executes it."""

import pickle
import shutil
from pathlib import Path

import pytest
from tiny_run import make_place, receipt, start

from data.prepared import open_prepared
from data.shards import Shard
from data.stream import TrainStream
from data.tokenizer import Tokenizer
from errors import InputError
from training.metrics import read_metrics
from training.ownership import read_owner
from training.receipt import read_receipt
from training.weights import load_weights


class Payload:
    def __reduce__(self):
        return (Path.write_text, (Path("executed"), "yes"))


@pytest.fixture
def payload(tmp_path, monkeypatch):
    make_place(tmp_path, monkeypatch)
    payload = pickle.dumps(Payload())
    pickle.loads(payload)
    assert Path("executed").exists(), "it is armed"
    Path("executed").unlink()
    yield payload
    assert not Path("executed").exists()


def test_files_of_a_corpus(payload, monkeypatch):
    start(monkeypatch, "run_id=a", "train.tokens=400", "stp.weight=0")
    data = Path(receipt("a")["data"]["folder"])
    files = sorted(path for path in data.rglob("*") if path.is_file() and path.suffix != ".sha256")
    assert {path.suffix for path in files} == {".bin", ".idx", ".json", ".model"}
    for file in files:
        kept = file.read_bytes()
        # padded too, so that its size is the one that the manifest names: the attacker knows that it is looked at
        for attack in (payload, payload.ljust(len(kept), b"\0")[: max(len(kept), len(payload))]):
            file.write_bytes(attack)
            with pytest.raises(InputError):
                TrainStream(open_prepared(data), 48, 4).batch(0)
                if file.suffix == ".bin" or "validation" in file.name:
                    Shard(file.with_suffix("")).document_starts(0, 3)
                    raise InputError("tokens are numbers: any bytes are some")
        file.write_bytes(kept)
    TrainStream(open_prepared(data), 48, 4).batch(0)


def test_a_foreign_tokenizer_index_and_weights(payload):
    for name in ("t.model", "s.idx", "s.bin", "w.safetensors"):
        Path(name).write_bytes(payload)
    with pytest.raises(InputError, match=r"t\.model"):
        Tokenizer.load("t.model")
    with pytest.raises(InputError, match=r"s\.idx.*MMIDIDX"):
        Shard("s")
    import torch

    with pytest.raises(InputError, match="not a safetensors file"):
        load_weights("w.safetensors", torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["receipt.json", "metrics.jsonl", "owner.json", "launch.json", "config.yaml"])
def test_files_of_a_run(payload, monkeypatch, name):
    from scripts.launch.status import describe

    start(monkeypatch, "run_id=a", "train.tokens=400", "stp.weight=0")
    run = Path("runs/a")
    (run / name).write_bytes(payload)
    assert read_receipt(run) == {} if name == "receipt.json" else read_receipt(run)
    assert read_owner(run) == {}
    read_metrics(run)
    describe(run)
    if name == "config.yaml":
        with pytest.raises(InputError):
            start(monkeypatch, "run_id=a", "train.tokens=400", "stp.weight=0")
    shutil.rmtree(run)


@pytest.mark.parametrize("name", ["apply:pathlib.Path.touch", "new:pathlib.Path.touch", "name:pathlib.Path.touch"])
@pytest.mark.parametrize("reader", ["config", "override", "grid", "status"])
def test_yaml_that_would_call_python(payload, reader, name):
    from scripts.ablate.grid import load_grid
    from scripts.launch.status import describe
    from training.config import load_config

    call = f"!!python/object/{name} [executed]" if "name" not in name else f"!!python/{name}"
    Path("evil.yaml").write_text(f"seed: {call}\n")
    if reader == "status":
        Path("runs/a").mkdir(parents=True)
        Path("evil.yaml").rename("runs/a/config.yaml")
        assert describe(Path("runs/a")).state == "new"
        return
    read = {
        "config": lambda: load_config("evil.yaml"),
        "override": lambda: load_config("tiny.yaml", [f"seed={call}"]),
        "grid": lambda: load_grid(Path("evil.yaml")),
    }[reader]
    with pytest.raises(InputError, match="tag"):
        read()
