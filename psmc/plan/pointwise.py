"""The pointwise plan: one program a block of lanes, one pass over time, everything fused.

Anchors, measured on an H200 for h = a h + b at B8 T8192 C2048 as a share of the speed of a copy: fp32 forward 32 x 32
tiles, 2 warps, 3 stages, 16-byte loads 0.95; backward 32 x 64 0.90. bf16 forward 32 x 64, 1 warp, 4-byte loads (a
thread then holds whole columns, and the scan needs no shuffles) 0.74. Tiles that spill cost ten times as much.
"""

from __future__ import annotations

from dataclasses import dataclass

from psmc.ir import Aggregator, Block, DimValue, Extern, Index, IndexValue, Op, Ref
from psmc.ir.query import restrict
from psmc.ir.rewrite import inline, refs, walk
from psmc.plan.base import Plan
from psmc.structure.live import relevant
from psmc.structure.report import Structure

_REGISTERS = 180  # a thread's values, of 255: addresses and masks need the rest; loads in flight lie in shared memory
_MAX_SCAN = 12  # scalars that one scan carries
# What a combine may do and still cost less than moving its operands between threads.
_ARITHMETIC = {"add", "sub", "mul", "neg", "max", "min", "abs", "stop", "real", "imag", "conj", "complex"}
_LIGHT = _ARITHMETIC | {"where", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"}


@dataclass(frozen=True)
class Tile:
    """`rows` tokens x `lanes` in `warps` warps, `stages` tiles in flight, loads of `vector` lanes."""

    rows: int
    lanes: int
    warps: int
    stages: int
    vector: int


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
    inputs = len(agg.leaf_inputs)
    element = sum(2 if agg.component(c).kind == "complex" else 1 for c in structure.element)
    live = sum(2 if agg.component(c).kind == "complex" else 1 for c in structure.live)
    outputs = len(agg.output.results)
    forward = inputs + element + outputs
    backward = inputs + outputs + live * live + live
    heavy = _heavy(agg, structure)
    why = (
        f"pointwise: {element} scalars an element, {live} carried; lanes are independent, one pass over time",
        "few lanes and a long sequence are split into segments",
    )
    return PointwisePlan(
        "pointwise",
        "scan",
        why,
        forward=tuple((size, _tile(forward, size, False, heavy)) for size in (4, 2)),
        backward=tuple((size, _tile(backward, size, True, False)) for size in (4, 2)),
    )


def _tile(values: int, size: int, backward: bool, heavy: bool) -> Tile:
    """The measured tile, made smaller until a thread's values fit its registers.

    A scan across threads combines about two and a half times an element. Where a combine is heavy, a thread has whole
    columns and combines once.
    """
    if backward:
        rows, lanes, warps, vector = (32, 32, 1, 4) if size == 4 else (32, 32, 2, 4)
    elif heavy:
        rows, lanes, warps, vector = 16, 128, 1, 4
    else:
        rows, lanes, warps, vector = (32, 32, 1, 4) if size == 4 else (32, 64, 1, 2)
    while rows * lanes // (32 * warps) * values > _REGISTERS and rows * lanes > 512:
        if rows > 16:
            rows //= 2
        elif warps < 4 and not heavy:
            warps *= 2
        else:
            lanes //= 2
    return Tile(rows, lanes, warps, 3, vector)


def _heavy(agg: Aggregator, structure: Structure) -> bool:
    """Whether combining two elements takes more than additions, products and choices."""
    assert isinstance(agg.combine, Block)
    block = inline(restrict(agg.combine, structure.element))
    return any(isinstance(node, Op) and node.op not in _LIGHT for node in walk(*(a.value for a in block.results)))
