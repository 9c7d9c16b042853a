import ast
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import doctor

ROOT = Path(__file__).parents[2]


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_doctor_says_what_is_used_and_imports_no_cuda_package():
    done = python(
        "import sys, scripts.doctor; code = scripts.doctor.main();"
        "assert not {'mamba_ssm', 'causal_conv1d', 'triton'} & set(sys.modules), 'imported'; sys.exit(code)"
    )
    assert done.returncode == 0, done.stderr
    for word in ("torch", "mamba-ssm", "a run here uses: cpu", "attention", "m2rnn", "mamba2"):
        assert word in done.stdout


def without(*packages):
    """Code that makes packages look as if they were not installed."""
    return (
        f"import importlib.metadata as m, sys; gone = {packages!r}; real = m.version\n"
        "def version(name):\n"
        "    if name in gone: raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version; sys.modules.update(dict.fromkeys(gone))\n"
    )


@pytest.mark.parametrize("package", ["filelock", "rich", "torch"])
def test_the_table_is_shown_whatever_is_missing(package):
    done = python(without(package) + "import scripts.doctor; sys.exit(scripts.doctor.main())")
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == [package]]
    assert "MISSING: make setup" in line and "every run" in line
    assert "causal-conv1d" in done.stdout and "Traceback" not in done.stderr


def test_training_starts_and_the_doctor_agrees_without_what_only_reports_need():
    gone = without(*doctor.OPTIONAL)
    done = python(f"{gone}import train, scripts.doctor; sys.exit(scripts.doctor.main())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not installed") == len(doctor.OPTIONAL) and "MISSING" not in done.stdout


def test_every_package_that_is_imported_is_listed_and_what_training_imports_as_such():
    """requirements.in against the imports of the code: those at the top of a module of training are of every run."""
    lines = (ROOT / "requirements.in").read_text().split("# development")[0].splitlines()
    direct = {"torch", *(line.split()[0] for line in lines if line[:1].isalpha())}
    inner = ["train.py", *(str(p.relative_to(ROOT)) for n in ("training", "model", "losses", "data", "blocks")
                           for p in (ROOT / n).rglob("*.py"))]  # fmt: skip
    outer = [str(p.relative_to(ROOT)) for name in ("analysis", "scripts") for p in (ROOT / name).rglob("*.py")]
    always = set().union(*(imports(ROOT / name, top=True) for name in inner)) & direct
    ever = set().union(*(imports(ROOT / name, top=False) for name in inner + outer)) & direct
    assert always == set(doctor.BASE)
    assert ever <= {*doctor.BASE, *doctor.OPTIONAL}


def imports(path, top):
    """Names of the packages that a file imports; top: not inside a function."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found
