"""Starting jobs of several processes on this machine."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# memory that is freed goes back at once, so that a resident size says what is alive
FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PATIENCE = "parallel.timeout_seconds=60"  # a rank that waits for the others in vain fails with a traceback


def command(ranks, script, *arguments, restarts=0):
    python = [sys.executable]
    if ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        python += [*launcher, f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    return [*python, str(HERE / script), *map(str, arguments)]


def run(ranks, script, *arguments, cwd, timeout=280, **environment):
    """ranks 0: one process without torchrun. timeout: with room for kernels that are compiled for the first time."""
    line = command(ranks, script, *arguments)
    environment = {**ENVIRONMENT, **environment}
    pipe = subprocess.PIPE
    with subprocess.Popen(line, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun takes its ranks along, which it could not when it is killed
            raise
    return subprocess.CompletedProcess(line, process.returncode, out, err)
