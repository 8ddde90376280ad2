"""Components lifted together, as what `assemble` writes down: the slots an element carries and how they compose.

A class of maps is a `Group`: `affine` ones over a semiring, perhaps rescaled; those of `maps`; any of them cut into
segments (`segmented`). In each, a member's own component holds the value of the composed map at a base point, the
member's identity; so a prefix that starts from a state holds the state, and decoding needs nothing else of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from psmc.derive.affine import Affine, Entry, Pair, Read, Side, applied, composed, past
from psmc.derive.rescale import Shift, linear
from psmc.derive.simplify import ZERO, make
from psmc.ir import Assign, Expr, Index, Interval, Kind, Ref
from psmc.ir.canonical import Names, canonical_assign
from psmc.ir.ops import join

Lets = Mapping[str, str]  # component that others are scaled by -> name of the let that holds its new value


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor that elements carry. Slots of equal `key` hold the same number for every token, and share a name."""

    pair: Pair  # tells it from the group's others
    letter: str
    indices: tuple[Index, ...]
    kind: Kind
    interval: Interval | None  # what its composition needs for a proof, and keeps
    identity: Expr
    leaf: Expr
    key: object


class Group(ABC):
    """`members`: components, all over `indices`."""

    members: tuple[str, ...]
    indices: tuple[Index, ...]
    by: tuple[Shift, ...] = ()

    @abstractmethod
    def slots(self) -> tuple[Slot, ...]: ...

    @abstractmethod
    def composed(self, pair: Pair, read: Read) -> Expr:
        """The slot of l∘r, over its own indices."""

    @abstractmethod
    def identity(self, name: str) -> Expr: ...

    @abstractmethod
    def leaf(self, name: str) -> Expr:
        """The member of one token's element."""

    @abstractmethod
    def applied(self, name: str, read: Read, lets_of: Lets) -> Expr:
        """The member of l∘r: r's map at l's member."""


@dataclass(frozen=True, eq=False)
class AffineGroup(Group):
    """s ↦ A ⊗ s ⊕ b. With `by` the members are carried relative to exp(Σ c·m): `scaled_leaf` holds their injections as
    they were, reading Ref('state', m), and `log` the log of the one transition entry where it is carried as that."""

    affine: Affine
    by: tuple[Shift, ...] = ()
    scaled_leaf: Mapping[str, Expr | None] = field(default_factory=dict)
    log: Expr | None = None
    interval: Interval | None = None

    @property
    def members(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.affine.members

    @property
    def indices(self) -> tuple[Index, ...]:  # type: ignore[override]
        return self.affine.indices

    @property
    def times(self) -> str:
        return self.affine.ring.times if self.log is None else "add"

    def slots(self) -> tuple[Slot, ...]:
        return tuple(self._slot(pair, entry) for pair, entry in self.affine.entries.items() if entry.carried)

    def _slot(self, pair: Pair, entry: Entry) -> Slot:
        leaf = entry.value if self.log is None else self.log
        same = canonical_assign(Assign("", entry.indices, leaf), Names(()))
        alone = None if len(self.members) == 1 else pair
        matrix = self.affine.acted is not None
        letter = "A" if matrix else "f" if self.times == "add" else "a"
        kind: Kind = "int" if self.affine.kinds[pair[0]] == "int" else join((leaf.kind, "real"))
        mixed = self.affine.ring.plus if matrix or alone else None  # one entry alone composes by ⊗ only
        key = (mixed, self.times, matrix, same.indices, same.value, kind, self.interval, alone)
        return Slot(pair, letter, entry.indices, kind, self.interval, self._unit(pair, entry), leaf, key)

    def _unit(self, pair: Pair, entry: Entry) -> Expr:
        ring = self.affine.ring
        if pair[0] != pair[1]:
            return ring.zero
        if self.affine.acted is not None:
            return ring.unit(*entry.indices[:2])
        return ring.one if self.log is None else ZERO

    def composed(self, pair: Pair, read: Read) -> Expr:
        if self.log is None:
            return composed(self.affine, pair, read)
        indices = self.affine.entries[pair].indices
        return make("add", *(read(side, pair, indices) for side in ("left", "right")))

    def identity(self, name: str) -> Expr:
        return self.affine.ring.zero

    def leaf(self, name: str) -> Expr:
        return self.affine.rest[name]

    def applied(self, name: str, read: Read, lets_of: Lets) -> Expr:
        """A2 b1 ⊕ b2, each scaled from its operand's scale to the new one."""
        if not self.by:
            return applied(self.affine, name, read)
        new = make("mul", self._scale("right", lets_of), self.affine.state("right", name, self.indices))
        if self.log is None:
            old = make("mul", self._scale("left", lets_of), past(self.affine, name, read))
        else:
            decay = read("right", (name, name), self.affine.entries[name, name].indices)
            old = make("mul", self._scale("left", lets_of, decay), self.affine.state("left", name, self.indices))
        return make("add", old, new)

    def _scale(self, side: Side, lets_of: Lets, extra: Expr | None = None) -> Expr:
        """exp(c·side.m + extra - c·m)."""
        found: dict[Expr, Fraction] = {Ref(side, ref.name, ref.subs, ref.value_kind): c for c, ref in self.by}
        if extra is not None:
            found[extra] = Fraction(1)
        found |= {Ref("let", lets_of[ref.name], ref.subs, ref.value_kind): -c for c, ref in self.by}
        return make("exp", linear(found))


Values = Mapping[str, Expr]  # by letter; VALUE is the member itself
VALUE = ""
Rule = Callable[[Values, Values], dict[str, Expr]]


@dataclass(frozen=True)
class Parameter:
    """A number that a map of some class is told by, besides its value at the base point."""

    letter: str
    leaf: Expr
    identity: Expr
    interval: Interval | None = None


@dataclass(frozen=True, eq=False)
class Maps(Group):
    """Elementwise maps of one component: `rule` composes two of them, as values by letter.

    Parameters that are the identity's for every token, and stay so, are not carried; the others have the indices that
    they depend on.
    """

    member: str
    indices: tuple[Index, ...]
    kind: Kind
    base: Expr
    value: Expr
    parameters: tuple[Parameter, ...]
    rule: Rule
    _carried: dict[str, tuple[Index, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fixed = {p.letter for p in self.parameters if p.leaf == p.identity}
        while True:
            found = self._composed(self._symbols({p.letter: () for p in self.parameters if p.letter not in fixed}))
            broken = {p.letter for p in self.parameters if p.letter in fixed and found[p.letter] != p.identity}
            if not broken:
                break
            fixed -= broken
        free = {p.letter: p.leaf.free for p in self.parameters if p.letter not in fixed}
        while True:
            over = {k: tuple(i for i in self.indices if i in f) for k, f in free.items()}
            found = self._composed(self._symbols(over))
            wider = {k: f | found[k].free for k, f in free.items()}
            if wider == free:
                break
            free = wider
        self._carried.update(over)

    @property
    def members(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.member,)

    def _symbols(self, over: Mapping[str, tuple[Index, ...]]) -> Callable[[Side, Parameter], Expr]:
        def one(side: Side, p: Parameter) -> Expr:
            indices = over.get(p.letter)
            return p.identity if indices is None else Ref(side, f"{self.member}.{p.letter}", indices, self._kind(p))

        return one

    def _kind(self, p: Parameter) -> Kind:
        return "int" if self.kind == "int" else join((p.leaf.kind, "real"))

    def _composed(self, read: Callable[[Side, Parameter], Expr]) -> dict[str, Expr]:
        def values(side: Side) -> dict[str, Expr]:
            own = Ref(side, self.member, self.indices, self.kind)
            return {VALUE: own} | {p.letter: read(side, p) for p in self.parameters}

        return self.rule(values("left"), values("right"))

    def _reading(self, read: Read) -> dict[str, Expr]:
        def one(side: Side, p: Parameter) -> Expr:
            over = self._carried.get(p.letter)
            return p.identity if over is None else read(side, (p.letter, self.member), over)

        return self._composed(one)

    def slots(self) -> tuple[Slot, ...]:
        return tuple(self._slot(p, self._carried[p.letter]) for p in self.parameters if p.letter in self._carried)

    def _slot(self, p: Parameter, indices: tuple[Index, ...]) -> Slot:
        pair = (p.letter, self.member)
        return Slot(pair, p.letter, indices, self._kind(p), p.interval, p.identity, p.leaf, pair)

    def composed(self, pair: Pair, read: Read) -> Expr:
        return self._reading(read)[pair[0]]

    def identity(self, name: str) -> Expr:
        return self.base

    def leaf(self, name: str) -> Expr:
        return self.value

    def applied(self, name: str, read: Read, lets_of: Lets) -> Expr:
        return self._reading(read)[VALUE]
