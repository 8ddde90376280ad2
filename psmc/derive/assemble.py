"""Lifted groups written as an aggregator: names for what is carried, leaves, the combine rule, identities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from psmc.derive.affine import Pair, Read, Side
from psmc.derive.group import AffineGroup, Group, Slot
from psmc.derive.rescale import collect_exponents
from psmc.derive.simplify import ZERO, simplify
from psmc.ir import Aggregator, Assign, Block, Component, Expr, Index, Ref
from psmc.ir.canonical import canonical, declared_names
from psmc.ir.rewrite import instantiate, replace_refs
from psmc.source import Span


@dataclass(frozen=True, eq=False)
class Carried:
    """A slot as a component."""

    name: str
    group: Group
    slot: Slot

    @property
    def owner(self) -> str:
        """The component whose recurrence it comes from."""
        return next((n for n in self.slot.pair if n in self.group.members), self.group.members[0])

    def component(self) -> Component:
        slot = self.slot
        identity = Assign(self.name, slot.indices, slot.identity)
        return Component(self.name, tuple(i.dim for i in slot.indices), slot.kind, slot.interval, identity)


class _Names:
    """The carried components of all groups, by what they hold."""

    def __init__(self, agg: Aggregator, groups: Sequence[Group]) -> None:
        self.taken = set(declared_names(replace(agg, recurrence=None))) | {"prev"}
        self.by_key: dict[object, Carried] = {}
        wanted = [(slot, group) for group in groups for slot in group.slots()]
        letters = {slot.key: slot.letter for slot, _ in wanted}
        for slot, group in wanted:
            if slot.key not in self.by_key:
                several = sum(x == slot.letter for x in letters.values()) > 1
                self.by_key[slot.key] = Carried(self.fresh(*_candidates(slot, group, several)), group, slot)

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

    def reader(self, group: Group) -> Read:
        slots = {slot.pair: slot for slot in group.slots()}

        def read(side: Side, pair: Pair, indices: tuple[Index, ...]) -> Expr:
            found = self.by_key[slots[pair].key]
            return Ref(side, found.name, indices, found.slot.kind)

        return read


def _candidates(slot: Slot, group: Group, several: bool) -> list[str]:
    members, letter = group.members, slot.letter
    if len(members) > 1:
        return [f"{letter}_{''.join(slot.pair) if all(len(m) == 1 for m in members) else '_'.join(slot.pair)}"]
    return [f"{letter}_{members[0]}"] if several else [letter, f"{letter}_{members[0]}"]


def assemble(agg: Aggregator, groups: Sequence[Group]) -> Aggregator:
    """The aggregator, in canonical form."""
    order = [c.name for c in agg.state]
    groups = sorted(groups, key=lambda g: min(map(order.index, g.members)))
    names = _Names(agg, groups)
    scales = sorted({ref.name for g in groups for _, ref in g.by}, key=order.index)
    lets_of = {name: names.fresh(f"{name}_1") for name in scales}
    lift, combine = _leaves(groups), {}
    state: list[Component] = []
    for group in groups:
        read = names.reader(group)
        for name in group.members:
            combine[name] = Assign(name, group.indices, group.applied(name, read, lets_of))
        for found in names.of(group):
            slot = found.slot
            state.append(found.component())
            lift[found.name] = Assign(found.name, slot.indices, slot.leaf)
            combine[found.name] = Assign(found.name, slot.indices, group.composed(slot.pair, read))
    lets = tuple(replace(combine[name], name=let) for name, let in lets_of.items())
    for name, let in lets_of.items():
        indices = combine[name].indices
        combine[name] = Assign(name, indices, Ref("let", let, indices, agg.component(name).kind))
    identity_of = {n: g.identity(n) for g in groups for n in g.members}
    state += [_member(c, identity_of[c.name]) for c in agg.state]
    return canonical(
        replace(
            agg,
            state=tuple(state),
            lift=Block((), tuple(lift[c.name] for c in state)),
            combine=Block(lets, tuple(combine[c.name] for c in state)),
            recurrence=None,
            readout=agg.output,
            origin=_origin(agg, {c.name: c.owner for c in names.by_key.values()}),
        )
    )


def _member(component: Component, identity: Expr) -> Component:
    initial = None if component.start.value == identity else component.start
    return replace(component, identity=replace(component.identity, value=identity), initial=initial)


def _leaves(groups: Sequence[Group]) -> dict[str, Assign]:
    """The members' leaves; those of a scaled group with the scales' leaves for the scales."""
    out = {n: Assign(n, g.indices, g.leaf(n)) for g in groups for n in g.members}
    for group in groups:
        if not isinstance(group, AffineGroup) or not group.by:
            continue
        for name in group.members:
            value = group.scaled_leaf.get(name) or ZERO
            value = replace_refs(value, lambda r: instantiate(out[r.name], r.subs) if r.space == "state" else None)
            out[name] = replace(out[name], value=simplify(collect_exponents(value)))
    return out


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
