"""A process that compiles the kernels computes what a process does that loads them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
