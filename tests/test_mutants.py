"""The registry is whole and the unpatched code passes; a seeded handful of mutants dies (all: `make mutants`)."""

import inspect
import random
import subprocess
import sys

import pytest

from tests.mutants.__main__ import pick, run
from tests.mutants.patching import Rewrite
from tests.mutants.registry import MUTANTS, controls
from tests.mutants.trial import ROOT, Trial, applied, try_mutant

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


def test_there_are_many_and_each_names_what_kills_it():
    assert len(MUTANTS) >= 30 and len(BY_NAME) == len(MUTANTS)
    assert len({mutant.patches for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.patches and mutant.fault and mutant.check
        if mutant.suite_test is not None:
            path, name = mutant.suite_test.split("::")
            assert f"def {name}(" in (ROOT / path).read_text(), mutant.name


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_changes_the_code_and_is_taken_out_again(mutant):
    """The replaced text still stands in the code exactly once: no later edit has turned a fault into nothing."""
    rewrites = [patch for patch in mutant.patches if isinstance(patch, Rewrite)]
    before = [inspect.unwrap(rewrite.function).__code__ for rewrite in rewrites]
    with applied(mutant.patches):
        inside = [inspect.unwrap(rewrite.function).__code__ for rewrite in rewrites]
        assert all(a is not b for a, b in zip(before, inside, strict=True))
    assert [inspect.unwrap(rewrite.function).__code__ for rewrite in rewrites] == before


def test_a_fault_that_finds_no_text_to_change_is_an_error():
    def honest():
        return 1 + 1

    for old in ("return 2", "1"):
        with pytest.raises(AssertionError, match="times, not once"):
            with Rewrite(honest, old, "0").applied():
                pass


def test_the_unpatched_run_passes_and_two_faults_die():
    with Trial() as trial:
        silence, verdict = trial.silence(), trial.guarded()
        assert silence.ok and not verdict.killed_by and verdict.error is None, (silence, verdict)
        for name in ("detached", "term times zero"):
            silence, verdict = try_mutant(trial, BY_NAME[name])
            assert silence.ok and verdict.killed_by == [BY_NAME[name].check], (name, silence, verdict)


def test_a_survivor_is_counted_and_fails_the_run(capsys):
    """A fault with a check that cannot see it: what the runner must be able to say."""
    from dataclasses import replace

    blind = replace(BY_NAME["detached"], check="causality")
    assert run([blind], markdown=True, all_controls=False) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "mutants: 0 killed, 1 survived"
    assert "causality did not notice (collector did)" in printed.err


@pytest.mark.slow
def test_a_handful_through_the_command():
    chosen = random.Random(7).sample(sorted(BY_NAME), 12)
    assert [mutant.name for mutant in pick(chosen)] == chosen
    line = [sys.executable, "-m", "tests.mutants", "--only", *chosen]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "mutants: 12 killed, 0 survived"


def test_every_control_is_known():
    runs, tests = controls()
    assert () in runs and all("::" in test for test in tests)
