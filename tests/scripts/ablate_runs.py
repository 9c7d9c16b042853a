"""Runs of a grid without the runs: what the tests of the runner, its placement and its results share."""

import io
import sys

import yaml
from rich.console import Console
from tiny_run import make_place

from scripts.ablate import __main__ as command
from scripts.ablate import runner
from scripts.ablate.grid import load_grid
from scripts.ablate.results import run_folder

GRID = {
    "base": "tiny.yaml",
    "overrides": {"train.tokens": 900, "stp.gate.start_tokens": 0, "stp.gate.ramp_tokens": 0},
    "arms": {"none": {"stp.weight": 0}, "triple": {}, "placebo": {"stp.variant": "detached"}},
    "seeds": [0, 1],
    "checkpoints": "remove",
}
# What a run leaves behind, without the run. An arm whose name is in $FAIL fails; $SLEEP: seconds it takes.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
time.sleep(float(os.environ.get("SLEEP", 0)))
if folder.name.rsplit("-", 1)[0] == os.environ.get("FAIL"):
    sys.exit("this arm is broken")
with (folder / "count").open("a") as file:
    file.write("x")
git = {"commit": "a" * 40, "dirty_sha256": os.environ.get("DIRTY")}
tokens = 900 + len(folder.name) + int(folder.name[-1])  # budgets end with a step, so no two runs end at the same count
records = [{"step": step, "tokens": count, "val_loss": 3.0} for step, count in ((1, 9), (9, tokens))]
(folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in records))
receipt = {"status": "finished", "tokens": tokens, "step": 9, "metrics": {"val_bits_per_byte": 2.0}}
receipt["starts"] = [{"git": git}]
receipt["data"] = {"manifest_sha256": "d" * 64}
(folder / "receipt.json").write_text(json.dumps(receipt))
settings = {"answers": "none", "limit": None, "curvature_rows": 8}
weights = os.environ.get("PLACEBO", "same") if folder.name.startswith("placebo") else "same"
(folder / "evaluation.json").write_text(json.dumps({"settings": settings, "metrics": {"weights_sha256": weights}}))
"""


def make_grid(tmp_path, monkeypatch):
    """GRID as g.yaml in the working directory, its runner in a hurry."""
    make_place(tmp_path, monkeypatch)
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(GRID))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    return load_grid("g.yaml")


def use_stand_ins(monkeypatch, before="", after=""):
    """Runs are STAND_IN from now on, with more code around it."""

    def arm_command(grid, cell):
        return [sys.executable, "-c", before + STAND_IN + after, str(run_folder(grid, cell))]

    monkeypatch.setattr(runner, "arm_command", arm_command)


def run(grid, jobs=3):
    console = Console(record=True, width=200, file=io.StringIO())
    return runner.run_local(grid, jobs, 1, console), console.export_text()


def ablate(monkeypatch, capsys, *arguments, jobs=3):
    """Exit code and output of the command. jobs None: its default."""
    given = [] if jobs is None else [f"--jobs={jobs}"]
    monkeypatch.setattr(sys, "argv", ["scripts.ablate", "g.yaml", *given, *arguments])
    code = command.main()
    return code, capsys.readouterr().out
