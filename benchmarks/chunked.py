"""Matrix states in chunks: psmc beside flash-linear-attention, in one run.

    python benchmarks/chunked.py --out benchmarks/results/chunked.json [--shapes main,more,alone] [--specs gla,mamba2]
    python benchmarks/chunked.py --only warm    # compile everything first, many processes at once
    python benchmarks/chunked.py --traffic      # launches and bytes, without a GPU

One process a spec and side, started again behind whatever kills it. The peer's kernels are compiled and tuned before
they are timed, in a cache of triton's of their own. The floor is the larger of the least bytes (inputs and output once;
backward: those, the output's cotangent and every gradient) at the speed of a copy, and the least operations (4 K V a
token forward, 12 K V with backward: reads and writes of the state alone) at the speed of a square product.
Block sizes: chunk_tiles.py. The kernels alone: chunk_parts.py. Errors: accuracy.py.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import chunk_peers, measure  # noqa: E402
from benchmarks.chunk_data import CHUNKED, DTYPES, Shape, inputs, load  # noqa: E402
from benchmarks.jobs import Cell, Group, Results, serve  # noqa: E402
from benchmarks.measure import Row, median_ms, options, peak_mib, relative, with_gradients  # noqa: E402

SHAPES = {
    "main": (Shape(8, 4096, 16, 128, 128), Shape(1, 65536, 16, 128, 128)),
    "more": (Shape(8, 4096, 32, 64, 64), Shape(1, 8192, 96, 128, 128), Shape(4, 4096, 64, 128, 128)),
    "alone": (Shape(8, 2048, 32, 256, 256), Shape(1, 32768, 16, 128, 128, sequences=16),
              Shape(8, 4096, 16, 96, 80), Shape(4, 2048, 16, 64, 64, "float32")),
}  # fmt: skip
TINY = {
    "main": (Shape(1, 70, 2, 16, 16),),
    "more": (),
    "alone": (Shape(1, 80, 2, 16, 16, sequences=3), Shape(1, 40, 1, 16, 8, "float32")),
}
SHARDS = {"gla": 5, "rwkv6": 4, "mamba2": 2, "retnet": 2, "linear_attention": 2, "mlstm": 1}  # hgrn2: gla's kernels
PASSES = ("fwd", "fwd+bwd")
RATIOS = "The peer's time over psmc's"


def call(name: str, side: str, shape: Shape, folder: Path) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of the tensors that have gradients, and those tensors."""
    given = inputs(name, shape)
    if side != "psmc":
        given = chunk_peers.prepared(name, given)
        fixed = {k: given.pop(k) for k in chunk_peers.NOT_TRAINED.get(name, ())}
        peer = chunk_peers.PEERS[name]
        return lambda *xs: peer({**dict(zip(given, xs, strict=True)), **fixed}), list(given.values())
    agg, more = load(name, folder), {}
    if shape.sequences:
        more["cu_seqlens"] = shape.cu_seqlens()
    return lambda *xs: agg(**dict(zip(given, xs, strict=True)), **more), list(given.values())


def floor(shape: Shape, tensors: list[Tensor], back: bool, speeds: dict[str, float]) -> Row:
    tokens = shape.batch * shape.length * shape.heads
    width = DTYPES[shape.dtype].itemsize
    own, y = sum(x.numel() * x.element_size() for x in tensors), tokens * shape.value * width
    by_bytes = (3 * own + 2 * y if back else own + y) / speeds["copy"] * 1e3
    by_flops = (12 if back else 4) * shape.key * shape.value * tokens / speeds[shape.dtype] * 1e3
    kind = "flops" if by_flops > by_bytes else "bytes"
    return {"floor_ms": round(max(by_bytes, by_flops), 4), "floor": kind}


def handle(cell: Cell) -> Iterator[Row]:
    """Both passes of one spec, side and shape."""
    name, side, shape = cell["spec"], cell["side"], Shape(*cell["shape"])
    if side != "psmc":
        os.environ.update(chunk_peers.ENV)
        if measure.device() == "cuda":
            from benchmarks import peer_tuning

            peer_tuning.compile_only(*cell["part"]) if cell["warm"] else peer_tuning.short()
        if chunk_peers.guarded(name) and measure.device() == "cuda":
            chunk_peers.guard_off()
    common = json.loads(os.environ["PSMC_CHUNKED"])
    folder = Path(common["folder"])
    fn, tensors = call(name, side, shape, folder)
    for kind in PASSES:
        back = kind == "fwd+bwd"

        def forward() -> Any:
            with torch.no_grad():
                return fn(*tensors)

        row: Row = {"spec": name, "shape": shape.label, "dtype": shape.dtype, "pass": kind}
        first = measure.first_call(run := with_gradients(fn, tensors) if back else forward)
        if cell["warm"]:
            continue
        peak, ms = peak_mib(run), round(median_ms(run, rep=40), 4)
        if side == "psmc":
            row |= {"ms": ms, "peak_mib": peak, "first_call_s": round(first, 2)}
            yield row | floor(shape, tensors, back, common["speeds"])
        else:
            who = chunk_peers.who(name)
            row |= {"peers": {who: ms}, "peer_peak_mib": {} if peak is None else {who: peak}}
            yield row | ({"note": chunk_peers.GUARD} if back and chunk_peers.guarded(name) else {})
        if not back:
            yield from agreement(row, forward(), folder, side)


def agreement(row: Row, y: Tensor, folder: Path, side: str) -> Iterator[Row]:
    """How far psmc's output is from the peer's, on some tokens; psmc runs first and leaves its own."""
    some = y[:, :: max(1, y.shape[1] // 64)].float().cpu()
    path = folder / f"{row['spec']}_{row['shape']}.pt".replace(" ", "_")
    if side == "psmc":
        torch.save(some, path)
    elif path.exists():
        same = {k: row[k] for k in ("spec", "shape", "dtype", "pass")}
        yield same | {"differs": float(f"{relative(torch.load(path), some):.1e}")}


def failed(cell: Cell, why: str) -> list[Row]:
    same = [{"spec": cell["spec"], "shape": Shape(*cell["shape"]).label, "dtype": Shape(*cell["shape"]).dtype,
             "pass": kind} for kind in PASSES]  # fmt: skip
    if cell["side"] == "psmc":
        return [row | {"error": why} for row in same]
    return [row | {"peer_error": {chunk_peers.who(cell["spec"]): why}} for row in same]


def groups(names: list[str], sets: list[str], tiny: bool, cache: Path, common: str, warm: bool) -> Iterator[Group]:
    """The main shapes of all before the others of any. Warming: a peer's candidates are split between processes."""
    for chosen in sets:
        shapes = (TINY if tiny else SHAPES)[chosen]
        for name in names if shapes else ():
            cells = [{"spec": name, "side": "psmc", "shape": astuple(s), "warm": warm} for s in shapes]
            yield Group(f"psmc {name} {chosen}", tuple(cells), 90, {"PSMC_CHUNKED": common})
            if chosen == "alone" or not chunk_peers.installed(name):
                continue
            if tiny and measure.device() != "cuda":
                continue  # fla's kernels want a GPU
            parts = SHARDS.get(name, 0) if warm else 1
            for part in range(parts):
                theirs = [{"spec": name, "side": "peer", "shape": astuple(s), "warm": warm, "part": [part, parts]}
                          for s in shapes]  # fmt: skip
                if warm and chosen != "main":  # what the main shapes have tuned needs no candidates: part -1 of 1
                    theirs.insert(0, {**theirs[0], "shape": astuple(SHAPES["main"][0]), "part": [-1, 1]})
                label = f"peer {name} {chosen}" + (f" {part + 1}/{parts}" if warm else "")
                where = {**chunk_peers.ENV, "PSMC_CHUNKED": common, "TRITON_CACHE_DIR": str(cache / "peers")}
                yield Group(label, tuple(theirs), limit=300 if warm else 240, env=where)


def _timed(warm: Group) -> str:
    """The group that a warming one is for: without the part of its name."""
    words = warm.name.split()
    return " ".join(words[:-1] if "/" in words[-1] else words)


def ratios(rows: list[Row]) -> list[Row]:
    """Geometric mean and least of peer / psmc, a pass, and how often the peer needs less memory."""
    found = []
    for kind in PASSES:
        mine = [r for r in rows if r.get("pass") == kind and "ms" in r]
        both = [(r, who, ms) for r in mine for who, ms in r.get("peers", {}).items()]
        if not both:
            continue
        quotients = {f"{r['spec']}, {r['shape']}, {who}": ms / r["ms"] for r, who, ms in both}
        least = min(quotients, key=quotients.__getitem__)
        more = [f"{r['spec']}, {r['shape']}" for r, who, _ in both
                if r.get("peak_mib", 0) > r.get("peer_peak_mib", {}).get(who, math.inf)]  # fmt: skip
        mean = math.exp(sum(map(math.log, quotients.values())) / len(quotients))
        apart = [r["differs"] for r, _, _ in both if "differs" in r]
        found.append({"passes": kind, "rows": len(quotients), "geometric mean": mean, "least": quotients[least],
                      "least at": least, "psmc needs more memory at": "; ".join(more) or "none",
                      "outputs differ by at most": max(apart, default=None)})  # fmt: skip
    return found


def order(row: Row) -> Any:
    names = [*CHUNKED, None]
    shapes = [s.label for s in (*SHAPES["main"], *SHAPES["more"], *SHAPES["alone"])]
    shape = row.get("shape")
    return ("table" in row, shapes.index(shape) if shape in shapes else 99, names.index(row.get("spec")),
            str(row.get("pass")), str(row.get("passes")))  # fmt: skip


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--shapes", default="main,more,alone", help="which sets of shapes")
    parser.add_argument("--specs", default=",".join(CHUNKED))
    parser.add_argument("--only", choices=["warm", "measure"], help="default: both")
    parser.add_argument("--warm-seconds", type=float, default=200.0, help="for compiling beforehand")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "bench_cache", help="of the peers' kernels")
    parser.add_argument("--traffic", action="store_true", help="launches and bytes, counted without a GPU")
    given = parser.parse_args()
    if given.job:
        serve(given.job, handle)
        return 0
    names = given.specs.split(",")
    if given.traffic:
        from benchmarks.chunk_traffic import rows

        measure.show(rows(tuple(names)))
        return 0
    if given.smoke:
        names = names if given.specs != ",".join(CHUNKED) else ["gla", "mamba2"]
    sets = given.shapes.split(",")
    speeds = {"copy": measure.copy_bandwidth(), **{k: measure.matmul_flops(d) for k, d in DTYPES.items()}}
    with tempfile.TemporaryDirectory() as folder:
        common = json.dumps({"folder": folder, "speeds": speeds})
        workers = max(1, min(14, (os.cpu_count() or 2) - 1))
        results = Results(given.out, given.resume, order, copy_gb_s=round(speeds["copy"] / 1e9),
                          matmul_tflops={k: round(v / 1e12) for k, v in speeds.items() if k in DTYPES})  # fmt: skip
        results.command = "python benchmarks/chunked.py --out benchmarks/results/chunked.json"
        timed = list(groups(names, sets, given.smoke, given.cache, common, False))
        if given.only != "measure":
            warmed, wanted = Results(None, False), {g.name for g in results.left(timed)}
            todo = [g for g in groups(names, sets, given.smoke, given.cache, common, True) if _timed(g) in wanted]
            todo.sort(key=lambda g: g.name.startswith("psmc"))  # the long ones first
            began = time.monotonic()
            warmed.run(__file__, todo, workers=workers, seconds=min(given.warm_seconds, given.seconds / 2))
            given.seconds -= time.monotonic() - began
        if given.only == "warm":
            return 0
        results.run(__file__, timed, failed, seconds=given.seconds)
        results.replace(RATIOS, ratios(list(results.rows.values())))
    measure.show(r for r in results.sorted() if "table" in r)
    print(json.dumps({"not measured": results.missing}) if results.missing else "all measured")
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main())
