"""The pointwise plan: one program a block of lanes, one pass over time, everything fused.

A thread walks over the tokens of its own lanes, so that a token costs one step of the rule and nothing is exchanged.
What hides the memory's latency is how many tokens are loaded ahead, and what fills the GPU where lanes are few is a
split of time into segments, whose products are folded first (the inputs are then read twice).

Anchors, measured on an H200 at B8 T8192 C2048 as a share of the speed of a copy, over least bytes: h = a h + b, fp32
forward 0.98 and backward 0.85; bf16 forward 0.89 and backward 0.86; log-sum-exp, fp32 forward 0.75 and backward 0.68.
`benchmarks/pointwise_tiles.py` measures them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from psmc.ir import Aggregator, Block, DimValue, Extern, Index, IndexValue, Op, Ref
from psmc.ir.rewrite import inline, refs, walk
from psmc.plan.base import Plan
from psmc.structure.live import relevant
from psmc.structure.report import Structure

_REGISTERS = 160  # values of a thread, backward: what it holds of `every` tokens; more make it spill
_SHARED = 80 * 1024  # bytes of loads in flight of a program
# What a rule may do and still cost no more than moving its operands.
_LIGHT = {"add", "sub", "mul", "neg", "max", "min", "abs", "stop", "real", "conj", "where",
          "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"}  # fmt: skip
_MAX_SCAN = 12  # scalars that one scan carries


@dataclass(frozen=True)
class Tile:
    """`rows` tokens x `lanes` in `warps` warps, `stages` - 1 tiles ahead."""

    rows: int
    lanes: int
    warps: int
    stages: int


@dataclass(frozen=True)
class PointwisePlan(Plan):
    """`forward`, `backward`: bytes of a real -> tile. `every`: tokens from one state kept for the backward to the
    next, and so the rows of its tiles."""

    forward: tuple[tuple[int, Tile], ...] = ()
    backward: tuple[tuple[int, Tile], ...] = ()
    every: int = 1


def licensed(agg: Aggregator, structure: Structure) -> str | None:
    """None if the pointwise kernels can run this spec, else why not."""
    if isinstance(agg.combine, Extern) or agg.combine is None or agg.claim == "no" or agg.order == "left":
        return "the order of combines is fixed, or the rule is Python"
    if not structure.pointwise:
        return "combine, lift or output sums over an index, gathers, or compares positions"
    if not agg.leaf_inputs:
        return "no inputs"
    if not any(agg.component(c).kind != "int" for c in structure.live):
        return "the output reads no real component"
    lanes = next((c.dims for c in agg.state if c.name in structure.live), ())
    return _shapes(agg, structure, lanes) or _rules(agg, structure) or _size(agg, structure)


def _shapes(agg: Aggregator, structure: Structure, lanes: tuple[str, ...]) -> str | None:
    if len(set(lanes)) != len(lanes):
        return "a dim occurs twice in the state"
    for c in agg.state:
        if c.name in structure.live and c.dims != lanes:
            return f"components '{structure.live[0]}' and '{c.name}' have different dims"
    for a in agg.output.results:
        if tuple(i.dim for i in a.indices) != lanes:
            return f"output '{a.name}' has other dims than the state"
    found = {c.name: c.dims for c in agg.state if c.name in structure.element}
    found |= {t.name: t.dims for t in (*agg.leaf_inputs, *agg.params)}
    for name, dims in found.items():
        if dims != tuple(d for d in lanes if d in dims):
            return f"'{name}' has dims that the state lacks, or in another order"
    return None


def _rules(agg: Aggregator, structure: Structure) -> str | None:
    sizes = {d.name: d.size for d in agg.dims}
    for definition in relevant(agg, structure.element):
        for node in walk(definition.value):
            if isinstance(node, IndexValue):
                return f"'{definition.name}' uses an index as a number"
            if isinstance(node, DimValue) and sizes[node.dim] is None:
                return f"'{definition.name}' uses the size of {node.dim}"
            if isinstance(node, Ref) and not all(isinstance(s, Index) for s in node.subs):
                return f"'{definition.name}' reads '{node.name}' at a fixed position"
    assert isinstance(agg.combine, Block)
    for result in inline(agg.combine).results:
        if result.name in structure.element and any(r.space == "param" for r in refs(result.value)):
            return f"combine reads a param for '{result.name}'"
    starts = [a.value for c in agg.state for a in (c.identity, c.start) if c.name in structure.element]
    if any(not _is_number(n) for value in starts for n in walk(value)):
        return "the start of the state differs between positions"
    return None


def _is_number(node: object) -> bool:
    return not isinstance(node, IndexValue | DimValue | Ref)


def _size(agg: Aggregator, structure: Structure) -> str | None:
    scalars = sum(2 if agg.component(c).kind == "complex" else 1 for c in structure.element)
    if scalars > _MAX_SCAN:
        return f"an element has {scalars} scalars, more than the {_MAX_SCAN} that stay in registers"
    live = sum(2 if agg.component(c).kind == "complex" else 1 for c in structure.live if agg.component(c).kind != "int")
    if live * live + live > 2 * _MAX_SCAN:
        return f"the backward would carry {live} x {live} Jacobians"
    return None


def plan(agg: Aggregator, structure: Structure) -> PointwisePlan:
    """Tiles for fp32 and for 2-byte reals, from how many values a thread holds at once."""
    width = {"complex": 2, "int": 2}
    inputs = sum(width.get(t.kind, 1) for t in agg.leaf_inputs)
    element = sum(width.get(agg.component(c).kind, 1) for c in structure.element)
    live = sum(width.get(agg.component(c).kind, 1) for c in structure.live)
    outputs = sum(width.get(a.value.kind, 1) for a in agg.output.results)
    costly = _costly(agg)
    every = 8 if costly else 16
    while every > 4 and every * 2 * (inputs + live) > _REGISTERS:
        every //= 2
    why = (
        f"pointwise: {element} scalars an element, {live} carried; lanes are independent, one pass over time",
        "few lanes and a long sequence are split into segments",
    )
    return PointwisePlan(
        "pointwise",
        "scan",
        why,
        forward=tuple((size, _tile(inputs, size, False, costly, every)) for size in (4, 2)),
        backward=tuple((size, _tile(inputs + outputs, size, True, costly, every)) for size in (4, 2)),
        every=every,
    )


def _tile(streams: int, size: int, backward: bool, costly: bool, every: int) -> Tile:
    """The measured tile; of a kernel that loads many tensors, with fewer loads ahead."""
    rows, lanes, warps, stages = (_COSTLY if costly else _CHEAP)[size, backward]
    rows = every if backward else rows
    while stages > 2 and (stages - 1) * rows * lanes * size * streams > _SHARED:
        stages -= 1
    return Tile(rows, lanes, warps, stages)


# (bytes of a real, backward) -> rows, lanes, warps, stages. Lanes that lie beside each other are read best 256 bytes
# and more at a time. Where a token is much work, each lane has a thread of its own, if it has the 4 bytes of a copy.
_CHEAP = {
    (4, False): (16, 128, 2, 4),
    (4, True): (16, 128, 2, 4),
    (2, False): (32, 128, 2, 4),
    (2, True): (16, 128, 2, 4),
}
_COSTLY = {
    (4, False): (8, 64, 2, 8),
    (4, True): (8, 64, 2, 6),
    (2, False): (8, 128, 1, 6),
    (2, True): (8, 128, 1, 6),
}


def _costly(agg: Aggregator) -> bool:
    values = [a.value for b in (agg.combine, agg.leaf, agg.output) if isinstance(b, Block) for a in inline(b).results]
    return any(isinstance(n, Op) and n.op not in _LIGHT for n in walk(*values))
