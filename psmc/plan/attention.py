"""Fused attention inside a rule: which of it the kernels run, and their blocks by kernel, precision and width.

Block sizes are from compiling for sm_90, not from a clock (`tests/test_attention_cubins.py`): a thread spills at most
64 bytes, but for products of three of TF32 above a width of 128, where gradients spill up to 284.
"""

from __future__ import annotations

from psmc.ir import Aggregator, Block, Const, DimValue, Expr, IndexValue, Op
from psmc.ir.rewrite import inline, walk
from psmc.structure.attention import Attention, almost, attentions

MAX_WIDTH = 256  # of queries, keys and values: a program holds whole rows
Tile = tuple[int, int, int, int]  # tokens of a block of queries and of keys, warps, stages of the loop
_WIDTHS = (32, 64, 128, 256)  # a row holds up to this width
# kernel -> products -> a tile for each width. On chip: what a program sums, fp32, in registers (255 a thread), operands
# in shared memory (227 KiB); a product of three of TF32 keeps each operand twice.
_TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "forward": {
        "bf16": ((64, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2), (32, 32, 4, 1)),
        "tf32": ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
        "tf32x3": ((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (16, 16, 8, 1)),
    },
    "query": {
        "bf16": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 1), (32, 32, 8, 1)),
        "tf32": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
        "tf32x3": ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 8, 1)),
    },
    "keys": {
        "bf16": ((32, 64, 4, 2), (32, 64, 4, 2), (64, 64, 8, 1), (32, 32, 8, 1)),
        "tf32": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
        "tf32x3": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 8, 1)),
    },
}


def tiles() -> dict[str, dict[str, tuple[tuple[int, Tile], ...]]]:
    """kernel -> products -> ((largest width, tile), ...)."""
    each = {
        kernel: {p: tuple(zip(_WIDTHS, row, strict=True)) for p, row in rows.items()} for kernel, rows in _TILES.items()
    }
    return {kernel: {**rows, "ieee": rows["tf32x3"]} for kernel, rows in each.items()}


def found_in(agg: Aggregator) -> tuple[Attention, ...]:
    """The attentions of a combine."""
    return attentions(inline(agg.combine)) if isinstance(agg.combine, Block) else ()


def by_kernel(agg: Aggregator, one: Attention) -> str | None:
    """None if the kernels run it, else why not."""
    sizes = {d.name: d.size for d in agg.dims}
    query = one.query.indices[-2].dim
    for keys, mask in zip(one.keys, one.masks, strict=True):
        if mask is None:
            continue
        for node in walk(mask.value):
            known = {query, keys.indices[-2].dim, *(n for n, s in sizes.items() if s is not None)}
            if isinstance(node, DimValue) and node.dim not in known:
                return f"a mask reads the size of {node.dim}"
            if not _plain(node):
                return "a mask is more than a comparison of places"
    return None


def _plain(node: Expr) -> bool:
    return isinstance(node, Const | DimValue | IndexValue | Op)


def notes(agg: Aggregator) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What `psmc explain` says of it: (lines, what is refused and why)."""
    found = found_in(agg)
    lines, refused = [], []
    for one in found:
        reason = by_kernel(agg, one)
        sets = f"{len(one.keys)} set{'s' if len(one.keys) > 1 else ''} of tokens"
        masked = ", masked" if any(m is not None for m in one.masks) else ""
        how = f"fused kernels on a GPU for widths up to {MAX_WIDTH}, torch's call elsewhere"
        lines.append(f"softmax attention over {sets}{masked}: {how if reason is None else 'one call of torch'}")
        if reason is not None:
            refused.append(("fused attention", reason))
    if isinstance(agg.combine, Block):
        refused += [("fused attention", reason) for reason in almost(inline(agg.combine))]
    return tuple(dict.fromkeys(lines)), tuple(dict.fromkeys(refused))
