"""Segments: where(reset, value, rule(s)) over whatever class the rule is of.

Maps of a class and constants are closed under composition: a flag says which of the two an element is, and the member
holds the constant or the map's value at its base point. (f, s)∘(g, t) = (f or g, t if g else t's map at s). Blelloch
1990, "Prefix sums and their applications", §1.5, does so for sums. Classes that hold the constants need no flag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from psmc.derive.affine import Pair, Read
from psmc.derive.group import Group, Lets, Slot
from psmc.derive.semiring import IsState
from psmc.derive.simplify import ONE, ZERO, make, simplify
from psmc.ir import Assign, Expr, Index, Infinity, Interval, Kind, Op, Ref
from psmc.ir.rewrite import refs, transform, walk

FLAG = "flag"
Peeled = tuple[Expr, list[Assign], list[Assign]]  # (test, constants where it holds, updates where it does not)


def peeled(updates: Sequence[Assign], is_state: IsState) -> Peeled | None:
    """The first condition under which every update forgets the state, taken out of them; more are joined to it."""
    for test in _tests(updates, is_state):
        for wanted in (True, False):
            constants = [replace(u, value=_given(u.value, test, wanted)) for u in updates]
            if any(is_state(r) for u in constants for r in refs(u.value)):
                continue
            others = [replace(u, value=_given(u.value, test, not wanted)) for u in updates]
            when = test if wanted else Op("not", (test,))
            again = peeled(others, is_state)
            if again is None:
                return when, constants, others
            pairs = zip(constants, again[1], strict=True)
            joined = [replace(c, value=make("where", when, c.value, d.value)) for c, d in pairs]
            return Op("or", (when, again[0])), joined, again[2]
    return None


def _tests(updates: Sequence[Assign], is_state: IsState) -> list[Expr]:
    """Conditions on the token, without bound indices, in the order in which they are met."""
    found: dict[Expr, None] = {}
    for update in updates:
        for node in walk(update.value):
            if isinstance(node, Op) and node.op == "where":
                test = node.args[0]
                if test.free <= set(update.indices) and not any(is_state(r) for r in refs(test)):
                    found.setdefault(test)
    return list(found)


def _given(root: Expr, test: Expr, holds: bool) -> Expr:
    def rule(node: Expr) -> Expr | None:
        if isinstance(node, Op) and node.op == "where" and node.args[0] == test:
            return node.args[1 if holds else 2]
        return None

    return simplify(transform(root, rule))


@dataclass(frozen=True, eq=False)
class Segmented(Group):
    """`inner`, an elementwise class, or the `constants` where `test` holds.

    Slots keep what was composed since the latest constant: what came before it neither overflows nor meets a gradient.
    """

    inner: Group
    test: Expr
    constants: Mapping[str, Expr]
    kinds: Mapping[str, Kind]

    @property
    def members(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.members

    @property
    def indices(self) -> tuple[Index, ...]:  # type: ignore[override]
        return self.inner.indices

    @property
    def _pair(self) -> Pair:
        return FLAG, self.members[0]

    def _over(self, indices: tuple[Index, ...] = ()) -> tuple[Index, ...]:
        return tuple(i for i in self.indices if i in self.test.free or i in indices)

    def slots(self) -> tuple[Slot, ...]:
        unit = Interval(Fraction(0), Fraction(1), False, False)
        leaf = make("where", self.test, ONE, ZERO)
        flag = Slot(self._pair, FLAG, self._over(), "int", unit, ZERO, leaf, (FLAG, self._over(), leaf))
        return (flag, *map(self._slot, self.inner.slots()))

    def _slot(self, slot: Slot) -> Slot:
        """At a constant the identity's, which no map can overflow with, unless it is infinite: what multiplies that has
        no gradient."""
        finite = not any(isinstance(n, Infinity) for n in walk(slot.identity))
        leaf = make("where", self.test, slot.identity, slot.leaf) if finite else slot.leaf
        over = self._over(slot.indices)
        return replace(slot, indices=over, leaf=leaf, key=(FLAG, over, self.test, slot.key))

    def _wide(self, read: Read) -> Read:
        return lambda side, pair, indices: read(side, pair, self._over(indices))

    def _if_flagged(self, read: Read, kept: Expr, other: Expr) -> Expr:
        return make("where", Op("gt", (read("right", self._pair, self._over()), ZERO)), kept, other)

    def composed(self, pair: Pair, read: Read) -> Expr:
        if pair == self._pair:
            return make("max", read("left", pair, self._over()), read("right", pair, self._over()))
        slot = next(s for s in self.inner.slots() if s.pair == pair)
        wide = self._wide(read)
        return self._if_flagged(read, wide("right", pair, slot.indices), self.inner.composed(pair, wide))

    def identity(self, name: str) -> Expr:
        return self.inner.identity(name)

    def leaf(self, name: str) -> Expr:
        return make("where", self.test, self.constants[name], self.inner.leaf(name))

    def applied(self, name: str, read: Read, lets_of: Lets) -> Expr:
        own = Ref("right", name, self.indices, self.kinds[name])
        return self._if_flagged(read, own, self.inner.applied(name, self._wide(read), lets_of))
