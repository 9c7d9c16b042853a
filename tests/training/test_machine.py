"""Device, precision, threads, matmul speed: resolved visibly; environment and git state described."""

import json
import subprocess
import sys
import time

import pytest
import torch

from errors import InputError
from training import machine
from training.environment import code_sha256, cores, describe_environment, git_state, shared_facts
from training.machine import (
    configure_threads,
    gemm_gflops,
    resolve_device,
    resolve_precision,
    tune_malloc,
)

CPU = torch.device("cpu")


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU == resolve_device("cpu")
    with pytest.raises(InputError, match=r"^device: cuda, but torch sees no GPU"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda" and resolve_device("cpu") == CPU
    with pytest.raises(InputError, match="did you mean 'cuda'"):
        resolve_device("cuda0")


@pytest.mark.parametrize(
    ("flags", "asked", "name", "reason"),
    [
        ({"avx512_bf16"}, "auto", "bf16", "auto: avx512_bf16"),
        ({"amx_bf16", "avx512_bf16"}, "auto", "bf16", "auto: amx_bf16"),
        ({"avx2"}, "auto", "fp32", "no native bf16"),
        ({"avx2"}, "bf16", "bf16", "emulates"),
        ({"avx512_bf16"}, "bf16", "bf16", "asked for"),
        ({"avx512_bf16"}, "fp32", "fp32", "asked for"),
    ],
)
def test_precision(monkeypatch, flags, asked, name, reason):
    monkeypatch.setattr(machine, "_cpu_flags", lambda: flags)
    precision = resolve_precision(asked, CPU)
    assert precision.name == name and reason in precision.reason
    with precision.autocast(CPU)():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == precision.dtype


def test_the_kernels_flags_agree_with_torch():
    assert ("avx512_bf16" in machine._cpu_flags()) == torch.cpu._is_avx512_bf16_supported()


def test_gemm_speed_is_in_gflops():
    """Against a timing of one's own; wide, for a busy machine."""
    a = torch.ones(512, 512)
    a @ a
    began = time.perf_counter()
    for _ in range(20):
        a @ a
    own = 20 * 2 * 512**3 / (time.perf_counter() - began) / 1e9
    assert own / 8 < gemm_gflops(CPU, torch.float32, seconds=0.05, size=512) < own * 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_measured_by_products_that_outlast_their_launch():
    """Against a timing of one's own, of products in a row; single small ones are bound by launching them."""
    gpu = torch.device("cuda")
    a = torch.ones(8192, 8192, device=gpu, dtype=torch.bfloat16)
    times = []
    for n in (3, 33):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(n):
            a @ a
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    own = 30 * 2 * 8192**3 / (times[1] - times[0]) / 1e9
    assert 0.7 * own < gemm_gflops(gpu, torch.bfloat16) < 1.4 * own


def test_products_in_a_row_are_timed_as_one():
    a = torch.ones(256, 256)
    seconds = machine._seconds_in_a_row(a, torch.empty_like(a), 0.05)
    own = time.perf_counter()
    for _ in range(100):
        a @ a
    own = (time.perf_counter() - own) / 100
    assert own / 8 < seconds < own * 8


def test_threads():
    assert configure_threads(1) == 1 == torch.get_num_threads()
    assert configure_threads(None) == 1
    with pytest.raises(InputError, match=r"^threads: "):
        configure_threads(0)


def test_the_first_numba_kernel_does_not_change_torchs_threads():
    """numba's pool sets the OpenMP thread count of the process when it is launched; that must be over by then."""
    script = """
import numba, numpy, torch
from training.machine import configure_threads
@numba.njit(parallel=True)
def f(x):
    for i in numba.prange(len(x)):
        x[i] += 1
configure_threads(1)
f(numpy.zeros(10))
print(torch.get_num_threads(), numba.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "1"], done.stderr


def test_malloc_tuning_keeps_freed_memory():
    """Elementwise on fresh 64 MB tensors: once the heap has settled hardly a page fault, untuned one at every page."""
    script = """
import resource, torch
from training.machine import tune_malloc
x = torch.ones(2**24)
for mode in ("default", "tuned"):
    tune_malloc(mode)
    for _ in range(20): y = x + 1; del y
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4): y = x + 1; del y
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    default, tuned = map(int, done.stdout.split())
    assert tuned < default / 3, (default, tuned)
    with pytest.raises(InputError, match=r"^malloc: "):
        tune_malloc("tune")


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@e"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_git_state(tmp_path):
    git(tmp_path, "init")
    assert git_state(tmp_path) == {"commit": None, "dirty_sha256": None}
    (tmp_path / "a.py").write_text("1")
    (tmp_path / ".gitignore").write_text("ignored\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty_sha256"] is None
    (tmp_path / "ignored").write_text("x")
    assert git_state(tmp_path) == clean
    seen = set()
    for change in ("2", "3"):
        (tmp_path / "a.py").write_text(change)
        seen.add(git_state(tmp_path)["dirty_sha256"])
    git(tmp_path, "add", ".")
    assert git_state(tmp_path)["dirty_sha256"] in seen, "staged or not makes no difference"
    for content in ("x", "y"):
        (tmp_path / "new.py").write_text(content)
        seen.add(git_state(tmp_path)["dirty_sha256"])
    assert len(seen) == 4 and None not in seen
    (tmp_path / "sub").mkdir()
    assert git_state(tmp_path / "sub") == git_state(tmp_path), "the same from below"


def test_without_git_or_repository(tmp_path, monkeypatch):
    nothing = {"commit": None, "dirty_sha256": None}
    assert git_state(tmp_path) == nothing
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(".") == nothing


def test_environment_is_json_and_says_what_matters():
    environment = describe_environment(CPU)
    assert json.loads(json.dumps(environment)) == environment
    assert environment["torch"] == torch.__version__ and environment["threads"] == torch.get_num_threads()
    assert environment["cores"] == cores() >= 1 and environment["cpu"]


def test_code_is_known_by_its_files(tmp_path, monkeypatch):
    import training.environment

    (tmp_path / "training").mkdir()
    (tmp_path / "blocks").mkdir()
    for name in ("train.py", "training/environment.py", "blocks/ablock.py"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(training.environment, "__file__", str(tmp_path / "training/environment.py"))
    seen = [code_sha256()]
    (tmp_path / "blocks/ablock.py").write_text("another")
    seen.append(code_sha256())
    (tmp_path / "blocks/ablock.py").rename(tmp_path / "blocks/eblock.py")
    seen.append(code_sha256())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/notes.py").write_text("no code of ours")
    (tmp_path / ".#train.py").symlink_to("somebody@machine.1234")  # Emacs, of a file with changes
    assert code_sha256() == seen[-1] and len(set(seen)) == 3


def test_a_kernel_that_one_machine_lacks_is_a_fact_that_differs():
    here, there = (shared_facts("c", "d", {"attention": name}) for name in ("flex", "reference"))
    assert [name for name in here if here[name] != there[name]] == ["kernel for attention"]
    assert {"config", "corpus", "code", "torch"} < set(here)
