"""What a run ran on and from: code, versions, processor. Everything here works without git and without a GPU."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from data.workers import cores
from training.durable import sha256_file

PACKAGES = ("numpy", "numba", "sentencepiece", "safetensors", "triton", "mamba-ssm", "causal-conv1d")


def git_state(folder: str | Path = ".") -> dict[str, str | None]:
    """{"commit", "dirty_sha256"}: both None outside a repository; dirty_sha256 None where nothing differs.

    The hash covers `git diff HEAD` and the content of every untracked file that is not ignored, so two runs with the
    same commit and hash ran the same code.
    """
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None:
        return {"commit": None, "dirty_sha256": None}
    top = Path(os.fsdecode(root).strip())
    commit = _git(top, "rev-parse", "--verify", "--quiet", "HEAD")
    diff = _git(top, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv") or b""
    untracked = (_git(top, "ls-files", "--others", "--exclude-standard", "-z") or b"").split(b"\0")
    digest = hashlib.sha256(diff)
    names = sorted(name for name in untracked if name)
    for name in names:
        digest.update(b"\0" + name + b"\0" + _content_hash(top / os.fsdecode(name)))
    return {
        "commit": commit.decode().strip() if commit else None,
        "dirty_sha256": digest.hexdigest() if diff or names else None,
    }


def shared_facts(config_sha256: str, corpus_sha256: str, kernels: dict[str, str]) -> dict[str, str]:
    """What every rank of a run must see alike: a machine with an old checkout or without a kernel trains along unseen.

    kernels: operation -> name.
    """
    known = {"config": config_sha256, "corpus": corpus_sha256, "code": code_sha256(), "torch": str(torch.__version__)}
    return {**known, **{f"kernel for {operation}": name for operation, name in kernels.items()}}


def code_sha256() -> str:
    """Of every Python file that a training run can import from here. Needs no git, which a machine may lack."""
    root = Path(__file__).parents[1]
    packages = ("model", "blocks", "losses", "data", "analysis", "training")
    files = [*root.glob("*.py"), *(path for package in packages for path in (root / package).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if not path.name.startswith(".")):  # an editor's: no name of a module
        digest.update(f"{path.relative_to(root)}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def describe_environment(device: torch.device | None = None) -> dict[str, Any]:
    """The receipt's `environment`: interpreter, packages, processor, threads, accelerator. JSON-able."""
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        **{name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if device is not None and device.type == "cuda":
        environment["cuda"] = torch.version.cuda
        environment["gpu"] = torch.cuda.get_device_name(device)
        environment["gpu_count"] = torch.cuda.device_count()
    return environment


def cpu_name() -> str:
    """As the kernel spells it, or what the platform module knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(folder: str | Path, *arguments: str) -> bytes | None:
    """Output of a git command, or None where there is no git, no repository, or no such thing."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _content_hash(path: Path) -> bytes:
    try:
        data = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes()
    except OSError as error:
        data = f"unreadable: {error.strerror}".encode()
    return hashlib.sha256(data).digest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
