"""Monotone maps with a floor and a ceiling, s ↦ max(min(a s + b, hi), lo), a > 0: saturating sums, clamped integrators.

They are closed: hi = min(a_r hi_l + b_r, hi_r), lo = max(min(a_r lo_l + b_r, hi_r), lo_r). The floor is the value at
-inf, so the member holds it, and no relation between lo and hi is needed: where hi < lo the map is the constant lo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    """s ↦ max(min(a s + b, hi), lo), or its negative (`falling`). Without bounds `a` may have any sign."""

    a: Expr
    b: Expr
    hi: Expr
    lo: Expr
    falling: bool = False

    @property
    def bounded(self) -> bool:
        return self.hi != HIGH or self.lo != LOW

    @property
    def parts(self) -> tuple[Expr, Expr, Expr, Expr]:
        return self.a, self.b, self.hi, self.lo

    def each(self, change: Callable[[Expr], Expr], factor: bool = False) -> Clamped:
        """Finite bounds and the offset changed, the factor too if asked for."""
        b, hi, lo = (x if isinstance(x, Infinity) else change(x) for x in self.parts[1:])
        return Clamped(change(self.a) if factor else self.a, b, hi, lo, self.falling)


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
    if found is not None and found.falling:
        raise NotAffineError(root, "it falls where the state rises; with a floor or a ceiling only rising maps compose")
    return _constant(root) if found is None else found


def _operator(node: Expr, done: dict[Expr, Clamped | None], positive: Known) -> Clamped:
    if not isinstance(node, Op) or node.op not in _WORDS:
        what = node.op if isinstance(node, Op) else "a reduction"
        raise NotAffineError(node, f"{what} of the state is not monotone and piecewise affine")
    if node.op == "where":
        return _choice(node, *(done[z] or _constant(z) for z in node.args[1:]))
    if node.op == "neg":
        found = done[node.args[0]]
        assert found is not None
        return _turned(found)
    x, y = node.args
    u, v = done[x], done[y]
    if u is not None and v is not None:
        if node.op in ("add", "sub") and not u.bounded and not v.bounded:
            return Clamped(make(node.op, u.a, v.a), make(node.op, u.b, v.b), HIGH, LOW)
        raise NotAffineError(node, f"{_WORDS[node.op]} of two terms that both read the state")
    if u is None:
        assert v is not None
        if node.op == "div":
            raise NotAffineError(node, "division by a term that reads the state is not monotone")
        if node.op == "sub":  # x - v
            return _shift(Op("add", (y, x)), _turned(v), x, positive)
        return _BINARY[node.op](Op(node.op, (y, x)), v, x, positive)
    return _BINARY[node.op](node, u, y, positive)


def _constant(value: Expr, falling: bool = False) -> Clamped:
    return Clamped(ONE, ZERO, value, value, falling)


def _choice(node: Op, one: Clamped, two: Clamped) -> Clamped:
    falling = two.falling if one == _constant(one.lo) else one.falling
    one, two = (_constant(make("neg", c.lo), falling) if c == _constant(c.lo) and falling else c for c in (one, two))
    pairs = list(zip(one.parts, two.parts, strict=True))
    if one.falling != two.falling or any(isinstance(p, Infinity) != isinstance(q, Infinity) for p, q in pairs):
        # With where(c, x, inf) for a bound it would be one, but what multiplies an infinite bound has no gradient.
        raise NotAffineError(
            node, "a choice between maps of which not both rise, or not both have a bound",
            "give both the same bounds; one that no value reaches is a finite number, as in max(a * s, -1e9).",
        )  # fmt: skip
    a, b, hi, lo = (make("where", node.args[0], p, q) for p, q in pairs)
    return Clamped(a, b, hi, lo, falling)


def _turned(m: Clamped) -> Clamped:
    if m.bounded:
        return replace(m, falling=not m.falling)
    return m.each(lambda x: make("neg", x), factor=True)


# The first operand of `node` reads the state; `m` is its map, `by` the other.


def _shift(node: Op, m: Clamped, by: Expr, positive: Known) -> Clamped:
    op = node.op if not m.falling else {"add": "sub", "sub": "add"}[node.op]
    return m.each(lambda x: make(op, x, by))


def _scale(node: Op, m: Clamped, by: Expr, positive: Known) -> Clamped:
    if m.bounded and not positive(by):
        raise NotPositiveError(node, by)
    return m.each(lambda x: make(node.op, x, by), factor=True)


def _bound(node: Op, m: Clamped, by: Expr, positive: Known) -> Clamped:
    """max(m, by) or min(m, by)."""
    if not m.bounded and not positive(m.a):
        if not positive(make("neg", m.a)):
            raise NotPositiveError(node.args[0], m.a)
        m = replace(_turned(m), falling=True)
    if m.falling:
        by = make("neg", by)
    if (node.op == "max") != m.falling:
        return replace(m, lo=greater(m.lo, by))
    return replace(m, hi=lesser(m.hi, by), lo=lesser(m.lo, by))


_WORDS = {
    "add": "a sum", "sub": "a difference", "mul": "a product", "div": "a quotient", "max": "a maximum",
    "min": "a minimum", "where": "a choice", "neg": "the negative",
}  # fmt: skip
_BINARY: dict[str, Callable[[Op, Clamped, Expr, Known], Clamped]] = {
    "add": _shift, "sub": _shift, "mul": _scale, "div": _scale, "max": _bound, "min": _bound,
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
