"""Fractional-linear maps s ↦ (a s + b) / (c s + d): continued fractions, scalar Riccati and Kalman variances.

They compose as their matrices do, up to a factor. An element is normalised so that d is 1 at a base point p,
s ↦ (a (s - p) + s_p) / (c (s - p) + 1), where s_p is its value there: nothing grows that does not grow in the map. Let
n = c_r (s_l - p) + 1; then a = (a_r (a_l - p c_l) + s_r c_l) / n, c = (c_r (a_l - p c_l) + c_l) / n,
s = (a_r (s_l - p) + s_r) / n. Lakshmivarahan & Dhall 1994, "Parallel computing using the prefix problem", ch. 3.

No n may vanish, whichever tokens are combined: only maps are lifted that keep a half-line, since all their entries,
taken from its end q, are known to have one sign, and whose denominators are known not to be 0 on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from psmc.derive.group import VALUE, Maps, Parameter, Values
from psmc.derive.rational import Quotient, coefficient, quotient
from psmc.derive.semiring import IsState, NotAffineError
from psmc.derive.simplify import ONE, ZERO, make
from psmc.ir import Assign, Const, Expr, Kind, Ref

Known = Callable[[Expr, bool], bool]  # whether an expression is known to be > 0, or (False) >= 0
Matrix = tuple[Expr, Expr, Expr, Expr]  # a, b, c, d


class MayVanishError(NotAffineError):
    """It would be, were the signs of its coefficients known; `node` is the denominator."""


def moebius(update: Assign, start: Expr, kind: Kind, is_state: IsState, known: Known) -> Maps:
    """The map of one component. Raises NotAffineError."""
    entries = matrix(update.value, is_state)
    points = list(dict.fromkeys(x for x in (start, ZERO, ONE) if isinstance(x, Const)))
    for end in points:
        for side in (1, -1):
            p = _base(entries, end, side, points, known)
            if p is not None:
                return _maps(update, kind, p, entries)
    _, _, c, d = entries
    below = make("add", make("mul", c, Ref("prev", update.name, update.indices, kind)), d)
    raise MayVanishError(below, "a denominator that may be 0 where tokens are combined")


def _base(entries: Matrix, q: Const, side: int, points: Sequence[Const], known: Known) -> Const | None:
    """A base point for maps of u = side * (s - q) >= 0 into itself; None if they are not known to be such."""
    a, b, c, d = _from(entries, q, side)
    for sign in (1, -1):
        if all(known(_signed(x, sign), False) for x in (a, b, c, d)):
            for p in (q, *points):
                u = Const(abs(p.value - q.value))
                inside = (p.value - q.value) * side >= 0
                below, above = (_signed(make("add", make("mul", x, u), y), sign) for x, y in ((c, d), (a, b)))
                if inside and known(below, True) and (known(_signed(d, sign), True) or known(above, True)):
                    return p
    return None


def _from(entries: Matrix, q: Const, side: int) -> Matrix:
    """The matrix of u = side * (s - q)."""
    a, b, c, d = entries
    at = make("add", make("mul", c, q), d)
    value = make("sub", make("add", make("mul", a, q), b), make("mul", q, at))
    return make("sub", a, make("mul", q, c)), _signed(value, side), _signed(c, side), at


def _signed(x: Expr, sign: int) -> Expr:
    return x if sign > 0 else make("neg", x)


def _maps(update: Assign, kind: Kind, p: Const, entries: Matrix) -> Maps:
    a, b, c, d = entries
    below = make("add", make("mul", c, p), d)
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


