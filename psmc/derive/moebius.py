"""Fractional-linear maps s ↦ (a s + b) / (c s + d): continued fractions, scalar Riccati and Kalman variances.

They compose as their matrices do, up to a factor. An element is normalised so that d is 1 at a base point p,
s ↦ (a (s - p) + s_p) / (c (s - p) + 1), where s_p is its value there: nothing grows that does not grow in the map. Let
n = c_r (s_l - p) + 1; then a = (a_r (a_l - p c_l) + s_r c_l) / n, c = (c_r (a_l - p c_l) + c_l) / n,
s = (a_r (s_l - p) + s_r) / n. Every token's map must have a value at p, so c p + d must be known not to be 0.
Lakshmivarahan & Dhall 1994, "Parallel computing using the prefix problem", ch. 3, has the matrix form.
"""

from __future__ import annotations

from collections.abc import Callable

from psmc.derive.group import VALUE, Maps, Parameter, Values
from psmc.derive.rational import Quotient, coefficient, quotient
from psmc.derive.semiring import IsState, NotAffineError
from psmc.derive.simplify import ONE, ZERO, make
from psmc.ir import Assign, Const, Expr, Kind

Known = Callable[[Expr], bool]
Matrix = tuple[Expr, Expr, Expr, Expr]  # a, b, c, d


class MayVanishError(NotAffineError):
    """It would be, were the denominator `node` known not to be 0."""


def moebius(update: Assign, start: Expr, kind: Kind, is_state: IsState, positive: Known) -> Maps:
    """The map of one component. Raises NotAffineError."""
    a, b, c, d = matrix(update.value, is_state)
    points = [x for x in (start, ZERO, ONE) if isinstance(x, Const)]
    for p in dict.fromkeys(points):
        below = make("add", make("mul", c, p), d)
        if positive(below) or positive(make("neg", below)):
            return _maps(update, kind, p, (a, b, c, d), below)
    raise MayVanishError(
        make("add", make("mul", c, points[0]), d), "a denominator that is not known to be other than 0 at any start"
    )


def _maps(update: Assign, kind: Kind, p: Const, entries: Matrix, below: Expr) -> Maps:
    a, b, c, _ = entries
    over = make("add", make("mul", a, p), b)
    value = make("div", over, below)
    parameters = (
        Parameter("a", make("div", a, below), ONE),
        Parameter("c", make("div", c, below), ZERO),
    )

    def rule(left: Values, right: Values) -> dict[str, Expr]:
        shifted = make("sub", left[VALUE], p)
        slope = make("sub", left["a"], make("mul", p, left["c"]))
        n = make("add", make("mul", right["c"], shifted), ONE)

        def of(x: Expr, y: Expr, z: Expr) -> Expr:
            return make("div", make("add", make("mul", x, y), z), n)

        return {
            VALUE: of(right["a"], shifted, right[VALUE]),
            "a": of(right["a"], slope, make("mul", right[VALUE], left["c"])),
            "c": of(right["c"], slope, left["c"]),
        }

    return Maps(update.name, update.indices, kind, p, value, parameters, rule)


def matrix(root: Expr, is_state: IsState) -> Matrix:
    """(a, b, c, d) with root = (a s + b) / (c s + d). Raises NotAffineError."""
    found: Quotient | None = None
    for expanded in (False, True):
        found = quotient(root, is_state, expanded)
        if len(found.num) <= 2 and len(found.den) <= 2:
            a, b, c, d = (coefficient(poly, power) for poly in (found.num, found.den) for power in (1, 0))
            return a, b, c, d
    raise NotAffineError(root, "a quotient of polynomials of a degree above 1 in the state")


