"""Machine: the device, dtype, threads and kernels of a run, resolved once and named in the log and the receipt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from blocks.kernels import attention, grouped_experts, linear_cross_entropy, m2rnn_mixer, mamba2
from errors import require
from training.config import RunConfig
from training.machine import (
    Precision,
    configure_threads,
    gemm_gflops,
    resolve_device,
    resolve_precision,
    tune_malloc,
)

KERNELS = {
    "A": {"attention": attention.kernel_name},
    "M": {"mamba2": mamba2.kernel_name},
    "E": {"grouped_experts": grouped_experts.kernel_name},
    "R": {"m2rnn": m2rnn_mixer.kernel_name},
}
# On a GPU these run once per start against plain torch: the kernels there come from other packages and compilers.
CHECKS = {"M": mamba2.check_against_reference, "R": m2rnn_mixer.check_against_reference}


@dataclass(frozen=True)
class Machine:
    """gflops: measured speed of a square matmul in the run's dtype (what gemm_share is relative to)."""

    device: torch.device
    precision: Precision
    threads: int
    malloc: str
    gflops: float

    @classmethod
    def resolve(cls, config: RunConfig) -> Machine:
        """Raises InputError for a device that is not there."""
        device = resolve_device(config.device)
        precision = resolve_precision(config.precision, device)
        problem = f"{config.parallel.gather} rounds the weights that products read, and precision is {precision.name}"
        require(config.parallel.gather in ("fp32", precision.name), "parallel.gather", problem)
        malloc = tune_malloc(config.malloc)
        threads = configure_threads(config.threads)
        return cls(device, precision, threads, malloc, gemm_gflops(device, precision.dtype))

    @property
    def autocast(self) -> Callable[[], AbstractContextManager]:
        """Makes the context of a forward pass."""
        return self.precision.autocast(self.device)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def kernels(self, letters: str) -> dict[str, str]:
        """operation -> the kernel that it runs, for the families in use and the head."""
        chosen = {"head": linear_cross_entropy.kernel_name(self.device, self.precision.dtype)}
        for letter in sorted(set(letters)):
            for operation, name in KERNELS[letter].items():
                chosen[operation] = name(self.device, self.precision.dtype)
        return chosen

    def check_kernels(self, letters: str) -> None:
        """On a GPU, compares its kernels with plain torch on a tiny input. Raises PreflightError."""
        if self.is_cuda:
            for letter in sorted(set(letters) & CHECKS.keys()):
                CHECKS[letter](self.device, self.precision.dtype)

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{self.device}, {self.precision.name} ({self.precision.reason}), {self.threads} threads, "
            f"{self.gflops:,.0f} GFLOP/s in a square matmul; {self.malloc}"
        )
