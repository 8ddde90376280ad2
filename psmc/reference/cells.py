"""The oracle on arrays that are dicts from position to number, as exact evaluation has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor

from psmc.ir import Block
from psmc.reference.evaluate import Env, run

Cells: TypeAlias = "dict[tuple[int, ...], int | float | complex]"
_DTYPES = {complex: torch.complex128, int: torch.int64}


def cells_runner(sizes: Mapping[str, int]) -> Callable[[Block, Mapping[tuple[str, str], Cells]], dict[str, Cells]]:
    """A block's results in fp64, from arrays by (space, name)."""

    def evaluated(block: Block, store: Mapping[tuple[str, str], Cells]) -> dict[str, Cells]:
        out = run(block, Env({(*key, 0): _tensor(array) for key, array in store.items()}, sizes))
        return {
            a.name: {p: out[a.name][p].item() for p in product(*(range(sizes[i.dim]) for i in a.indices))}
            for a in block.results
        }

    return evaluated


def _tensor(array: Cells) -> Tensor:
    """The dtype is that of the first entry: entries of one array are of one kind."""
    shape = [1 + max(p[axis] for p in array) for axis in range(len(next(iter(array))))]
    values = [array[p] for p in sorted(array)]
    return torch.tensor(values, dtype=_DTYPES.get(type(values[0]), torch.float64)).reshape(shape)
