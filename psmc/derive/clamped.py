"""Monotone maps with a floor and a ceiling, s ↦ max(min(a s + b, hi), lo), a > 0: saturating sums, clamped integrators.

They are closed: hi = min(a_r hi_l + b_r, hi_r), lo = max(min(a_r lo_l + b_r, hi_r), lo_r). The floor is the value at
-inf, so the member holds it, and no relation between lo and hi is needed: where hi < lo the map is the constant lo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from psmc.derive.group import VALUE, Maps, Parameter, Values
from psmc.derive.semiring import IsState, NotAffineError, NotPositiveError
from psmc.derive.simplify import ONE, ZERO, make
from psmc.ir import Assign, Expr, Infinity, Interval, Kind, Op, Ref
from psmc.ir.rewrite import refs, walk

Known = Callable[[Expr], bool]
LOW, HIGH = Infinity(True), Infinity(False)


@dataclass(frozen=True)
class Clamped:
    """s ↦ max(min(a s + b, hi), lo)."""

    a: Expr
    b: Expr
    hi: Expr
    lo: Expr


def clamped(update: Assign, kind: Kind, is_state: IsState, positive: Known) -> Maps:
    """The map of one component. Raises NotAffineError."""
    found = read(update.value, is_state, positive)
    slope = Parameter("a", found.a, ONE, Interval(Fraction(0)))
    offset = Parameter("b", found.b, ZERO)
    if found.lo == LOW:
        return Maps(update.name, update.indices, kind, HIGH, found.hi, (slope, offset), _capped)
    ceiling = Parameter("hi", found.hi, HIGH)
    return Maps(update.name, update.indices, kind, LOW, found.lo, (slope, offset, ceiling), _floored)


def _capped(left: Values, right: Values) -> dict[str, Expr]:
    """Without a floor: the member is the ceiling, the value at inf."""
    a, b = right["a"], right["b"]
    return {
        VALUE: lesser(_add(_mul(a, left[VALUE]), b), right[VALUE]),
        "a": _mul(a, left["a"]),
        "b": _add(_mul(a, left["b"]), b),
    }


def _floored(left: Values, right: Values) -> dict[str, Expr]:
    a, b, hi = right["a"], right["b"], right["hi"]
    return {
        VALUE: greater(lesser(_add(_mul(a, left[VALUE]), b), hi), right[VALUE]),
        "a": _mul(a, left["a"]),
        "b": _add(_mul(a, left["b"]), b),
        "hi": lesser(_add(_mul(a, left["hi"]), b), hi),
    }


def read(root: Expr, is_state: IsState, positive: Known) -> Clamped:
    """`root` as such a map. Raises NotAffineError, at the node that is not one."""
    done: dict[Expr, Clamped | None] = {}  # None: free of the state
    for node in walk(root):
        if isinstance(node, Ref) and is_state(node):
            done[node] = Clamped(ONE, ZERO, HIGH, LOW)
        elif not any(is_state(r) for r in refs(node)):
            done[node] = None
        else:
            done[node] = _operator(node, done, positive)
    found = done[root]
    return _constant(root) if found is None else found


def _operator(node: Expr, done: dict[Expr, Clamped | None], positive: Known) -> Clamped:
    if not isinstance(node, Op) or node.op not in _WORDS:
        what = node.op if isinstance(node, Op) else "a reduction"
        raise NotAffineError(node, f"{what} of the state is not increasing and piecewise affine")
    if node.op == "where":
        test, x, y = node.args
        one, two = (done[z] or _constant(z) for z in (x, y))
        pairs = list(zip(_parts(one), _parts(two), strict=True))
        if any(isinstance(p, Infinity) != isinstance(q, Infinity) for p, q in pairs):
            # As where(c, x, inf) it would be one, but an infinite bound that is multiplied has no gradient.
            raise NotAffineError(node, "a choice between a map with a bound and one without")
        return Clamped(*(make("where", test, p, q) for p, q in pairs))
    x, y = node.args
    u, v = done[x], done[y]
    if u is not None and v is not None:
        raise NotAffineError(node, f"{_WORDS[node.op]} of two terms that both read the state")
    map_, free = (u, y) if u is not None else (v, x)
    assert map_ is not None
    if u is None and node.op in ("sub", "div"):
        raise NotAffineError(node, f"{_WORDS[node.op]} of the state decreases in it")
    return _BINARY[node.op](node, map_, free, positive)


def _parts(m: Clamped) -> tuple[Expr, ...]:
    return m.a, m.b, m.hi, m.lo


def _constant(value: Expr) -> Clamped:
    return Clamped(ONE, ZERO, value, value)


def _shift(node: Op, m: Clamped, by: Expr, positive: Known) -> Clamped:
    return Clamped(m.a, *(x if isinstance(x, Infinity) else make(node.op, x, by) for x in (m.b, m.hi, m.lo)))


def _scale(node: Op, m: Clamped, by: Expr, positive: Known) -> Clamped:
    if not positive(by):
        raise NotPositiveError(node, by)
    return Clamped(*(x if isinstance(x, Infinity) else make(node.op, x, by) for x in _parts(m)))


def _floor(node: Op, m: Clamped, by: Expr, positive: Known) -> Clamped:
    return Clamped(m.a, m.b, m.hi, greater(m.lo, by))


def _ceiling(node: Op, m: Clamped, by: Expr, positive: Known) -> Clamped:
    return Clamped(m.a, m.b, lesser(m.hi, by), lesser(m.lo, by))


_WORDS = {
    "add": "a sum", "sub": "a difference", "mul": "a product", "div": "a quotient", "max": "a maximum",
    "min": "a minimum", "where": "a choice",
}  # fmt: skip
_BINARY: dict[str, Callable[[Op, Clamped, Expr, Known], Clamped]] = {
    "add": _shift, "sub": _shift, "mul": _scale, "div": _scale, "max": _floor, "min": _ceiling,
}  # fmt: skip


# --- the extended reals: what a ceiling of inf and a floor of -inf do -----------------------------------


def _add(x: Expr, y: Expr) -> Expr:
    return x if isinstance(x, Infinity) else make("add", x, y)


def _mul(a: Expr, x: Expr) -> Expr:
    return x if isinstance(x, Infinity) else make("mul", a, x)


def lesser(x: Expr, y: Expr) -> Expr:
    """min(x, y), simplified at the infinities."""
    if x == HIGH or y == LOW:
        return y
    return x if y == HIGH or x == LOW else make("min", x, y)


def greater(x: Expr, y: Expr) -> Expr:
    """max(x, y), simplified at the infinities."""
    if x == LOW or y == HIGH:
        return y
    return x if y == LOW or x == HIGH else make("max", x, y)
