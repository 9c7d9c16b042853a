"""How many held-out prompts a model answers rightly: greedy answers, scored as strings and as regexes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from data.nlrx.score import score, summarise
from data.prepared import Answer, Prepared
from model.generate import greedy_answers


def answer_accuracy(
    model: Any,
    data: Prepared,
    split: str = "test",
    *,
    limit: int | None = None,
    batch_size: int = 128,
    max_new_tokens: int | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> dict[str, Any]:
    """Greedy answers to the prompts of a split (train, validation or test) and their scores; no gradient.

    limit: that many of them, evenly spaced. max_new_tokens: default 1.5 times the longest expected answer.

    Returns n, exact, dfa, dfa_letter (shares of n; see data/nlrx/score.py), invalid, limit (counts of answers that are
    no regex, and of comparisons given up: both count as wrong), unfinished (counts those that reached no end token),
    split, seconds, tokens_per_second (read and written, decoding alone), and rows: expected, answer, exact, dfa.
    Raises InputError if the corpus has no such answers.
    """
    asked = _spread(data.answers(split), limit)
    if max_new_tokens is None:
        max_new_tokens = max(answer.n_tokens for answer in asked) * 3 // 2
    start = time.perf_counter()
    stop_token = data.tokenizer.eos_id
    with autocast():
        answers = greedy_answers(model, [one.prompt for one in asked], max_new_tokens, stop_token, batch_size)
    seconds = time.perf_counter() - start
    n_tokens = sum(len(one.prompt) + len(tokens) for one, tokens in zip(asked, answers))
    texts = [data.tokenizer.decode(tokens) for tokens in answers]
    scores = [score(text, one.text) for text, one in zip(texts, asked)]
    return {
        "split": split,
        **summarise(scores),
        "unfinished": sum(tokens[-1] != stop_token for tokens in answers),
        "seconds": seconds,
        "tokens_per_second": n_tokens / seconds,
        "rows": [
            {"prompt": data.tokenizer.decode(one.prompt), "expected": one.text, "answer": text, **vars(scored)}
            for one, text, scored in zip(asked, texts, scores)
        ],
    }


def _spread(answers: list[Answer], limit: int | None) -> list[Answer]:
    if limit is None or limit >= len(answers):
        return answers
    return [answers[number * len(answers) // limit] for number in range(limit)]
