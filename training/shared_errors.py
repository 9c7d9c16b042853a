"""Errors as what one rank tells the others, who raise them too."""

from __future__ import annotations

from typing import Any

from errors import InputError, PreflightError, Stopped, StorageError

SHARED = (InputError, PreflightError, StorageError, Stopped, OSError)


def tell(error: BaseException) -> dict[str, Any]:
    """An error of `SHARED` for other ranks."""
    if isinstance(error, OSError):
        return {"error": "OSError", "arguments": [error.errno, error.strerror or str(error), error.filename]}
    return {"error": type(error).__name__, "arguments": [str(error)]}


def told_error(error: dict[str, Any], where: str = "") -> Exception:
    """The error again. where: which rank had it, in front of the text (of a disk's error, which becomes a line)."""
    arguments = error["arguments"]
    if error["error"] != "OSError":
        kind = next(kind for kind in SHARED if kind.__name__ == error["error"])
        return kind(where + arguments[0])
    _, problem, path = arguments
    return StorageError(f"{where}{path}: {problem}") if where else OSError(*arguments)
