"""lifted(agg): a recurrence s_t = F(s_{t-1}, x_t) as the monoid of its maps, written as lift + combine.

Components are taken in the order in which they depend on each other. A group of them is lifted by the first that fits:

1. affine in some semiring (`affine`): carried are the transition's entries, as small as their structure allows;
2. elementwise maps of one component of another class that composition keeps (`moebius`, `clamped`, `finite`);
3. either of these, cut into segments by a condition on the token (`segmented`);
4. affine with coefficients that read an earlier component m, removable by a rescaling with exp(c·m) (`rescale`).

What fits none is an error that names the term. `associative: no` with `order: left` keeps its recurrence: such a
plan runs it token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psmc.derive import blame
from psmc.derive.affine import Affine, BothSidesError, affine
from psmc.derive.assemble import assemble
from psmc.derive.classes import in_some_class
from psmc.derive.graph import layers
from psmc.derive.group import AffineGroup, Group
from psmc.derive.known import known_positive
from psmc.derive.logs import log_transition
from psmc.derive.newest import newest
from psmc.derive.rescale import CannotRescaleError, rescaled, shifts
from psmc.derive.semiring import PLUS_TIMES, NotAffineError, Semiring, split
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
        earlier = [g for g in groups if read & set(g.members)]
        joint = _joint(agg, raw, layer, earlier, kinds) if earlier else None
        if not earlier:
            groups.append(in_some_class(agg, [raw[n] for n in layer], kinds))
        elif joint is not None:
            groups = [*(g for g in groups if g not in earlier), joint]
        else:
            groups.append(_rescaled(agg, [new[n] for n in layer], kinds))
    return groups


def _joint(
    agg: Aggregator, raw: Updates, layer: Sequence[str], earlier: Sequence[Group], kinds: Kinds
) -> AffineGroup | None:
    """The layer with those it reads, where all are affine in one semiring."""
    coupled = {*layer, *(n for g in earlier for n in g.members)}
    updates = [raw[c.name] for c in agg.state if c.name in coupled]
    rings = [g.affine.ring for g in earlier if isinstance(g, AffineGroup) and not g.by]
    if len(rings) < len(earlier) or any(ring != rings[0] for ring in rings) or not _fits(updates, rings[0]):
        return None
    found = _affine(agg, updates, rings[0], kinds)
    return None if found.acted is not None and rings[0].reduce is None else AffineGroup(found)


def _fits(updates: Sequence[Assign], ring: Semiring) -> bool:
    members = {u.name for u in updates}
    try:
        for update in updates:
            split(update.value, lambda r: r.space == "prev" and r.name in members, ring)
    except NotAffineError:
        return False
    return True


def _affine(agg: Aggregator, updates: Sequence[Assign], ring: Semiring, kinds: Kinds) -> Affine:
    if len({agg.component(u.name).dims for u in updates}) > 1:
        blame.different_shapes(agg, [u.name for u in updates])
    try:
        return affine(updates, ring, kinds)
    except BothSidesError:
        blame.both_sides(agg, updates[0].name)


def _rescaled(agg: Aggregator, updates: Sequence[Assign], kinds: Kinds) -> Group:
    members = [u.name for u in updates]
    by = shifts(updates)
    try:
        leaf = {u.name: split(u.value, lambda r: r.space == "prev" and r.name in members)[1] for u in updates}
        found = _affine(agg, [rescaled(u, members, by) for u in updates], PLUS_TIMES, kinds)
    except NotAffineError as error:
        blame.not_affine(agg, updates, [blame.Failure("add mul", error)])
    except CannotRescaleError as error:
        blame.depends_on(agg, updates, error.node)
    scaled = {s for _, ref in by for s in ref.subs if isinstance(s, Index)}
    if found.acted is not None and found.indices[found.acted] in scaled:
        blame.both_sides(agg, members[0])
    entry = found.entries[members[0], members[0]]
    alone = len(members) == 1 and found.acted is None and entry.carried
    return AffineGroup(found, by, leaf, log_transition(entry.value, known_positive(agg)) if alone else None)
