"""A generated module whose tiles are exchanged while it is loaded: what both checks and timing run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from psmc.plan.tiles import Row, rows, table
from psmc.runtime.load import load_file
from psmc.tuning.shape import Shape


@dataclass(frozen=True)
class Target:
    """What is tuned: an aggregator of a spec's file, its module's file, for inputs of a dtype on a device; `quick`: in
    an interpreter, where everything takes long."""

    spec: str
    name: str
    module: str
    dtype: str
    device: str
    shapes: tuple[Shape, ...]
    quick: bool


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter here."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class _Watched(tuple[int, ...]):
    """A tile that says when it is read."""

    seen: set[str]
    name: str

    def __iter__(self) -> Iterator[int]:
        self.seen.add(self.name)
        return super().__iter__()


class Loaded:
    """The module, its aggregator with the oracle attached, and its tables of tiles, which are alike."""

    def __init__(self, target: Target) -> None:
        from psmc import reference
        from psmc.pipeline import pick, read

        place = Path(target.module)
        module = load_file(place, place.stem)
        self.agg: Any = getattr(module, target.name)
        declared = pick(read(target.spec), target.name, target.spec).declared
        base = type(self.agg)
        told = {"declared": declared, "reference": staticmethod(partial(reference.fold, declared))}
        self.agg.__class__ = type(base.__name__, (base,), told)
        held = [x for name, x in vars(module).items() if name == "KERNELS" or name.startswith("ATTENTION_KERNELS_")]
        self.kernels: list[Any] = [x for x in held if x is not None]
        self.tables: list[Any] = [x.table for x in self.kernels]
        if hasattr(module, "CHUNK_KERNELS"):
            self.tables.append(module.CHUNK_KERNELS)
        self.shipped = rows(self.tables[0].tiles)
        self.used: set[str] = set()

    def install(self, found: Sequence[Row]) -> None:
        """Runs these tiles from now on; `used` begins anew."""
        self.used = set()
        tiles = table([_watched(row, self.used) for row in found])
        for each in self.tables:
            each.tiles = tiles
        for each in self.kernels:  # what a shape fixes is remembered, tiles among it
            vars(each).get("_plans", {}).clear()


def _watched(row: Row, seen: set[str]) -> Row:
    numbers = _Watched(row.numbers)
    numbers.seen, numbers.name = seen, row.name
    return Row(row.kernel, row.size, row.key, numbers)
