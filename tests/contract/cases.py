"""The calls that every spec is held to, and a small part of them for each that covers all over all specs."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from contract.data import Case

FULL = os.environ.get("PSMC_FULL", "") not in ("", "0")
LENGTHS = (0, 1, 2, 63, 64, 65, 199)
LANES: tuple[tuple[int, ...], ...] = ((), (3,), (2, 3))
GROUPED: tuple[tuple[int, ...], ...] = ((4,), (2, 4))
OPTIONS: tuple[dict[str, bool], ...] = (
    {},
    {"mask": True, "reset": True, "initial": True},
    {"packed": True, "initial": True, "reverse": True, "strided": True},
    {"grouped": True},
    {"packed": True, "mask": True, "reset": True},
    {"initial": True, "strided": True},
    {"mask": True, "reverse": True, "grouped": True, "initial": True},
    {"reset": True},
    {"packed": True, "initial": True, "mask": True, "reset": True, "reverse": True, "grouped": True},
    {"mask": True},
    {"packed": True},
    {"reset": True, "initial": True, "reverse": True},
)


def _grid() -> tuple[Case, ...]:
    """Every length with every option; lanes and seeds go round."""
    cases = []
    for i, length in enumerate(LENGTHS):
        for j, options in enumerate(OPTIONS):
            shapes = GROUPED if options.get("grouped") else LANES
            cases.append(Case(length, lanes=shapes[(i + j) % len(shapes)], seed=i + j, **options))
    return tuple(cases)


GRID = _grid()


def chosen(index: int, count: int = 2) -> tuple[Case, ...]:
    """A few of the grid for the spec of that number; neighbours take others. All of it under PSMC_FULL=1."""
    if FULL:
        return GRID
    stride = 19  # coprime to the grid's 84: length and options both move on
    return tuple(GRID[(index * count + k) * stride % len(GRID)] for k in range(count))


def fitting(case: Case, agg: Any) -> Case:
    """The case as far as the oracle can run it: a tree has no one initial state (splits test its counters)."""
    return replace(case, initial=False) if agg.fold_order == "tree" else case
