"""What one token does to the live state: the update with the lift substituted, earlier layers read by prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psmc.derive.newest import newest
from psmc.derive.rescale import collect_exponents
from psmc.derive.simplify import simplify
from psmc.ir import Aggregator, Assign, Expr, Extern, Ref
from psmc.ir.rewrite import inline, instantiate, replace_refs


def steps(agg: Aggregator, groups: Sequence[tuple[str, ...]]) -> dict[str, Assign]:
    """Live component -> its new value over Ref('prev', ...), Ref('state', earlier layer), inputs and params.

    `groups` are the layers in order. Empty if the rule is Python.
    """
    rule = agg.combine if agg.recurrence is None else agg.recurrence
    if rule is None or isinstance(rule, Extern):
        return {}
    position = {n: k for k, group in enumerate(groups) for n in group}
    updates = {r.name: r for r in inline(rule).results if r.name in position}
    kinds = {c.name: c.kind for c in agg.state}
    layered = newest(updates, kinds, lambda reader, read: position[read] < position[reader])
    if agg.recurrence is not None:
        return layered
    leaf = {r.name: r for r in inline(agg.leaf).results}
    return {n: Assign(n, a.indices, _of_token(a.value, leaf)) for n, a in layered.items()}


def _of_token(value: Expr, leaf: Mapping[str, Assign]) -> Expr:
    def rule(ref: Ref) -> Expr | None:
        if ref.space == "left":
            return Ref("prev", ref.name, ref.subs, ref.value_kind)
        return instantiate(leaf[ref.name], ref.subs) if ref.space == "right" else None

    return simplify(collect_exponents(replace_refs(value, rule)))
