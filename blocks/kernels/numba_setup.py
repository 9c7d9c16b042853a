"""What Numba's compiler and cache do not do by themselves, so that the same source always gives the same bits.

Own copies: Numba links the code of callees into every caller as `linkonce_odr`: one copy for all, whichever was loaded
first. The copies are optimised where they stand and round differently under FASTMATH, so what ran depended on what the
process had compiled or loaded before: the first run on a machine, which compiles, differed in its last bits from all
later ones, which load the cache. Here each compiled function runs its own copies of the functions that it calls.

All sources: the cache knows a function by the file that it stands in, and not by those of its callees. Here it knows it
by every file of this folder too, this one among them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llvmlite.binding import Linkage
from numba.core.caching import _SourceFileBackedLocatorMixin
from numba.core.codegen import CPUCodeLibrary

FOLDER = Path(__file__).resolve().parent
SOURCES = hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(FOLDER.glob("[!.]*.py")))).hexdigest()

_optimize: Any = CPUCodeLibrary._optimize_final_module
_own_stamp: Any = _SourceFileBackedLocatorMixin.get_source_stamp


def _optimize_with_own_copies(library: Any) -> None:
    for function in library._final_module.functions:
        if function.linkage == Linkage.linkonce_odr:
            function.linkage = "internal"
    _optimize(library)


def _stamp_of_all_sources(locator: Any) -> Any:
    stamp = _own_stamp(locator)
    ours = Path(locator._py_file).resolve().is_relative_to(FOLDER.parents[1])
    return (stamp, SOURCES) if ours else stamp


CPUCodeLibrary._optimize_final_module = _optimize_with_own_copies  # type: ignore[method-assign]
_SourceFileBackedLocatorMixin.get_source_stamp = _stamp_of_all_sources  # type: ignore[method-assign]
