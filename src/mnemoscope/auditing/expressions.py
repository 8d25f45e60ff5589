"""Expressions of strangers' files: exact numbers, comparisons, and the few functions that are named here.

They are evaluated by the library simpleeval, from which attributes, subscripts, and all that builds text are taken out.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, overload

from mnemoscope.runs.errors import InputError

LONGEST_RANGE = 10**7
LONGEST, LARGEST, HIGHEST = 2_000, 10**30, 12  # characters of an expression, a number's parts, an exponent
REFUSED = (ast.Attribute, ast.Subscript, ast.JoinedStr, ast.FormattedValue, ast.Slice)


class Steps(Sequence[Fraction]):
    """Numbers from ``start`` on, below ``stop``, which are made when they are asked for."""

    def __init__(self, start: Fraction, stop: Fraction | None = None, step: Fraction = Fraction(1)) -> None:
        self.start, stop = (Fraction(0), start) if stop is None else (start, stop)
        if step <= 0:
            raise InputError(f"step: {step}; allowed is a number above 0")
        self.step, self._length = step, max(0, -int((self.start - stop) // step))
        if self._length > LONGEST_RANGE:
            raise InputError(f"range: {self._length} numbers; allowed are {LONGEST_RANGE}")

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> Fraction: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Fraction]: ...
    def __getitem__(self, place: int | slice) -> Fraction | Sequence[Fraction]:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        return self.start + self.step * range(self._length)[place]


def _number(value: Any) -> Fraction:
    if not isinstance(value, int | Fraction):
        raise InputError(f"{value!r} where a number is wanted")
    found = Fraction(value)
    if max(abs(found.numerator), found.denominator) > LARGEST:
        raise InputError("a number is too large")
    return found


def _of_numbers(act: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*values: Any) -> Any:
        found = act(*map(_number, values))
        return found if isinstance(found, bool) else _number(found)

    return checked


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or not 0 <= exponent <= HIGHEST:
        raise InputError(f"exponent {exponent}; allowed is a whole number up to {HIGHEST}")
    return base ** int(exponent)


def whole(value: Fraction) -> Fraction:
    """The number itself; InputError where it is not whole."""
    if value.denominator != 1:
        raise InputError(f"{value} where a whole number is wanted")
    return value


OPERATORS: dict[type, Callable[..., Any]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: _power, ast.USub: operator.neg},
    **{ast.Gt: operator.gt, ast.Lt: operator.lt, ast.GtE: operator.ge, ast.LtE: operator.le},
}
OPERATORS = {kind: _of_numbers(act) for kind, act in OPERATORS.items()}
OPERATORS |= {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Not: operator.not_}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "int": _of_numbers(lambda value: Fraction(int(value))),
    "float": _of_numbers(lambda value: value),
    "Fraction": _of_numbers(lambda value: value),
    "round": _of_numbers(lambda value, digits=Fraction(0): Fraction(round(value, int(digits)))),
    "is_int": _of_numbers(lambda value: value.denominator == 1),
    "ensure_int": _of_numbers(whole),
    "divides": _of_numbers(lambda value, by: value % by == 0),
}


class Expression:
    """One expression, read once; InputError where it is none, or holds what is not allowed."""

    def __init__(self, text: str, functions: Mapping[str, Callable[..., Any]] | None = None) -> None:
        try:
            from simpleeval import SimpleEval
        except ImportError as error:
            raise InputError("expression: needs simpleeval: pip install 'mnemoscope[audit]'") from error
        self.text = text.strip()
        if len(self.text) > LONGEST:
            raise InputError(f"expression: {len(self.text)} characters; at most {LONGEST} are read")
        self._evaluator = SimpleEval(operators=OPERATORS, functions={**FUNCTIONS, **(functions or {})}, names={})
        for node in REFUSED:
            self._evaluator.nodes.pop(node, None)
        self._evaluator.nodes |= {ast.List: self._each, ast.Tuple: self._each, ast.Constant: _constant}
        self._tree = self._guarded(lambda: SimpleEval.parse(self.text))

    def __call__(self, names: Mapping[str, Any] | None = None) -> Any:
        """Its value: a ``Fraction``, a text, a truth value, or a list of these."""
        self._evaluator.names = dict(names or {})
        return self._guarded(lambda: self._evaluator.eval(self.text, previously_parsed=self._tree))

    def _each(self, node: Any) -> list[Any]:
        return [self._evaluator._eval(one) for one in node.elts]

    def _guarded(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except InputError as error:
            raise InputError(f"expression: {self.text[:80]!r}: {error}") from error
        except Exception as error:  # whatever a stranger's expression makes of Python's parser or arithmetic
            raise InputError(f"expression: {self.text[:80]!r} cannot be evaluated ({type(error).__name__})") from error


def _constant(node: Any) -> Any:
    value = node.value
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return _number(Fraction(str(value)))
    raise InputError(f"{value!r} is no number and no text")
