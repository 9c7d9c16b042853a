"""The environments of the peers that AMER is compared with: python -m scripts.peers [hf|kernels]

Each is a virtual environment of its own under .venvs/, because transformers changes its behaviour where mamba-ssm can
be imported. It sees this project's packages through a .pth file and adds only the peer: no second torch.
Made on first use; remove the folder to make it again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from errors import InputError, exit_with

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venvs"
BUILD_TOOLS = ("setuptools==80.9.0", "wheel==0.45.1", "packaging==25.0", "ninja==1.13.0")
# environment -> pip install lines, in order
ENVIRONMENTS: dict[str, list[list[str]]] = {
    "hf": [["transformers==5.24.0", "mambapy==1.2.0"]],
    "kernels": [
        [*BUILD_TOOLS, "triton==3.9.0"],
        ["--no-build-isolation", "--no-deps", "mamba-ssm==2.3.2.post1", "causal-conv1d==1.7.0"],
    ],
}
# Without a CUDA compiler only the Python and Triton parts of these packages are built.
SKIP_CUDA = {
    "MAMBA_FORCE_BUILD": "TRUE",
    "MAMBA_SKIP_CUDA_BUILD": "TRUE",
    "CAUSAL_CONV1D_FORCE_BUILD": "TRUE",
    "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE",
}


def interpreter(name: str) -> Path:
    """The Python of a peer's environment, made first if need be. Raises InputError when it cannot be made."""
    folder = HOME / name
    python, ready = folder / "bin" / "python", folder / ".ready"
    lines = ENVIRONMENTS[name]
    wanted = "\n".join(" ".join(line) for line in lines) + f"\n{sysconfig.get_paths()['purelib']}\n"
    if ready.exists() and ready.read_text() == wanted:
        return python
    print(f"making the environment of the peers '{name}' in {folder.relative_to(ROOT)} (once)", file=sys.stderr)
    try:
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        own = folder / "lib" / version / "site-packages"
        (own / "amer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        for line in lines:
            _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", _torch_pin(), *line])
    except subprocess.CalledProcessError as error:
        raise InputError(
            f"peers {name}: {' '.join(error.cmd)} failed with exit code {error.returncode}; "
            "the package index must be reachable the first time"
        ) from None
    ready.write_text(wanted)
    return python


def _torch_pin() -> str:
    """Whatever a peer asks for, torch stays the one that this project runs on."""
    from importlib.metadata import version

    return f"torch=={version('torch').split('+')[0]}"


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **SKIP_CUDA})


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the environments of the peers.")
    parser.add_argument("names", nargs="*", help="hf, kernels; default: both")
    names = parser.parse_args().names or list(ENVIRONMENTS)
    for name in names:
        if name not in ENVIRONMENTS:
            raise InputError(f"peers: expected one of {', '.join(ENVIRONMENTS)}, got {name!r}")
        print(interpreter(name))
    return 0


if __name__ == "__main__":
    exit_with(main)
