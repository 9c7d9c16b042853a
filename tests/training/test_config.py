"""Every shipped config parses and validates; bad input is one line that names the key and the nearest valid one."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from errors import InputError
from training.config import RunConfig, differing_keys, load_config, merge

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/demo.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = load_config(path)
    config.validate()
    assert load_config(path).sha256 == config.sha256


def test_overrides_are_typed_and_change_the_identity():
    base, other = (
        load_config(DEMO),
        load_config(DEMO, ["stp.weight=0.05", "model.pattern=AMEMR", "train.tokens=5000000"]),
    )
    assert (other.stp.weight, other.model.pattern, other.train.tokens) == (0.05, "AMEMR", 5_000_000)
    assert base.sha256 != other.sha256
    assert differing_keys(base, other) == ["model.pattern", "stp.weight", "train.tokens"]
    assert load_config(DEMO, ["run_id=x", "resume=never"]).sha256 == base.sha256


def test_the_merged_config_round_trips(tmp_path):
    config = load_config(DEMO, ["optimizer.learning_rate=1e-3", "stp.boundaries=[last,'entering:M',3]"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert differing_keys(load_config(tmp_path / "config.yaml"), config) == []


def refused(*overrides):
    with pytest.raises(InputError) as caught:
        load_config(DEMO, overrides).validate()
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD = {
    "stp.wieght=0.1": ["stp.wieght", "stp.weight"],
    "weight=0.1": ["weight", "stp.weight"],
    "model.d_modle=64": ["model.d_modle", "model.d_model"],
    "stp=0.1": ["stp", "section"],
    "stp.weight": ["key=value"],
    "stp.weight=heavy": ["stp.weight", "heavy"],
    "train.tokens=1.5": ["train.tokens"],
    "model.pattern=AMXR": ["model.pattern", "position 3", "A (attention)"],
    "model.pattern=''": ["model.pattern"],
    "model.depth=0": ["model.depth"],
    "model.d_model=190": ["d_model", "n_heads"],
    "data.source=installed_pyhton": ["data.source", "installed_python"],
    "data.sequence_length=2": ["data.sequence_length", "3"],
    "stp.gate.start_tokens=2000000": ["stp.gate.start_tokens", "1,600,000"],
    "stp.gate.start_tokens=-1": ["stp.gate.start_tokens"],
    "stp.boundaries=[]": ["stp.boundaries", "empty list"],
    "stp.boundaries=['family:X']": ["stp.boundaries", "family"],
    "stp.boundaries=[13]": ["stp.boundaries", "13"],
    "stp.weight=nan": ["stp.weight", "finite"],
    "stp.weight=-0.1": ["stp.weight", "negative"],
    "optimizer.learning_rate=inf": ["optimizer.learning_rate"],
    "optimizer.learning_rate=-1": ["optimizer.learning_rate"],
    "train.accumulation=3": ["train.accumulation", "8 rows"],
    "train.batch_rows=0": ["train.batch_rows"],
    "device=gpu": ["device", "cuda"],
    "wandb.mode=of": ["wandb.mode", "offline"],
    "checkpoint.keep_last=1": ["checkpoint.keep_last", "2"],
    "model.moe.top_k=9": ["model.moe.top_k", "8"],
}


@pytest.mark.parametrize("override", BAD)
def test_bad_values_name_the_key_and_what_was_expected(override):
    message = refused(override)
    for part in BAD[override]:
        assert part in message, message


def test_a_family_that_the_stack_lacks():
    assert "no R block" in refused("model.pattern=AEM", "stp.boundaries=['family:R']")


def test_steps_alone_do_not_open_a_gate():
    message = refused("stp.gate.start_tokens=null", "stp.gate.start_steps=10")
    assert "reference_tokens_per_step" in message


def test_partial_tiles_and_late_gates_are_announced():
    warnings = load_config(DEMO, ["model.depth=14", "stp.gate.start_tokens=1200000"]).validate()
    assert any("partial" in w for w in warnings) and any("later than half" in w for w in warnings)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match=r"no such config file \(did you mean .*demo.yaml"):
        load_config(ROOT / "configs/dmeo.yaml")
    cases = {
        "a: [": "not a YAML file",
        "- 1\n- 2": "keys and values",
        "model: 3": "model",
        "stp:\n  wait: 1": "stp.wait",
        "checkpoint: ${seed}": "checkpoint: Interpolation key .seed. not found",
    }
    for text, part in cases.items():
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(InputError, match=part) as caught:
            load_config(path)
        assert "bad.yaml" in str(caught.value)


KEYS = [
    "stp.weight",
    "model.pattern",
    "data.path",
    "train.tokens",
    "stp.gate",
    "stp.boundaries",
    "model.moe.top_k",
    "x",
]


@given(st.sampled_from(KEYS), st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12))
@example("stp.weight", "\x1f\n")
@settings(max_examples=50, deadline=None)
def test_no_override_ever_ends_in_anything_but_a_config_or_one_line(key, value):
    try:
        merge(RunConfig(), [f"{key}={value}"]).validate()
    except InputError as error:
        assert str(error) and "\n" not in str(error)
