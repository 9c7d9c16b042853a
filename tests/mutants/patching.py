"""Cuts faults into the real code at run time, so that whoever holds the function already runs the changed one."""

from __future__ import annotations
import __future__

import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any


@dataclass(frozen=True)
class Rewrite:
    """The source of `function` with `old` replaced by `new` (and `also`, more such pairs).

    `old` must stand there exactly once, so that a later edit of the code cannot turn the fault into nothing.
    """

    function: Callable[..., Any]
    old: str
    new: str
    also: tuple[tuple[str, str], ...] = ()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        target = inspect.unwrap(self.function)
        assert isinstance(target, FunctionType), f"{self.function} is no plain function"
        honest = target.__code__
        target.__code__ = self._changed(target)
        try:
            yield
        finally:
            target.__code__ = honest

    def _changed(self, target: FunctionType) -> Any:
        source = textwrap.dedent(inspect.getsource(target))
        source = source[source.index("def ") :] if not source.startswith("def ") else source
        for old, new in ((self.old, self.new), *self.also):
            found = source.count(old)
            assert found == 1, f"{target.__module__}.{target.__qualname__} holds {old!r} {found} times, not once"
            source = source.replace(old, new)
        name = f"{target.__module__}.{target.__qualname__} (mutant)"
        flags = __future__.annotations.compiler_flag
        namespace = dict(target.__globals__)
        exec(compile(source, name, "exec", flags=flags), namespace)
        changed = namespace[target.__name__].__code__
        assert changed.co_freevars == target.__code__.co_freevars, f"{name}: closures cannot be changed"
        return changed


@dataclass(frozen=True)
class Replace:
    """`name` of a module or class becomes make(what it was)."""

    owner: Any
    name: str
    make: Callable[[Any], Any]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        honest = inspect.getattr_static(self.owner, self.name)
        setattr(self.owner, self.name, self.make(getattr(self.owner, self.name)))
        try:
            yield
        finally:
            setattr(self.owner, self.name, honest)


Patch = Rewrite | Replace
