"""What is installed, what a run here would use, and why not the rest: python -m scripts.doctor.

Exit code 0 on any machine where training works. Imports no CUDA package: versions are read from the metadata, and
whether a package can be imported is only tried where torch sees a GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata

from errors import exit_with

# What training imports: without one of them nothing below the first table can be said.
BASE = (
    "torch",
    "numpy",
    "numba",
    "einops",
    "sentencepiece",
    "omegaconf",
    "safetensors",
    "rich",
    "filelock",
    "psutil",
)
OPTIONAL = {
    "scipy": "reports: intervals and tests",
    "plotly": "reports: pages with figures",
    "pyarrow": "parquet: documents and tables",
    "optuna": "search of scripts.ablate",
    "wandb": "second metrics writer",
    "datasets": "data.source: huggingface",
    "transformers": "oracle tests, reports on foreign models",
    "triton": "M2RNN and Mamba-2 kernels on a GPU",
    "mamba-ssm": "Mamba-2 kernels on a GPU",
    "causal-conv1d": "convolution kernel on a GPU",
}
FROM_SETUP = ("scipy", "plotly", "pyarrow", "optuna", "wandb")
CUDA_ONLY = ("triton", "mamba-ssm", "causal-conv1d")


def main() -> int:
    has_gpu = _sees_gpu()
    missing = [name for name in BASE if _version(name) is None]
    rows = [("package", "version", "for", "state")]
    for name in BASE:
        rows.append((name, _version(name) or "-", "every run", "MISSING: make setup" if name in missing else "ok"))
    for name, purpose in OPTIONAL.items():
        rows.append((name, _version(name) or "-", purpose, _state(name, has_gpu)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # plain text: rich itself may be missing
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if missing:
        print(f"no run can start here: {', '.join(missing)}")
        return 1
    _print_machine(has_gpu)
    return 0


def _print_machine(has_gpu: bool) -> None:
    """What a run here uses; everything that training imports is there."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from training.config import RunConfig
    from training.environment import cpu_name
    from training.hardware import Machine

    console = Console()
    console.print(
        f"processor: {cpu_name()}; GPU: {torch.cuda.get_device_name() if has_gpu else 'none that torch sees'}"
    )
    machine = Machine.resolve(RunConfig())
    console.print(f"a run here uses: {machine.describe()}")
    kernels = Table("operation", "kernel that a run here uses")
    for operation, kernel in machine.kernels("AMER").items():
        kernels.add_row(operation, kernel)
    console.print(kernels)


def _sees_gpu() -> bool:
    if _version("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _state(package: str, has_gpu: bool) -> str:
    if _version(package) is None:
        if package in FROM_SETUP:
            return "not installed: make setup"
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
