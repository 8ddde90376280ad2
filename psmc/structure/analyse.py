"""analyse(agg): the report that plans are chosen from. Each question is answered in its own module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from psmc.derive.graph import layers
from psmc.derive.known import known_positive
from psmc.derive.semiring import SEMIRINGS, NotAffineError, split
from psmc.ir import Aggregator, Assign, Expr, Extern, Index, Ref
from psmc.ir.canonical import declared_names
from psmc.ir.rewrite import refs, rename
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
        stacks=stacks(agg, affines),
    )


def context(agg: Aggregator) -> Context:
    """What expansions need to know: fixed sizes, and the names that indices must not take."""
    return Context({d.name: d.size for d in agg.dims if d.size is not None}, declared_names(agg))


def _layer(
    agg: Aggregator, group: tuple[str, ...], step: Mapping[str, Assign], summed: Mapping[str, tuple[int, ...]]
) -> Layer:
    element = element_state(agg, group)
    own = tuple(step[n] for n in group) if step else ()
    reads = _reads(agg, group, own)
    if not step or (agg.claim == "no" and agg.recurrence is None):
        return Layer(group, "opaque", None, reads, element, own)
    ring = _ring(agg, group, step)
    affine = _affine(agg, group[0], step[group[0]], summed) if len(group) == 1 and ring == "add mul" else None
    return Layer(group, _class(agg, group, step, ring, affine), ring, reads, element, own, affine)


def _reads(agg: Aggregator, group: tuple[str, ...], step: Sequence[Assign]) -> tuple[str, ...]:
    read = {r.name for a in step for r in refs(a.value) if r.space in ("prev", "state")}
    return tuple(c.name for c in agg.state if c.name in read and c.name not in group)


def _ring(agg: Aggregator, group: tuple[str, ...], step: Mapping[str, Assign]) -> str | None:
    """The first semiring in which every member is affine in the layer's earlier values."""
    for plain in SEMIRINGS:
        ring = replace(plain, is_positive=known_positive(agg))
        try:
            for name in group:
                split(step[name].value, lambda r: r.space == "prev" and r.name in group, ring)
        except NotAffineError:
            continue
        return f"{ring.plus} {ring.times}"
    return None


def stacks(agg: Aggregator, affines: Sequence[Affine]) -> tuple[tuple[str, ...], ...]:
    """Groups of two and more components, all real or all complex, that differ in their C alone."""
    groups: dict[tuple[object, ...], list[Affine]] = {}
    for a in affines:
        index = Index("key", a.key.dim)
        vectors = (*a.transition.left, *a.transition.right, *a.injection.left)
        if a.decay.kind in ("V", "KV") or a.outer:
            continue
        same = tuple(rename(x.value, {a.key: index}) for x in (a.decay.value, *vectors))
        groups.setdefault((agg.component(a.component).kind, index, len(a.transition.left), same), []).append(a)
    found = [sorted(g, key=lambda a: a.value is None) for g in groups.values() if len(g) > 1]
    return tuple(tuple(a.component for a in group) for group in found)


def _affine(agg: Aggregator, name: str, step: Assign, summed: Mapping[str, tuple[int, ...]]) -> Affine | None:
    component = agg.component(name)
    if not component.dims:
        return None
    over = lanes(agg, element_state(agg, live_state(agg)))
    return affine_step(step, component.kind, summed[name], context(agg), known_positive(agg), over)


def _class(
    agg: Aggregator, group: tuple[str, ...], step: Mapping[str, Assign], ring: str | None, affine: Affine | None
) -> Class:
    rule = update(agg)
    assert rule is not None and not isinstance(rule, Extern)
    pointwise = is_pointwise(rule.result(n) for n in group)
    if affine is not None and affine.columns_alike:
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
