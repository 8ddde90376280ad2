"""Points of a spec whose dims are fixed and large: a corner of entries, and one value everywhere else.

`dim K = 64` makes a matrix of 4096 entries, and a product of two a quarter of a million steps. Counterexamples are
searched where such dims are small, and count if the declared sizes show the same: there one entry of each side is
evaluated, and of what it reads only what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import prod

from psmc.algebra.exact import Array, Evaluator, Position, Sizes
from psmc.algebra.numbers import Number
from psmc.algebra.ring import UndefinedError
from psmc.ir import Aggregator, Assign, Block, Expr, Reduce
from psmc.ir.rewrite import children

_MAX_COST = 1000  # steps of one combine at the declared sizes; more than that, and the search is in a corner
_LARGE = 3
MAX_ENTRIES = 1_000_000  # of a counterexample, written out
Element = Mapping[str, Array]


class Corner(Array):
    """What is not among the entries is `filler`, within the bounds."""

    def __init__(self, entries: Array, filler: Number, shape: tuple[int, ...]) -> None:
        super().__init__(entries)
        self.filler, self.shape = filler, shape

    def get(self, position: Position, default: object = None) -> Number | None:
        if not all(0 <= p < size for p, size in zip(position, self.shape, strict=True)):
            return None
        return super().get(position, self.filler)

    def filled(self) -> Array:
        """All entries."""
        return {p: self.get(p) for p in product(*map(range, self.shape))}


class Lazy(Array):
    """One result of a block: entries are evaluated when they are read."""

    def __init__(self, evaluator: Evaluator, result: Assign) -> None:
        super().__init__()
        self.evaluator, self.result = evaluator, result

    def get(self, position: Position, default: object = None) -> Number | None:
        sizes = self.evaluator.sizes
        if not all(0 <= p < sizes[i.dim] for p, i in zip(position, self.result.indices, strict=True)):
            return None
        try:
            return self.evaluator.at(self.result, position)
        except UndefinedError:
            return None


def lazily(block: Block, sizes: Sizes, store: Mapping[tuple[str, str], Array], deadline: float) -> dict[str, Array]:
    """The results of a block, as `exact.run`, of which nothing is computed yet."""
    evaluator = Evaluator(sizes, store, {a.name: a for a in block.lets}, deadline=deadline)
    return {a.name: Lazy(evaluator, a) for a in block.results}


def shrunk(agg: Aggregator) -> frozenset[str]:
    """The dims of fixed size that are too large to be filled."""
    sizes = {d.name: d.size or _LARGE for d in agg.dims}
    if steps(agg, sizes) <= _MAX_COST:
        return frozenset()
    return frozenset(d.name for d in agg.dims if d.size is not None and d.size > _LARGE)


def steps(agg: Aggregator, sizes: Sizes) -> int:
    """Of one combine of whole elements."""
    assert isinstance(agg.combine, Block)
    work = ((a.value, a.indices) for a in (*agg.combine.lets, *agg.combine.results))
    return sum(prod(sizes[i.dim] for i in indices) * _steps(value, sizes) for value, indices in work)


def _steps(root: Expr, sizes: Sizes) -> int:
    """Of one evaluation, loops included."""
    done: dict[Expr, int] = {}

    def visit(node: Expr) -> int:
        if node not in done:
            inner = 1 + sum(map(visit, children(node)))
            done[node] = inner * sizes[node.index.dim] if isinstance(node, Reduce) else inner
        return done[node]

    return visit(root)
