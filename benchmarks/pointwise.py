"""Pointwise scans: psmc against what else there is, each in its own best layout, in one run.

    python benchmarks/pointwise.py --out benchmarks/results/pointwise.json [--skip warp]

h = a h + b (3 streams forward, 8 with backward) and log-sum-exp as a pair of numbers a lane (2 and 5), and what a byte
of the second costs over one of the first; few lanes and a long sequence. A process for each contestant. Tiles are swept
by pointwise_tiles.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import psmc  # noqa: E402
from benchmarks import measure  # noqa: E402
from benchmarks.jobs import Cell, Group, Results, free, serve  # noqa: E402
from benchmarks.measure import EXAMPLES, Row, first_call, median_ms, options, peak_mib, with_gradients  # noqa: E402
from benchmarks.pointwise_peers import JAX, PEERS, Case, Size, gates, jax_ms, names  # noqa: E402

BIG: Size = (8, 8192, 2048)
LONG: tuple[Size, ...] = ((1, 1 << 20, 64), (1, 65536, 2048))
TINY: Size = (2, 40, 8)
STREAMS = {"linear_recurrence": (3, 8), "logsumexp": (2, 5)}  # forward, forward and backward
PASSES = ("fwd", "fwd+bwd")
BYTES = "Time a byte of log-sum-exp over the linear recurrence's"


def case(cell: Cell, dtype: torch.dtype) -> Case:
    size: Size = tuple(cell["size"])  # type: ignore[assignment]
    if cell["who"] != "psmc":
        return PEERS[cell["who"]][1](size, dtype)
    agg = psmc.load(EXAMPLES / f"{cell['spec']}.psm")
    pair = gates(size, dtype)
    return agg, pair if cell["spec"] == "linear_recurrence" else pair[1:]


def handle(cell: Cell) -> Iterator[Row]:
    """Both passes of one contestant at one size."""
    dtype, who = getattr(torch, cell["dtype"]), cell["who"]
    for row, (kind, streams) in zip(rows_of(cell), enumerate(STREAMS[cell["spec"]]), strict=True):
        back = kind == 1
        if who == JAX:
            yield row | {"peers": {who: round(jax_ms(tuple(cell["size"]), dtype, back), 4)}}  # type: ignore[arg-type]
            continue
        fn, tensors = case(cell, dtype)

        def forward(fn: Any = fn, tensors: Any = tensors) -> Any:
            with torch.no_grad():
                return fn(*tensors)

        run = with_gradients(fn, tensors) if back else forward
        first = first_call(run)
        peak, ms = peak_mib(run), round(median_ms(run), 4)
        if who != "psmc":
            yield row | {"peers": {who: ms}, "peer_peak_mib": {} if peak is None else {who: peak}}
            continue
        size = cell["size"]
        floor = streams * size[0] * size[1] * size[2] * dtype.itemsize / float(os.environ["PSMC_COPY"]) * 1e3
        yield row | {"ms": ms, "floor_ms": round(floor, 4), "floor": "bytes", "first_call_s": round(first, 2),
                     "peak_mib": peak}  # fmt: skip
        del run, fn, tensors
        free()


def rows_of(cell: Cell) -> list[Row]:
    shape = "B{} T{} C{}".format(*cell["size"])
    return [{"spec": cell["spec"], "shape": shape, "dtype": cell["dtype"], "pass": kind} for kind in PASSES]


def failed(cell: Cell, why: str) -> list[Row]:
    more = {"error": why} if cell["who"] == "psmc" else {"peer_error": {cell["who"]: why}}
    return [row | more for row in rows_of(cell)]


def groups(skip: str, tiny: bool) -> Iterator[Group]:
    env = {"FLA_DISABLE_BACKEND_DISPATCH": "1", "PSMC_COPY": os.environ["PSMC_COPY"]}
    linear = {"spec": "linear_recurrence", "size": TINY if tiny else BIG}
    both = ("float32", "bfloat16")
    cells = [{**linear, "spec": spec, "dtype": d, "who": "psmc"} for d in both for spec in STREAMS]
    cells += [{**linear, "size": s, "dtype": "float32", "who": "psmc"} for s in (() if tiny else LONG)]
    yield Group("psmc", tuple(cells), 60, env)
    for who in names():
        if skip and skip in who:
            continue
        if tiny and measure.device() != "cuda" and who != "torch associative_scan (B,T,C)":
            continue  # the others want a GPU
        yield Group(who, tuple({**linear, "dtype": d, "who": who} for d in both[: 1 if tiny else 2]), 120, env)


def bytes_rows(rows: list[Row]) -> list[Row]:
    """ms / floor_ms of the one over ms / floor_ms of the other: the floors count the bytes."""
    found = []
    for dtype in ("float32", "bfloat16"):
        for kind in PASSES:
            cost = {r["spec"]: r["ms"] / r["floor_ms"] for r in rows if "floor_ms" in r and r.get("dtype") == dtype
                    and r["pass"] == kind and r["shape"] in ("B8 T8192 C2048", "B2 T40 C8")}  # fmt: skip
            if len(cost) == 2:
                quotient = cost["logsumexp"] / cost["linear_recurrence"]
                found.append({"dtype": dtype, "passes": kind, "quotient": quotient})
    return found


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--skip", default="", help="peers to leave out, by a part of their name")
    given = parser.parse_args()
    if given.job:
        serve(given.job, handle)
        return 0
    copy = measure.copy_bandwidth()
    os.environ["PSMC_COPY"] = str(copy)
    print(f"copy {copy / 1e9:.0f} GB/s", flush=True)
    specs, shapes = [*STREAMS, None], ["B{} T{} C{}".format(*s) for s in (BIG, *LONG)]
    results = Results(
        given.out, given.resume, lambda r: ("table" in r, shapes.index(r["shape"]) if r.get("shape") in shapes else 9,
                                            specs.index(r.get("spec")), r["dtype"] != "float32", str(r.get("pass"))),
        copy_gb_s=round(copy / 1e9),
    )  # fmt: skip
    results.run(__file__, list(groups(given.skip, given.smoke)), failed, seconds=given.seconds)
    results.replace(BYTES, bytes_rows(list(results.rows.values())))
    measure.show(r for r in results.sorted() if "table" in r)
    print(json.dumps({"not measured": results.missing}) if results.missing else "all measured")
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main())
