"""Lifted groups written as an aggregator: names for what is carried, leaves, the combine rule, identities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from psmc.derive.affine import Affine, Entry, Pair, Side, applied, composed, past
from psmc.derive.rescale import Shift, collect_exponents, linear
from psmc.derive.simplify import ONE, ZERO, make, simplify
from psmc.ir import Aggregator, Assign, Block, Component, Expr, Index, Interval, Kind, Ref
from psmc.ir.canonical import Names, canonical, canonical_assign, declared_names
from psmc.ir.ops import join
from psmc.ir.rewrite import instantiate, replace_refs
from psmc.source import Span


@dataclass(frozen=True, eq=False)
class Group:
    """Components lifted together. With `by` they are carried relative to exp(Σ c·m): `leaf` holds their injections as
    they were, reading Ref('state', m), and `log` the log of the one transition entry where it is carried as that."""

    affine: Affine
    by: tuple[Shift, ...] = ()
    leaf: Mapping[str, Expr | None] = field(default_factory=dict)
    log: Expr | None = None

    def value(self, pair: Pair) -> Expr:
        """What an element carries for an entry of the transition."""
        return self.affine.entries[pair].value if self.log is None else self.log

    @property
    def times(self) -> str:
        return self.affine.ring.times if self.log is None else "add"


@dataclass(frozen=True, eq=False)
class Carried:
    """A transition entry as a component. Equal entries of different groups share one."""

    name: str
    group: Group
    pair: Pair

    @property
    def indices(self) -> tuple[Index, ...]:
        return self.group.affine.entries[self.pair].indices

    @property
    def kind(self) -> Kind:
        of_state = self.group.affine.kinds[self.pair[0]]
        return "int" if of_state == "int" else join((self.group.value(self.pair).kind, "real"))

    @property
    def interval(self) -> Interval | None:
        """What its composition needs for a proof, and keeps."""
        return Interval(lo=Fraction(0)) if self.group.affine.ring.positive_factors else None

    def identity(self) -> Assign:
        ring, (row, column) = self.group.affine.ring, self.pair
        if row != column:
            value = ring.zero
        elif self.group.affine.acted is not None:
            value = ring.unit(*self.indices[:2])
        else:
            value = ONE if self.group.times == "mul" else ZERO
        return Assign(self.name, self.indices, value)


_Key = tuple[object, ...]


class _Names:
    """The carried components of all groups, by what they hold."""

    def __init__(self, agg: Aggregator, groups: Sequence[Group]) -> None:
        self.taken = set(declared_names(replace(agg, recurrence=None))) | {"prev"}
        self.by_key: dict[_Key, Carried] = {}
        wanted = [(_key(g, p), g, p) for g in groups for p, e in g.affine.entries.items() if e.carried]
        letters = {key: _letter(g) for key, g, _ in wanted}
        for key, group, pair in wanted:
            if key not in self.by_key:
                several = sum(x == letters[key] for x in letters.values()) > 1
                self.by_key[key] = Carried(self.fresh(*_candidates(letters[key], group, pair, several)), group, pair)

    def fresh(self, *candidates: str) -> str:
        """The first candidate that is not taken, else the last one, numbered."""
        name, number = next((c for c in candidates if c not in self.taken), candidates[-1]), 1
        while name in self.taken:
            number += 1
            name = f"{candidates[-1]}_{number}"
        self.taken.add(name)
        return name

    def of(self, group: Group) -> Iterator[Carried]:
        return (c for c in self.by_key.values() if c.group is group)

    def reader(self, group: Group) -> Callable[[Side, Pair, tuple[Index, ...]], Expr]:
        def read(side: Side, pair: Pair, indices: tuple[Index, ...]) -> Expr:
            found = self.by_key[_key(group, pair)]
            return Ref(side, found.name, indices, found.kind)

        return read


def _key(group: Group, pair: Pair) -> _Key:
    """Equal for entries that hold the same number for every token and compose in the same way."""
    entry: Entry = group.affine.entries[pair]
    same = canonical_assign(Assign("", entry.indices, group.value(pair)), Names(()))
    alone = None if len(group.affine.members) == 1 else pair
    return (group.times, group.affine.acted is not None, same.indices, same.value, alone)


def _letter(group: Group) -> str:
    if group.affine.acted is not None:
        return "A"
    return "f" if group.times == "add" else "a"


def _candidates(letter: str, group: Group, pair: Pair, several: bool) -> list[str]:
    members = group.affine.members
    if len(members) > 1:
        return [f"{letter}_{''.join(pair) if all(len(m) == 1 for m in members) else '_'.join(pair)}"]
    return [f"{letter}_{pair[0]}"] if several else [letter, f"{letter}_{pair[0]}"]


def assemble(agg: Aggregator, groups: Sequence[Group]) -> Aggregator:
    """The aggregator, in canonical form."""
    order = [c.name for c in agg.state]
    groups = sorted(groups, key=lambda g: min(map(order.index, g.affine.members)))
    names = _Names(agg, groups)
    scales = sorted({ref.name for g in groups for _, ref in g.by}, key=order.index)
    lets_of = {name: names.fresh(f"{name}_1") for name in scales}
    lift, combine = _leaves(groups), {}
    state: list[Component] = []
    for group in groups:
        read = names.reader(group)
        for name in group.affine.members:
            combine[name] = Assign(name, group.affine.indices, _combined(group, name, read, lets_of))
        for found in names.of(group):
            state.append(Component(found.name, _dims(found.indices), found.kind, found.interval, found.identity()))
            lift[found.name] = Assign(found.name, found.indices, group.value(found.pair))
            combine[found.name] = Assign(found.name, found.indices, _composed(found, read))
    lets = tuple(replace(combine[name], name=let) for name, let in lets_of.items())
    for name, let in lets_of.items():
        indices = combine[name].indices
        combine[name] = Assign(name, indices, Ref("let", let, indices, agg.component(name).kind))
    ring_of = {n: g.affine.ring for g in groups for n in g.affine.members}
    state += [_member(c, ring_of[c.name].zero) for c in agg.state]
    return canonical(
        replace(
            agg,
            state=tuple(state),
            lift=Block((), tuple(lift[c.name] for c in state)),
            combine=Block(lets, tuple(combine[c.name] for c in state)),
            recurrence=None,
            readout=agg.output,
            origin=_origin(agg, {c.name: c.pair[0] for c in names.by_key.values()}),
        )
    )


def _dims(indices: tuple[Index, ...]) -> tuple[str, ...]:
    return tuple(i.dim for i in indices)


def _member(component: Component, zero: Expr) -> Component:
    initial = None if component.start.value == zero else component.start
    return replace(component, identity=replace(component.identity, value=zero), initial=initial)


def _leaves(groups: Sequence[Group]) -> dict[str, Assign]:
    """The members' injections; those of a scaled group with the scales' leaves for the scales."""
    out = {n: Assign(n, g.affine.indices, g.affine.rest[n]) for g in groups for n in g.affine.members}
    for group in (g for g in groups if g.by):
        for name in group.affine.members:
            value = group.leaf.get(name) or ZERO
            value = replace_refs(value, lambda r: instantiate(out[r.name], r.subs) if r.space == "state" else None)
            out[name] = replace(out[name], value=simplify(collect_exponents(value)))
    return out


def _composed(found: Carried, read: Callable[[Side, Pair, tuple[Index, ...]], Expr]) -> Expr:
    if found.group.log is None:
        return composed(found.group.affine, found.pair, read)
    return make("add", *(read(side, found.pair, found.indices) for side in ("left", "right")))


def _combined(
    group: Group, name: str, read: Callable[[Side, Pair, tuple[Index, ...]], Expr], lets_of: Mapping[str, str]
) -> Expr:
    """The rule of a member: A2 b1 ⊕ b2, each scaled from its operand's scale to the new one."""
    if not group.by:
        return applied(group.affine, name, read)
    indices = group.affine.indices
    new = make("mul", _scale("right", group, lets_of), group.affine.state("right", name, indices))
    if group.log is None:
        old = make("mul", _scale("left", group, lets_of), past(group.affine, name, read))
    else:
        decay = read("right", (name, name), group.affine.entries[name, name].indices)
        old = make("mul", _scale("left", group, lets_of, decay), group.affine.state("left", name, indices))
    return make("add", old, new)


def _scale(side: Side, group: Group, lets_of: Mapping[str, str], extra: Expr | None = None) -> Expr:
    """exp(c·side.m + extra - c·m)."""
    found: dict[Expr, Fraction] = {Ref(side, ref.name, ref.subs, ref.value_kind): c for c, ref in group.by}
    if extra is not None:
        found[extra] = Fraction(1)
    found |= {Ref("let", lets_of[ref.name], ref.subs, ref.value_kind): -c for c, ref in group.by}
    return make("exp", linear(found))


def _origin(agg: Aggregator, owner: Mapping[str, str]) -> dict[str, Span]:
    origin = dict(agg.origin)
    whole = agg.where("recurrence", "name")
    if whole is not None:
        origin.setdefault("combine", whole)
    for name in (*owner, *(c.name for c in agg.state)):
        where = agg.where(f"recurrence {owner.get(name, name)}", "recurrence", "name")
        if where is not None:
            origin |= {f"lift {name}": where, f"combine {name}": where}
    return origin
