"""Processes that tokenise parts: `python -m data.workers TOKENIZER`, fed part by part over a pipe.

They end with the process that started them, however that ends, since their pipe ends then. They load neither torch nor
what started them (multiprocessing would import the main module, which may be train.py, in each).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from data import parts
from data.parts import Part
from data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """A context manager. finished_bytes: of text in the parts that are done."""

    def __init__(self, count: int, tokenizer: Path) -> None:
        self.finished_bytes = 0
        self._command = [sys.executable, "-m", "data.workers", str(tokenizer.resolve())]
        self._count = count
        self._idle: list[subprocess.Popen[bytes]] = []
        self._busy: dict[subprocess.Popen[bytes], int] = {}
        self._answers = selectors.DefaultSelector()

    def __enter__(self) -> Workers:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        for _ in range(self._count):
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._idle.append(process)
            assert process.stdout is not None
            self._answers.register(process.stdout, selectors.EVENT_READ, process)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._answers.close()
        for process in [*self._idle, *self._busy]:
            if kind is not None:
                process.kill()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # it is dead, which has been said
                    pipe.close()
            process.wait()

    def give(self, part: Part, path: Path, digest: str) -> None:
        """Hands a part to a process that is free, after waiting for one. Raises OSError (its own, or a process's)."""
        while not self._idle:
            self._wait()
        process = self._idle.pop()
        assert process.stdin is not None
        task = {"path": str(path.resolve()), "digest": digest, "n_bytes": len(part.payload)}
        self._busy[process] = part.n_bytes
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.write(part.payload)
            process.stdin.flush()
        except BrokenPipeError:
            raise _dead(process) from None

    def wait(self) -> bool:
        """Waits until something more is done. False: nothing is at work any more."""
        if not self._busy:
            return False
        self._wait()
        return True

    def _wait(self) -> None:
        for key, _ in self._answers.select():
            process: subprocess.Popen[bytes] = key.data
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise _dead(process)
            answer: dict[str, Any] = json.loads(line)
            if "errno" in answer:
                raise OSError(answer["errno"], answer["strerror"], answer["filename"])
            self.finished_bytes += self._busy.pop(process)
            self._idle.append(process)


def _dead(process: subprocess.Popen[bytes]) -> RuntimeError:
    return RuntimeError(f"a tokenising process ended with {process.wait()}; start again: its part alone is done again")


def main(model: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the process that feeds this one decides
    tokenizer = Tokenizer.load(model)
    for line in sys.stdin.buffer:
        task = json.loads(line)
        payload = sys.stdin.buffer.read(task["n_bytes"])
        if len(payload) < task["n_bytes"]:
            return  # what feeds this process was killed
        answer: dict[str, Any] = {}
        try:
            parts.save(Path(task["path"]), parts.tokenise(parts.unpack(payload), tokenizer), task["digest"])
        except OSError as error:
            answer = {"errno": error.errno, "strerror": error.strerror, "filename": error.filename}
        try:
            print(json.dumps(answer), flush=True)
        except BrokenPipeError:  # nobody waits for it any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return


if __name__ == "__main__":
    main(sys.argv[1])
