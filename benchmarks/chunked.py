"""Matrix states in chunks on a GPU: psmc beside flash-linear-attention, in one run.

    python benchmarks/chunked.py --out benchmarks/results/chunked.json [--peers] [--specs gla,mamba2] [--quick]
    python benchmarks/chunked.py --candidates [--decays 0,1,2] [--seconds 150]   # block sizes, checked, then timed
    python benchmarks/chunked.py --kernels [--quick]                             # the kernels alone, without the spec
    python benchmarks/chunked.py --accuracy [--quick]                            # errors against fp64
    python benchmarks/chunked.py --traffic                                       # launches and bytes, without a GPU

fla has to be told FLA_DISABLE_BACKEND_DISPATCH=1; this script does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from chunk_cases import Data, kernels, one_tile, table  # noqa: E402

import psmc  # noqa: E402
from benchmarks.chunk_traffic import rows as traffic_rows  # noqa: E402
from benchmarks.measure import copy_bandwidth, first_call, median_ms, show, with_gradients, write  # noqa: E402
from psmc.plan.chunked_kernels import ChunkTile, tiles  # noqa: E402
from psmc.runtime.kit_chunk_kernels import ChunkKernels  # noqa: E402
from psmc.runtime.kit_chunk_views import ChunkCall  # noqa: E402

SHAPES = [(8, 4096, 16, 128, 128), (1, 65536, 16, 128, 128), (4, 4096, 64, 128, 128), (8, 4096, 32, 64, 64),
          (1, 8192, 96, 128, 128)]  # fmt: skip
ALONE = [(8, 2048, 32, 256, 256), (4, 4096, 16, 96, 80)]
Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    made = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=made).to(dtype)


def log_gate(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    return torch.nn.functional.logsigmoid(normal(*shape, dtype=torch.float32, seed=seed) + 3).to(dtype)


# --- specs: name -> inputs of psmc and the same model by fla


def _qkv(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    b, t, h, k, v = shape
    return normal(b, t, h, k, seed=1), normal(b, t, h, k, seed=2) / k**0.5, normal(b, t, h, v, seed=3)


def linear_attention(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Case | None]:
    q, k, v = _qkv(shape)

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from fla.ops.linear_attn import chunk_linear_attn

        q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
        return chunk_linear_attn(q, k, v, scale=1.0, normalize=True)[0]

    return (q, k, v), (peer, (q, k, v))


def retnet(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Case | None]:
    q, k, v = _qkv(shape)
    h = shape[2]
    gamma = 1 - 2.0 ** (-5 - torch.arange(h, device="cuda", dtype=torch.float32))

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from fla.ops.retention import chunk_retention

        return chunk_retention(q, k, v)[0]

    return (q, k, v, gamma), (peer, (q, k, v))


def mamba2(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Case | None]:
    b, t, h = shape[:3]
    c, n, x = _qkv(shape)
    dt = torch.nn.functional.softplus(normal(b, t, h, dtype=torch.float32, seed=4) - 2).bfloat16()
    a = -torch.rand(h, device="cuda") - 0.5
    skip = torch.rand(h, device="cuda")

    def peer(x: Tensor, dt: Tensor, n: Tensor, c: Tensor, a: Tensor, skip: Tensor) -> Tensor:
        from fla.ops.simple_gla import chunk_simple_gla

        y = chunk_simple_gla(c, n * dt[..., None], x, g=dt.float() * a, scale=1.0)[0]
        return y + skip[:, None].to(x.dtype) * x

    return (x, dt, n, c, a, skip), (peer, (x, dt, n, c, a, skip))


def gla(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Case | None]:
    q, k, v = _qkv(shape)
    g = log_gate(*q.shape, dtype=torch.bfloat16)

    def peer(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        from fla.ops.gla import chunk_gla

        return chunk_gla(q, k, v, g)[0]

    return (q, k, v, g), (peer, (q, k, v, g))


def hgrn2(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Case | None]:
    q, _, v = _qkv(shape)
    g = log_gate(*q.shape, dtype=torch.bfloat16)

    def peer(q: Tensor, v: Tensor, g: Tensor) -> Tensor:
        from fla.ops.gla import chunk_gla

        return chunk_gla(q, 1 - g.exp(), v, g, scale=1.0)[0]

    return (q, v, g), (peer, (q, v, g))


def rwkv6(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Case | None]:
    r, k, v = _qkv(shape)
    w = normal(*r.shape, seed=5) - 3
    u = normal(shape[2], shape[3], dtype=torch.float32, seed=6)

    def peer(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        from fla.ops.rwkv6 import chunk_rwkv6

        return chunk_rwkv6(r, k, v, -w.float().exp(), u.to(r.dtype), scale=1.0)[0]

    names = {"r": r, "k": k, "v": v, "w": w, "u": u}
    return tuple(names.values()), (peer, tuple(names.values()))


def gated_rfa(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Case | None]:
    q, k, v = _qkv(shape)
    return (q.abs(), k.abs(), v, normal(*shape[:3], seed=8) + 3), None


def mlstm(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Case | None]:
    return (*_qkv(shape), normal(*shape[:3], seed=8), normal(*shape[:3], seed=9) + 3), None


def value_gate(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Case | None]:
    q, k, v = _qkv(shape)
    return (q, k, v, log_gate(*v.shape, dtype=torch.bfloat16)), None


def two_writes(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Case | None]:
    q, k, v = _qkv(shape)
    h, w = normal(*k.shape, seed=8) / shape[3] ** 0.5, normal(*v.shape, seed=9)
    return (q, k, v, h, w, normal(*shape[:3], seed=5)), None


def grid_gate(shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Case | None]:
    q, k, v = _qkv(shape)
    gates = (log_gate(*x.shape, dtype=torch.bfloat16, seed=n) for n, x in enumerate((k, v)))
    return (q, k, v, *gates, normal(shape[2], shape[3], dtype=torch.float32, seed=6)), None


SPECS: dict[str, Callable[[tuple[int, ...]], tuple[tuple[Tensor, ...], Case | None]]] = {
    f.__name__: f for f in (linear_attention, retnet, mamba2, gla, hgrn2, rwkv6, gated_rfa, mlstm, value_gate,
                            two_writes, grid_gate)
}
ORDER = {"rwkv6": ("r", "k", "v", "w", "u"), "mamba2": ("x", "dt", "B", "C", "A", "skip")}


def _named(name: str, agg: Any, tensors: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """psmc's call with its arguments in our order."""
    declared = [s.name for s in (*agg.spec.inputs, *agg.spec.params)] if hasattr(agg, "spec") else None
    order = ORDER.get(name, declared)
    return lambda *xs: agg(**dict(zip(order, xs, strict=True)))


def floor_ms(shape: tuple[int, ...], tensors: tuple[Tensor, ...], backward: bool, bandwidth: float) -> float:
    """Inputs once and y once; backward: those and dy once more, and every gradient."""
    b, t, h, _, v = shape
    own = sum(x.numel() * x.element_size() for x in tensors)
    y = b * t * h * v * 2
    return ((3 * own + 2 * y) if backward else own + y) / bandwidth * 1e3


def measure(run: Callable[[], Any]) -> dict[str, Any]:
    """ms, seconds of the first call, and peak MiB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    first = first_call(run)
    ms = median_ms(run, rep=40)
    return {"ms": round(ms, 4), "first_call_s": round(first, 2),
            "peak_mib": round((torch.cuda.max_memory_allocated() - base) / 2**20)}  # fmt: skip


def spec_rows(
    names: list[str], shapes: list[tuple[int, ...]], peers: bool, bandwidth: float
) -> Iterator[dict[str, Any]]:
    for name in names:
        agg = psmc.load(str(ROOT / "examples" / f"{name}.psm"))
        for shape in shapes:
            tensors, peer = SPECS[name](shape)
            ours = _named(name, agg, tensors)
            right = None
            for kind in ("fwd", "fwd+bwd"):
                back = kind != "fwd"
                run = with_gradients(ours, tensors) if back else (lambda ours=ours, ts=tensors: ours(*ts))
                label = f"B{shape[0]} T{shape[1]} H{shape[2]} K{shape[3]} V{shape[4]}"
                row: dict[str, Any] = {"spec": name, "shape": label, "dtype": "bf16", "pass": kind}
                try:
                    with torch.set_grad_enabled(back):
                        row |= measure(run)
                    row |= {"floor_ms": round(floor_ms(shape, tensors, back, bandwidth), 4), "floor": "bytes"}
                    if peers and peer is not None:
                        theirs = with_gradients(*peer) if back else (lambda p=peer: p[0](*p[1]))
                        with torch.set_grad_enabled(back):
                            found = measure(theirs)
                        row |= {"peers": {"fla": found["ms"]}, "peer_peak_mib": {"fla": found["peak_mib"]},
                                "peer_first_call_s": {"fla": found["first_call_s"]}}  # fmt: skip
                        if not back:
                            with torch.no_grad():
                                right = peer[0](*peer[1]).float()
                                row["differs"] = float((ours(*tensors).float() - right).norm() / right.norm())
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                yield row
            del tensors, peer, right
            torch.cuda.empty_cache()


# --- block sizes


def grid_of(kernel: str, key: int, wide: bool) -> Iterator[ChunkTile]:
    """The shipped tile, and a handful of others; (tokens, values, keys or 0: all, warps, stages)."""
    yield next(t for k, s, limit, t in tiles(wide).rows if k == kernel and s == 2 and key <= limit)
    choices = {
        "forward": [(64, 64, 0, 8, 1), (64, 64, 0, 8, 2), (64, 64, 0, 4, 1), (64, 64, 0, 4, 3), (64, 128, 0, 8, 2),
                    (64, 128, 0, 8, 1), (64, 32, 0, 4, 2), (32, 64, 0, 4, 2), (32, 64, 0, 4, 3), (128, 64, 0, 8, 1)],
        "states": [(64, 64, 64, 4, 1), (64, 64, 64, 4, 3), (64, 128, 64, 4, 2), (64, 64, 128, 4, 2),
                   (64, 128, 64, 8, 2),
                   (64, 128, 128, 8, 2), (64, 64, 64, 8, 2), (32, 64, 64, 4, 3)],
        "gradients": [(64, 64, 64, 4, 1), (64, 64, 64, 8, 1), (64, 64, 64, 8, 2), (64, 32, 64, 8, 1), (64, 64, 0, 8, 1),
                      (64, 32, 0, 8, 1), (64, 128, 64, 8, 1), (64, 64, 32, 4, 1), (32, 64, 64, 4, 1)],
        "prepare": [(64, 64, 64, 4, 1), (64, 64, 64, 8, 1), (64, 64, 32, 4, 1), (64, 64, 0, 8, 1), (32, 64, 64, 4, 1)],
    }  # fmt: skip
    for tokens, values, keys, warps, stages in choices[kernel]:
        yield ChunkTile(tokens, values, min(keys or key, key), warps, stages)


def call_of(made: Any, kernel: str, args: tuple[Any, ...], bt: int) -> Callable[[], Any]:
    """One kernel by itself (with the one that it waits for, where a decay is over the key)."""
    q, b, c, log, start = args
    wide = log is not None and log.dim() == 4
    decay = 2 if wide else int(log is not None)
    shape = (c.shape[0], c.shape[1], c.shape[2])
    a = ChunkCall(start, None, None if wide else log, None, c, (q, b, log if wide else None), (), (), shape, 0, 1.0,
                  None, None, c.dtype, decay)  # fmt: skip
    how = made.plan("forward", a, bt)
    if kernel == "prepare":
        return lambda: made._prepared(a, how, None)
    ready = made._prepared(a, how, None)
    if kernel == "states":
        return lambda: made.states(a, ready, None, bt)
    do = torch.randn_like(c)
    kept = made.forward(a, True)[3]
    made._prepared = lambda *_: ready
    if kernel == "gradients":
        return lambda: made.backward(a, kept, do, None, None, (True,) * len(a.tensors))
    return lambda: made.forward(a)


def check(decay: int, kernel: str, tile: ChunkTile, key: int, value: int) -> dict[str, Any]:
    """Errors of one candidate on a small problem, in a process of its own: a fault ends no other. Leaves what it
    compiled in triton's cache."""
    try:
        made = kernels(one_tile(decay == 2, kernel, tile))
        small = Data(1, 200, 2, key, value, decay, dtype=torch.bfloat16, device="cuda")
        errors = small.errors(made, backward=kernel != "forward")
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:120]}"}
    worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else 1e9)
    found: dict[str, Any] = {"error": f"{errors[worst]:.1e} {worst}"}
    if not errors[worst] < 2e-2:
        found["wrong"] = {n: f"{e:.1e}" for n, e in errors.items()}
    return found


def candidates(decays: list[int], shape: tuple[int, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """Each tile checked, a dozen at a time, then timed; for 'gradients': the costates and the gradients."""
    b, t, h, k, v = shape
    began = time.perf_counter()
    todo = [(decay, kernel, tile) for decay in decays
            for kernel in (*(("prepare",) if decay == 2 else ()), "forward", "gradients", "states")
            for tile in dict.fromkeys(grid_of(kernel, k, decay == 2))]  # fmt: skip
    context = multiprocessing.get_context("spawn")
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        jobs = [pool.submit(check, decay, kernel, tile, k, v) for decay, kernel, tile in todo]
        checked = []
        for job in jobs:
            try:
                checked.append(job.result(timeout=max(1.0, seconds - (time.perf_counter() - began))))
            except Exception as error:
                checked.append({"failed": f"{type(error).__name__}: {str(error)[:120]}"})
        pool.shutdown(wait=False, cancel_futures=True)
    print(f"checked {len(todo)} in {time.perf_counter() - began:.0f} s", flush=True)
    q, key, val = normal(b, t, h, k, seed=1), normal(b, t, h, k, seed=2), normal(b, t, h, v, seed=3)
    logs = {0: None, 1: log_gate(b, t, h), 2: log_gate(b, t, h, k, dtype=torch.bfloat16)}
    for (decay, kernel, tile), row in zip(todo, checked, strict=True):
        row = {"decay": decay, "kernel": kernel, "tile": tile.numbers, **row}
        if "failed" not in row and time.perf_counter() - began < 2 * seconds:
            made = ChunkKernels(kernels(one_tile(decay == 2, kernel, tile)).table)
            row["ms"] = round(
                median_ms(call_of(made, kernel, (q, key, val, logs[decay], None), tile.tokens), rep=15), 4
            )
        yield row


def kernel_rows(shapes: list[tuple[int, ...]], bandwidth: float) -> Iterator[dict[str, Any]]:
    """The cut itself: y and the last state from factors, without the spec's torch code."""
    for b, t, h, k, v in shapes:
        for decay in (0, 1, 2):
            made = kernels(table(decay == 2))
            q, key, val = normal(b, t, h, k, seed=1), normal(b, t, h, k, seed=2), normal(b, t, h, v, seed=3)
            log = None if not decay else log_gate(b, t, h) if decay == 1 else log_gate(b, t, h, k, dtype=torch.bfloat16)
            tensors = tuple(x for x in (q, key, val, log) if x is not None)

            def scan(q: Tensor, key: Tensor, val: Tensor, log: Tensor | None = None, made: Any = made) -> Tensor:
                return made.scan(q, key, val, log, None)[0]

            for kind in ("fwd", "fwd+bwd"):
                back = kind != "fwd"
                row = {"decay": decay, "shape": f"B{b} T{t} H{h} K{k} V{v}", "pass": kind}
                try:
                    run = with_gradients(scan, tensors) if back else (lambda s=scan, ts=tensors: s(*ts))
                    with torch.set_grad_enabled(back):
                        row |= measure(run)
                    row["floor_ms"] = round(floor_ms((b, t, h, k, v), tensors, back, bandwidth), 4)
                    if back:
                        names = ("states", "forward", "gradients", *(["prepare"] if decay == 2 else []))
                        given, bt = (q, key, val, log, None), 64 if k <= 128 else 32
                        parts = {n: call_of(ChunkKernels(made.table), n, given, bt) for n in names}
                        row["parts"] = {n: round(median_ms(f, rep=10), 4) for n, f in parts.items()}
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                yield row


def accuracy_rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """Relative errors against a sequential loop in fp64."""
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32):
        for k, v in ((128, 128), (96, 80)) if quick else ((128, 128), (64, 64), (96, 80), (256, 256)):
            for decay in (0, 1, 2):
                for hard in (False, True):
                    for shift in (0, 1) if not hard else (0,):
                        made = kernels(table(decay == 2))
                        row = {"dtype": str(dtype).removeprefix("torch."), "K": k, "V": v, "decay": decay, "hard": hard,
                               "shift": shift}  # fmt: skip
                        try:
                            data = Data(1, 300, 2, k, v, decay, cu=[0, 137, 300], hard=hard, dtype=dtype, device="cuda")
                            row |= {n: f"{e:.1e}" for n, e in data.errors(made, shift).items()}
                        except Exception as error:
                            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                        yield row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--specs", default=",".join(SPECS))
    parser.add_argument("--candidates", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--traffic", action="store_true", help="launches and bytes, counted without a GPU")
    parser.add_argument("--decays", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=170.0)
    args = parser.parse_args()
    shapes: list[tuple[int, ...]] = list(SHAPES[:1] if args.quick else SHAPES)
    rows: list[dict[str, Any]] = []

    def keep(found: Iterator[dict[str, Any]]) -> None:
        for row in found:
            rows.append(row)
            show([row])
            if args.out:
                write(args.out, rows, f"python benchmarks/chunked.py {' '.join(sys.argv[1:])}")

    if args.traffic:
        keep(traffic_rows(tuple(args.specs.split(","))))
    elif args.accuracy:
        keep(accuracy_rows(args.quick))
    elif args.candidates:
        keep(candidates([int(d) for d in args.decays.split(",")], shapes[0], args.seconds))
    else:
        bandwidth = copy_bandwidth()
        if args.kernels:
            keep(kernel_rows([*shapes, *([] if args.quick else ALONE)], bandwidth))
        else:
            keep(spec_rows(args.specs.split(","), shapes, args.peers, bandwidth))


if __name__ == "__main__":
    main()
