"""What a person sees before compute is spent."""

from tiny_run import ROOT

from training.config import load_config
from training.summary import activation_bytes, meta_model


def test_tying_the_head_changes_no_activation():
    """Embedding and head are one tensor then: taken off twice, half the stack was gone."""
    found = []
    for head in ("tied", "untied"):
        config = load_config(ROOT / "configs" / "demo.yaml", [f"model.head={head}"])
        found.append(activation_bytes(config, meta_model(config, config.data.tokenizer.vocab_size)))
    assert found[0] == found[1] > 0
