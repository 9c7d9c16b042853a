"""What can go wrong on purpose: errors that a person caused or must act on, and their exit codes.

Everything else is a bug and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import math
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

# A disk that is full, read-only or not ours: nothing that a traceback explains better than a line.
STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class InputError(ValueError):
    """Bad input: a key, a file or a value. One line on stderr, exit code 2.

    The message quotes what a person typed, so what cannot be printed is escaped: it stays one line whatever that was.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__("".join(char if char.isprintable() else repr(char)[1:-1] for char in message))


class PreflightError(RuntimeError):
    """The wire that a run claims is not there (or died). Exit code 3."""

    exit_code = 3


class StorageError(RuntimeError):
    """The disk refuses what the run cannot do without (full, read-only, no permission). One line, exit code 1."""

    exit_code = 1


class Stopped(Exception):  # noqa: N818 - a wish that was granted, not an error
    """The run was asked to stop and left a valid checkpoint behind. Exit code 4."""

    exit_code = 4


def require(condition: bool, key: str, problem: str) -> None:
    """Raises InputError("key: problem") unless the condition holds."""
    if not condition:
        raise InputError(f"{key}: {problem}")


def require_number(
    key: str,
    value: float,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    *,
    exclusive: bool = False,
) -> None:
    """Raises InputError unless value is finite and in [minimum, maximum] ((minimum, maximum] if exclusive)."""
    low_ok = value > minimum if exclusive else value >= minimum
    if math.isfinite(value) and low_ok and value <= maximum:
        return
    low = f"{'above' if exclusive else 'at least'} {minimum:g}"
    bounds = [low] if minimum > -math.inf else []
    bounds += [f"at most {maximum:g}"] if maximum < math.inf else []
    raise InputError(f"{key}: expected a finite number{' ' if bounds else ''}{' and '.join(bounds)}, got {value}")


def require_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises InputError naming the nearest valid choice unless value is one of them."""
    names = list(choices)
    if value not in names:
        raise InputError(f"{key}: unknown value {value!r}{nearest(value, names)}; expected one of {', '.join(names)}")


def nearest(word: str, candidates: Iterable[str]) -> str:
    """A hint " (did you mean 'x'?)" for the closest candidate, or an empty string."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def exit_with(main: Callable[[], int | None]) -> None:
    """Runs main and turns the errors of this module into one line on stderr and their exit code."""
    try:
        code = main() or 0
    except BaseException as error:
        said = say(error)
        if said is None:
            raise
        code = said
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk, a cut pipe: the interpreter would try once more and make the code 120 of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def say(error: BaseException) -> int | None:
    """Says what a person can act on as one line on stderr; the exit code. None, and no word: anything else, which keeps
    its traceback."""
    if isinstance(error, Stopped):
        _say_of(error, f"stopped: {error}")
        # torchrun takes any other code for a failure and starts the job again, srun for one that it has to end the
        # other ranks for; the receipt has the truth
        launched = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"
        return 0 if launched else Stopped.exit_code
    if isinstance(error, (InputError, PreflightError, StorageError)):
        _say_of(error, f"error: {error}")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted")
        return 130
    if isinstance(error, OSError):
        if error.errno == errno.EPIPE and (_is_cut(sys.stdout) or _is_cut(sys.stderr)):
            return 128 + signal.SIGPIPE  # its reader has enough, such as `head`: the shell's code, and no word
        if error.errno in STORAGE_ERRNOS:
            _say_of(error, f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")
            return StorageError.exit_code
    return None


def _say_of(error: BaseException, line: str) -> None:
    """Of many ranks that end with the same line rank 0 speaks, and each that ends with another one. `spoken`: noted on
    the error where the ranks have compared; before they have met, one of each machine speaks."""
    rank, local = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if rank == "0":
        _say(line)
    elif not getattr(error, "spoken", local != "0"):
        _say(f"rank {rank}: {line}")


def _is_cut(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # no file behind it
        return False
    return bool(poll.poll(0))


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
