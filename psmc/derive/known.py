"""What declared intervals say about an expression over inputs and params."""

from __future__ import annotations

from collections.abc import Callable

from psmc.algebra.interval_math import positive
from psmc.algebra.intervals import bounds
from psmc.ir import Aggregator, Expr


def known_positive(agg: Aggregator) -> Callable[[Expr], bool]:
    """Whether an expression is > 0 for all inputs and params within their intervals; states may be anything."""
    declared = {("input", t.name): t.interval for t in agg.leaf_inputs}
    declared |= {("param", t.name): t.interval for t in agg.params}
    env = {key: interval for key, interval in declared.items() if interval is not None}
    return lambda expr: positive(bounds(expr, env))
