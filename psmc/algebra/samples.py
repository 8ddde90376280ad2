"""Deterministic test elements: small legal values first, then wider ones."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from psmc.algebra import interval_math as im
from psmc.algebra.exact import Array, Sizes, positions
from psmc.algebra.numbers import Complex, Number
from psmc.algebra.padded import shrunk
from psmc.ir import Aggregator, Block, Component, Const, Interval, Ref, Tensor
from psmc.ir.rewrite import refs, walk

Element = dict[str, Array]
Declared = Component | Tensor
_SIMPLE = [Fraction(v) for v in ["0", "1", "2", "3", "-1", "1/2", "4", "5", "-2", "1/3", "-3", "7"]]
_MAX_SIZE = 3


@dataclass(frozen=True)
class Sampler:
    """Draws elements and params of one aggregator. `intervals` are the closed ones of the state."""

    agg: Aggregator
    intervals: Mapping[str, Interval]
    pools: Mapping[str, tuple[Number, ...]]
    indices: Mapping[str, str]  # int component or param -> the dim it indexes
    shrunk: frozenset[str] = frozenset()  # dims of fixed size that points have small

    @staticmethod
    def of(agg: Aggregator, intervals: Mapping[str, Interval]) -> Sampler:
        constants = _constants(agg)
        legal = {**intervals, **{p.name: p.interval for p in agg.params if p.interval is not None}}
        pools = {t.name: _pool(t.kind, legal.get(t.name), constants) for t in declared(agg)}
        return Sampler(agg, intervals, pools, _gathers(agg), shrunk(agg))

    def sizes(self, trial: int) -> dict[str, int]:
        """1 for all dims, then 2, then mixtures of 1 to 3."""
        free = [d for d in self.agg.dims if d.size is None or d.name in self.shrunk]
        fixed = {d.name: d.size for d in self.agg.dims if d.size is not None}
        if trial % 4 == 0:
            chosen = {d.name: 1 for d in free}
        elif trial % 4 == 1:
            chosen = {d.name: 2 for d in free}
        else:
            rng = random.Random(trial)
            chosen = {d.name: rng.randint(1, _MAX_SIZE) for d in free}
        return {**fixed, **chosen}

    def element(self, rng: random.Random, sizes: Sizes, width: int) -> Element:
        return {c.name: self.array(c.name, c.dims, rng, sizes, width) for c in self.agg.state}

    def params(self, rng: random.Random, sizes: Sizes, width: int) -> Element:
        return {p.name: self.array(p.name, p.dims, rng, sizes, width) for p in self.agg.params}

    def array(self, name: str, dims: tuple[str, ...], rng: random.Random, sizes: Sizes, width: int) -> Array:
        pool = self.choices(name, sizes)[:width]
        return {position: rng.choice(pool) for position in positions(dims, sizes)}

    def declared_sizes(self, sizes: Sizes) -> dict[str, int]:
        """The same with shrunk dims as large as they are."""
        return {**sizes, **{d.name: d.size for d in self.agg.dims if d.size is not None}}

    def filler(self, name: str) -> Number:
        """What stands where a corner says nothing: the simplest legal value."""
        return Fraction(0) if name in self.indices else self.pools[name][0]

    def choices(self, name: str, sizes: Sizes) -> tuple[Number, ...]:
        """Legal values, simplest first."""
        if name in self.indices:
            return tuple(Fraction(k) for k in range(sizes[self.indices[name]]))
        return self.pools[name]


def declared(agg: Aggregator) -> list[Declared]:
    """The tensors that a combine reads."""
    return [*agg.state, *agg.params]


def _constants(agg: Aggregator) -> list[Fraction]:
    """Numbers of the rule and their neighbours: thresholds are crossed there."""
    assert isinstance(agg.combine, Block)
    values = [a.value for a in (*agg.combine.lets, *agg.combine.results)]
    found = sorted({n.value for n in walk(*values) if isinstance(n, Const)})
    return [v + d for v in found if abs(v) > 1 for d in (Fraction(0), Fraction(1), Fraction(-1))]


def _pool(kind: str, interval: Interval | None, constants: list[Fraction]) -> tuple[Number, ...]:
    values = list(dict.fromkeys([*_SIMPLE, *constants]))
    if kind == "complex":
        rows = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (-1, 0), (0, 2), (2, -1))
        return tuple(Complex(Fraction(a), Fraction(b)) for a, b in rows)
    if kind == "int":
        values = [v for v in values if v.denominator == 1]
    if interval is not None:
        values = [v for v in values if im.holds(interval, v)] + _inside(interval, kind)
    return tuple(dict.fromkeys(values)) or (Fraction(0),)


def _inside(interval: Interval, kind: str) -> list[Fraction]:
    lo, hi = interval.lo, interval.hi
    if lo is not None and hi is not None:
        candidates = [lo, hi] + [lo + (hi - lo) * Fraction(n, d) for n, d in ((1, 2), (1, 3), (2, 3), (1, 4), (3, 4))]
    elif lo is not None or hi is not None:
        end, step = (lo, 1) if lo is not None else (hi, -1)
        assert end is not None
        candidates = [end] + [end + step * d for d in (1, 2, Fraction(1, 2), 3, Fraction(1, 3), 5)]
    else:
        candidates = []
    return [c for c in candidates if im.holds(interval, c) and (kind != "int" or c.denominator == 1)]


def _gathers(agg: Aggregator) -> dict[str, str]:
    """Int tensors read inside a subscript, and the dim of the axis they index."""
    assert isinstance(agg.combine, Block)
    dims = {t.name: t.dims for t in declared(agg)}
    dims |= {a.name: tuple(i.dim for i in a.indices) for a in agg.combine.lets}
    out: dict[str, str] = {}
    values = [a.value for a in (*agg.combine.lets, *agg.combine.results)]
    for ref in refs(*values):
        for axis, sub in enumerate(ref.subs):
            if isinstance(sub, Ref) and sub.space in ("left", "right", "param") and ref.name in dims:
                out[sub.name] = dims[ref.name][axis]
    return out
