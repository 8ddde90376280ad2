"""The planner: the first plan that the algebra licenses, fastest first."""

from __future__ import annotations

from psmc.ir import Aggregator
from psmc.plan.base import Plan
from psmc.plan.general import general
from psmc.structure.report import Structure


def choose(agg: Aggregator, structure: Structure | None) -> Plan:
    """A plan for a spec with a combine, or for a recurrence that stays one. Never raises: `general` takes all."""
    fallback = general(agg)
    if structure is None or fallback.fold != "scan":
        return fallback
    try:
        from psmc.plan import pointwise
    except ImportError:
        return fallback
    refusal = pointwise.licensed(agg, structure)
    if refusal is not None:
        return Plan(fallback.name, fallback.fold, fallback.why, (("pointwise", refusal),))
    return pointwise.plan(agg, structure)
