"""What is installed, what a run here would use, and why not the rest: python -m scripts.doctor.

Exit code 0 on any machine where training works. Imports no CUDA package: versions are read from the metadata, and
whether a package can be imported is only tried where torch sees a GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

import torch
from rich.console import Console
from rich.table import Table

from errors import exit_with
from training.config import RunConfig
from training.environment import cpu_name
from training.hardware import Machine

BASE = ("torch", "numpy", "numba", "einops", "sentencepiece", "omegaconf", "safetensors", "scipy", "pyarrow", "plotly")
OPTIONAL = {
    "wandb": "second metrics writer",
    "datasets": "data.source: huggingface",
    "transformers": "oracle tests, reports on foreign models",
    "triton": "M2RNN and Mamba-2 kernels on a GPU",
    "mamba-ssm": "Mamba-2 kernels on a GPU",
    "causal-conv1d": "convolution kernel on a GPU",
}
CUDA_ONLY = ("triton", "mamba-ssm", "causal-conv1d")


def main() -> int:
    console = Console()
    has_gpu = torch.cuda.is_available()
    console.print(
        f"processor: {cpu_name()}; GPU: {torch.cuda.get_device_name() if has_gpu else 'none that torch sees'}"
    )

    packages = Table("package", "version", "for", "state")
    for name in BASE:
        packages.add_row(name, _version(name) or "-", "every run", "ok" if _version(name) else "MISSING: make setup")
    for name, purpose in OPTIONAL.items():
        packages.add_row(name, _version(name) or "-", purpose, _state(name, has_gpu))
    console.print(packages)

    machine = Machine.resolve(RunConfig())
    console.print(f"a run here uses: {machine.describe()}")
    kernels = Table("operation", "kernel that a run here uses")
    for operation, kernel in machine.kernels("AMER").items():
        kernels.add_row(operation, kernel)
    console.print(kernels)
    return 0 if all(_version(name) for name in BASE) else 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _state(package: str, has_gpu: bool) -> str:
    if _version(package) is None:
        return "not installed" + (": make setup-cuda" if package in CUDA_ONLY and has_gpu else "")
    if package not in CUDA_ONLY:
        return "ok"
    if not has_gpu:
        return "installed, not used: torch sees no GPU"
    try:
        importlib.import_module(package.replace("-", "_"))
    except Exception as error:  # a broken build raises whatever it likes
        return f"installed, does not import: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "ok"


if __name__ == "__main__":
    exit_with(main)
