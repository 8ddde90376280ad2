"""Interval arithmetic over the IR, and which declared intervals of the state are closed.

An interval of the state may enter a proof only if every lifted token lands in it and combine keeps it (l, r in it imply
l∘r in it). All components are taken together: the greatest set of intervals that holds is found by dropping those that
fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from psmc.algebra import interval_math as im
from psmc.ir import (
    Aggregator,
    Block,
    Const,
    DimValue,
    Expr,
    Eye,
    IndexValue,
    Infinity,
    Interval,
    Op,
    Reduce,
    Ref,
)
from psmc.ir.rewrite import children, inline

Env = Mapping[tuple[str, str], Interval]  # (space, name) -> interval; ints and reals only
_DEPTH = 4  # conditions within conditions that are made use of


def bounds(expr: Expr, env: Env) -> Interval:
    """An interval that holds every (finite) value of `expr`; bools and complex values give the whole line."""
    return _Bounds(env)(expr)


class _Bounds:
    """`known` holds what the conditions around say of whole expressions."""

    def __init__(self, env: Env, known: Mapping[Expr, Interval] | None = None, depth: int = 0) -> None:
        self.env, self.depth = env, depth
        self._done: dict[Expr, Interval] = dict(known or {})
        self._known = dict(self._done)
        self._infinite: dict[Expr, bool] = {}

    def __call__(self, expr: Expr) -> Interval:
        found = self._done.get(expr)
        if found is None:
            found = self._done[expr] = self._visit(expr)
        return found

    def _visit(self, expr: Expr) -> Interval:
        match expr:
            case Const(value=value):
                return im.point(value)
            case Infinity() | IndexValue():
                return im.NON_NEGATIVE if isinstance(expr, IndexValue) else im.ANY
            case DimValue():
                return Interval(Fraction(1), None, False, True)
            case Eye():
                return im.UNIT_RANGE
            case Ref(space=space, name=name, lag=lag):
                found = self.env.get((space, name), im.ANY) if expr.kind in ("int", "real") else im.ANY
                return im.union(found, im.point(0)) if lag else found  # a tap before the first token reads 0
            case Reduce(op=op, body=body):
                return _REDUCE[op](self(body))
            case Op(op="where", args=(test, x, y)) if expr.kind != "complex" and self.depth < _DEPTH:
                found = im.union(self._where(test, True)(x), self._where(test, False)(y))
                return im.closed(found) if any(map(self._may_be_infinite, (x, y))) else found
            case Op(op=op, args=args):
                if op == "mul" and args[0] is args[1]:
                    return im.power(self(args[0]), 2)
                if any(a.kind == "complex" for a in args) and op != "abs":
                    return im.ANY
                found = TABLE[op](*(self(a) for a in args))
                # exp(-inf) = 0 and its like: at infinity an open limit is reached
                return im.closed(found) if any(map(self._may_be_infinite, args)) else found
        raise AssertionError(expr)

    def _where(self, test: Expr, holds: bool) -> _Bounds:
        """The same where the condition holds, or where it does not."""
        found: dict[Expr, Interval] = {}
        for e, half in self._told(test, holds):
            found[e] = im.intersect(found.get(e, self(e)), _of_whole(half) if e.kind == "int" else half)
        return _Bounds(self.env, {**self._known, **found}, self.depth + 1) if found else self

    def _told(self, test: Expr, holds: bool) -> Iterator[tuple[Expr, Interval]]:
        match test:
            case Op(op="not", args=(a,)):
                yield from self._told(a, not holds)
            case Op(op="and" | "or" as op, args=args) if (op == "and") == holds:
                for a in args:
                    yield from self._told(a, holds)
            case Op(op="lt" | "le" | "gt" | "ge" as op, args=(x, y)):
                less, more = (x, y) if (op in ("lt", "le")) == holds else (y, x)
                strict = (op in ("lt", "gt")) == holds
                below, above = self(more), self(less)
                yield less, Interval(None, below.hi, True, strict or below.hi_open)
                yield more, Interval(above.lo, None, strict or above.lo_open, True)

    def _may_be_infinite(self, expr: Expr) -> bool:
        found = self._infinite.get(expr)
        if found is None:
            logarithm = isinstance(expr, Op) and expr.op in ("log", "log1p")
            shift = 1 if logarithm and expr.op == "log1p" else 0  # type: ignore[attr-defined]
            found = (
                isinstance(expr, Infinity)
                or (logarithm and not im.positive(im.add(self(children(expr)[0]), im.point(shift))))
                or any(map(self._may_be_infinite, children(expr)))
            )
            self._infinite[expr] = found
        return found


def _of_whole(x: Interval) -> Interval:
    """With the whole numbers inside as ends."""
    lo = None if x.lo is None else floor(x.lo) + 1 if x.lo_open else ceil(x.lo)
    hi = None if x.hi is None else ceil(x.hi) - 1 if x.hi_open else floor(x.hi)
    return Interval(None if lo is None else Fraction(lo), None if hi is None else Fraction(hi), lo is None, hi is None)


def _sum(x: Interval) -> Interval:
    """At least one summand."""
    lo = x.lo if x.lo is not None and x.lo >= 0 else None
    hi = x.hi if x.hi is not None and x.hi <= 0 else None
    return Interval(lo, hi, lo is None or x.lo_open, hi is None or x.hi_open)


def _prod(x: Interval) -> Interval:
    if im.contains(im.UNIT_RANGE, x):
        return Interval(Fraction(0), x.hi, x.lo_open, x.hi_open)
    if x.lo is not None and x.lo >= 1:
        return Interval(x.lo, None, x.lo_open, True)
    return im.POSITIVE if im.positive(x) else im.NON_NEGATIVE if im.non_negative(x) else im.ANY


_REDUCE: dict[str, Callable[[Interval], Interval]] = {"sum": _sum, "max": lambda x: x, "prod": _prod}


def _pow(x: Interval, y: Interval) -> Interval:
    if y.lo is not None and y.lo == y.hi:
        if y.lo.denominator == 1:
            return im.power(x, int(y.lo))
        return im.POSITIVE if im.positive(x) else im.NON_NEGATIVE
    if im.positive(x):
        return im.exp(im.mul(im.log(x), y))
    return im.ANY


def _abs(x: Interval) -> Interval:
    return im.absolute(x)


def _sign(x: Interval) -> Interval:
    if im.positive(x):
        return im.point(1)
    return Interval(Fraction(0), Fraction(1), False, False) if im.non_negative(x) else im.SIGNED_UNIT


def _clamp(x: Interval, lo: Interval, hi: Interval) -> Interval:
    return im.least(im.greatest(x, lo), hi)


def _gelu(x: Interval) -> Interval:
    return _gated(x, Fraction(-1, 5))


def _silu(x: Interval) -> Interval:
    return _gated(x, Fraction(-3, 10))


def _gated(x: Interval, least: Fraction) -> Interval:
    """x times something in [0, 1] that falls to 0: between 0 and x, or above a least value."""
    if im.non_negative(x):
        return Interval(Fraction(0), x.hi, False, x.hi_open)
    return Interval(least, None, True, True)


def _logaddexp(x: Interval, y: Interval) -> Interval:
    return im.log(im.add(im.exp(x), im.exp(y)))


def _any(*_: Interval) -> Interval:
    return im.ANY


TABLE: dict[str, Callable[..., Interval]] = {
    **{op: _any for op in ("or", "and", "not", "lt", "le", "gt", "ge", "eq", "ne", "real", "imag", "conj", "complex")},
    "add": im.add,
    "sub": lambda x, y: im.add(x, im.neg(y)),
    "mul": im.mul,
    "div": im.div,
    "neg": im.neg,
    "pow": _pow,
    "where": lambda _, x, y: im.union(x, y),
    "max": im.greatest,
    "min": im.least,
    "abs": _abs,
    "sign": _sign,
    "clamp": _clamp,
    "exp": im.exp,
    "expm1": im.expm1,
    "log": im.log,
    "log1p": lambda x: im.log(im.add(x, im.point(1))),
    "sqrt": im.sqrt,
    "rsqrt": lambda x: im.inverse(im.sqrt(x)),
    "sin": lambda _: im.SIGNED_UNIT,
    "cos": lambda _: im.SIGNED_UNIT,
    "tanh": im.tanh,
    "sigmoid": im.sigmoid,
    "logsigmoid": lambda x: im.neg(im.softplus(im.neg(x))),
    "softplus": im.softplus,
    "relu": lambda x: im.greatest(x, im.point(0)),
    "silu": _silu,
    "gelu": _gelu,
    "erf": im.erf,
    "logaddexp": _logaddexp,
    "stop": lambda x: x,
}


# --- closure ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Closure:
    """Which intervals of the state may be used, and for the others which half fails."""

    closed: Mapping[str, Interval]
    open: Mapping[str, str]  # component -> 'lift' or 'combine'


def closure(agg: Aggregator) -> Closure:
    """The greatest closed subset of the state's declared intervals."""
    inputs: dict[tuple[str, str], Interval] = {
        **{("input", t.name): t.interval for t in agg.leaf_inputs if t.interval is not None},
        **{("param", t.name): t.interval for t in agg.params if t.interval is not None},
    }
    kept = {c.name: c.interval for c in agg.state if c.interval is not None and c.kind in ("int", "real")}
    failed: dict[str, str] = {}
    lifted = _block_bounds(agg.leaf, inputs)
    for name in [n for n in kept if not im.contains(kept[n], lifted[n])]:
        failed[name] = "lift"
        del kept[name]
    assert isinstance(agg.combine, Block)
    while kept:
        env = {**inputs, **{(side, n): v for n, v in kept.items() for side in ("left", "right")}}
        combined = _block_bounds(agg.combine, env)
        bad = [n for n in kept if not im.contains(kept[n], combined[n])]
        if not bad:
            break
        for name in bad:
            failed[name] = "combine"
            del kept[name]
    return Closure(kept, failed)


def _block_bounds(block: Block, env: Env) -> dict[str, Interval]:
    """Of the results. Without lets: whether a value may be infinite shows only where its definition does."""
    return {r.name: bounds(r.value, env) for r in inline(block).results}
