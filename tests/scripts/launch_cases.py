"""The launcher's commands in this process, and run folders without a run."""

import contextlib
import io
import json
import sys

import pytest
from tiny_run import ROOT

from errors import InputError
from scripts.launch import __main__ as command
from training.config import RunConfig


def launch(*arguments, code=0):
    """In this process; what it starts is a process of its own all the same."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["scripts.launch", *arguments])
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            ended = command.main()
        except InputError as error:
            ended = 2
            said.write(f"{error}\n")
    assert ended == code, said.getvalue()
    return said.getvalue()


def write_run(folder, **receipt):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(RunConfig().to_yaml())
    (folder / "receipt.json").write_text(json.dumps({"config_sha256": RunConfig().sha256, **receipt}))
    return folder
