"""The duality test: one spec, every way to run it, held to the fp64 oracle on the user's own machine.

    scan       the parallel call                   steps     token by token
    segments   split in three, the state carried   tree      elements combined in balanced halves (associative rules)
    flags      masked tokens and restarts          packed    sequences of different lengths in one row (cu_seqlens)

Outputs, final state and the gradient of every input, param and initial state are compared. Inputs are drawn from the
declared intervals, once mild, once hard (repeated keys, gates from 1e-3 to 50, closed ends), rounded to the dtype, and
the oracle sees the rounded ones. What a dtype cannot do in any order is no fault of the compiler: the limit is a few
units of rounding or, if that is more, a multiple of the error of the oracle itself in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from psmc.duality.batch import DTYPES, Batch
from psmc.duality.report import Row, Setting

__all__ = ["DTYPES", "Row", "Setting", "available", "count", "duality"]


def available(device: str) -> bool:
    """Whether torch can use 'cpu' or 'cuda' here."""
    import torch

    return device != "cuda" or torch.cuda.is_available()


def count(setting: Setting) -> int:
    """How many batches `duality` runs."""
    return len(setting.dtypes) * len(setting.lengths) * len(setting.data)


def duality(agg: Any, setting: Setting, *, begin: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """The rows of a compiled aggregator (`psmc.load`). `begin` is told of each batch as it begins."""
    for name in setting.dtypes:
        for length in setting.lengths:
            for data in setting.data:
                begin(f"{name}, T {length}")
                yield from Batch(agg, setting, name, length, data).rows()
