"""Tiles of the pointwise kernels, checked against fp64, then timed: the anchors of `psmc.plan.pointwise`.

    python benchmarks/pointwise_tiles.py --out benchmarks/results/pointwise_tiles.json [--only logsumexp]

The kernels alone, without autograd: forward as in inference, backward from saved states. A tile is rows, lanes, warps,
stages; the first of a group is the one that is shipped, and "best" says which of those that are right took the least
time. Checks run a dozen at once, in processes of their own; times one by one.
Without a GPU: --smoke under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import psmc  # noqa: E402
from benchmarks import measure  # noqa: E402
from benchmarks.jobs import Cell, Group, Results, serve  # noqa: E402
from benchmarks.measure import EXAMPLES, Row, median_ms, options, relative  # noqa: E402

Tile = tuple[int, int, int, int]
SHAPE, SMALL, TINY = (8, 8192, 2048), (8, 1024, 2048), (1, 9, 32)
WAYS = {"fwd": "forward", "bwd": "backward"}
GROUPS = (("linear_recurrence", "bfloat16", "fwd"), ("linear_recurrence", "bfloat16", "bwd"),
          ("logsumexp", "float32", "fwd"), ("logsumexp", "float32", "bwd"),
          ("linear_recurrence", "float32", "fwd"), ("linear_recurrence", "float32", "bwd"))  # fmt: skip
BEST = "Best tiles"


@cache
def kernels(spec: str) -> Any:
    return psmc.load(EXAMPLES / f"{spec}.psm").module.KERNELS


def shipped(spec: str, dtype: str, way: str) -> Tile:
    found: Tile = tuple(kernels(spec).table.tiles[WAYS[way]][getattr(torch, dtype).itemsize])
    return found


def candidates(spec: str, dtype: str, way: str) -> list[Tile]:
    """The shipped tile, and those around: a thread has 1 to 4 lanes, 8 to 96 KiB are in flight."""
    size = 2 if dtype == "bfloat16" else 4
    streams = {"fwd": 2, "bwd": 3}[way] if spec == "linear_recurrence" else {"fwd": 1, "bwd": 2}[way]
    found = [shipped(spec, dtype, way)]
    for rows, lanes, warps, stages in product((8, 16, 32), (64, 128, 256), (1, 2, 4), (3, 4, 6, 8)):
        held, flight = lanes // (32 * warps), (stages - 1) * rows * lanes * size * streams
        if held in (1, 2, 4) and 2**13 <= flight <= 3 * 2**15 and (way == "fwd" or rows == kernels(spec).table.every):
            found.append((rows, lanes, warps, stages))
    return list(dict.fromkeys(found))


def tensors(spec: str, dtype: str, shape: tuple[int, int, int]) -> list[Tensor]:
    made = torch.Generator(measure.device()).manual_seed(0)
    b = torch.randn(shape, device=measure.device(), generator=made).to(getattr(torch, dtype))
    if spec == "logsumexp":
        return [b]
    return [(torch.rand(shape, device=measure.device(), generator=made) * 0.2 + 0.8).to(b.dtype), b]


def cotangent(y: Tensor) -> Tensor:
    made = torch.Generator(measure.device()).manual_seed(1)
    return torch.randn(y.shape, device=y.device, generator=made).to(y.dtype)


def exact(spec: str, x: list[Tensor], dy: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of inputs in fp64, by loops over time that say what they are."""
    wide, g = [t.double() for t in x], dy.double()
    length = g.shape[1]
    if spec == "logsumexp":
        y, (b,) = torch.logcumsumexp(wide[0], 1), wide
        r, rows = torch.zeros_like(g[:, 0]), []
        for t in reversed(range(length)):
            r = g[:, t] + (r * (y[:, t] - y[:, t + 1]).exp() if t + 1 < length else 0)
            rows.append((b[:, t] - y[:, t]).exp() * r)
        return [y], [torch.stack(rows[::-1], 1)]
    a, b = wide
    h, hs = torch.zeros_like(b[:, 0]), []
    for t in range(length):
        h = a[:, t] * h + b[:, t]
        hs.append(h)
    d, ds = torch.zeros_like(h), []
    for t in reversed(range(length)):
        d = g[:, t] + (a[:, t + 1] * d if t + 1 < length else 0)
        ds.append(d)
    y, db = torch.stack(hs, 1), torch.stack(ds[::-1], 1)
    before = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
    return [y], [db * before, db]


@cache
def prepared(spec: str, dtype: str, shape: tuple[int, int, int]) -> tuple[Any, ...]:
    """Tensors, what a backward starts from (by the shipped tiles), and the exact results."""
    x, k = tensors(spec, dtype, shape), kernels(spec)
    outputs, finals, saved = k.scan_forward(x, [], None, None, None, True)
    grads = [cotangent(y) for y in outputs]
    ends = [torch.zeros_like(f) for f in finals]
    right = exact(spec, x, grads[0]) if shape != SHAPE else None
    return x, saved, grads, ends, right


def handle(cell: Cell) -> Iterator[Row]:
    spec, dtype, way, tile, shape = cell["spec"], cell["dtype"], cell["way"], tuple(cell["tile"]), tuple(cell["shape"])
    x, saved, grads, ends, right = prepared(spec, dtype, shape)
    k = kernels(spec)
    k.table.tiles = {**k.table.tiles, WAYS[way]: {4: tile, 2: tile}}  # another dict: plans are kept by its contents

    def run() -> list[Tensor]:
        if way == "fwd":
            return list(k.scan_forward(x, [], None, None, None, False)[0])
        return list(k.scan_backward(grads, ends, x, [], None, saved, None, None)[0])

    row = row_of(cell)
    if cell["check"]:
        wanted, bound = right[way == "bwd"], 1e-5 if dtype == "float32" else 1e-2
        error = max(relative(a, b) for a, b in zip(run(), wanted, strict=True))
        yield row | ({} if error < bound else {"error": f"wrong by {error:.1e}"}) | {"differs": float(f"{error:.1e}")}
        return
    streams = len(x) + 1 if way == "fwd" else 2 * len(x) + 1
    floor = streams * x[0].numel() * x[0].element_size() / float(os.environ["PSMC_COPY"]) * 1e3
    yield row | {"ms": round(median_ms(run), 4), "floor_ms": round(floor, 4), "floor": "bytes"}


def row_of(cell: Cell) -> Row:
    shape = SHAPE if tuple(cell["shape"]) == SMALL else cell["shape"]
    return {"spec": cell["spec"], "shape": "B{} T{} C{}".format(*shape), "dtype": cell["dtype"], "pass": cell["way"],
            "tile": ", ".join(map(str, cell["tile"]))}  # fmt: skip


def groups(what: list[tuple[str, str, str]], tiny: bool, checks: bool, each: int) -> Iterator[Group]:
    env = {"PSMC_COPY": os.environ["PSMC_COPY"]}
    for spec, dtype, way in what:
        shape = TINY if tiny else SMALL if checks else SHAPE
        found = candidates(spec, dtype, way)[: 2 if tiny else None]
        cells = [{"spec": spec, "dtype": dtype, "way": way, "tile": t, "shape": shape, "check": checks} for t in found]
        for n in range(0, len(cells), each):
            label = f"{'check' if checks else 'time'} {spec} {dtype} {way} {n}"
            yield Group(label, tuple(cells[n : n + each]), 300 if tiny else 60, env)


def best(rows: list[Row]) -> list[Row]:
    found = []
    for spec, dtype, way in GROUPS:
        mine = [r for r in rows if (r.get("spec"), r.get("dtype"), r.get("pass")) == (spec, dtype, way)
                and "ms" in r and "error" not in r]  # fmt: skip
        if not mine:
            continue
        first = ", ".join(map(str, shipped(spec, dtype, way)))
        now = next((r["ms"] for r in mine if r["tile"] == first), None)
        least = min(mine, key=lambda r: r["ms"])
        found.append({"spec": spec, "dtype": dtype, "passes": way, "shipped": first, "shipped ms": now,
                      "best": least["tile"], "best ms": least["ms"], "of the floor": least["floor_ms"] / least["ms"],
                      "tiles": len(mine)})  # fmt: skip
    return found


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--only", default="", help="groups whose name has this: 'logsumexp', 'bfloat16 fwd'")
    given = parser.parse_args()
    if given.job:
        serve(given.job, handle)
        return 0
    if measure.device() != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        parser.error("without a GPU, the kernels run under TRITON_INTERPRET=1")
    copy, began = measure.copy_bandwidth(), time.monotonic()
    os.environ["PSMC_COPY"] = str(copy)
    what = [(s, "float32" if given.smoke else d, w) for s, d, w in GROUPS if given.only in f"{s} {d} {w}"]
    what = list(dict.fromkeys(what))
    results = Results(given.out, given.resume, copy_gb_s=round(copy / 1e9))
    failed = lambda cell, why: [row_of(cell) | {"error": why}]  # noqa: E731
    workers = max(1, min(12, (os.cpu_count() or 2) - 1))
    checks = list(groups(what, given.smoke, True, 3))
    results.run(__file__, checks, failed, workers=workers, seconds=given.seconds * 0.6, quiet=True)
    wrong = {results.key(row) for row in results.rows.values() if "error" in row}
    right = [Group(g.name, tuple(c for c in g.cells if results.key(row_of(c)) not in wrong), g.limit, g.env)
             for g in groups(what, given.smoke, False, 1000)]  # fmt: skip
    results.run(__file__, right, failed, seconds=given.seconds - (time.monotonic() - began))
    results.replace(BEST, best(list(results.rows.values())))
    measure.show(r for r in results.sorted() if "table" in r)
    print(json.dumps({"not measured": len(results.missing)}) if results.missing else "all measured")
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main())
