"""What declared intervals say about an expression over inputs and params."""

from __future__ import annotations

from collections.abc import Callable

from psmc.algebra.interval_math import non_negative, positive
from psmc.algebra.intervals import bounds
from psmc.ir import Aggregator, Expr, Index, IndexValue, Interval, Ref
from psmc.ir.rewrite import transform


def known_bounds(agg: Aggregator) -> Callable[[Expr], Interval]:
    """An interval of an expression's values, for all inputs and params within theirs; states may be anything."""
    env = _environment(agg)
    return lambda expr: bounds(expr, env)


def known_bounds_at(agg: Aggregator) -> Callable[[Expr, Index, Interval], Interval]:
    """The same where an index used as a number is known to lie in an interval."""
    env = _environment(agg)

    def of(expr: Expr, index: Index, inside: Interval) -> Interval:
        number = Ref("let", "", (), "int")
        known = transform(expr, lambda n: number if n == IndexValue(index) else None)
        return bounds(known, {**env, ("let", ""): inside})

    return of


def _environment(agg: Aggregator) -> dict[tuple[str, str], Interval]:
    declared = {("input", t.name): t.interval for t in agg.leaf_inputs}
    declared |= {("param", t.name): t.interval for t in agg.params}
    return {key: interval for key, interval in declared.items() if interval is not None}


def known_positive(agg: Aggregator) -> Callable[[Expr], bool]:
    """Whether an expression is > 0 for all inputs and params within their intervals; states may be anything."""
    of = known_bounds(agg)
    return lambda expr: positive(of(expr))


def known_non_negative(agg: Aggregator) -> Callable[[Expr], bool]:
    """The same for >= 0."""
    of = known_bounds(agg)
    return lambda expr: non_negative(of(expr))
