"""Conversations as documents: what is read, what is learned, and how the two are told apart in the text.

The layout is plain text, so that any tokenizer serves: a message that is not the assistant's is followed by a newline;
an assistant's is followed by the end token, which is learned. Loss is on the assistant's messages alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from data.documents import Document, Segment, checked_text
from errors import InputError, nearest

ROLES = ("system", "user", "assistant")
_EXPECTED = 'expected "messages" (a list of role and content), or "prompt" and "completion"'


def as_document(key: str, messages: list[tuple[str, str]], split: str = "") -> Document:
    """(role, content) of each message -> a document that ends with an answer, grouped by all that is before it."""
    segments = []
    for role, content in messages:
        segments.append(Segment(content, "answer") if role == "assistant" else Segment(f"{content}\n", "prompt"))
    prompt = "".join(segment.text for segment in segments[:-1])
    return Document(key, prompt + segments[-1].text, prompt, tuple(segments), split)


def read_chat(path: Path, split: str = "") -> Iterator[Document]:
    """The conversations of a .jsonl file. Raises InputError naming file and line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:  # also UnicodeDecodeError
                    raise InputError(f"{where}: not JSON ({error})") from None
                yield as_document(where, _messages(row, where), split)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _messages(row: object, where: str) -> list[tuple[str, str]]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: {_EXPECTED}, got {type(row).__name__}")
    if "prompt" in row and "completion" in row:
        texts = [checked_text(row[name], f"{where}: field {name!r}") for name in ("prompt", "completion")]
        return list(zip(("user", "assistant"), texts))
    listed = row.get("messages")
    if not isinstance(listed, list) or not listed:
        names = [name for name in row if isinstance(name, str)]
        found = f"; the row has {', '.join(names[:8])}" if names else ""
        raise InputError(f"{where}: {_EXPECTED}{nearest('messages', names)}{found}")
    messages = []
    for number, message in enumerate(listed):
        at = f"{where}: message {number}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise InputError(f"{at}: expected an object with role and content")
        role = message["role"]
        if role not in ROLES:
            raise InputError(f"{at}: unknown role {role!r}{nearest(str(role), ROLES)}; expected {', '.join(ROLES)}")
        messages.append((role, checked_text(message["content"], f"{at}: content")))
    if messages[-1][0] != "assistant":
        raise InputError(f"{where}: the last message is of role {messages[-1][0]}; expected the assistant's answer")
    if len(messages) < 2:
        raise InputError(f"{where}: an answer without a prompt; expected a message before the assistant's")
    return messages
