"""A structure in words, for `psmc explain`, and as data, for `psmc explain --json`."""

from __future__ import annotations

from typing import Any

from psmc.ir import Assign, Index
from psmc.ir.text import show_expr
from psmc.structure.report import Affine, Layer, Readout, Structure, Term

_RINGS = {
    "add mul": "(+, *)",
    "max add": "(max, +)",
    "min add": "(min, +)",
    "logaddexp add": "(logaddexp, +)",
    "max mul": "(max, *)",
    "min mul": "(min, *)",
    "max min": "(max, min)",
    "min max": "(min, max)",
}
_DECAYS = {
    "none": "none (D = 1)",
    "constant": "one number, the same for every token",
    "scalar": "one number a token",
    "K": "diagonal over the key",
    "V": "diagonal over the value",
    "KV": "diagonal over key and value",
}


def describe(structure: Structure) -> list[str]:
    """One line a fact; deeper facts are indented."""
    lines = [f"live state: {', '.join(structure.live) or 'none'}"]
    carried = [n for n in structure.element if n not in structure.live]
    if carried:
        lines.append(f"carried between segments only: {', '.join(carried)}")
    if structure.lanes:
        lines.append(f"lanes: {', '.join(structure.lanes)}")
    for number, layer in enumerate(structure.layers, 1):
        lines += [f"layer {number}: {_layer(layer)}", *(f"  {line}" for line in _affine(layer))]
    lines += [f"one matrix with more value columns: {', '.join(stack)}" for stack in structure.stacks]
    for readout in structure.readout:
        lines += _readout(readout)
    return lines


def as_data(structure: Structure) -> dict[str, Any]:
    """{"aggregator", "layers": [{"components", "class"}], ...}: the planner adds "plan" to each layer."""
    return {
        "aggregator": structure.name,
        "live": list(structure.live),
        "element": list(structure.element),
        "lanes": list(structure.lanes),
        "stacks": [list(stack) for stack in structure.stacks],
        "layers": [_layer_data(x) for x in structure.layers],
        "outputs": [{"name": r.output, "epilogue": _text(r.epilogue), **_linear_data(r)} for r in structure.readout],
    }


def _layer(layer: Layer) -> str:
    parts = [f"{', '.join(layer.components)}: {layer.cls}"]
    if layer.ring is not None:
        parts.append(f"affine in {_RINGS[layer.ring]}")
    if layer.reads:
        parts.append(f"reads {', '.join(layer.reads)}")
    return "; ".join(parts)


def _affine(layer: Layer) -> list[str]:
    a = layer.affine
    if a is None:
        return []
    axes = f"[{a.key.dim}{'' if a.value is None else f', {a.value.dim}'}]"
    lines = [f"{a.component}{axes}: decay {_DECAYS[a.decay.kind]}, transition of rank {a.rank}"]
    lines.append(_text(a.decay.value) + ("" if a.decay.log is None else f", log {show_expr(a.decay.log.value)}"))
    if a.scaled:
        lines.append("the decay over the value multiplies the whole transition")
    for columns in (a.transition, a.injection):
        lines += [_text(x) for pair in zip(columns.left, columns.right, strict=True) for x in pair]
    return lines


def _readout(readout: Readout) -> list[str]:
    lines = [f"output {_text(readout.epilogue)}"]
    for linear in readout.linear:
        lines += [f"  {linear.name}: {kind} {_text(v)}" for kind, v in _vectors(linear.query, linear.previous)]
    return lines


def _vectors(query: Assign | None, previous: Assign | None) -> list[tuple[str, Assign]]:
    pairs = (("after the token,", query), ("before the token,", previous))
    return [(kind, v) for kind, v in pairs if v is not None]


def _text(assign: Assign) -> str:
    return f"{assign.name}{_brackets(assign.indices)} = {show_expr(assign.value)}"


def _brackets(indices: tuple[Index, ...]) -> str:
    return f"[{', '.join(i.name for i in indices)}]" if indices else ""


def _layer_data(layer: Layer) -> dict[str, Any]:
    found: dict[str, Any] = {
        "components": list(layer.components),
        "class": layer.cls,
        "semiring": None if layer.ring is None else _RINGS[layer.ring],
        "reads": list(layer.reads),
    }
    return found | ({} if layer.affine is None else {"affine": _affine_data(layer.affine)})


def _affine_data(a: Affine) -> dict[str, Any]:
    def columns(term: Term) -> list[list[str]]:
        return [[_text(x), _text(y)] for x, y in zip(term.left, term.right, strict=True)]

    return {
        "key": a.key.dim,
        "value": None if a.value is None else a.value.dim,
        "rank": a.rank,
        "scaled": a.scaled,
        "decay": {
            "kind": a.decay.kind,
            "value": _text(a.decay.value),
            "log": None if a.decay.log is None else show_expr(a.decay.log.value),
            "separable": a.decay.parts is not None,
        },
        "transition": columns(a.transition),
        "injection": columns(a.injection),
    }


def _linear_data(readout: Readout) -> dict[str, Any]:
    linear = [
        {
            "name": x.name,
            "component": x.component,
            "query": None if x.query is None else _text(x.query),
            "previous": None if x.previous is None else _text(x.previous),
        }
        for x in readout.linear
    ]
    return {"linear": linear, "whole": list(readout.whole)}
