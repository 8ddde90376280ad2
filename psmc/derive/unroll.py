"""Small dims of a known size written out: a rule over tensors as one over scalars, the same in every lane.

A dim that is summed over, read at a position or used as a number is unrolled if its size is fixed and small; any other
dim has to be a lane, along which the rule does the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

from psmc.derive.names import declared_names, fresh_name
from psmc.derive.simplify import ONE, ZERO
from psmc.ir import Aggregator, Assign, Block, Const, DimValue, Expr, Eye, Index, IndexValue, Infinity, Op, Reduce, Ref
from psmc.ir.rewrite import inline, instantiate, rename, with_children

MAX_SIZE = 8  # of a dim that is written out
_CHAINS = {"sum": "add", "prod": "mul", "max": "max"}


@dataclass(frozen=True)
class Unrolled:
    """Blocks over scalars, without indices and lets. `lanes`: the dims that stay; `dims`: those written out.

    `scalars`: declared tensor -> its scalars, over its written-out dims, the last one fastest; `outputs` likewise.
    `starts`: component's scalar -> where a sequence starts, a number.
    """

    lanes: tuple[str, ...]
    dims: frozenset[str]
    leaf: Block
    combine: Block
    output: Block
    scalars: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, tuple[str, ...]]
    starts: Mapping[str, Expr]


class _Blocked(Exception):
    """`dim` is no lane: it may be written out."""

    def __init__(self, reason: str, dim: str = "") -> None:
        super().__init__(reason)
        self.dim = dim


def unroll(agg: Aggregator) -> Unrolled | str:
    """`agg` has a combine in the language. A string says why its rule is not one over a few scalars a lane."""
    sizes = {d.name: d.size for d in agg.dims}
    chosen: set[str] = set()
    while True:
        try:
            return _Unroller(agg, {d: sizes[d] or 0 for d in sorted(chosen)}).result()
        except _Blocked as blocked:
            size = sizes.get(blocked.dim)
            if not blocked.dim or blocked.dim in chosen:
                return str(blocked)
            if size is None:
                return f"{blocked}, and its size is not fixed"
            if size > MAX_SIZE:
                return f"{blocked}, and {size} entries are too many to write out"
            chosen.add(blocked.dim)


class _Unroller:
    def __init__(self, agg: Aggregator, sizes: Mapping[str, int]) -> None:
        self.agg, self.sizes = agg, sizes
        self.taken = declared_names(agg)
        tensors = [(t.name, t.dims) for t in (*agg.leaf_inputs, *agg.params)]
        self.dims = dict(tensors) | {c.name: c.dims for c in agg.state}
        self.names = {name: self._names(name, dims) for name, dims in sorted(self.dims.items())}
        self.memo: dict[Expr, Expr] = {}

    def result(self) -> Unrolled:
        agg = self.agg
        assert isinstance(agg.combine, Block)
        shown = {a.name: tuple(i.dim for i in a.indices) for a in agg.output.results}
        outputs = {
            name: self.names[name] if self.dims.get(name) == dims else self._names(name, dims)
            for name, dims in shown.items()
        }
        components = {c.name: self.names[c.name] for c in agg.state}
        starts = {
            a.name: a.value
            for c in agg.state
            for a in self._results((Assign(c.name, c.start.indices, c.start.value),), components)
        }
        blocks = [
            self.block(agg.combine, components),
            self.block(agg.leaf, components),
            self.block(agg.output, outputs),
        ]
        found = Unrolled(
            self._lanes(shown),
            frozenset(self.sizes),
            blocks[1],
            blocks[0],
            blocks[2],
            {name: tuple(x.values()) for name, x in self.names.items()},
            {name: tuple(x.values()) for name, x in outputs.items()},
            starts,
        )
        for name, value in starts.items():
            if not isinstance(value, Const | Infinity):
                raise _Blocked(f"the start of '{name}' is not a number")
        return found

    def _lanes(self, outputs: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        """The dims that stay, alike in all components and outputs; inputs and params may lack some."""
        first = self.agg.state[0]
        lanes = self._kept(first.dims)
        if len(set(lanes)) != len(lanes):
            raise _Blocked(f"component '{first.name}' has the dim {lanes[0]} twice", lanes[0])
        for name, dims in [*((c.name, c.dims) for c in self.agg.state), *outputs.items()]:
            if (kept := self._kept(dims)) != lanes:
                raise _Blocked(f"'{name}' has other dims than '{first.name}'", self._odd(kept, lanes))
        for t in (*self.agg.leaf_inputs, *self.agg.params):
            kept = self._kept(t.dims)
            if kept != tuple(d for d in lanes if d in kept):
                why = f"'{t.name}' has dims that the state lacks, or in another order"
                raise _Blocked(why, self._odd(kept, tuple(d for d in lanes if d in kept)))
        return lanes

    def _odd(self, one: Sequence[str], other: Sequence[str]) -> str:
        """The dim to write out where two tensors' dims are not alike: what one lacks, else what is known."""
        known = [d.name for d in self.agg.dims if d.size is not None and d.name in one]
        return ([*sorted(set(one) ^ set(other)), *known, ""])[0]

    def _kept(self, dims: Sequence[str]) -> tuple[str, ...]:
        return tuple(d for d in dims if d not in self.sizes)

    def _names(self, name: str, dims: Sequence[str]) -> dict[tuple[int, ...], str]:
        """Position in the written-out dims -> the scalar's name."""
        places = list(product(*(range(self.sizes[d]) for d in dims if d in self.sizes)))
        if places == [()]:
            return {(): name}
        return {place: fresh_name("_".join([name, *map(str, place)]), self.taken) for place in places}

    def block(self, block: Block, names: Mapping[str, Mapping[tuple[int, ...], str]]) -> Block:
        return Block(results=tuple(self._results(inline(block).results, names)))

    def _results(self, results: Sequence[Assign], names: Mapping[str, Mapping[tuple[int, ...], str]]) -> list[Assign]:
        out = []
        for a in results:
            for place, name in names[a.name].items():
                at = iter(place)
                subs = tuple(next(at) if i.dim in self.sizes else i for i in a.indices)
                out.append(Assign(name, (), self.flat(instantiate(a, subs))))
        return out

    def flat(self, node: Expr) -> Expr:
        if node not in self.memo:
            self.memo[node] = self._flat(node)
        return self.memo[node]

    def _flat(self, node: Expr) -> Expr:
        match node:
            case Op():
                return with_children(node, self.flat)
            case Reduce(op=op, index=index, body=body):
                if index.dim not in self.sizes:
                    raise _Blocked(f"a {op} runs over {index.dim}", index.dim)
                parts = [self.flat(rename(body, {index: g})) for g in range(self.sizes[index.dim])]
                return reduce(lambda a, b: Op(_CHAINS[op], (a, b)), parts)
            case IndexValue(index=index):
                raise _Blocked(f"an index over {index.dim} is used as a number", index.dim)
            case DimValue(dim=dim):
                if (size := {d.name: d.size for d in self.agg.dims}[dim]) is None:
                    raise _Blocked(f"the size of {dim} is used as a number, and it is not fixed")
                return Const(ONE.value * size)
            case Eye(row=row, col=col):
                if isinstance(row, int) and isinstance(col, int):
                    return ONE if row == col else ZERO
                inner = next((s for s in (row, col) if isinstance(s, Index)), None)
                raise _Blocked("positions are compared", inner.dim if inner else "")
            case Ref():
                return self._ref(node)
        return node

    def _ref(self, node: Ref) -> Expr:
        place = []
        for sub, dim in zip(node.subs, self.dims[node.name], strict=True):
            if dim in self.sizes:
                if not isinstance(sub, int):
                    raise _Blocked(f"'{node.name}' is read at a position that the data decides")
                place.append(sub)
            elif not isinstance(sub, Index):
                raise _Blocked(f"'{node.name}' is read at a fixed or computed position of {dim}", dim)
        return Ref(node.space, self.names[node.name][tuple(place)], (), node.value_kind, node.lag)
