"""Affine recurrences as monoids: s ↦ A ⊗ s ⊕ b composes to (A2 A1, A2 b1 ⊕ b2), A kept as small as possible.

A group of coupled components x, y, ... of equal dims has a block of transitions, one entry x←y for each pair where y
reaches x. An entry is diagonal (elementwise; it has only the indices its value depends on, none for a scalar) or
dense along one dim (A[i, m] acts on the left index). An entry that is 1 for every token is not carried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from psmc.derive.contract import contract
from psmc.derive.semiring import Semiring, split
from psmc.derive.simplify import make
from psmc.ir import Assign, Expr, Index, Kind, Op, Reduce, Ref
from psmc.ir.rewrite import fresh, refs, rename, replace_refs, walk, with_children

Pair = tuple[str, str]
Side = Literal["left", "right"]


class BothSidesError(Exception):
    """The transition acts on more than one index of a component at once."""


@dataclass(frozen=True)
class Entry:
    """One block x←y: `value` over `indices`; dense entries read A[row, col, ...], `indices` beginning with both."""

    indices: tuple[Index, ...]
    value: Expr  # the leaf's; the semiring's zero if only compositions fill the entry
    carried: bool


@dataclass(frozen=True)
class Affine:
    """A group with its leaf: `entries` of the transition, `rest` the injections, all over `indices`."""

    ring: Semiring
    members: tuple[str, ...]
    indices: tuple[Index, ...]
    acted: int | None  # position of the dim along which entries are dense
    column: Index | None
    entries: Mapping[Pair, Entry]
    rest: Mapping[str, Expr]
    kinds: Mapping[str, Kind]

    def state(self, side: Side, name: str, indices: tuple[Index, ...]) -> Ref:
        return Ref(side, name, indices, self.kinds[name])


def affine(updates: Sequence[Assign], ring: Semiring, kinds: Mapping[str, Kind]) -> Affine:
    """The group's structure, from inlined updates over Ref('prev', ...), all of the same dims.

    Raises NotAffineError, BothSidesError.
    """
    members = tuple(u.name for u in updates)
    indices = updates[0].indices
    values = {u.name: rename(u.value, dict(zip(u.indices, indices, strict=True))) for u in updates}
    homs: dict[str, Expr] = {}
    rest: dict[str, Expr] = {}
    for name, value in values.items():
        hom, free = split(value, lambda r: r.space == "prev" and r.name in members, ring)
        if hom is not None:
            homs[name] = contract(hom, ring)
        rest[name] = ring.zero if free is None else contract(free, ring)
    acted = _acted(homs.values(), members, indices)
    column = None if acted is None else fresh(indices[acted], _names(homs.values()) | {i.name for i in indices})
    leaf: dict[Pair, Expr] = {}
    for name, hom in homs.items():
        for source in sorted({r.name for r in _states(hom, members)}, key=members.index):
            leaf[name, source] = contract(_probe(hom, source, members, ring, acted, column), ring)
    entries = _entries(leaf, members, indices, ring, acted, column)
    return Affine(ring, members, indices, acted, column, entries, rest, {n: kinds[n] for n in members})


def _names(exprs: Iterable[Expr]) -> set[str]:
    found: set[str] = set()
    for e in exprs:
        found |= {n.index.name for n in walk(e) if isinstance(n, Reduce)} | {i.name for i in e.free}
    return found


def _states(root: Expr, members: tuple[str, ...]) -> list[Ref]:
    return [r for r in refs(root) if r.space == "prev" and r.name in members]


def _acted(homs: Iterable[Expr], members: tuple[str, ...], indices: tuple[Index, ...]) -> int | None:
    """The one position at which the transition is not elementwise."""
    found = {
        n
        for hom in homs
        for ref in _states(hom, members)
        for n, (sub, index) in enumerate(zip(ref.subs, indices, strict=True))
        if sub != index
    }
    if len(found) > 1:
        raise BothSidesError
    return found.pop() if found else None


def _probe(
    hom: Expr, source: str, members: tuple[str, ...], ring: Semiring, acted: int | None, column: Index | None
) -> Expr:
    """The entry: the homogeneous part at the unit vectors (or 1) of `source`, 0 elsewhere."""

    def rule(ref: Ref) -> Expr | None:
        if ref.space != "prev" or ref.name not in members:
            return None
        if ref.name != source:
            return ring.zero
        return ring.one if acted is None or column is None else ring.unit(ref.subs[acted], column)

    return _folded(replace_refs(hom, rule), ring)


def _folded(root: Expr, ring: Semiring) -> Expr:
    """Units and zeros of the semiring taken out."""
    done: dict[Expr, Expr] = {}
    for node in walk(root):
        new = with_children(node, done.__getitem__)
        match new:
            case Op(op=op, args=(a, b)) if op == ring.plus:
                new = ring.add(a, b) or ring.zero
            case Op(op=op, args=(a, b)) if op == ring.times:
                new = ring.mul(a, b)
            case Op(op=op, args=(a, _)) if op == ring.inverse and a == ring.zero:
                new = ring.zero
            case Op(op=op, args=args):
                found = ring.reduction(new)
                new = ring.zero if found is not None and found[1] == ring.zero else make(op, *args)
            case Reduce(body=body) if not ring.dual and ring.reduction(new) and body == ring.zero:
                new = ring.zero
        done[node] = new
    return done[root]


def _entries(
    leaf: Mapping[Pair, Expr],
    members: tuple[str, ...],
    indices: tuple[Index, ...],
    ring: Semiring,
    acted: int | None,
    column: Index | None,
) -> dict[Pair, Entry]:
    """Which entries are carried, and over which indices: closed under composition with themselves and the identity."""
    base = () if acted is None or column is None else (indices[acted], column)
    deps: dict[Pair, set[Index]] = {p: set(v.free) for p, v in leaf.items()}
    for x in members:
        deps.setdefault((x, x), set())
    changed = True
    while changed:
        changed = False
        for x, z in list(deps):
            for y in members:
                if (z, y) in deps and z != y and x != z:
                    union = deps[x, z] | deps[z, y] | deps.get((x, y), set())
                    changed |= (x, y) not in deps or union != deps[x, y]
                    deps[x, y] = union
        for x, y in list(deps):  # A_xx A_xy + A_xy A_yy
            union = deps[x, y] | deps[x, x] | deps[y, y]
            changed |= union != deps[x, y]
            deps[x, y] = union
    found: dict[Pair, Entry] = {}
    for x in members:
        for y in members:
            if (x, y) not in deps:
                continue
            value = leaf.get((x, y), ring.zero)
            others = [i for i in indices if i in deps[x, y] and i not in base]
            cycle = any(z != x and (x, z) in deps and (z, x) in deps for z in members)
            trivial = x == y and acted is None and value == ring.one and not cycle
            found[x, y] = Entry((*base, *others), value, not trivial)
    return found


# --- the composed rule ------------------------------------------------------------------------------

Read = Callable[[Side, Pair, tuple[Index, ...]], Expr]  # (operand, entry, indices) -> carried component


def composed(group: Affine, pair: Pair, read: Read) -> Expr:
    """The entry of A2 A1 (r after l) at its own indices."""
    ring, (x, y) = group.ring, pair
    total: Expr | None = None
    for z in group.members:
        if (x, z) not in group.entries or (z, y) not in group.entries:
            continue
        if group.acted is None or group.column is None:
            later, earlier = _read(group, (x, z), "right", read), _read(group, (z, y), "left", read)
            single = len(group.members) == 1
            term = ring.mul(earlier, later) if single else ring.mul(later, earlier)
        else:
            inner = fresh(group.column, {i.name for i in (*group.indices, group.column)})
            at = group.entries
            later = read("right", (x, z), _renamed(at[x, z].indices, {group.column: inner}))
            earlier = read("left", (z, y), _renamed(at[z, y].indices, {group.indices[group.acted]: inner}))
            term = ring.over(inner, ring.mul(later, earlier))
        total = ring.add(total, term)
    assert total is not None
    return total


def applied(group: Affine, name: str, read: Read) -> Expr:
    """A2 b1 ⊕ b2, component `name`."""
    return make(group.ring.plus, past(group, name, read), group.state("right", name, group.indices))


def past(group: Affine, name: str, read: Read) -> Expr:
    """A2 b1, component `name`."""
    ring = group.ring
    total: Expr | None = None
    for source in group.members:
        entry = group.entries.get((name, source))
        if entry is None:
            continue
        if group.acted is None or group.column is None:
            decay, before = _read(group, (name, source), "right", read), group.state("left", source, group.indices)
            term = ring.mul(before, decay) if ring.times == "add" else ring.mul(decay, before)
        else:
            subs = _renamed(group.indices, {group.indices[group.acted]: group.column})
            matrix = read("right", (name, source), entry.indices)
            term = ring.over(group.column, ring.mul(matrix, group.state("left", source, subs)))
        total = ring.add(total, term)
    assert total is not None
    return total


def _read(group: Affine, pair: Pair, side: Side, read: Read) -> Expr:
    entry = group.entries[pair]
    return read(side, pair, entry.indices) if entry.carried else group.ring.one


def _renamed(indices: tuple[Index, ...], subs: Mapping[Index, Index]) -> tuple[Index, ...]:
    return tuple(subs.get(i, i) for i in indices)
