"""The curvature inspector on small random models of many architectures: families, boundaries, and the whole command.

Run in an environment with transformers 5.24 (and plotly, pyarrow, omegaconf, sentencepiece):
    python -m pytest tests/oracle_suites/hf/test_curvature_hf.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from scripts.inspect_curvature.hf import find_layers, hf_states, hf_subject, hf_twin  # noqa: E402

ROOT = Path(__file__).parents[3]
SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16, mamba_expand=2)
CASES = {
    "nemotron_h": (
        "NemotronHConfig",
        dict(
            hybrid_override_pattern="ME*-",
            head_dim=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=1,
            chunk_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16,
            n_group=1,
            topk_group=1,
            n_shared_experts=1,
        ),
        ["M", "E", "A", "F"],
    ),
    "bamba": ("BambaConfig", dict(num_hidden_layers=3, attn_layer_indices=[1], **MAMBA), ["M+F", "A+F", "M+F"]),
    "zamba2": (
        "Zamba2Config",
        dict(
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            hybrid_layer_ids=[1, 3],
            n_mamba_heads=4,
            mamba_headdim=16,
            mamba_d_state=8,
            mamba_ngroups=1,
            chunk_size=16,
            num_mem_blocks=1,
            use_mem_rope=False,
            adapter_rank=4,
        ),
        ["M", "A+F+M", "M", "A+F+M"],
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        dict(
            num_hidden_layers=3,
            layer_types=["mamba", "attention", "mamba"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=16,
            **MAMBA,
        ),
        ["M+E", "A+E", "M+E"],
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        dict(
            num_hidden_layers=4,
            head_dim=8,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        ["R+E", "R+E", "R+E", "A+E"],
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        dict(num_hidden_layers=3, lru_width=32, head_dim=8, attention_window_size=16),
        ["R+F", "R+F", "A+F"],
    ),
    "mixtral": ("MixtralConfig", dict(num_hidden_layers=2, num_local_experts=4), ["A+E", "A+E"]),
    "llama": ("LlamaConfig", dict(num_hidden_layers=2), ["A+F", "A+F"]),
}


def build(name, folder, seed=0):
    class_name, more, families = CASES[name]
    kind = getattr(transformers, class_name)
    config = kind(**{**SMALL, **more})
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return families


@pytest.mark.parametrize("name", CASES)
def test_families_and_boundaries(name, tmp_path):
    """Letters as the architecture says; states equal to the model's own output_hidden_states, the last one pre-norm."""
    families = build(name, tmp_path)
    subject = hf_subject(tmp_path, torch.device("cpu"))
    assert subject.letters == families
    tokens, lengths = torch.randint(0, 97, (2, 40)), torch.tensor([40, 23])
    states = subject.forward(tokens, lengths)
    assert len(states) == len(families) + 2 and all(h.shape == (2, 40, 32) and h.dtype == torch.float32 for h in states)

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        own = model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states[: len(families)], own[: len(families)]):
        assert torch.equal(ours, theirs)
    assert torch.equal(states[-1], own[-1])
    assert not torch.equal(states[-2], states[-1])  # the last block's output is not the normed state

    # end padding is not seen by what comes before it
    shorter = subject.forward(tokens[1:, :23], lengths[1:])
    for whole, alone in zip(states, shorter):
        torch.testing.assert_close(whole[1:, :23], alone, rtol=1e-4, atol=1e-5)


def test_the_twin_is_another_draw_and_leaves_the_random_state_alone(tmp_path):
    build("llama", tmp_path)
    before = torch.random.get_rng_state()
    twin = hf_twin(tmp_path, torch.device("cpu"), 7)
    assert torch.equal(torch.random.get_rng_state(), before)
    tokens, lengths = torch.randint(0, 97, (1, 12)), torch.tensor([12])
    again = hf_twin(tmp_path, torch.device("cpu"), 7)
    assert torch.equal(twin.forward(tokens, lengths)[-1], again.forward(tokens, lengths)[-1])
    trained = hf_subject(tmp_path, torch.device("cpu"))
    assert not torch.equal(twin.forward(tokens, lengths)[-1], trained.forward(tokens, lengths)[-1])


def run(*arguments, cwd):
    command = [sys.executable, "-m", "scripts.inspect_curvature", *map(str, arguments), "--threads", "1"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})


def test_the_whole_command_without_a_tokenizer(tmp_path):
    build("nemotron_h", tmp_path / "tiny")
    build("nemotron_h", tmp_path / "other", seed=1)
    out = tmp_path / "out"
    size = ("--documents", 12, "--tokens", 40)
    done = run("--hf", tmp_path / "tiny", "--compare", tmp_path / "other", "--out", out, *size, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "NO TOKENIZER" in done.stdout
    page = (out / "report.html").read_text()
    assert "NO TOKENIZER" in page and "figure-comparison" in page
    content = json.loads((out / "curvature.json").read_text())
    assert content["subject"]["letters"] == ["M", "E", "A", "F"]
    assert set(content["families"]["model"]) == {"M", "E", "A", "F"}


def test_the_whole_command_with_a_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path / "tiny"
    build("llama", folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=90, initial_alphabet=list("abcdefghijklmnopqrstuvwxyz"))
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 5, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("the lazy dog jumps over the quick brown fox " * (number + 1))
    done = run("--hf", folder, "--data", f"{tmp_path}/*.txt", "--out", tmp_path / "out", "--tokens", 60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "NO TOKENIZER" not in done.stdout and "10 documents" in done.stdout


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not readable"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "nobody"}'), "not readable"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"PK\x03\x04" * 50), "cannot be loaded"),
    ],
    ids=["no config", "broken config", "unknown type", "no weights", "broken weights"],
)
def test_bad_folders_are_one_line(spoil, says, tmp_path):
    build("llama", tmp_path / "tiny")
    spoil(tmp_path / "tiny")
    done = run("--hf", tmp_path / "tiny", cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr


def test_layers_are_found_by_their_number(tmp_path):
    build("llama", tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).base_model
    with pytest.raises(ValueError, match="no list of 5 layers"):
        find_layers(base, 5)
    assert callable(hf_states)
