"""Block sizes of the chunk kernels, checked against fp64, then timed: `psmc.plan.chunked_kernels` ships from it.

    python benchmarks/chunk_tiles.py --out benchmarks/results/chunk_tiles.json [--decays 0,1,2] [--seconds 350]

For 'gradients', 'key' and 'values' the time is that of the costates and all gradients. decay 0, 1, 2: none, a number a
token, a vector over the key. A check is a process of its own, a dozen at once: a fault ends no other.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from chunk_cases import Data, kernels, one_tile  # noqa: E402

from benchmarks.jobs import Cell, Group, Results, serve  # noqa: E402
from benchmarks.measure import Row, device, median_ms, options  # noqa: E402
from psmc.plan.chunked_kernels import ChunkTile, tiles  # noqa: E402
from psmc.plan.tiles import candidates  # noqa: E402
from psmc.runtime.kit_chunk_kernels import ChunkKernels  # noqa: E402
from psmc.runtime.kit_chunk_views import ChunkCall  # noqa: E402

SHAPE, TINY = (8, 4096, 16, 128, 128), (1, 70, 1, 64, 64)
OPERAND = torch.bfloat16 if device() == "cuda" else torch.float32  # triton's interpreter has no bf16


def normal(*shape: int, dtype: torch.dtype = OPERAND, seed: int = 0) -> Tensor:
    made = torch.Generator(device=device()).manual_seed(seed)
    return torch.randn(shape, device=device(), generator=made).to(dtype)


def log_gate(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    return torch.nn.functional.logsigmoid(normal(*shape, dtype=torch.float32, seed=seed) + 3).to(dtype)


def grid_of(kernel: str, key: int) -> Iterator[ChunkTile]:
    """The shipped tile, and what `psmc tune` tries instead."""
    shipped = tiles().data
    own = next(row for row in shipped if (row.kernel, row.size) == (kernel, 2) and key <= row.key)
    for each in candidates("chunked", shipped, {own.name}):
        yield from (ChunkTile(*row.numbers) for row in each.rows if row.kernel == kernel)


def call_of(made: Any, kernel: str, args: tuple[Any, ...], bt: int) -> Callable[[], Any]:
    """One kernel by itself (with the one that it waits for, where a decay is over the key)."""
    q, b, c, log, start = args
    wide = log is not None and log.dim() == 4
    decay = 2 if wide else int(log is not None)
    shape = (c.shape[0], c.shape[1], c.shape[2])
    a = ChunkCall(start, None, None if wide else log, None, c, (q, b, log if wide else None), (), (), shape, 0, 1.0,
                  None, None, c.dtype, decay, False)  # fmt: skip
    how = made.plan("forward", a, bt)
    if kernel == "prepare":
        return lambda: made._prepared(a, how, None, None)
    ready = made._prepared(a, how, None, made.lifted(a, how)[1])
    if kernel == "states":
        return lambda: made.states(a, ready, None, bt)
    do = torch.randn_like(c)
    kept = made.forward(a, True)[3]
    made._prepared = lambda *_: ready
    if kernel in ("gradients", "key", "values"):
        return lambda: made.backward(a, kept, do, None, None, (True,) * len(a.tensors))
    return lambda: made.forward(a)


def check(decay: int, kernel: str, tile: ChunkTile, key: int, value: int) -> Row:
    """Errors of one candidate on a small problem. Leaves what it compiled in triton's cache."""
    made = kernels(one_tile(kernel, tile))
    small = Data(1, 200 if device() == "cuda" else 70, 2, key, value, decay, dtype=OPERAND, device=device())
    errors = small.errors(made, backward=kernel != "forward")
    worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else 1e9)
    found: Row = {"largest error": f"{errors[worst]:.1e} {worst}"}
    if not errors[worst] < 2e-2:
        found["error"] = "wrong: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items())
    return found


def timed(decay: int, kernel: str, tile: ChunkTile, shape: tuple[int, ...]) -> float:
    b, t, h, k, v = shape
    q, key, val = normal(b, t, h, k, seed=1), normal(b, t, h, k, seed=2), normal(b, t, h, v, seed=3)
    log = (None, log_gate(b, t, h), log_gate(b, t, h, k, dtype=OPERAND))[decay]
    made = ChunkKernels(kernels(one_tile(kernel, tile)).table)
    return round(median_ms(call_of(made, kernel, (q, key, val, log, None), tile.tokens), rep=15), 4)


def handle(cell: Cell) -> Iterator[Row]:
    shape, tile = tuple(cell["shape"]), ChunkTile(*cell["tile"])
    what = cell["decay"], cell["kernel"], tile
    row = row_of(cell)
    yield row | (check(*what, *shape[3:]) if cell["check"] else {"ms": timed(*what, shape)})


def row_of(cell: Cell) -> Row:
    b, t, h, k, v = cell["shape"]
    tile = ", ".join(map(str, cell["tile"]))
    return {"spec": f"decay {cell['decay']}", "shape": f"B{b} T{t} H{h} K{k} V{v}", "dtype": str(OPERAND)[6:],
            "pass": cell["kernel"], "tile": tile}  # fmt: skip


def groups(decays: list[int], shape: tuple[int, ...], few: int | None, checks: bool) -> Iterator[Group]:
    for decay in decays:
        for kernel in (*(("prepare", "key") if decay == 2 else ("gradients",)), "forward", "states"):
            found = list(dict.fromkeys(grid_of(kernel, shape[3])))[:few]
            cells = [{"decay": decay, "kernel": kernel, "tile": t.numbers, "shape": shape, "check": checks}
                     for t in found]  # fmt: skip
            if checks:  # one process each
                yield from (Group(f"check {kernel} {decay} {n}", (c,), 120) for n, c in enumerate(cells))
            else:
                yield Group(f"time {kernel} {decay}", tuple(cells), 60)


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--decays", default="0,1,2")
    given = parser.parse_args()
    if given.job:
        serve(given.job, handle)
        return 0
    what = [int(d) for d in given.decays.split(",")], TINY if given.smoke else SHAPE, 1 if given.smoke else None
    results = Results(given.out, given.resume)
    workers, began = max(1, min(12, (os.cpu_count() or 2) - 1)), time.monotonic()
    failed = lambda cell, why: [row_of(cell) | {"error": why}]  # noqa: E731
    results.run(__file__, list(groups(*what, True)), failed, workers=workers, seconds=given.seconds * 0.7)
    wrong = {results.key(row) for row in results.rows.values() if "error" in row}
    right = []
    for group in groups(*what, False):
        cells = tuple(c for c in group.cells if results.key(row_of(c)) not in wrong)
        right.append(Group(group.name, cells, group.limit))
    results.run(__file__, right, failed, seconds=given.seconds - (time.monotonic() - began))
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main())
