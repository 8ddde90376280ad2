"""The classes of maps that composition keeps, tried in order: which one is a recurrence's?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from psmc.algebra import interval_math as im
from psmc.algebra.interval_math import NON_NEGATIVE, UNIT_RANGE, contains
from psmc.derive import blame
from psmc.derive.affine import BothSidesError, affine
from psmc.derive.clamped import clamped
from psmc.derive.finite import finite
from psmc.derive.group import AffineGroup, Group, Maps
from psmc.derive.known import known_bounds, known_bounds_at, known_non_negative, known_positive
from psmc.derive.moebius import moebius
from psmc.derive.plain import plain
from psmc.derive.segmented import Segmented, peeled
from psmc.derive.semiring import SEMIRINGS, NotAffineError, Semiring, split
from psmc.ir import Aggregator, Assign, Const, Expr, Infinity, Interval, Kind, Ref
from psmc.ir.rewrite import refs

Kinds = Mapping[str, Kind]


def in_some_class(agg: Aggregator, updates: Sequence[Assign], kinds: Kinds) -> Group:
    """The group of `updates` (inlined, over Ref('prev', ...)), which read no other component. Raises PsmcError."""
    search = _Search(agg, kinds, {u.name for u in updates})
    found = search.any_of(updates)
    if found is None:
        blame.not_affine(agg, updates, search.failures)
    return found


class _Search:
    def __init__(self, agg: Aggregator, kinds: Kinds, members: set[str]) -> None:
        self.agg, self.kinds, self.members = agg, kinds, members
        self.bounds, self.positive = known_bounds(agg), known_positive(agg)
        self.failures: list[blame.Failure] = []

    def is_state(self, ref: Ref) -> bool:
        return ref.space == "prev" and ref.name in self.members

    def known(self, expr: Expr, strictly: bool) -> bool:
        """Whether it is > 0, or >= 0, for all inputs and params within their intervals."""
        bounds = self.bounds(expr)
        return im.positive(bounds) if strictly else im.non_negative(bounds)

    def any_of(self, updates: Sequence[Assign]) -> Group | None:
        """Of the recurrence as written, then in fewer operators, then in segments."""
        simpler = [replace(u, value=plain(u.value, self.is_state, self.bounds)) for u in updates]
        for form in (updates, simpler) if simpler != list(updates) else (updates,):
            found = self._unsegmented(form)
            if found is not None:
                return found
        cut = peeled(simpler, self.is_state)
        if cut is None:
            return None
        test, constants, others = cut
        inner = self._unsegmented(others)
        if inner is None or _is_matrix(inner):
            return None
        return Segmented(inner, test, {c.name: c.value for c in constants}, self.kinds)

    def _unsegmented(self, updates: Sequence[Assign]) -> Group | None:
        for ring in self._rings(updates):
            try:
                for update in updates:
                    split(update.value, self.is_state, ring)
            except NotAffineError as error:
                self.failures.append(blame.Failure(f"{ring.plus} {ring.times}", error))
                continue
            group = self._affine(updates, ring)
            if group is not None:
                return group
        if len(updates) > 1:
            return None
        for name, read in _CLASSES.items():
            try:
                return read(self, updates[0])
            except NotAffineError as error:
                self.failures.append(blame.Failure(name, error))
        return None

    def _rings(self, updates: Sequence[Assign]) -> Iterator[Semiring]:
        components = [self.agg.component(u.name) for u in updates]
        fits = all(c.interval is not None and contains(NON_NEGATIVE, c.interval) for c in components)
        starts = all(not isinstance(c.start.value, Const) or c.start.value.value >= 0 for c in components)
        whole = any(c.kind == "int" for c in components)
        for ring in SEMIRINGS:
            if whole and isinstance(ring.zero, Infinity):  # an identity that is no whole number
                continue
            if not ring.non_negative:
                yield replace(ring, is_positive=self.positive)
            elif fits and starts:
                yield replace(ring, is_positive=known_non_negative(self.agg))

    def _affine(self, updates: Sequence[Assign], ring: Semiring) -> AffineGroup | None:
        agg = self.agg
        if len({agg.component(u.name).dims for u in updates}) > 1:
            blame.different_shapes(agg, [u.name for u in updates])
        try:
            found = affine(updates, ring, self.kinds)
        except BothSidesError:
            blame.both_sides(agg, updates[0].name)
        if found.acted is not None and ring.reduce is None:
            why = f"entries that are mixed by {ring.plus}, of which the language has no reduction"
            self.failures.append(blame.Failure(f"{ring.plus} {ring.times}", NotAffineError(updates[0].value, why)))
            return None
        if not ring.positive_factors:
            return AffineGroup(found)
        if not ring.non_negative:
            return AffineGroup(found, interval=Interval(Fraction(0)))
        if not all(known_non_negative(agg)(rest) for rest in found.rest.values()):
            return None
        shrinks = all(contains(UNIT_RANGE, self.bounds(e.value)) for e in found.entries.values())
        return AffineGroup(found, interval=UNIT_RANGE if shrinks else NON_NEGATIVE)


def _is_matrix(group: Group) -> bool:
    return isinstance(group, AffineGroup) and (group.affine.acted is not None or len(group.members) > 1)


def _moebius(search: _Search, update: Assign) -> Maps:
    start = search.agg.component(update.name).start.value
    return moebius(_elementwise(search, update), start, search.kinds[update.name], search.is_state, search.known)


def _clamped(search: _Search, update: Assign) -> Maps:
    if search.kinds[update.name] == "int":
        why = "a bound of whole numbers, which have no -inf and inf to start from"
        name = update.name
        raise NotAffineError(update.value, why, f"leave out ': int' of '{name}': a real state counts as well.")
    return clamped(_elementwise(search, update), search.kinds[update.name], search.is_state, search.positive)


def _finite(search: _Search, update: Assign) -> Maps:
    sizes = {d.name: d.size for d in search.agg.dims}
    size = sizes[update.indices[0].dim] if update.indices else None
    return finite(update, search.kinds[update.name], search.is_state, known_bounds_at(search.agg), size)


def _elementwise(search: _Search, update: Assign) -> Assign:
    if search.kinds[update.name] == "complex":  # their laws need an order
        raise NotAffineError(update.value, "a map of complex values that is not affine")
    for ref in refs(update.value):
        if search.is_state(ref) and ref.subs != update.indices:
            raise NotAffineError(ref, "an entry of the state other than its own")
    return update


_CLASSES: dict[str, Callable[[_Search, Assign], Maps]] = {
    "fractional-linear": _moebius,
    "clamped": _clamped,
    "finite": _finite,
}
