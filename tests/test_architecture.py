"""Imports point one way, and nothing that only some machines have is loaded on the way to a training step."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# package -> what it may import; errors is open to all
ARROWS = {
    "blocks/kernels": {"blocks.kernels"},
    "blocks": {"blocks"},
    "model": {"model", "blocks"},
    "losses": {"losses", "model", "blocks"},
    "data": {"data"},
    "training": {"training", "model", "losses", "data", "blocks"},
    "analysis": {"analysis", "model", "losses", "data", "blocks"},
    "scripts": {"scripts", "training", "analysis", "model", "losses", "data", "blocks", "train"},
}
OWN = {"blocks", "model", "losses", "data", "training", "analysis", "scripts", "train", "tests"}
OPTIONAL = {"mamba_ssm", "causal_conv1d", "triton", "wandb", "plotly", "transformers", "optuna"}


def runtime_imports(path):
    """Modules that a file imports, left out what is for type checkers only."""
    tree = ast.parse(path.read_text())
    hidden = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            hidden |= {id(child) for statement in node.body for child in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def files(package):
    found = sorted((ROOT / package).rglob("*.py"))
    return [path for path in found if package != "blocks" or path.parent.name != "kernels"]


@pytest.mark.parametrize("package", ARROWS)
def test_imports_point_one_way(package):
    for path in files(package):
        for module in runtime_imports(path):
            if module.split(".")[0] in OWN:
                allowed = any(module == name or module.startswith(f"{name}.") for name in ARROWS[package])
                assert allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_losses_and_analysis_take_tensors_not_models():
    for package in ("losses", "analysis"):
        for path in files(package):
            modules = set(runtime_imports(path))
            assert not modules & {"model.hybrid", "training.config", "model.generate"}, path


def test_the_model_knows_nothing_of_parallelism():
    for package in ("model", "blocks", "blocks/kernels", "losses"):
        for path in files(package):
            assert not [module for module in runtime_imports(path) if module.startswith("torch.distributed")], path


def test_the_cpu_path_loads_no_optional_package():
    code = "import sys, train, losses.stp, model.hybrid; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not OPTIONAL & set(ast.literal_eval(done.stdout))


def test_train_py_fits_in_one_sitting():
    assert len((ROOT / "train.py").read_text().splitlines()) < 250


def test_cores_are_asked_for_in_one_place():
    """Those that this process may use (an affinity, a Slurm step), not those that the machine has."""
    paths = [ROOT / "train.py", *(path for package in ARROWS for path in files(package))]
    asked = {path.name for path in paths if any(w in path.read_text() for w in ("cpu_count", "sched_getaffinity"))}
    assert asked == {"workers.py"}
