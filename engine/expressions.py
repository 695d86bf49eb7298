"""Sizes as expressions of the batch, as plain data: what sympy said, without sympy.

    Expression("floor", (Expression("times", (BATCH, 3)), 2))      is 3n // 2

Made by `from_sympy` when a forward is captured for any batch; `value` puts the number of images in. It counts
with whole numbers and fractions, so nothing is rounded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import Any, Union

Number = int | Fraction
Operand = Union["Expression", int]

MOST_POWER = 64  # a size is far below 2^64


@dataclass(frozen=True, slots=True)
class Expression:
    """An operation of OPERATIONS and its operands. "batch" has none."""

    op: str
    operands: tuple[Operand, ...] = ()

    def value(self, batch: int) -> Number:
        """ZeroDivisionError where it has none for this batch."""
        if self.op == "batch":
            return batch
        return OPERATIONS[self.op](
            *(one.value(batch) if isinstance(one, Expression) else one for one in self.operands)
        )


BATCH = Expression("batch")


def _power(base: Number, exponent: Number) -> Number:
    if Fraction(exponent).denominator != 1 or abs(exponent) > MOST_POWER:
        raise ZeroDivisionError(f"{base} to the power of {exponent} is no size")
    return Fraction(base) ** int(exponent)


def _modular(base: Number, divisor: Number, modulus: Number) -> Number:
    return base // divisor % modulus


OPERATIONS: dict[str, Callable[..., Number]] = {
    "plus": lambda *terms: sum(terms),
    "times": lambda *factors: reduce(operator.mul, factors, 1),
    "divide": lambda a, b: Fraction(a) / b,
    "power": _power,
    "floor": lambda a, b: a // b,
    "ceil": lambda a, b: -(-a // b),
    "modulo": lambda a, b: a % b,
    "modular": _modular,
    "least": min,
    "most": max,
    "absolute": abs,
    "round down": math.floor,
    "round up": math.ceil,
    "truncate": math.trunc,
    "equal": operator.eq,
    "differ": operator.ne,
    "less": operator.lt,
    "less or equal": operator.le,
    "greater": operator.gt,
    "greater or equal": operator.ge,
    "all": lambda *conditions: all(conditions),
    "any": lambda *conditions: any(conditions),
    "not": operator.not_,
}

# sympy's classes, and those that PyTorch has added, by name.
_NAMES = {
    "Add": "plus", "Mul": "times", "Pow": "power", "PowByNatural": "power",
    "FloorDiv": "floor", "CleanDiv": "floor", "CeilDiv": "ceil",
    "Mod": "modulo", "PythonMod": "modulo", "ModularIndexing": "modular",
    "Min": "least", "Max": "most", "Abs": "absolute",
    "floor": "round down", "ceiling": "round up", "FloorToInt": "round down", "CeilToInt": "round up",
    "TruncToInt": "truncate",
    "Equality": "equal", "Unequality": "differ", "StrictLessThan": "less", "LessThan": "less or equal",
    "StrictGreaterThan": "greater", "GreaterThan": "greater or equal",
    "And": "all", "Or": "any", "Not": "not",
}  # fmt: skip


def from_sympy(expression: Any, symbol: Any) -> Expression:
    """ValueError where it holds something that OPERATIONS has no word for."""
    found = _operand(expression, symbol)
    return found if isinstance(found, Expression) else Expression("plus", (found,))


def _operand(expression: Any, symbol: Any) -> Operand:
    if expression == symbol:
        return BATCH
    if expression.is_Integer:
        return int(expression)
    if type(expression).__name__ in ("BooleanTrue", "BooleanFalse"):
        return int(bool(expression))
    if expression.is_Rational:
        return Expression("divide", (int(expression.p), int(expression.q)))
    name = _NAMES.get(type(expression).__name__)
    if name is None or not expression.args:
        raise ValueError(f"{expression}, a {type(expression).__name__}, is no size of a batch")
    return Expression(name, tuple(_operand(argument, symbol) for argument in expression.args))
