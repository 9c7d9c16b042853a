"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass

from tests.mutants.patching import Patch


@dataclass(frozen=True)
class Mutant:
    """One wiring fault.

    fault: what somebody did, in words. patches: what that changes in the real code. check: what must notice, by name: a
    check of preflight (before the first step or at the opening of the gate), "evidence" (the gradients that a running
    step shows), "never live" (the end of a run), or a test of the suite as path::name. overrides: of the tiny run's
    config, where the fault needs them; the unpatched run with the same ones has to pass.
    """

    name: str
    fault: str
    patches: tuple[Patch, ...]
    check: str
    overrides: tuple[str, ...] = ()

    @property
    def suite_test(self) -> str | None:
        return self.check if "::" in self.check else None
