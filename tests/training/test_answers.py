"""Answers decoded side by side are those decoded one by one, and are counted as they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.config import DataConfig, NLRXConfig, TokenizerConfig
from data.prepare import prepare
from data.prepared import Prepared
from errors import InputError
from model.context import SequenceContext
from model.generate import greedy_answers
from model.hybrid import HybridLM, ModelConfig
from training.answers import answer_accuracy

VOCAB, STOP = 23, 7


def small_model(pattern: str = "AMERM", dtype: torch.dtype = torch.float64) -> HybridLM:
    config = ModelConfig(pattern=pattern, d_model=32)
    config.attention.n_heads, config.attention.n_kv_heads = 4, 2
    config.mamba2.head_dim, config.mamba2.d_state, config.mamba2.chunk_size = 16, 8, 8
    config.moe.n_experts, config.moe.expert_ff = 4, 16
    model = HybridLM(config, VOCAB)
    model.init_weights(torch.Generator().manual_seed(3))
    return model.to(dtype)


def some_prompts(count: int = 13) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 15, (count,), generator=generator).tolist()
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def by_parallel_forward(model: HybridLM, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The plain definition: run the whole text so far, take the likeliest next token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens and tokens[len(prompt) :][-1:] != [STOP]:
        row = torch.tensor([tokens])
        with torch.no_grad():
            final = model(row, SequenceContext.single_documents(row)).final
        tokens.append(int(model.logits(final)[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_side_by_side_equals_one_by_one(batch_size: int) -> None:
    """In float64, for prompts of 1 to 14 tokens, and against the parallel forward of each text alone."""
    model = small_model().train()
    prompts = some_prompts()
    answers = greedy_answers(model, prompts, 12, STOP, batch_size)
    assert model.training  # as it was
    model.eval()
    assert answers == [by_parallel_forward(model, prompt, 12) for prompt in prompts]
    ends = {answer[-1] == STOP for answer in answers}
    assert ends == {True, False}, "the case is too easy: some answers should stop, some reach the cap"
    assert all(STOP not in answer[:-1] and 0 < len(answer) <= 12 for answer in answers)
    assert len({len(answer) for answer in answers}) > 2


def test_order_and_company_change_nothing() -> None:
    model = small_model("RAEM").eval()
    prompts = some_prompts(9)
    answers = greedy_answers(model, prompts, 8, STOP)
    assert greedy_answers(model, prompts[::-1], 8, STOP) == answers[::-1]
    assert greedy_answers(model, [prompts[4]] * 7, 8, STOP) == [answers[4]] * 7
    assert greedy_answers(model, [], 8, STOP) == []


class Lookup:
    """In place of a model: knows texts by heart. Its state is what each row has read; rows are re-ordered with it."""

    training = False

    def __init__(self, texts: list[list[int]], vocab_size: int) -> None:
        self.texts, self.vocab_size = texts, vocab_size
        self.embedding = SimpleNamespace(weight=torch.zeros(1))

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def init_state(self, batch_size: int, max_length: int) -> list[dict[str, Tensor]]:
        return [{"read": torch.full((batch_size, max_length), -1), "n": torch.zeros(batch_size, dtype=torch.int64)}]

    def step(self, tokens: Tensor, states: list[dict[str, Tensor]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        read, n = states[0]["read"].clone(), states[0]["n"]
        read[torch.arange(len(tokens)), n] = tokens
        logits = torch.zeros(len(tokens), self.vocab_size)
        for row, length in enumerate((n + 1).tolist()):
            known = read[row, :length].tolist()
            follows = next((text[length] for text in self.texts if text[:length] == known and len(text) > length), 0)
            logits[row, follows] = 1
        return logits, [{"read": read, "n": n + 1}]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    config = DataConfig(
        source="nlrx", nlrx=NLRXConfig(pairs=300), test_fraction=0.2, tokenizer=TokenizerConfig(vocab_size=320)
    )
    return prepare(config, tmp_path_factory.mktemp("artifacts"))


def test_every_kind_of_answer_is_counted(pairs: Prepared) -> None:
    tokenizer = pairs.tokenizer
    asked = pairs.answers("test")
    replies = [one.text for one in asked]
    replies[0] = f"({replies[0]})|({replies[0]})"  # other string, same lines
    replies[1] = "(" + replies[1]  # no regex
    replies[2] = "[0-9][0-9][A-Z]"  # another regex
    texts = [[*one.prompt, *tokenizer.encode(reply), tokenizer.eos_id] for one, reply in zip(asked, replies)]
    texts[3] = texts[3][:-1] + [tokenizer.encode("g")[-1]] * 300  # never ends
    report = answer_accuracy(Lookup(texts, tokenizer.vocab_size), pairs, "test", max_new_tokens=130, batch_size=16)
    n = len(asked)
    assert (report["n"], report["split"]) == (n, "test") and n > 40
    assert report["exact"] == pytest.approx((n - 4) / n)
    assert report["dfa"] == report["dfa_letter"] == pytest.approx((n - 3) / n)
    assert (report["invalid"], report["limit"], report["unfinished"]) == (1, 0, 1)
    assert [row["expected"] for row in report["rows"]] == [one.text for one in asked]
    assert [row["answer"] for row in report["rows"]][4:] == replies[4:]
    assert report["rows"][1]["dfa"] == "invalid" and report["rows"][0]["dfa"] == "equal"
    assert report["tokens_per_second"] > 0


def test_a_limit_takes_evenly_spaced_prompts_and_the_cap_leaves_room(pairs: Prepared) -> None:
    asked = pairs.answers("validation")
    whole = [[*one.prompt, *pairs.tokenizer.encode(one.text), pairs.tokenizer.eos_id] for one in asked]
    model = Lookup(whole, pairs.vocab_size)
    report = answer_accuracy(model, pairs, "validation", limit=4)
    assert report["n"] == 4 and report["exact"] == 1.0
    assert [row["expected"] for row in report["rows"]] == [asked[k * len(asked) // 4].text for k in range(4)]
    assert answer_accuracy(model, pairs, "validation", limit=10**6)["n"] == len(asked)


RUN = """
model:
  pattern: AMER
  d_model: 32
  attention: {n_heads: 4, n_kv_heads: 2}
  mamba2: {head_dim: 16, d_state: 8, chunk_size: 16}
  moe: {n_experts: 4, top_k: 2, expert_ff: 16}
data:
  source: nlrx
  nlrx: {pairs: 300}
  sequence_length: 160
  validation_fraction: 0.1
  tokenizer: {vocab_size: 320}
stp: {weight: 0.02}
train: {tokens: 600, batch_rows: 2}
validation: {rows: 4, sample_tokens: 0}
wandb: {mode: disabled}
threads: 1
"""


def test_the_command_scores_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train
    from scripts import evaluate_nlrx

    def command(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["evaluate_nlrx", *arguments])
        capsys.readouterr()
        evaluate_nlrx.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RUN)
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny.yaml", "run_id=tiny"])
    train.main()
    assert "12 test prompts" in command("tiny", "--limit", "12")
    report = json.loads(command("runs/tiny", "--limit", "12", "--json"))
    stored = json.loads((tmp_path / "runs/tiny/answers-test.json").read_text())
    assert len(stored.pop("rows")) == stored["n"] == report["n"] == 12
    assert {k: v for k, v in stored.items() if k not in ("seconds", "tokens_per_second")}.items() <= report.items()
    assert json.loads(command("tiny", "--split", "validation", "--json"))["split"] == "validation"
    with pytest.raises(InputError, match=r"tinny: no run .*did you mean 'tiny'"):
        command("tinny")
    with pytest.raises(InputError, match=r"^--limit: expected a finite number at least 1"):
        command("tiny", "--limit", "0")
