"""The chunked plan: matrix states as batched products, a chunk of tokens at a time."""

from __future__ import annotations

from psmc.ir import Aggregator
from psmc.plan.base import Plan
from psmc.structure.report import Affine, Layer, Structure


def licensed(agg: Aggregator, structure: Structure) -> str | None:
    """None if the plan applies, else the reason why not."""
    affine = [layer for layer in structure.layers if layer.affine is not None and layer.cls == "affine"]
    if not affine:
        return "no component is an affine matrix state"
    if any(c.initial is not None for c in agg.state):
        return "the state starts elsewhere than at the identity"
    if any(c.kind != "real" for c in agg.state):
        return "a component is not real"
    for layer in structure.layers:
        reason = _matrix(layer.affine) if layer in affine and layer.affine is not None else _small(layer)
        if reason is not None:
            return f"{', '.join(layer.components)}: {reason}"
    owners = {name for layer in affine for name in layer.components}
    for readout in structure.readout:
        if owners & set(readout.whole):
            return f"output '{readout.output}' reads a matrix state other than linearly"
        if any(len(part.indices) > _width(structure, part.component) for part in readout.linear):
            return f"output '{readout.output}' reads several vectors a token"
    if {r.output for r in structure.readout} != {a.name for a in agg.output.results}:
        return "the readout is not taken apart"
    return None


def _width(structure: Structure, component: str) -> int:
    affine = structure.layer(component).affine
    assert affine is not None
    return len(affine.outer) + (affine.value is not None)


def _matrix(affine: Affine | None) -> str | None:
    if affine is None:
        return "it is not affine"
    if affine.decay.logs is None or affine.decay.parts is None:
        return "its decay is not known to be positive"
    if not affine.columns_alike or (affine.rank and affine.decay.kind in ("V", "KV")):
        return "its columns evolve differently under its transition"
    if not affine.injection.rank:
        return "nothing enters it"
    return None


def _small(layer: Layer) -> str | None:
    if layer.cls != "pointwise":
        return f"it is {layer.cls}"
    return "it reads the prefixes of other components" if layer.reads else None


def plan(agg: Aggregator, structure: Structure) -> Plan:
    ranks = {layer.affine.rank for layer in structure.layers if layer.affine is not None}
    solve = f", a triangular solve for the rank-{max(ranks)} transition" if max(ranks) else ""
    return Plan("chunked", "scan", (f"affine matrix state: chunks of tokens as batched matrix products{solve}",))
