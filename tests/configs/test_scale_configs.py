"""configs/scale: every one validates, builds without memory, and has the size that its comments promise."""

from collections import Counter
from pathlib import Path

import pytest

from losses.gate import TokenGate
from training.config import load_config
from training.summary import meta_model, parameter_counts

SCALE = Path(__file__).parents[2] / "configs/scale"
# name -> parameters in all, active per token, and the letters of the stack
SIZES = {
    "nam56r_4b": (4_680_401_792, 3_227_075_456, {"A": 13, "M": 13, "E": 22, "R": 4}),
    "hybrid_1b": (1_114_220_416, 595_175_296, {"A": 6, "M": 6, "E": 10, "R": 2}),
    "hybrid_150m": (149_363_416, 78_584_536, {"A": 3, "M": 3, "E": 5, "R": 1}),
}


def loaded(name):
    config = load_config(SCALE / f"{name}.yaml")
    return config, config.validate()


def test_every_scale_config_has_its_size_here():
    assert {path.stem for path in SCALE.glob("*.yaml")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_it_builds_without_memory_and_has_its_size(name):
    config, _ = loaded(name)
    model = meta_model(config, config.data.tokenizer.vocab_size)
    total, active, letters = SIZES[name]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert parameter_counts(model) == {"total": total, "active": active}
    assert Counter(model.letters) == letters


def test_the_size_of_the_large_one_by_hand():
    D, V = 4096, 65536
    a = D * (32 + 2 * 8) * 128 + D * D + 2 * 128  # queries, keys and values; output; two head norms
    inner, conv = 8192, 8192 + 2 * 128
    m = D * (2 * inner + 2 * 128 + 128) + inner * D + 5 * conv + 3 * 128 + inner
    expert = 3 * D * 448
    e = D * 16 + 17 * expert
    conv = D + 2 * 64
    r = D * (2 * D + 2 * 64 + 256) + D * D + 5 * conv + 2 * 256 + D + 256 * 16 * 16 + D
    total = 13 * a + 13 * m + 22 * e + 4 * r + 52 * D + D + 2 * V * D
    assert (total, total - 22 * 12 * expert) == SIZES["nam56r_4b"][:2]


@pytest.mark.parametrize("name", SIZES)
def test_its_rows_split_over_the_gpus_that_it_names(name):
    config, warnings = loaded(name)
    gpus = {"nam56r_4b": 64, "hybrid_1b": 8, "hybrid_150m": 1}[name]
    assert config.train.batch_rows % (gpus * config.train.accumulation) == 0
    assert not [line for line in warnings if "gate" in line]


def test_the_large_one_is_the_published_stack_and_gate():
    config, warnings = loaded("nam56r_4b")
    model = meta_model(config, config.data.tokenizer.vocab_size)
    assert "".join(model.letters) == "AEMEAEMEAEMR" * 4 + "AEME" and config.model.d_model == 4096
    assert (config.model.moe.n_experts, config.model.moe.top_k, config.model.moe.n_shared_experts) == (16, 4, 1)
    assert len(warnings) == 1 and "partial" in warnings[0]
    gate = TokenGate(config.stp.gate, config.stp.weight)
    tokens_per_step = config.train.batch_rows * config.data.sequence_length
    assert gate.start_tokens == 10_000 * 1_048_576 and gate.start_tokens // tokens_per_step == 10_000
    assert gate.full_at_token < config.train.tokens / 2


def test_comments_say_whose_every_value_of_the_large_one_is():
    """In every section, down to the last line."""
    marked = 0
    for line in (SCALE / "nam56r_4b.yaml").read_text().splitlines():
        value, _, comment = line.partition("#")
        if value.strip() and not value.rstrip().endswith(":"):
            marked += 1
            assert comment.strip().startswith(("source", "ours", "yours", "tokenised")), line
    assert marked > 40
