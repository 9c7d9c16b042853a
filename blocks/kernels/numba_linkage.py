"""Each compiled Numba function runs its own copies of the functions that it calls: its bits are always the same.

Numba links the code of callees into every caller as `linkonce_odr`: one copy for all, whichever was loaded first. The
copies are optimised where they stand and round differently under FASTMATH, so what ran depended on what the process
had compiled or loaded before: the first run on a machine, which compiles, differed in its last bits from all later
ones, which load the cache. Private copies make them equal (tests/blocks/test_numba_cache.py).
"""

from __future__ import annotations

from typing import Any

from llvmlite.binding import Linkage
from numba.core.codegen import CPUCodeLibrary

_optimize: Any = CPUCodeLibrary._optimize_final_module


def _optimize_with_own_copies(library: Any) -> None:
    for function in library._final_module.functions:
        if function.linkage == Linkage.linkonce_odr:
            function.linkage = "internal"
    _optimize(library)


CPUCodeLibrary._optimize_final_module = _optimize_with_own_copies  # type: ignore[method-assign]
