"""lifted(agg): a recurrence s_t = F(s_{t-1}, x_t) as the monoid of its maps, written as lift + combine.

Components are taken in the order in which they depend on each other. A group of them is lifted by the first that fits:

1. affine in some semiring (`affine`): carried are the transition's entries, as small as their structure allows;
2. affine with coefficients that read an earlier component m, removable by a rescaling with exp(c·m) (`rescale`).

What fits neither is an error that names the term. `associative: no` with `order: left` keeps its recurrence: such a
plan runs it token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from psmc.derive import blame
from psmc.derive.affine import Affine, BothSidesError, affine
from psmc.derive.assemble import Group, assemble
from psmc.derive.graph import layers
from psmc.derive.known import known_positive
from psmc.derive.logs import log_decay
from psmc.derive.newest import newest
from psmc.derive.rescale import CannotRescaleError, rescaled, shifts
from psmc.derive.semiring import PLUS_TIMES, SEMIRINGS, NotAffineError, Semiring, split
from psmc.ir import Aggregator, Assign, Index, Kind
from psmc.ir.rewrite import inline, refs

Updates = Mapping[str, Assign]
Kinds = Mapping[str, Kind]


def lifted(agg: Aggregator) -> Aggregator:
    """`agg` with lift and combine instead of its recurrence; unchanged without one, or if it only runs from the left.

    Components keep their names, order and meaning; carried ones are put before the first that needs them. Identities
    are the monoid's; a declared start that differs becomes `Component.initial`. Raises PsmcError PSM401-PSM404.
    """
    if agg.recurrence is None or (agg.claim == "no" and agg.order == "left"):
        return agg
    kinds = {c.name: c.kind for c in agg.state}
    raw = {r.name: r for r in inline(agg.recurrence).results}
    return assemble(agg, _groups(agg, raw, newest(raw, kinds), kinds))


def _groups(agg: Aggregator, raw: Updates, new: Updates, kinds: Kinds) -> list[Group]:
    names = [c.name for c in agg.state]
    reads = {n: sorted({r.name for r in refs(raw[n].value) if r.space == "prev"} - {n}) for n in names}
    groups: list[Group] = []
    for layer in layers(names, reads):
        read = {m for n in layer for m in reads[n]} - set(layer)
        earlier = [g for g in groups if read & set(g.affine.members)]
        if not earlier:
            groups.append(Group(_in_some_ring(agg, [raw[n] for n in layer], kinds)))
            continue
        coupled = {*layer, *(n for g in earlier for n in g.affine.members)}
        joint = [raw[n] for n in names if n in coupled]
        ring = earlier[0].affine.ring
        same = all(g.affine.ring == ring and not g.by for g in earlier)
        if same and _failure(joint, ring) is None:
            groups = [g for g in groups if g not in earlier]
            groups.append(Group(_affine(agg, joint, ring, kinds)))
        else:
            groups.append(_rescaled(agg, [new[n] for n in layer], kinds))
    return groups


def _failure(updates: Sequence[Assign], ring: Semiring) -> NotAffineError | None:
    """Why the updates are not affine in each other's earlier values; None if they are."""
    members = {u.name for u in updates}
    try:
        for update in updates:
            split(update.value, lambda r: r.space == "prev" and r.name in members, ring)
    except NotAffineError as error:
        return error
    return None


def _affine(agg: Aggregator, updates: Sequence[Assign], ring: Semiring, kinds: Kinds) -> Affine:
    if len({agg.component(u.name).dims for u in updates}) > 1:
        blame.different_shapes(agg, [u.name for u in updates])
    try:
        return affine(updates, ring, kinds)
    except BothSidesError:
        blame.both_sides(agg, updates[0].name)


def _in_some_ring(agg: Aggregator, updates: Sequence[Assign], kinds: Kinds) -> Affine:
    failures: list[NotAffineError] = []
    for plain in SEMIRINGS:
        ring = replace(plain, is_positive=known_positive(agg))
        failure = _failure(updates, ring)
        if failure is None:
            return _affine(agg, updates, ring, kinds)
        failures.append(failure)
    blame.not_affine(agg, updates, failures)


def _rescaled(agg: Aggregator, updates: Sequence[Assign], kinds: Kinds) -> Group:
    members = [u.name for u in updates]
    by = shifts(updates)
    try:
        leaf = {u.name: split(u.value, lambda r: r.space == "prev" and r.name in members)[1] for u in updates}
        found = _affine(agg, [rescaled(u, members, by) for u in updates], PLUS_TIMES, kinds)
    except NotAffineError as error:
        blame.not_affine(agg, updates, [error])
    except CannotRescaleError as error:
        blame.depends_on(agg, updates, error.node)
    scaled = {s for _, ref in by for s in ref.subs if isinstance(s, Index)}
    if found.acted is not None and found.indices[found.acted] in scaled:
        blame.both_sides(agg, members[0])
    entry = found.entries[members[0], members[0]]
    alone = len(members) == 1 and found.acted is None and entry.carried
    return Group(found, by, leaf, log_decay(entry.value, known_positive(agg)) if alone else None)
