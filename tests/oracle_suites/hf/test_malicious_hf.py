"""A folder of a Hugging Face model by an attacker: no pickle and no code of it is ever executed.

Run in an environment with transformers 5.24: python -m pytest tests/oracle_suites/hf/test_malicious_hf.py
"""

import json
import pickle
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from errors import InputError  # noqa: E402
from scripts.inspect_curvature import hf  # noqa: E402

CODE = "from pathlib import Path\nPath({marker!r}).write_text('code')\n"


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.write_text, (self.marker, "unpickled"))


@pytest.fixture
def armed(tmp_path):
    """A sound model folder, the payload, and the marker that shows that it ran."""
    folder, marker = tmp_path / "model", tmp_path / "executed"
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    payload = pickle.dumps(Payload(marker))
    pickle.loads(payload)
    assert marker.exists(), "it is armed"
    marker.unlink()
    yield folder, payload, marker
    assert not marker.exists()


def read(folder):
    """Both things that the inspector reads. Returns what each was refused with, or None."""
    said = []
    for reader in (lambda: hf.hf_subject(folder, torch.device("cpu")), lambda: hf._tokenizer(folder)):
        try:
            reader()
            said.append(None)
        except InputError as error:
            assert "\n" not in str(error)
            said.append(str(error))
    return said


BESIDE = [
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "adapter_model.bin",
]


def test_pickles_beside_sound_weights_are_not_read(armed):
    folder, payload, _ = armed
    for name in BESIDE:
        (folder / name).write_bytes(payload)
        torch.save({"x": Payload(folder.parent / "executed")}, folder / f"saved-{name}")
    assert read(folder)[0] is None


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_a_pickle(armed, name, kind):
    folder, payload, marker = armed
    (folder / "model.safetensors").unlink()
    if kind == "pickle":
        (folder / name).write_bytes(payload)
    else:
        torch.save({"model.norm.weight": Payload(marker)}, folder / name)
    assert "no *.safetensors" in (said := read(folder)[0]) or "cannot be loaded" in said


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_points_to_a_pickle(armed, index):
    folder, payload, _ = armed
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "evil.bin")}
    (folder / index).write_text(json.dumps(content))
    (folder / "evil.bin").write_bytes(payload)
    said = read(folder)[0]
    assert "only *.safetensors are read" in said if "safetensors" in index else "cannot be loaded" in said


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json"]
)
def test_files_of_a_tokenizer(armed, name):
    folder, payload, _ = armed
    (folder / name).write_bytes(payload)
    weights, tokenizer = read(folder)
    assert weights is None and "tokenizer" in tokenizer


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_json_that_is_a_pickle(armed, name):
    folder, payload, _ = armed
    (folder / name).write_bytes(payload)
    read(folder)


def test_code_of_the_folder_is_not_imported(armed):
    folder, _, marker = armed
    for module in ("evil", "tokenization_evil", "modeling_evil", "configuration_evil"):
        (folder / f"{module}.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    maps = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    for model_type in ("llama", "nobody"):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": maps}))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}})
        )
        weights, tokenizer = read(folder)
        assert tokenizer is not None
        assert (weights is None) == (model_type == "llama")
