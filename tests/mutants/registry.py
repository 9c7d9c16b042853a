"""All mutants, in the order of the table."""

from __future__ import annotations

from tests.mutants import block_faults, collector_faults, loop_faults, objective_faults, wrapper_faults
from tests.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *collector_faults.MUTANTS,
    *block_faults.MUTANTS,
    *objective_faults.MUTANTS,
    *loop_faults.MUTANTS,
    *wrapper_faults.MUTANTS,
)


def controls() -> tuple[list[tuple[str, ...]], list[str]]:
    """What the unpatched code has to pass: runs with every set of overrides in use, and every test in use."""
    runs = list(dict.fromkeys(mutant.overrides for mutant in MUTANTS))
    tests = list(dict.fromkeys(mutant.suite_test for mutant in MUTANTS if mutant.suite_test is not None))
    return runs, tests
