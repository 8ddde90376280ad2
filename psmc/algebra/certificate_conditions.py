"""What a rule divides by, takes the logarithm or a root of, and why that has a value."""

from __future__ import annotations

from collections.abc import Iterator

from psmc.algebra import interval_math as im
from psmc.algebra.intervals import bounds, closure
from psmc.ir import Aggregator, Block, Const, Expr, Interval, Op
from psmc.ir.rewrite import inline, walk
from psmc.ir.text import show

_ASSUMED = "assumed: the laws are claimed where both sides have values"


def conditions(agg: Aggregator) -> list[dict[str, str]]:
    """Every side condition of the combine, in order: where it is met, the term, what it must be, and why it is that."""
    assert isinstance(agg.combine, Block)
    env: dict[tuple[str, str], Interval] = {("param", p.name): p.interval for p in agg.params if p.interval is not None}
    env |= {(side, n): i for n, i in closure(agg).closed.items() for side in ("left", "right")}
    out: list[dict[str, str]] = []
    for assign in inline(agg.combine).results:
        for term, must in _terms(assign.value):
            row = {"in": assign.name, "term": show(term), "must be": must, "because": _why(term, must, env)}
            if row not in out:
                out.append(row)
    return out


def _terms(value: Expr) -> Iterator[tuple[Expr, str]]:
    for node in walk(value):
        match node:
            case Op(op="div", args=(_, y)):
                yield y, "not 0"
            case Op(op="log" | "rsqrt", args=(x,)):
                yield x, "positive"
            case Op(op="log1p", args=(x,)):
                yield x, "above -1"
            case Op(op="sqrt", args=(x,)):
                yield x, "not negative"
            case Op(op="pow", args=(x, Const(value=n))):
                if n.denominator != 1:
                    yield x, "positive" if n < 0 else "not negative"
                elif n < 0:
                    yield x, "not 0"
            case Op(op="pow", args=(x, _)):
                yield x, "positive"


def _why(term: Expr, must: str, env: dict[tuple[str, str], Interval]) -> str:
    found = bounds(term, env)
    holds = {
        "not 0": im.positive(found) or im.positive(im.neg(found)),
        "positive": im.positive(found),
        "not negative": im.non_negative(found),
        "above -1": found.lo is not None and (found.lo > -1 or (found.lo == -1 and found.lo_open)),
    }[must]
    if not holds:
        return _ASSUMED
    return "it is a number" if isinstance(term, Const) else "it is, by the intervals that are closed"
