"""manifest.json: size and sha256 of every file of a checkpoint, written last. No other defence sees a flipped bit.

torch's distributed checkpoints and safetensors load flipped weights without a word (measured), so nothing is read
from a folder before its manifest has been checked, and a folder without one was never finished.
"""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

from training.durable import canonical_json, sha256_file, write_durably

MANIFEST = "manifest.json"
FORMAT = 1


def entries(folder: Path, prefix: str = "") -> dict[str, Any]:
    """Size and sha256 of the files below folder whose names begin so. Raises OSError."""
    return {name: _entry(folder / name) for name in _files(folder) if name.startswith(prefix)}


def write_manifest(folder: Path, step: int, known: dict[str, Any] | None = None) -> str:
    """Writes what `entries` says of every file below folder; returns the manifest's own sha256. Raises OSError.

    known: entries of files that other processes wrote and hashed, which must be there; the rest is hashed here.
    """
    known, present = known or {}, _files(folder)
    unseen = sorted(known.keys() - set(present))
    if unseen:
        raise OSError(errno.ENOENT, "written by another rank and not seen by rank 0: no shared disk?", unseen[0])
    files = {name: known.get(name) or _entry(folder / name) for name in present}
    content: dict[str, Any] = {"format": FORMAT, "step": step, "files": files}
    content["self_sha256"] = hashlib.sha256(canonical_json(content)).hexdigest()
    data = canonical_json(content)
    write_durably(folder / MANIFEST, data)
    return hashlib.sha256(data).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against itself. Raises ValueError saying what is wrong with it."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST}: missing, so the save was not finished") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror or error}") from None
    try:
        content = json.loads(data)
        spelled = canonical_json(content)
        rest = {key: value for key, value in content.items() if key != "self_sha256"}
        sound = spelled == data and hashlib.sha256(canonical_json(rest)).hexdigest() == content["self_sha256"]
        sound = sound and isinstance(content["files"], dict) and isinstance(content["step"], int)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{MANIFEST}: damaged")
    if content["format"] != FORMAT:
        raise ValueError(f"{MANIFEST}: format {content['format']}, expected {FORMAT}")
    return dict(content)


def damages(folder: Path, *, hashes: bool = True, part: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint folder, one "file: problem" each; [] = sound.

    hashes=False compares names and sizes only: cheap, blind to flipped bits, for housekeeping and never for loading.
    part: (k, n) compares the hashes of every n-th file from the k-th on, where n readers share the work.
    """
    try:
        expected = read_manifest(folder)["files"]
        present = set(_files(folder))
    except (ValueError, OSError) as error:
        return [str(error)]
    found = [f"{name}: missing" for name in sorted(expected.keys() - present)]
    found += [f"{name}: not in the manifest" for name in sorted(present - expected.keys())]
    for number, name in enumerate(sorted(expected.keys() & present)):
        problem = _compare(folder / name, expected[name], hashes and number % part[1] == part[0])
        found += [f"{name}: {problem}"] if problem else []
    return found


def _compare(path: Path, expected: Any, hashes: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{size} bytes, the manifest says {expected['bytes']}"
        if hashes and sha256_file(path) != expected["sha256"]:
            return "its sha256 is not the one in the manifest"
    except OSError as error:
        return str(error.strerror or error)
    except (KeyError, TypeError):
        return "no size and hash in the manifest"
    return None


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if name != MANIFEST)
