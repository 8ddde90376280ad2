"""How much one aggregator may expand to: macros and loops multiply, and later passes recurse over what comes out."""

from __future__ import annotations

from typing import NoReturn

from psmc import ir
from psmc.diagnostics import fail
from psmc.frontend.scope import Poisoned
from psmc.ir.rewrite import children, walk
from psmc.source import Span

MAX_NODES = 20_000  # of one aggregator, after macros and loops are expanded
MAX_DEPTH = 200  # as the parser's, but after macros are expanded


class Budget:
    """How much expansion one aggregator has left."""

    def __init__(self, limit: int = MAX_NODES) -> None:
        self._left = self._limit = limit

    def spend(self, depth: int, span: Span) -> None:
        if self._left < 0:
            raise Poisoned  # said already
        self._left -= 1
        if self._left < 0:
            fail(
                "PSM217",
                f"this expands to more than {self._limit:,} operations",
                span,
                helps=("use a smaller loop, or fewer nested fns",),
            )
        if depth > MAX_DEPTH:
            too_deep(span)


def too_deep(span: Span) -> NoReturn:
    fail(
        "PSM217",
        f"this expands to an expression more than {MAX_DEPTH} levels deep",
        span,
        helps=("give parts of it a name: let x = …",),
    )


def check_depth(root: ir.Expr, span: Span) -> None:
    """What recurses over the IR later relies on this bound; arguments of fns nest where their bodies use them."""
    depth: dict[ir.Expr, int] = {}
    for node in walk(root):
        depth[node] = 1 + max((depth[c] for c in children(node)), default=0)
    if depth[root] > MAX_DEPTH:
        too_deep(span)
