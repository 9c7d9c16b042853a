"""No code of ours evaluates text or unpickles bytes: what is loaded is JSON, YAML's plain values, or tensors."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "blocks", "losses", "data", "training", "analysis", "scripts")
# A test of attacks has to make the pickle that must not run.
MAKES_PAYLOADS = {"scripts/chaos/pickles.py"}
CALLS = {
    "eval",
    "exec",
    "__import__",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.save",
    "joblib.load",
    "dill.load",
    "cloudpickle.load",
    "marshal.loads",
    "shelve.open",
    "OmegaConf.register_new_resolver",
}


def dangers(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [
                name for name in names if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal", "shelve")
            ]
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in CALLS:
                found.append(name)
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if name.endswith(("np.load", "numpy.load", "np.lib.format.read_array")) and "allow_pickle" in keywords:
                found.append(f"{name} with allow_pickle")
            if keywords.get("shell") == "True" or name in ("os.system", "os.popen"):
                found.append(f"{name}: a shell")
            if keywords.get("trust_remote_code") not in (None, "False"):
                found.append("trust_remote_code")
    return found


def files():
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))
    yield from (ROOT / name for name in ("train.py", "errors.py"))


def test_no_file_of_ours_evaluates_or_unpickles():
    found = {str(path.relative_to(ROOT)): dangers(path.read_text()) for path in files()}
    found = {name: what for name, what in found.items() if what}
    assert {name: what for name, what in found.items() if name not in MAKES_PAYLOADS} == {}
    assert found == {"scripts/chaos/pickles.py": ["pickle"]}  # and that one only makes them
    text = (ROOT / "scripts/chaos/pickles.py").read_text()
    assert "pickle.load" not in text and "Unpickler" not in text


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "exec(x)",
        "import pickle",
        "from pickle import loads",
        "import yaml; yaml.load(x)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=flag)",
    ],
)
def test_the_search_finds_what_it_is_for(code):
    assert dangers(code)


def test_the_search_leaves_the_harmless_alone():
    assert not dangers("model.eval(); torch.load(p, weights_only=True); yaml.safe_load(t); np.load(p); re.compile('x')")
