"""Filters such as `arm != "placebo" or train_fraction == 1`: a few operators over named values, nothing else."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import Any

from errors import InputError, nearest

COMPARE: dict[type[ast.cmpop], Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, among: value in among,
    ast.NotIn: lambda value, among: value not in among,
}


class Expression:
    """One filter. Raises InputError, at once for what is no expression and on use for a name that is not there."""

    def __init__(self, text: str, key: str = "--filter") -> None:
        self.text, self.key = text, key
        try:
            self._tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError):
            raise InputError(f'{key}: {text!r} is no expression; expected e.g. arm == "triple" and seed < 2') from None

    def __call__(self, names: Mapping[str, Any]) -> bool:
        try:
            return bool(self._value(self._tree, names))
        except TypeError as error:
            raise InputError(f"{self.key}: {self.text!r}: {error}") from None

    def _value(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        match node:
            case ast.BoolOp(op=ast.And(), values=values):
                return all(self._value(value, names) for value in values)
            case ast.BoolOp(op=ast.Or(), values=values):
                return any(self._value(value, names) for value in values)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._value(operand, names)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._value(operand, names)
            case ast.Compare(left=left, ops=ops, comparators=others):
                values = [self._value(value, names) for value in (left, *others)]
                pairs = zip(ops, values, values[1:])
                return all(COMPARE[type(op)](a, b) for op, a, b in pairs if self._known(op))
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [self._value(element, names) for element in elements]
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                if name not in names:
                    known = ", ".join(names)
                    raise InputError(f"{self.key}: unknown name {name}{nearest(name, names)}; expected one of {known}")
                return names[name]
        raise InputError(
            f"{self.key}: {ast.unparse(node)!r} cannot stand in a filter (names, numbers, text, and, or, not)"
        )

    def _known(self, op: ast.cmpop) -> bool:
        if type(op) not in COMPARE:
            raise InputError(f"{self.key}: {self.text!r}: expected one of == != < <= > >= in, not in")
        return True
