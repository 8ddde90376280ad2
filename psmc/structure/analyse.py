"""analyse(agg): the report that plans are chosen from. Each question is answered in its own module."""

from __future__ import annotations

from psmc.derive.graph import layers
from psmc.ir import Aggregator
from psmc.ir.rewrite import inline
from psmc.structure.live import dependence, element_state, is_pointwise, lanes, live_state, relevant, update
from psmc.structure.report import Layer, Structure


def analyse(agg: Aggregator) -> Structure:
    """The structure of an aggregator: with a combine, or with a recurrence that only runs from the left."""
    live = live_state(agg)
    element = element_state(agg, live)
    edges = dependence(agg, ("left", "prev"))
    found = []
    for group in layers(live, edges):
        reads = {n for c in group for n in edges[c]} - set(group)
        found.append(_layer(agg, group, tuple(n for n in live if n in reads)))
    return Structure(
        live=live,
        element=element,
        layers=tuple(found),
        lanes=lanes(agg, element),
        pointwise=update(agg) is not None and is_pointwise(relevant(agg, element)),
    )


def _layer(agg: Aggregator, group: tuple[str, ...], reads: tuple[str, ...]) -> Layer:
    rule = update(agg)
    if rule is None or (agg.claim == "no" and agg.recurrence is None and agg.order == "tree"):
        return Layer(group, "opaque", False, reads)
    pointwise = is_pointwise(inline(rule).result(n) for n in group)
    return Layer(group, "pointwise" if pointwise else "opaque", False, reads)
