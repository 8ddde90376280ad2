"""Shapes as benchmarks write them: "B8 T4096 H16 K128 V128"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from psmc.ir import Aggregator

_WORD = re.compile(r"([A-Za-z_]\w*?)(=?)(\d+)")
# plan -> tokens, lanes and the size of a dim; where the first dim takes the place of lanes, others are small
_USUAL = {
    "chunked": (4096, 16, 128), "attention": (64, 8, 64), "pointwise": (4096, 2048, 2048), "tree": (4096, 512, 512),
}  # fmt: skip
_DIMS_ARE_LANES = ("pointwise", "tree")
_SMALL = 16  # a dim in the interpreter


@dataclass(frozen=True)
class Shape:
    """`lanes` in order; `sizes`: of the dims that the spec leaves open."""

    batch: int
    tokens: int
    lanes: tuple[int, ...]
    sizes: tuple[tuple[str, int], ...]
    text: str


def parse(text: str, agg: Aggregator) -> Shape:
    """B rows, T tokens, open dims by name, any other name a lane axis; NAME=N is a dim, whatever its name. Raises
    ValueError with what is wrong."""
    dims = [d.name for d in agg.dims if d.size is None]
    found: dict[str, int] = {}
    lanes: list[int] = []
    for word in text.split():
        matched = _WORD.fullmatch(word)
        if matched is None or int(matched[3]) < 1:
            raise ValueError(f"'{word}' is not a name and a size, such as B8 or K128")
        name, equals, size = matched[1], matched[2], int(matched[3])
        if equals or (name in dims and name not in "BT"):
            if name not in dims:
                raise ValueError(f"'{name}' is no open dim; those are {', '.join(dims) or 'none'}")
            key = f"{name}="
        elif name in "BT":
            key = name
        else:
            lanes.append(size)
            continue
        if key in found:
            raise ValueError(f"'{name}' is given twice")
        found[key] = size
    missing = [k for k in ("B", "T", *(f"{d}=" for d in dims)) if k not in found]
    if missing:
        raise ValueError(f"the size of {missing[0].rstrip('=')} is missing: such as {_example(dims)}")
    sizes = tuple((d, found[f"{d}="]) for d in dims)
    return Shape(found["B"], found["T"], tuple(lanes), sizes, " ".join(text.split()))


def usual(agg: Aggregator, plan: str, tiny: bool) -> Shape:
    """A shape that trains on one GPU; `tiny`: one that an interpreter gets through."""
    dims = [d.name for d in agg.dims if d.size is None]
    batch, (tokens, count, size) = (1, (48, 2, _SMALL)) if tiny else (8, _USUAL[plan])
    as_lanes = plan in _DIMS_ARE_LANES
    lanes = () if as_lanes and dims else (count,)
    sizes = tuple((d, _SMALL if as_lanes and n else size) for n, d in enumerate(dims))
    words = [f"B{batch}", f"T{tokens}", *(f"{_axis(dims)}{n}" for n in lanes), *(_word(d, n) for d, n in sizes)]
    return Shape(batch, tokens, lanes, sizes, " ".join(words))


def _axis(dims: Sequence[str]) -> str:
    return next(name for name in ("H", "C", "lanes") if name not in dims)


def _word(dim: str, size: int) -> str:
    return f"{dim}={size}" if dim in "BT" or dim[-1].isdigit() else f"{dim}{size}"


def _example(dims: Sequence[str]) -> str:
    return " ".join(["B8", "T4096", f"{_axis(dims)}16", *(_word(d, 128) for d in dims)])
