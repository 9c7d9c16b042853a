from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data.config import DataConfig, TokenizerConfig
from errors import InputError
from training.config import RunConfig, merge


def config(**values: Any) -> DataConfig:
    return DataConfig(**values)


def test_defaults_are_valid_and_name_the_installed_source() -> None:
    DataConfig().validate("data")
    assert [(s.source, s.paths, s.weight) for s in DataConfig().corpora()] == [("installed_python", (), 1.0)]


def test_a_path_alone_selects_files() -> None:
    for path, paths in (("my/*.txt", ("my/*.txt",)), (["a.txt", "b"], ("a.txt", "b"))):
        (spec,) = config(path=path).corpora()
        assert (spec.source, spec.paths) == ("files", paths)
    (spec,) = config(source="megatron", path="x").corpora()
    assert spec.source == "megatron"


def test_mixture_weights_are_normalised_and_zeros_left_out() -> None:
    specs = config(
        mixture={"installed_python": 3, "files:a/*.txt": 1, "huggingface:org/name:subset": 0, "files": 4}, path="b"
    ).corpora()
    assert [(s.label, s.weight) for s in specs] == [
        ("installed_python", 0.375),
        ("files:a/*.txt", 0.125),
        ("files:b", 0.5),
    ]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"source": "instaled_python"},
            r"^data.source: unknown value 'instaled_python' \(did you mean 'installed_pyth",
        ),
        ({"path": ""}, r"^data.path: is empty"),
        ({"path": "  "}, r"^data.path: is empty"),
        ({"path": []}, r"^data.path: is empty"),
        ({"path": ["a", ""]}, r"^data.path: is empty"),
        ({"path": 3}, r"^data.path: expected a string or a list of strings, got 3"),
        ({"path": ["a", 3]}, r"^data.path: expected a string or a list"),
        ({"source": "files"}, r"^data.path: is missing; source files needs it"),
        ({"source": "megatron"}, r"^data.path: is missing"),
        ({"source": "installed_cpp", "path": "x"}, r"^data.source: source installed_cpp takes no path"),
        ({"mixture": {"installed_python": 1, "instaled_cpp": 1}}, r"^data.mixture.instaled_cpp: .*'installed_cpp'"),
        ({"mixture": {"installed_python": -1, "installed_cpp": 2}}, r"^data.mixture.installed_python: .*at least 0"),
        ({"mixture": {"installed_python": math.nan}}, r"^data.mixture.installed_python: expected a finite"),
        ({"mixture": {"installed_python": math.inf}}, r"^data.mixture.installed_python: expected a finite"),
        ({"mixture": {"installed_python": 0, "installed_cpp": 0.0}}, r"^data.mixture: the weights sum to 0"),
        ({"mixture": {"files": 1.0}}, r"^data.path: is missing"),
        ({"mixture": {"installed_python": 1.0}, "path": "x"}, r"^data.path: no corpus of data.mixture takes it"),
        (
            {"mixture": {"files:a/*": {"txt": 0.3}}},
            r"^data.mixture.files:a/\*: expected a share \(a number\), got {'txt'",
        ),
        ({"mixture": {"installed_python": None}}, r"^data.mixture.installed_python: expected a share"),
        ({"sequence_length": 1}, r"^data.sequence_length: .*at least 2, got 1"),
        ({"validation_fraction": 0.0}, r"^data.validation_fraction: .*above 0"),
        ({"validation_fraction": 0.6}, r"^data.validation_fraction: .*at most 0.5"),
        ({"validation_fraction": math.nan}, r"^data.validation_fraction: "),
        ({"text_field": ""}, r"^data.text_field: is empty"),
        ({"tokenizer": TokenizerConfig(vocab_size=100)}, r"^data.tokenizer.vocab_size: .*at least 260"),
        ({"tokenizer": TokenizerConfig(vocab_size=-5)}, r"^data.tokenizer.vocab_size: "),
        ({"tokenizer": TokenizerConfig(sample_bytes=0)}, r"^data.tokenizer.sample_bytes: "),
        ({"tokenizer": TokenizerConfig(path="")}, r"^data.tokenizer.path: is empty"),
        ({"source": "megatron", "path": "x"}, r"^data.tokenizer.path: is missing; a megatron corpus needs the senten"),
        ({"mixture": {"installed_cpp": 1, "megatron:x": 1}}, r"^data.tokenizer.path: is missing; a megatron corpus"),
    ],
)
def test_bad_values_are_one_line_with_their_key(values: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line) as error:
        config(**values).validate("data")
    assert "\n" not in str(error.value)


def test_the_mixture_of_the_readme_is_one() -> None:
    """As it is written there, in YAML and as an override."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = (part for part in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "mixture:" in part)
    (override,) = re.findall(r"`(data\.mixture='\{.*?\}')`", readme.replace("\n", " "))
    from_yaml = merge(OmegaConf.create(block), []).data
    assert [spec.label for spec in from_yaml.corpora()] == ["installed_python", "files:my_texts/*.txt"]
    assert merge(RunConfig(), shlex.split(override)).data == from_yaml
    from_yaml.validate()


def test_it_is_an_omegaconf_structure() -> None:
    schema = OmegaConf.structured(DataConfig)
    dots = OmegaConf.from_dotlist(
        ["path=a/*.txt", "mixture={files: 0.7, installed_cpp: 0.3}", "tokenizer.vocab_size=512", "sequence_length=64"]
    )
    merged = OmegaConf.to_object(OmegaConf.merge(schema, dots))
    assert isinstance(merged, DataConfig)
    merged.validate("data")
    assert [spec.label for spec in merged.corpora()] == ["files:a/*.txt", "installed_cpp"]
    listed = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.from_dotlist(["path=[a, b/*.txt]"])))
    assert isinstance(listed, DataConfig) and listed.paths() == ("a", "b/*.txt")
