"""The machine as training sees it: device, precision, threads, matmul speed, memory."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from errors import InputError, require, require_choice

# On a GPU a product must outlast its launch: one of 1024 does not.
GEMM_SIZE, GPU_GEMM_SIZE = 1024, 8192
MIB = 2**20
PEAK_RESET = Path("/proc/self/clear_refs")  # Linux: forgets the largest resident size so far


@dataclass(frozen=True)
class Precision:
    """dtype of the matmuls; the weights stay float32. reason: one phrase for the log and the receipt."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def autocast(self, device: torch.device) -> Callable[[], AbstractContextManager]:
        """A factory of contexts for the forward pass; a disabled autocast under fp32."""
        return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def resolve_device(name: str) -> torch.device:
    """auto: the GPU if torch sees one. Raises InputError for cuda without a GPU."""
    require_choice("device", name, ["auto", "cpu", "cuda"])
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        built = torch.version.cuda or "none: a CPU build"
        raise InputError(f"device: cuda, but torch sees no GPU (CUDA of this torch: {built}); use auto or cpu")
    if not available or name == "cpu":
        return torch.device("cpu")
    local_rank = os.environ.get("LOCAL_RANK")  # torchrun: one GPU for each process of a node
    return torch.device("cuda") if local_rank is None else torch.device("cuda", int(local_rank))


def resolve_precision(name: str, device: torch.device) -> Precision:
    """auto: bf16 where the device multiplies it natively, else fp32; the reason says which and why."""
    require_choice("precision", name, ["auto", "bf16", "fp32"])
    feature = native_bf16(device)
    if name == "auto":
        if feature:
            return Precision(torch.bfloat16, f"auto: {feature}")
        return Precision(torch.float32, f"auto: this {device.type} has no native bf16 matmul")
    if name == "bf16":
        return Precision(torch.bfloat16, "asked for" + ("" if feature else f"; this {device.type} emulates it: slow"))
    return Precision(torch.float32, "asked for")


def native_bf16(device: torch.device) -> str | None:
    """The feature that multiplies bf16 natively, or None."""
    if device.type == "cuda":
        return "native bf16 GPU" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    flags = _cpu_flags()
    return next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags), None)


def configure_threads(threads: int | None = None) -> int:
    """Sets torch's and numba's threads to the same number; None keeps torch's choice. Returns the number.

    Results of float32 sums may depend on it, so an exact resume needs the same number. numba is clipped to what it
    was launched with.
    """
    import numba

    require(threads is None or threads > 0, "threads", f"expected at least 1, got {threads}")
    number = torch.get_num_threads() if threads is None else threads
    # numba first: launching its pool changes the OpenMP thread count that torch uses, behind torch's back (measured)
    numba.set_num_threads(min(number, int(vars(numba.config)["NUMBA_NUM_THREADS"])))
    torch.set_num_threads(number)
    return number


def gemm_gflops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3, size: int | None = None) -> float:
    """Measured speed of a square matmul, GFLOP/s: the yardstick of `gemm_share`, not the processor's data sheet.

    Products of 2 * size^3 FLOPs with preallocated output, for about `seconds` after a warmup: the median of single
    ones on the CPU, the mean of a row of them on a GPU, which is waited for once. Other jobs on the machine lower it,
    and then lower training alike.
    """
    size = size or (GPU_GEMM_SIZE if device.type == "cuda" else GEMM_SIZE)
    a = torch.ones(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    times: list[float] = []
    with torch.no_grad():
        for _ in range(3):
            torch.mm(a, a, out=out)
        if device.type == "cuda":
            return 2 * size**3 / _seconds_in_a_row(a, out, seconds) / 1e9
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 3:
            started = time.perf_counter()
            torch.mm(a, a, out=out)
            times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times) / 1e9


def _seconds_in_a_row(a: torch.Tensor, out: torch.Tensor, seconds: float) -> float:
    """Of one product; the second of two rows, as many as the first says will fill `seconds`."""
    each, count = 0.0, 3
    for _ in range(2):
        _synchronize(a.device)
        started = time.perf_counter()
        for _ in range(count):
            torch.mm(a, a, out=out)
        _synchronize(a.device)
        each = (time.perf_counter() - started) / count
        count = min(1000, max(3, int(seconds / each)))
    return each


def resident_growth(work: Callable[[], object]) -> int:
    """Bytes by which `work` raises this process's largest resident size above what it holds before. Linux only.

    The high-water mark is reset through /proc, and glibc first gives back what it keeps in reserve, so that memory
    which is resident already does not hide what `work` takes. Raises OSError where there is no such /proc.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    PEAK_RESET.write_text("5")
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def tune_malloc(mode: str) -> str:
    """Returns what was done, for the log.

    default: nothing; tuned: glibc keeps freed memory instead of giving every large tensor back to the kernel. That
    saved the page faults of elementwise operations on fresh tensors above 32 MB (4-6x faster there) and nothing
    below, at the price of a larger resident size. Call it before the first large tensor. Raises InputError where
    there is no glibc.
    """
    require_choice("malloc", mode, ["default", "tuned"])
    if mode == "default":
        return "malloc: default"
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018 - musl has mallopt's name but ignores it
    except (OSError, AttributeError):
        raise InputError("malloc: tuned needs glibc, which this system lacks; use malloc=default") from None
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    settings = ((m_mmap_max, 0), (m_trim_threshold, 2047 * MIB), (m_top_pad, 256 * MIB))
    if not all([mallopt(option, value) for option, value in settings]):
        raise InputError("malloc: this glibc refused the tuning; use malloc=default")
    return "malloc: tuned (no mmap for large blocks, 2 GiB trim threshold, 256 MiB top pad)"


def _cpu_flags() -> set[str]:
    """Feature words of the first core, as the kernel spells them (x86: flags, ARM: Features); empty elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
