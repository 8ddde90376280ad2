"""The planner: the first plan that the algebra licenses, fastest first."""

from __future__ import annotations

from dataclasses import replace

from psmc.ir import Aggregator
from psmc.plan import chunked, pointwise, tree
from psmc.plan.base import Plan
from psmc.plan.general import general
from psmc.structure.report import Structure

# name, the algebra that licenses it, the plan; the first licensed one wins
_FASTER = (("pointwise", pointwise.licensed, pointwise.plan), ("chunked", chunked.licensed, chunked.plan))


def choose(agg: Aggregator, structure: Structure | None) -> Plan:
    """A plan for a spec with a combine, or for a recurrence that stays one. Never raises: `general` takes all."""
    fallback = general(agg)
    if fallback.fold == "tree":
        reason = tree.licensed(agg)
        return tree.plan(agg) if reason is None else tree.in_torch(agg, fallback, reason)
    if structure is None or fallback.fold != "scan":
        return fallback
    refused: list[tuple[str, str]] = []
    for name, licensed, plan in _FASTER:
        reason = licensed(agg, structure)
        if reason is None:
            return replace(plan(agg, structure), refused=tuple(refused))
        refused.append((name, reason))
    return replace(fallback, refused=tuple(refused))
