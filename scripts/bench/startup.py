"""From the start of the process to the end of the first training step, warm caches: `train.py configs/demo.yaml`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from scripts.bench.harness import Row, print_row

RUN = "bench-startup"


def seconds_to_first_step(root: Path) -> float:
    folder = root / "runs" / RUN
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [f"run_id={RUN}", "resume=never", "train.log_every=1", "checkpoint.every_steps=1000000"]
    command = [sys.executable, "train.py", "configs/demo.yaml", *overrides]
    started = time.time()
    with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        metrics = folder / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n")):
            time.sleep(0.02)
        elapsed = time.time() - started
        process.kill()
    found = metrics.exists() and bool(json.loads(metrics.read_text().splitlines()[0]))
    shutil.rmtree(folder, ignore_errors=True)
    if not found:
        raise RuntimeError("train.py configs/demo.yaml made no first step")
    return elapsed


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    seconds_to_first_step(root)  # prepares the corpus and compiles the kernels where that was never done
    seconds = sorted(seconds_to_first_step(root) for _ in range(3))[1]
    print_row(Row("process start to first step, seconds (demo)", "-", seconds, 15.0, 8.0, lower_is_better=True))
