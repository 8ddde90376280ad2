"""Fused tree kernels against the same tree in PyTorch, one batched combine a level.

    python benchmarks/tree.py --out benchmarks/results/tree.json

Written shape by shape; a shape that fails says so in its row. `floor_ms` counts inputs and outputs once, and for a
backward their cotangents and gradients too; `peers` has the PyTorch tree of the same module.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import psmc
from benchmarks.measure import copy_bandwidth, first_call, median_ms, show, with_gradients, write

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHAPES = ((1, 65536, 256), (8, 4096, 1024), (8, 65536, 64))


def plain(agg: Any) -> Any:
    """The same aggregator without its kernels."""
    return type(agg)(agg.spec, agg.rules, fold=agg.fold_order)


def draw(agg: Any, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Inputs [B, T, C], then params that all lanes share, [*dims]."""
    made = torch.Generator().manual_seed(0)
    sizes = [shape] * len(agg.spec.inputs)
    params = [tuple(agg.spec.sizes[d] for d in slot.dims) for slot in agg.spec.params]
    return [torch.randn(s, generator=made).to(device, dtype) for s in (*sizes, *params)]


def moved(fn: Callable[..., Tensor], tensors: Sequence[Tensor], backward: bool) -> int:
    """Least bytes: every tensor once; a backward reads the output's cotangent and writes gradients as well."""
    with torch.no_grad():
        out = fn(*tensors)
    once = sum(x.numel() * x.element_size() for x in (*tensors, out))
    return 3 * once - out.numel() * out.element_size() if backward else once


def clock(run: Callable[[], Any]) -> float:
    """Median ms of a few calls on a CPU."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[1]


def peak_mib(run: Callable[[], Any]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(
    shapes: Sequence[tuple[int, int, int]], dtypes: Sequence[torch.dtype], device: str, spec: str = "pr_lstm",
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:  # fmt: skip
    agg = psmc.load(EXAMPLES / f"{spec}.psm")
    tree = plain(agg)
    bandwidth = copy_bandwidth() if device == "cuda" else None
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for dtype in dtypes:
            try:
                rows += rows_of(agg, tree, spec, shape, dtype, device, bandwidth)
            except Exception as error:
                same = {"spec": spec, "shape": "B{} T{} C{}".format(*shape), "dtype": str(dtype)[6:]}
                rows.append({**same, "pass": "fwd+bwd", "error": f"{type(error).__name__}: {str(error)[:200]}"})
            keep(rows)
    return rows


def rows_of(
    agg: Any, tree: Any, spec: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str,
    bandwidth: float | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Both passes at one shape. Raises AssertionError if the two trees differ."""
    on_gpu = device == "cuda"
    timed = median_ms if on_gpu else clock
    tensors = draw(agg, shape, dtype, device)
    with torch.no_grad():
        near = (agg(*tensors).float() - tree(*tensors).float()).abs().max().item()
    assert near < (1e-4 if dtype == torch.float32 else 3e-2), f"{shape}: the trees differ by {near}"
    for name in ("fwd", "fwd+bwd"):
        back = name == "fwd+bwd"
        mine, theirs = (with_gradients(f, tensors) if back else partial(f, *tensors) for f in (agg, tree))
        row: dict[str, Any] = {
            "spec": spec, "shape": "B{} T{} C{}".format(*shape), "dtype": str(dtype)[6:], "pass": name,
            "first_call_s": round(first_call(mine), 2) if on_gpu else None,
            "ms": timed(mine), "peers": {"PyTorch tree": timed(theirs)},
        }  # fmt: skip
        if bandwidth is not None:
            floor = moved(agg, tensors, back) / bandwidth * 1e3
            row |= {"floor_ms": floor, "floor": "bytes", "peak_mib": peak_mib(mine),
                    "peer_peak_mib": {"PyTorch tree": peak_mib(theirs)}}  # fmt: skip
        yield {k: v for k, v in row.items() if v is not None}

def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", action="append", help="B,T,C; several times")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, any machine")
    given = parser.parse_args(arguments)
    shapes = [tuple(map(int, s.split(","))) for s in given.shape or ()] or SHAPES
    dtypes = (torch.float32, torch.bfloat16) if given.device == "cuda" else (torch.float32,)
    shapes = ((1, 6, 4),) if given.smoke else shapes

    def keep(rows: list[dict[str, Any]]) -> None:
        show(rows[-2:])
        if given.out is not None:
            write(given.out, rows, "python benchmarks/tree.py --out benchmarks/results/tree.json")

    return measure(shapes, dtypes, given.device, keep=keep)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
