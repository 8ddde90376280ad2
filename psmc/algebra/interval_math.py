"""Arithmetic on `ir.Interval`: every function returns an interval that holds all values, rounded outwards.

`None` is the unbounded end. Ends are rationals; transcendental ends are floats moved outwards by a few units in the
last place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from psmc.ir import Interval

ANY = Interval()
UNIT_RANGE = Interval(Fraction(0), Fraction(1), False, False)
SIGNED_UNIT = Interval(Fraction(-1), Fraction(1), False, False)
NON_NEGATIVE = Interval(Fraction(0), None, False, True)
POSITIVE = Interval(Fraction(0), None, True, True)

# An end is (value, open); value None is infinite, with the sign known from its side.
End = tuple[Fraction | None, bool]


def point(value: Fraction | int) -> Interval:
    return Interval(Fraction(value), Fraction(value), False, False)


def closed(x: Interval) -> Interval:
    """With its finite ends."""
    return Interval(x.lo, x.hi, x.lo is None, x.hi is None)


def contains(outer: Interval, inner: Interval) -> bool:
    """inner ⊆ outer."""
    return _within(outer.lo, outer.lo_open, inner.lo, inner.lo_open, 1) and _within(
        outer.hi, outer.hi_open, inner.hi, inner.hi_open, -1
    )


def _within(outer: Fraction | None, outer_open: bool, inner: Fraction | None, inner_open: bool, inwards: int) -> bool:
    if outer is None or inner is None:
        return outer is None
    return (inner - outer) * inwards > 0 or (inner == outer and (inner_open or not outer_open))


def holds(interval: Interval, value: Fraction) -> bool:
    """value ∈ interval."""
    return contains(interval, point(value))


def positive(x: Interval) -> bool:
    return x.lo is not None and (x.lo > 0 or (x.lo == 0 and x.lo_open))


def non_negative(x: Interval) -> bool:
    return x.lo is not None and x.lo >= 0


def union(x: Interval, y: Interval) -> Interval:
    lo, lo_open = _least((x.lo, x.lo_open), (y.lo, y.lo_open), lower=True)
    hi, hi_open = _greatest((x.hi, x.hi_open), (y.hi, y.hi_open), lower=False)
    return Interval(lo, hi, lo_open, hi_open)


def intersect(x: Interval, y: Interval) -> Interval:
    """Their common part; the first one if they are disjoint (the caller then has an empty case anyway)."""
    lo, lo_open = _greatest((x.lo, x.lo_open), (y.lo, y.lo_open), lower=True, closed_wins=False)
    hi, hi_open = _least((x.hi, x.hi_open), (y.hi, y.hi_open), lower=False, closed_wins=False)
    if lo is not None and hi is not None and lo > hi:
        return x
    return Interval(lo, hi, lo_open, hi_open)


def _least(a: End, b: End, *, lower: bool, closed_wins: bool = True) -> End:
    """The lesser of two ends of the same side; on a tie the closed one if `closed_wins`."""
    if a[0] is None or b[0] is None:
        none, other = (a, b) if a[0] is None else (b, a)
        return none if lower else other
    if a[0] == b[0]:
        return a[0], (a[1] and b[1]) if closed_wins else (a[1] or b[1])
    return a if a[0] < b[0] else b


def _greatest(a: End, b: End, *, lower: bool, closed_wins: bool = True) -> End:
    if a[0] is None or b[0] is None:
        none, other = (a, b) if a[0] is None else (b, a)
        return other if lower else none
    if a[0] == b[0]:
        return a[0], (a[1] and b[1]) if closed_wins else (a[1] or b[1])
    return a if a[0] > b[0] else b


def neg(x: Interval) -> Interval:
    return Interval(None if x.hi is None else -x.hi, None if x.lo is None else -x.lo, x.hi_open, x.lo_open)


def add(x: Interval, y: Interval) -> Interval:
    lo = None if x.lo is None or y.lo is None else x.lo + y.lo
    hi = None if x.hi is None or y.hi is None else x.hi + y.hi
    return Interval(lo, hi, x.lo_open or y.lo_open, x.hi_open or y.hi_open)


def mul(x: Interval, y: Interval) -> Interval:
    products = [_times(a, b) for a in _ends(x) for b in _ends(y)]
    lo = min(products, key=lambda e: (e[0], e[1]))
    hi = max(products, key=lambda e: (e[0], not e[1]))
    return _interval(lo, hi)


# Extended ends: floats ±inf for the unbounded ones, exact rationals otherwise.
_Ext = tuple["Fraction | float", bool]


def _ends(x: Interval) -> tuple[_Ext, _Ext]:
    lo: _Ext = (-math.inf, True) if x.lo is None else (x.lo, x.lo_open)
    hi: _Ext = (math.inf, True) if x.hi is None else (x.hi, x.hi_open)
    return lo, hi


def _times(a: _Ext, b: _Ext) -> _Ext:
    (x, x_open), (y, y_open) = a, b
    if x == 0 or y == 0:  # 0 times an unbounded end is 0: the end is a limit, the factor may be exactly 0
        attained = (x == 0 and not x_open) or (y == 0 and not y_open)
        return Fraction(0), not attained
    if isinstance(x, float) or isinstance(y, float):
        return (math.inf if (x > 0) == (y > 0) else -math.inf), True
    return x * y, x_open or y_open


def _interval(lo: _Ext, hi: _Ext) -> Interval:
    return Interval(
        None if isinstance(lo[0], float) else lo[0],
        None if isinstance(hi[0], float) else hi[0],
        lo[1] or isinstance(lo[0], float),
        hi[1] or isinstance(hi[0], float),
    )


def inverse(x: Interval) -> Interval:
    if x.lo == x.hi == 0:  # 0 alone, or no number at all: a root of what is negative
        return ANY
    if positive(x):
        lo = Fraction(0) if x.hi is None else 1 / x.hi
        hi = None if not x.lo else 1 / x.lo
        return Interval(lo, hi, x.hi is None or x.hi_open, x.lo_open or hi is None)
    if positive(neg(x)):
        return neg(inverse(neg(x)))
    return ANY


def div(x: Interval, y: Interval) -> Interval:
    return mul(x, inverse(y))


def absolute(x: Interval) -> Interval:
    if non_negative(x):
        return x
    if non_negative(neg(x)):
        return neg(x)
    top = union(x, neg(x))
    return Interval(Fraction(0), top.hi, False, top.hi_open)


_LARGE = 64  # exponents past which the ends of a power are not computed


def power(x: Interval, k: int) -> Interval:
    """x^k for an integer k."""
    if k < 0:
        return inverse(power(x, -k))
    if k == 0:
        return point(1)
    if k % 2 == 0:
        x = absolute(x)
    if k > _LARGE:
        return _sign_of(x)
    lo = None if x.lo is None else x.lo**k
    hi = None if x.hi is None else x.hi**k
    return Interval(lo, hi, x.lo_open, x.hi_open)


def _sign_of(x: Interval) -> Interval:
    """What the sign alone says of an odd power, or of any power of what is not negative."""
    if positive(x) or positive(neg(x)):
        return POSITIVE if positive(x) else neg(POSITIVE)
    if non_negative(x) or non_negative(neg(x)):
        return NON_NEGATIVE if non_negative(x) else neg(NON_NEGATIVE)
    return ANY


def greatest(x: Interval, y: Interval) -> Interval:
    lo, lo_open = _greatest((x.lo, x.lo_open), (y.lo, y.lo_open), lower=True, closed_wins=False)
    hi, hi_open = _greatest((x.hi, x.hi_open), (y.hi, y.hi_open), lower=False)
    return Interval(lo, hi, lo_open, hi_open)


def least(x: Interval, y: Interval) -> Interval:
    return neg(greatest(neg(x), neg(y)))


def monotone(
    x: Interval, fn: Callable[[float], float], at_low: Fraction | None, at_high: Fraction | None,
    exact: dict[Fraction, Fraction],
) -> Interval:  # fmt: skip
    """Image under an increasing function with limits `at_low`, `at_high` (open; None is infinite).

    `exact` holds the rational values that the function takes at rational arguments of interest.
    """

    def end(value: Fraction | None, open_: bool, low: bool) -> End:
        limit = at_low if low else at_high
        if value is None:
            return limit, True
        if value in exact:
            return exact[value], open_
        try:
            image = fn(float(value))
        except (OverflowError, ValueError):
            return limit, True
        if not math.isfinite(image):
            return limit, True
        slack = abs(image) * 1e-14 + 1e-300
        outward = Fraction(image - slack if low else image + slack)
        if limit is not None and (outward <= limit if low else outward >= limit):
            return limit, True
        return outward, False

    lo, lo_open = end(x.lo, x.lo_open, True)
    hi, hi_open = end(x.hi, x.hi_open, False)
    return Interval(lo, hi, lo_open, hi_open)


_ZERO, _ONE = Fraction(0), Fraction(1)
_HALF = Fraction(1, 2)


def exp(x: Interval) -> Interval:
    return monotone(x, math.exp, _ZERO, None, {_ZERO: _ONE})


def log(x: Interval) -> Interval:
    return monotone(intersect(x, POSITIVE), math.log, None, None, {_ONE: _ZERO})


def sqrt(x: Interval) -> Interval:
    return monotone(intersect(x, NON_NEGATIVE), math.sqrt, _ZERO, None, {_ZERO: _ZERO, _ONE: _ONE})


def sigmoid(x: Interval) -> Interval:
    return monotone(x, lambda v: 1 / (1 + math.exp(-v)), _ZERO, _ONE, {_ZERO: _HALF})


def tanh(x: Interval) -> Interval:
    return monotone(x, math.tanh, -_ONE, _ONE, {_ZERO: _ZERO})


def erf(x: Interval) -> Interval:
    return monotone(x, math.erf, -_ONE, _ONE, {_ZERO: _ZERO})


def softplus(x: Interval) -> Interval:
    return monotone(x, lambda v: max(v, 0.0) + math.log1p(math.exp(-abs(v))), _ZERO, None, {})


def expm1(x: Interval) -> Interval:
    return monotone(x, math.expm1, -_ONE, None, {_ZERO: _ZERO})
