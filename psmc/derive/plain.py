"""A recurrence with fewer operators, for the classes that would see through it: the maps stay the same.

clamp and relu become min and max, -max(-x, -y) a minimum, and a factor that is 0 or 1, such as (1 - reset) of a whole
number reset in [0, 1], the choice that it makes.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from psmc.algebra.interval_math import contains
from psmc.derive.semiring import IsState, negated
from psmc.derive.simplify import ONE, ZERO, make
from psmc.ir import Expr, Interval, Op
from psmc.ir.rewrite import refs, transform

Bounds = Callable[[Expr], Interval]
_UNIT = Interval(Fraction(0), Fraction(1), False, False)


def plain(root: Expr, is_state: IsState, bounds: Bounds) -> Expr:
    """`root`, rewritten wherever it reads the state."""

    def reads(node: Expr) -> bool:
        return any(is_state(r) for r in refs(node))

    def rule(node: Expr) -> Expr | None:
        match node:
            case Op(op="clamp", args=(x, lo, hi)) if reads(x):
                return make("min", make("max", x, lo), hi)
            case Op(op="relu", args=(x,)) if reads(x):
                return make("max", x, ZERO)
            case Op(op="neg", args=(Op(op="max" | "min") as inner,)) if reads(inner):
                return negated(inner)
            case Op(op="mul", args=(a, b)) if reads(a) != reads(b):
                factor, other = (b, a) if reads(a) else (a, b)
                found = _gate(factor, bounds)
                return None if found is None else _chosen(found[0], make("mul", found[1], other))
        return None

    return transform(root, rule)


def _gate(factor: Expr, bounds: Bounds) -> tuple[Expr, Expr] | None:
    """(gate, rest): a factor of `factor` that is 0 or 1, and the product of the others."""
    if factor.kind == "int" and contains(_UNIT, bounds(factor)):
        return factor, ONE
    match factor:
        case Op(op="mul", args=(a, b)):
            if (found := _gate(a, bounds)) is not None:
                return found[0], make("mul", found[1], b)
            if (found := _gate(b, bounds)) is not None:
                return found[0], make("mul", a, found[1])
    return None


def _chosen(gate: Expr, other: Expr) -> Expr:
    """gate * other, of a gate that is 0 or 1."""
    match gate:
        case Op(op="sub", args=(left, right)) if left == ONE:
            return make("where", Op("gt", (right, ZERO)), ZERO, other)
    return make("where", Op("gt", (gate, ZERO)), other, ZERO)
