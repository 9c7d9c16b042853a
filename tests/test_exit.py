"""How the commands end: what `errors.exit_with` makes of a pipe that nobody reads any more."""

import os
import subprocess
import sys

from tiny_run import ROOT


def piped(body, *, keep):
    """Runs `def main(): body` and closes its stdout after one line (keep: reads it to the end). Exit code, stderr."""
    code = f"import os, sys, errors\ndef main():\n{body}\nerrors.exit_with(main)"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        job.stdout.readline()
        if keep:
            job.stdout.read()
        job.stdout.close()
        return job.wait(60), job.stderr.read()


def test_a_reader_that_has_enough_ends_a_command_quietly():
    """As `head` does: the shell's code for a broken pipe, and not a word."""
    assert piped(" while True: print('line', flush=True)", keep=False) == (141, "")


def test_what_was_not_written_yet_is_dropped_as_quietly():
    assert piped(" print('one', flush=True)\n while True: sys.stdout.write('line')", keep=False) == (141, "")


def test_another_broken_pipe_is_a_bug():
    code, said = piped(" print('one')\n end, start = os.pipe()\n os.close(end)\n os.write(start, b'x')", keep=True)
    assert code == 1 and "BrokenPipeError" in said
