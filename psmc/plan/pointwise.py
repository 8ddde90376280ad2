"""The pointwise plan: one program a block of lanes, one pass over time, everything fused.

Anchors, measured on an H200 for h = a h + b at B8 T8192 C2048 as a share of the speed of a copy, over least bytes (rows
a chunk x chunks x lanes, warps, lanes a load): fp32 forward and backward 4 x 8 x 64, 2, 4: 0.98 and 0.93; bf16 forward
4 x 16 x 64, 4, 8: 0.80; backward 4 x 8 x 64, 2, 8: 0.88. A chunk lies in one thread. Tiles that spill cost up to ten
times as much. `benchmarks/pointwise_tiles.py` measures them again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from psmc.ir import Aggregator, Block, DimValue, Extern, Index, IndexValue, Ref
from psmc.ir.rewrite import inline, refs, walk
from psmc.plan.base import Plan
from psmc.structure.live import relevant
from psmc.structure.report import Structure

_REGISTERS = (320, 180)  # values of a thread, fp32 forward, and backward or 2-byte; more make it spill
_SHARED = 52 * 1024  # bytes of loads in flight of a program, so that four fit a multiprocessor
_MAX_SCAN = 12  # scalars that one scan carries


@dataclass(frozen=True)
class Tile:
    """`chunks` of `rows` tokens x `lanes` in `warps` warps, `stages` tiles in flight, loads of `vector` lanes."""

    rows: int
    chunks: int
    lanes: int
    warps: int
    stages: int
    vector: int

    def with_streams(self, size: int, streams: int) -> Tile:
        """The tile of a kernel that loads `streams` tensors of `size` bytes an entry; if many, two are in flight."""
        whole = self.rows * self.chunks * self.lanes * size * streams
        return replace(self, stages=3 if 2 * whole <= _SHARED else 2)


@dataclass(frozen=True)
class PointwisePlan(Plan):
    """`forward`, `backward`: bytes of a real -> tile."""

    forward: tuple[tuple[int, Tile], ...] = ()
    backward: tuple[tuple[int, Tile], ...] = ()


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
    """Tiles for fp32 and for 2-byte reals, from how many values a program holds at once."""
    wide = [t for t in (*agg.leaf_inputs, *agg.params) if t.kind == "complex"]
    inputs = len(agg.leaf_inputs) + len(agg.params) + len(wide)
    width = {"complex": 2, "int": 2}
    element = sum(width.get(agg.component(c).kind, 1) for c in structure.element)
    live = sum(width.get(agg.component(c).kind, 1) for c in structure.live)
    outputs = sum(width.get(a.value.kind, 1) for a in agg.output.results)
    saved = 0 if all(x.ring == "add mul" for x in structure.layers) else live
    forward = inputs + element + outputs + saved + 2 * (len(structure.layers) - 1)
    backward = inputs + outputs + live * live + live
    why = (
        f"pointwise: {element} scalars an element, {live} carried; lanes are independent, one pass over time",
        "few lanes and a long sequence are split into segments",
    )
    return PointwisePlan(
        "pointwise",
        "scan",
        why,
        forward=tuple((size, _tile(forward, size, False)) for size in (4, 2)),
        backward=tuple((size, _tile(backward, size, True)) for size in (4, 2)),
    )


def _tile(values: int, size: int, backward: bool) -> Tile:
    """The measured tile, with as many rows a chunk as a thread's registers hold."""
    rows, chunks, lanes, warps, vector = (_LIGHT if values <= _FEW else _HEAVY)[size, backward]
    limit = _REGISTERS[backward or size == 2]
    while rows * vector * values > limit and rows > 2:
        rows //= 2
    return Tile(rows, chunks, lanes, warps, 3, vector)


# (bytes of a real, backward) -> rows a chunk, chunks, lanes, warps, lanes a load
_FEW = 5  # values a token, up to which a thread may hold two chunks
_LIGHT = {
    (4, False): (4, 8, 64, 2, 4),
    (4, True): (4, 8, 64, 2, 4),
    (2, False): (4, 16, 64, 4, 8),
    (2, True): (4, 8, 64, 2, 8),
}
_HEAVY = {
    (4, False): (4, 8, 64, 4, 4),
    (4, True): (8, 4, 64, 2, 4),
    (2, False): (4, 16, 64, 4, 8),
    (2, True): (8, 4, 64, 2, 4),
}
