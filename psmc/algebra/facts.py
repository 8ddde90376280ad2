"""What may be taken as known while terms are simplified: intervals, dim sizes, and the assumptions of the current case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from psmc.algebra.interval_math import ANY
from psmc.algebra.terms import Atom, Poly
from psmc.ir import Interval


@dataclass(frozen=True)
class Case:
    """One assumption: `poly` > 0, or ≥ 0 if not `strict`."""

    poly: Poly
    strict: bool


@dataclass(frozen=True)
class Facts:
    """`intervals` are by tensor name (`a.S`, or a param's); `used` collects the names whose interval was asked for."""

    intervals: Mapping[str, Interval] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    unroll: bool = False  # reductions over dims of known size become plain sums
    cases: tuple[Case, ...] = ()
    values: Mapping[Atom, Poly] = field(default_factory=dict)  # elements fixed by an equality of the case
    distinct: frozenset[Atom] = frozenset()  # eye atoms that are 0
    used: set[str] = field(default_factory=set)

    def interval(self, name: str) -> Interval:
        found = self.intervals.get(name)
        if found is None:
            return ANY
        self.used.add(name)
        return found

    def apart(self, eye: Atom) -> Facts:
        """The same, where the two positions of an eye atom differ."""
        return replace(self, distinct=self.distinct | {eye})

    def with_case(self, poly: Poly, *, strict: bool) -> Facts:
        return replace(self, cases=(*self.cases, Case(poly, strict)))
