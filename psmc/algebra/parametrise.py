"""Intervals as images of the line: x in (0, inf) is exp(u) for a real u, x in (0, 1) is 1/(1 + exp(-u)).

A rule that is another one in disguise (x∘y = φ⁻¹(φ x ⋆ φ y) with φ = log, log1p, logit, ...) reads, in u, as what it is
made of. The maps are bijections, so an identity in u for all u is one in x for all x of the interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from psmc.ir import Const, Expr, Interval, Op, Ref
from psmc.ir.rewrite import refs, replace_refs, walk

_ONE = Const(Fraction(1))
_DOWN = Interval(Fraction(0), None, False, True)  # of u, where one end of x's interval is attained


def parametrised(expr: Expr, intervals: Mapping[str, Interval]) -> tuple[Expr, dict[str, Interval], frozenset[str]]:
    """(expr over new variables, their intervals, the names that were replaced). A name `a.x` becomes `a.x'`."""
    found: dict[str, Interval] = {}
    replaced: set[str] = set()

    def rule(ref: Ref) -> Expr | None:
        interval = intervals.get(ref.name)
        if interval is None or ref.value_kind != "real":
            return None
        new = Ref(ref.space, f"{ref.name}'", ref.subs)
        image = _image(new, interval)
        if image is not None:
            replaced.add(ref.name)
            if not (interval.lo is None or interval.lo_open) or not (interval.hi is None or interval.hi_open):
                found[new.name] = _DOWN
        return image

    return replace_refs(expr, rule), found, frozenset(replaced)


def applies(expr: Expr, intervals: Mapping[str, Interval]) -> bool:
    """Whether anything would be replaced."""
    return any(
        ref.name in intervals and ref.value_kind == "real" and _image(ref, intervals[ref.name]) is not None
        for ref in refs(expr)
    )


def takes_logs(expr: Expr) -> bool:
    """Whether the rule reads like one in disguise, which the new variables undo."""
    return any(
        isinstance(node, Op) and node.op in ("log", "log1p") and any(True for _ in refs(node)) for node in walk(expr)
    )


def _image(u: Expr, interval: Interval) -> Expr | None:
    """x in terms of u; None for the whole line, a point, and intervals with both ends attained."""
    lo, hi = interval.lo, interval.hi
    lo_open, hi_open = interval.lo_open, interval.hi_open
    if lo is None and hi is not None:
        return _plus(hi, Op("neg", (Op("exp", (u,)),))) if hi_open else None
    if hi is None and lo is not None:
        return _plus(lo, Op("exp", (u,))) if lo_open else None
    if lo is None or hi is None or not lo < hi or not (lo_open or hi_open):
        return None
    width = Const(hi - lo)
    falling = Op("exp", (Op("neg", (u,)),))
    if lo_open and hi_open:
        return _plus(lo, Op("div", (width, Op("add", (_ONE, falling)))))
    return _plus(lo, Op("mul", (width, falling))) if lo_open else _plus(hi, Op("neg", (Op("mul", (width, falling)),)))


def _plus(constant: Fraction, rest: Expr) -> Expr:
    return Op("add", (Const(constant), rest)) if constant else rest
