"""One token of many streams: a matrix state is read and written once, at what share of a copy's bandwidth?

    python benchmarks/decode.py --out benchmarks/results/decode.json

Batch 64, 16 heads, states of 128 x 128 in fp32, inputs in bf16. psmc: `step_` in place, on all rows and on 64 of 96
rows that `slots` name; eager (what Python costs a call included) and as a CUDA graph. Peer: fla's fused_recurrent,
which writes a new state, in the same two ways. Bytes are those of the state, read and written.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import chunk_peers, measure  # noqa: E402
from benchmarks.chunk_data import PARAMS, Shape, inputs, load  # noqa: E402
from benchmarks.jobs import Cell, Group, Results, serve  # noqa: E402
from benchmarks.measure import Row, median_ms, options, relative  # noqa: E402

SPECS = ("gla", "mamba2", "retnet", "linear_attention", "hgrn2", "rwkv6", "mlstm", "gated_deltanet")
BIG, TINY = Shape(64, 1, 16, 128, 128), Shape(4, 1, 2, 16, 16)
HOW = ("graph", "graph, slots", "eager", "eager, slots")


def token(name: str, shape: Shape) -> dict[str, Tensor]:
    """[B, H, *dims], and params."""
    found = inputs(name, shape)
    return {k: x if k in PARAMS.get(name, ()) else x[:, 0].contiguous() for k, x in found.items()}


def start(agg: Any, shape: Shape, rows: int) -> dict[str, Tensor]:
    """A state that is not all zeros."""
    names = list(agg.spec.dims)
    sizes = dict(zip(names, (shape.key, shape.value), strict=True))
    state: dict[str, Tensor] = agg.init_state(rows, (shape.heads,), measure.device(), sizes=sizes)
    made = torch.Generator(device=measure.device()).manual_seed(1)
    for x in state.values():
        x.copy_(torch.randn(x.shape, device=x.device, generator=made))
    return state


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph; on a CPU, itself."""
    if measure.device() != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def handle(cell: Cell) -> Iterator[Row]:
    """All ways of one spec and side."""
    name, shape = cell["spec"], TINY if cell["tiny"] else BIG
    common = json.loads(os.environ["PSMC_DECODE"])
    x = token(name, shape)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        agg = load(name, Path(folder))
        order = [s.name for s in (*agg.spec.inputs, *agg.spec.params)]
        given = [x[n] for n in order]
        extra = shape.batch // 2
        slots = torch.randperm(shape.batch + extra, generator=torch.Generator().manual_seed(0))[: shape.batch]
        slots = slots.to(measure.device())
        for how in HOW if cell["side"] == "psmc" else HOW[::2]:
            row: Row = {"spec": name, "shape": f"B{shape.batch} H{shape.heads} K{shape.key} V{shape.value}",
                        "dtype": "float32 state", "pass": "step", "what": how}  # fmt: skip
            whole, some = start(agg, shape, shape.batch), start(agg, shape, shape.batch + extra)
            moved = 2 * sum(s.numel() * s.element_size() for s in whole.values())
            if cell["side"] != "psmc":
                step, state = chunk_peers.token(name), max(whole.values(), key=Tensor.numel)
                assert step is not None
                yield row | peer_row(lambda step=step, state=state: step(x, state), how, moved)
                continue
            if "slots" in how and not near(agg, given, whole, some, slots):
                yield row | {"error": "the rows that slots name differ from a step of all"}
                continue

            def run(whole: Any = whole, some: Any = some, how: str = how) -> Any:
                if "slots" in how:
                    return agg.step_(some, *given, slots=slots)
                return agg.step_(whole, *given)

            timed = captured(run) if "graph" in how else run
            ms = median_ms(timed, rep=100)
            row |= {"ms": round(ms, 5), "floor_ms": round(moved / common["copy"] * 1e3, 5), "floor": "bytes"}
            yield row | {"GB/s": round(moved / ms / 1e6), "of copy": round(moved / ms * 1e3 / common["copy"], 3)}


def near(agg: Any, given: list[Tensor], whole: Any, some: Any, slots: Tensor) -> bool:
    """A step by slots does to the rows it names what a step does to all."""
    one = {k: t.clone() for k, t in whole.items()}
    rows = {k: t.clone() for k, t in some.items()}
    for k, t in rows.items():
        t[slots] = one[k]
    y, z = agg.step_(one, *given), agg.step_(rows, *given, slots=slots)
    same = all(relative(rows[k][slots], one[k]) < 1e-6 for k in one)
    return bool(same and relative(z, y) < 1e-2)


def peer_row(run: Callable[[], Any], how: str, moved: int) -> Row:
    try:
        run()
        measure.wait()
        ms = median_ms(captured(run) if how == "graph" else run, rep=100)
    except Exception as error:
        lost = "CUDA" in str(error)
        if lost:
            raise
        return {"peer_error": {"fla": f"{type(error).__name__}: {str(error)[:160]}"}}
    return {"peers": {"fla": round(ms, 5)}, "fla GB/s": round(moved / ms / 1e6)}


def failed(cell: Cell, why: str) -> list[Row]:
    shape = TINY if cell["tiny"] else BIG
    same = {"spec": cell["spec"], "shape": f"B{shape.batch} H{shape.heads} K{shape.key} V{shape.value}",
            "dtype": "float32 state", "pass": "step"}  # fmt: skip
    if cell["side"] == "psmc":
        return [same | {"what": how, "error": why} for how in HOW]
    return [same | {"what": how, "peer_error": {"fla": why}} for how in HOW[::2]]


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--specs", default=",".join(SPECS))
    given = parser.parse_args()
    if given.job:
        serve(given.job, handle)
        return 0
    copy = measure.copy_bandwidth()
    env = {"PSMC_DECODE": json.dumps({"copy": copy})}
    names = given.specs.split(",")
    cells = [{"spec": n, "side": "psmc", "tiny": given.smoke} for n in names]
    groups = [Group("psmc", tuple(cells), 90, env)]
    if chunk_peers.installed("gla") and measure.device() == "cuda":
        theirs = tuple({**c, "side": "fla"} for c in cells if chunk_peers.token(str(c["spec"])))
        cache = {"TRITON_CACHE_DIR": str(ROOT / "build" / "bench_cache" / "peers")}
        groups.append(Group("fla", theirs, 120, env | chunk_peers.ENV | cache))
    results = Results(given.out, given.resume, lambda r: (names.index(r["spec"]), HOW.index(r["what"])),
                      copy_gb_s=round(copy / 1e9))  # fmt: skip
    results.run(__file__, groups, failed, seconds=given.seconds)
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main())
