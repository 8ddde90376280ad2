"""What is known while terms are simplified: intervals, dim sizes, and the assumptions of the current case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from psmc.algebra.interval_math import ANY, intersect
from psmc.algebra.terms import ONE, Atom, Poly
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
    narrowed: Mapping[Atom, Interval] = field(default_factory=dict)  # what the assumptions say of lone quantities
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
        """The same under one more assumption: poly > 0, or ≥ 0."""
        narrowed = dict(self.narrowed)
        found = _half_line(poly, strict)
        if found is not None:
            atom, interval = found
            narrowed[atom] = intersect(narrowed.get(atom, ANY), interval)
        return replace(self, cases=(*self.cases, Case(poly, strict)), narrowed=narrowed)


def _half_line(poly: Poly, strict: bool) -> tuple[Atom, Interval] | None:
    """(x, its interval) if the assumption is c·x + d > 0 (or ≥ 0) of a lone x."""
    rest = [(m, c) for m, c in poly if m.factors]
    if len(rest) != 1:
        return None
    (mono, coef), end = rest[0], -poly.terms.get(ONE, Fraction(0))
    if len(mono.factors) != 1 or mono.bound or mono.factors[0][1] != 1:
        return None
    end /= coef
    return mono.factors[0][0], Interval(end, None, strict, True) if coef > 0 else Interval(None, end, True, strict)
