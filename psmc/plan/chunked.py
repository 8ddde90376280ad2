"""The chunked plan: matrix states as batched products, a chunk of tokens at a time."""

from __future__ import annotations

from psmc.ir import Aggregator, Index
from psmc.ir.rewrite import refs
from psmc.plan.base import Plan
from psmc.structure.report import Affine, Layer, Linear, Structure

_INSEPARABLE = "its decay does not come apart into one over the key times one over the value"
_UNLIKE = "its decay along the value, under a transition of low rank, would take a solve for each column"


def licensed(agg: Aggregator, structure: Structure) -> str | None:
    """None if the plan applies, else the reason why not."""
    matrices = [layer for layer in structure.layers if _is_matrix(layer)]
    if not matrices:
        near = next((layer.affine for layer in structure.layers if layer.affine is not None), None)
        if near is None:
            return "no component is a matrix state that each token changes affinely"
        return f"{near.component}: {_INSEPARABLE if near.decay.parts is None else _UNLIKE}"
    if any(c.initial is not None for c in agg.state):
        return "the state starts elsewhere than at the identity"
    owners = {name for layer in matrices for name in layer.components}
    for layer in structure.layers:
        reason = _matrix(agg, layer.affine, owners) if layer in matrices else _small(layer, owners)
        if reason is not None:
            return f"{', '.join(layer.components)}: {reason}"
    for readout in structure.readout:
        turned = sorted(p.component for p in readout.linear if _is_turned(agg, p))
        if turned:
            return f"output '{readout.output}' reads {', '.join(turned)}, which is real, through complex vectors"
        whole = sorted(owners & set(readout.whole))
        if whole:
            return f"output '{readout.output}' reads {', '.join(whole)} other than through vectors over the key"
    if {r.output for r in structure.readout} != {a.name for a in agg.output.results}:
        return "an output could not be taken apart"
    return None


def split_layers(structure: Structure) -> tuple[tuple[Layer, ...], tuple[tuple[Affine, ...], ...]]:
    """(layers of small components, which read no matrix; the matrices in order, those that differ in C alone as one
    stack)."""
    small = tuple(layer for layer in structure.layers if not _is_matrix(layer))
    affines = {x.affine.component: x.affine for x in structure.layers if x.affine is not None and _is_matrix(x)}
    stacks: list[tuple[Affine, ...]] = []
    for name, affine in affines.items():
        group = next((g for g in structure.stacks if name in g and set(g) <= affines.keys()), (name,))
        stack = tuple(affines[n] for n in group)
        if affine in stack and stack not in stacks:
            stacks.append(stack)
    return small, tuple(stacks)


def _is_turned(agg: Aggregator, part: Linear) -> bool:
    kinds = {x.value.kind for x in (part.query, part.previous) if x is not None}
    return "complex" in kinds and agg.component(part.component).kind != "complex"


def extra_indices(part: Linear, affine: Affine) -> tuple[Index, ...]:
    """The indices of a linear part that tell apart several vectors of a token."""
    return tuple(i for i in part.indices if i not in affine.outer and i != affine.value)


def _is_matrix(layer: Layer) -> bool:
    return layer.affine is not None and layer.cls == "affine"


def _matrix(agg: Aggregator, affine: Affine | None, owners: set[str]) -> str | None:
    assert affine is not None and affine.decay.parts is not None  # a matrix's columns are alike
    if agg.component(affine.component).kind not in ("real", "complex"):
        return f"it holds {agg.component(affine.component).kind} numbers"
    if affine.rank and affine.decay.kind in ("V", "KV"):
        return _UNLIKE
    if not affine.injection.rank:
        return "nothing enters it"
    vectors = (*affine.transition.left, *affine.transition.right, *affine.injection.left, *affine.injection.right)
    read = {r.name for a in (*vectors, *affine.decay.parts) for r in refs(a.value) if r.space in ("state", "prev")}
    return _reading(read & owners)


def _small(layer: Layer, owners: set[str]) -> str | None:
    return _reading(owners & {*layer.reads, *layer.element})


def _reading(matrices: set[str]) -> str | None:
    return f"it reads the matrix state {', '.join(sorted(matrices))}" if matrices else None


def plan(agg: Aggregator, structure: Structure) -> Plan:
    small, stacks = split_layers(structure)
    why = []
    for stack in stacks:
        names = " and ".join(a.component for a in stack)
        head = stack[0]
        solve = f", with a triangular solve for the rank-{head.rank} transition" if head.rank else ""
        shared = " as one matrix" if len(stack) > 1 else ""
        why.append(f"{names}{shared}: chunks of tokens as batched matrix products{solve}")
    if small:
        why.append(f"{', '.join(n for layer in small for n in layer.components)}: blocked scan, before that")
    return Plan("chunked", "scan", tuple(why))
