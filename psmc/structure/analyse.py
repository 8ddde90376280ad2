"""analyse(agg): the report that plans are chosen from. Each question is answered in its own module."""

from __future__ import annotations

from collections.abc import Mapping

from psmc.derive.graph import layers
from psmc.derive.known import known_positive
from psmc.derive.semiring import SEMIRINGS, NotAffineError, split
from psmc.ir import Aggregator, Assign, Expr, Extern, Ref
from psmc.ir.canonical import declared_names
from psmc.ir.rewrite import refs
from psmc.structure.live import dependence, element_state, is_pointwise, lanes, live_state, relevant, update
from psmc.structure.matrix import affine_step
from psmc.structure.products import Context
from psmc.structure.readout import contracted, readouts
from psmc.structure.report import Affine, Class, Layer, Structure
from psmc.structure.steps import steps


def analyse(agg: Aggregator) -> Structure:
    """The structure of an aggregator: with a combine, or with a recurrence that only runs from the left."""
    live = live_state(agg)
    element = element_state(agg, live)
    groups = layers(live, dependence(agg, ("left", "prev")))
    step = steps(agg, groups)
    summed = contracted(agg)
    found = tuple(_layer(agg, group, step, summed) for group in groups)
    affines = [x.affine for x in found if x.affine is not None]
    return Structure(
        name=agg.name,
        live=live,
        element=element,
        layers=found,
        lanes=lanes(agg, element),
        pointwise=update(agg) is not None and is_pointwise(relevant(agg, element)),
        expanded=tuple(
            d.name for d in agg.dims if d.name in {agg.component(c).dims[n] for c in live for n in summed[c]}
        ),
        readout=readouts(agg, affines, context(agg)),
    )


def context(agg: Aggregator) -> Context:
    """What expansions need to know: fixed sizes, and the names that indices must not take."""
    return Context({d.name: d.size for d in agg.dims if d.size is not None}, declared_names(agg))


def _layer(
    agg: Aggregator, group: tuple[str, ...], step: Mapping[str, Assign], summed: Mapping[str, tuple[int, ...]]
) -> Layer:
    if not step or (agg.claim == "no" and agg.recurrence is None):
        return Layer(group, "opaque", None, _reads(agg, group, step))
    ring = _ring(group, step)
    affine = _affine(agg, group[0], step[group[0]], summed) if len(group) == 1 and ring == "add mul" else None
    return Layer(group, _class(agg, group, step, ring, affine), ring, _reads(agg, group, step), affine)


def _reads(agg: Aggregator, group: tuple[str, ...], step: Mapping[str, Assign]) -> tuple[str, ...]:
    if not step:
        return ()
    read = {r.name for n in group for r in refs(step[n].value) if r.space in ("prev", "state")}
    return tuple(c.name for c in agg.state if c.name in read and c.name not in group)


def _ring(group: tuple[str, ...], step: Mapping[str, Assign]) -> str | None:
    """The first semiring in which every member is affine in the layer's earlier values."""
    for ring in SEMIRINGS:
        try:
            for name in group:
                split(step[name].value, lambda r: r.space == "prev" and r.name in group, ring)
        except NotAffineError:
            continue
        return f"{ring.plus} {ring.times}"
    return None


def _affine(agg: Aggregator, name: str, step: Assign, summed: Mapping[str, tuple[int, ...]]) -> Affine | None:
    component = agg.component(name)
    if not component.dims:
        return None
    return affine_step(step, component.kind, summed[name], context(agg), known_positive(agg))


def _class(
    agg: Aggregator, group: tuple[str, ...], step: Mapping[str, Assign], ring: str | None, affine: Affine | None
) -> Class:
    rule = update(agg)
    assert rule is not None and not isinstance(rule, Extern)
    pointwise = is_pointwise(rule.result(n) for n in group)
    if affine is not None and affine.decay.parts is not None:
        return "affine"
    if pointwise:
        return "pointwise"
    return "dense" if ring is not None or _composes(step[group[0]]) else "opaque"


def _composes(step: Assign) -> bool:
    """A gather of tokens at the earlier state: functions of a finite set, composed."""
    match step.value:
        case Ref(space="input", subs=subs):
            return all(isinstance(s, Ref) and s.space == "prev" for s in subs if isinstance(s, Expr))
    return False
