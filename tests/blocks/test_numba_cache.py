"""A process that compiles the kernels computes what a process does that loads them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blocks.kernels import numba_setup

ROOT = Path(__file__).parents[2]
STEP = """
import hashlib, sys, torch
from losses.objective import Objective, STPConfig
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig
from training.machine import configure_threads

configure_threads(1)
model = HybridLM(ModelConfig(pattern=sys.argv[1], d_model=64), 512)
model.init_weights(torch.Generator().manual_seed(0))
tokens = torch.randint(0, 512, (4, 256), generator=torch.Generator().manual_seed(1))
ids = torch.repeat_interleave(torch.arange(3), torch.tensor([100, 100, 56])).expand(4, -1).contiguous()
objective = Objective(STPConfig(boundaries=["all", "final"]), model.letters, seed=1)
triples = objective.draw(ids, torch.arange(4), 0)
output = model(tokens, SequenceContext.from_document_ids(ids))
loss = objective(output, model.head.weight, tokens, triples, stp_weight=torch.tensor(0.5), lm_divisor=1024,
                 stp_divisor=objective.divisor(triples))
loss.total.backward()
for name, parameter in model.named_parameters():
    print(name, hashlib.sha256(parameter.grad.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_and_loaded_kernels_give_the_same_bits(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def gradients(pattern):
        line = [sys.executable, "-c", STEP, pattern]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    compiled = gradients("AMER")
    assert len(compiled) > 20
    assert gradients("AMER") == compiled


HELPER = """
from numba import njit
from own.kernels import numba_setup

@njit
def more(x):
    return x + AMOUNT
"""
KERNEL = """
from numba import njit
from own.kernels.helper import more

@njit(cache=True)
def kernel(x):
    return more(x)

print(kernel(1.0), sum(kernel.stats.cache_hits.values()))
"""


def test_an_edited_helper_in_another_file_is_compiled_anew(tmp_path):
    """Numba itself looks at the file of the function that it caches and at no other."""
    place = tmp_path / "own" / "kernels"
    place.mkdir(parents=True)
    shutil.copy(numba_setup.__file__, place)
    (place / "kernel.py").write_text(KERNEL)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    said = []
    for amount in ("1", "1", "100", "100"):
        (place / "helper.py").write_text(HELPER.replace("AMOUNT", amount))
        line = [sys.executable, "-m", "own.kernels.kernel"]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
        said.append(done.stdout.split() or done.stderr[-2000:])
    assert said == [["2.0", "0"], ["2.0", "1"], ["101.0", "0"], ["101.0", "1"]]
