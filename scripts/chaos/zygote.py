"""Processes that are ready to train: imports and kernels are loaded once, then every start is a fork.

A start of `train.py` costs 3 to 6 s, nearly all of it imports; a fork of a process that has them costs about 1 s. What
is forked runs `train.main()` with the arguments of the command line, in a process of its own that is really killed.
Forking is safe here as nothing runs in the parent: one thread, numba's own pool instead of OpenMP's (which refuses).
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.chaos.place import Place, environment

WARM = "warm"
# No run here takes a tenth of it, on any machine.
HUNG_SECONDS = 300.0


class Zygote:
    """The caller's end: one child at a time. A context manager."""

    def __init__(self, place: Place, number: int = 0) -> None:
        self.place, self.number = place, number
        self.log = place.folder / f"zygote-{number}.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.chaos.zygote", f"{WARM}-{number}"],
            cwd=place.folder,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(place.folder / f"zygote-{number}.err").open("w"),
            bufsize=0,  # an answer that waits in a buffer would be invisible to select
        )
        self.seconds = float(self._answer()["seconds"])
        self.pid: int | None = None

    def start(self, run_id: str, *overrides: str, fault: str = "none") -> int:
        """Forks `train.py tiny.yaml run_id=... overrides`; returns its pid. fault: a name in scripts.chaos.faults."""
        return self._fork([f"run_id={run_id}", *overrides], fault)

    def start_bare(self, *overrides: str) -> tuple[int, str]:
        """Without a run id; waits."""
        self._fork(list(overrides), "none")
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """The child's exit code (negative: the signal that ended it; SIGABRT: it hung) and all that it said."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], HUNG_SECONDS)[0] and self.pid is not None:
            os.kill(self.pid, signal.SIGABRT)
        code = int(self._answer()["code"])
        self.pid = None
        return code, self.log.read_text(errors="replace")

    def run(self, run_id: str, *overrides: str, fault: str = "none") -> tuple[int, str]:
        self.start(run_id, *overrides, fault=fault)
        return self.wait()

    def warm_up(self) -> None:
        """Measures `seconds`, of one undisturbed run in a fork: the first run loads the kernels, a fork has them."""
        began = time.monotonic()
        code, said = self.run(f"{WARM}-{self.number}-fork")
        if code:
            raise RuntimeError(f"a forked run failed: {said[-400:]}")
        self.seconds = time.monotonic() - began

    def is_done(self) -> bool:
        """Whether the child has ended, without waiting for it."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(timeout=60)

    def _fork(self, overrides: list[str], fault: str) -> int:
        self._ask({"arguments": ["tiny.yaml", *overrides], "log": str(self.log), "fault": fault})
        self.pid = int(self._answer()["pid"])
        return self.pid

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the zygote died; see {self.place.folder}")
        return dict(json.loads(line))


def serve(warm: str) -> None:
    """The other end: answers on the inherited stdout; children write to their own log."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    import train
    from scripts.chaos import faults  # noqa: F401 - loaded before the forks, as all else
    from training import hardware

    # a measured speed that only `gemm_share` shows, 0.3 s per start
    hardware.gemm_gflops = lambda *_, **__: 100.0
    began = time.monotonic()
    sys.argv = ["train.py", "tiny.yaml", f"run_id={warm}"]
    train.main()
    answers.write(json.dumps({"seconds": time.monotonic() - began}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the child is where a command would be: in main
        pid = os.fork()
        if pid == 0:
            _child(request)
        answers.write(json.dumps({"pid": pid}) + "\n")
        _, status = os.waitpid(pid, 0)
        answers.write(json.dumps({"code": os.waitstatus_to_exitcode(status)}) + "\n")


def _child(request: dict[str, Any]) -> None:
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from numba.np.ufunc import parallel

        import train
        from errors import exit_with
        from scripts.chaos.faults import FAULTS

        # numba shares this lock with its forks: a killed one would keep it from all that come later
        parallel._backend_init_process_lock = None
        FAULTS[request["fault"]]()
        sys.argv = ["train.py", *request["arguments"]]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exit_with(train.main)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except KeyboardInterrupt:  # between two lines of this function
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    assert Path("tiny.yaml").is_file()
    serve(sys.argv[1])
