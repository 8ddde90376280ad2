"""Pointwise scans on a GPU: psmc against what else there is, each in its own best layout, in one run.

    python benchmarks/pointwise.py --out benchmarks/results/pointwise.json [--peers]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import psmc
from benchmarks.measure import copy_bandwidth, first_call, median_ms, with_gradients, write

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def gates(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    a = torch.rand(shape, device="cuda", generator=generator) * 0.2 + 0.8
    b = torch.randn(shape, device="cuda", generator=generator)
    return a.to(dtype), b.to(dtype)


def peers(dtype: torch.dtype, shape: tuple[int, int, int]) -> Iterator[tuple[str, Callable[[], Case]]]:
    """name -> a function that makes (scan, its tensors) in the layout that the peer wants."""
    batch, length, lanes = shape
    channels_first = (batch, lanes, length)

    def triton_scalar() -> Case:
        from accelerated_scan.scalar import scan

        return scan, gates(channels_first, dtype)

    def warp() -> Case:
        from accelerated_scan.warp import scan

        return scan, gates(channels_first, dtype)

    def torch_scan(dim: int, layout: tuple[int, ...]) -> Callable[[], Case]:
        def make() -> Case:
            from torch._higher_order_ops.associative_scan import associative_scan

            def op(l: Any, r: Any) -> Any:
                return l[0] * r[0], l[1] * r[0] + r[1]

            fn = torch.compile(lambda a, b: associative_scan(op, (a, b), dim=dim, combine_mode="pointwise")[1])
            return fn, gates(layout, dtype)

        return make

    def hgrn() -> Case:
        from fla.ops.hgrn import chunk_hgrn

        a, b = gates(shape, dtype)
        return lambda x, g: chunk_hgrn(x, g)[0], (b, a.float().log().to(dtype))

    yield "accelerated-scan triton (B,C,T)", triton_scalar
    yield "accelerated-scan warp (B,C,T)", warp
    yield "torch associative_scan (B,C,T)", torch_scan(2, channels_first)
    yield "torch associative_scan (B,T,C)", torch_scan(1, shape)
    yield "fla chunk_hgrn (B,T,C)", hgrn


def jax_ms(shape: tuple[int, int, int], dtype: torch.dtype, rep: int = 20) -> float:
    """jax.lax.associative_scan, jitted, (B,T,C), forward; wall clock over `rep` calls."""
    import time

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    kind = jnp.float32 if dtype == torch.float32 else jnp.bfloat16
    a = jax.random.uniform(jax.random.PRNGKey(0), shape, kind) * 0.2 + 0.8
    b = jax.random.normal(jax.random.PRNGKey(1), shape, kind)

    def op(l: Any, r: Any) -> Any:
        return l[0] * r[0], l[1] * r[0] + r[1]

    fn = jax.jit(lambda a, b: jax.lax.associative_scan(op, (a, b), axis=1)[1])
    fn(a, b).block_until_ready()
    start = time.perf_counter()
    for _ in range(rep):
        out = fn(a, b)
    out.block_until_ready()
    return (time.perf_counter() - start) / rep * 1e3


Passes = dict[str, dict[str, float | str]]  # 'fwd' and 'fwd+bwd' -> ms, first_call_s, or error


def measure(make: Callable[[], Case]) -> Passes:
    """Both passes of one contestant; what fails is said."""
    found: Passes = {"fwd": {}, "fwd+bwd": {}}
    try:
        fn, tensors = make()
        for name, run in (("fwd", lambda: fn(*tensors)), ("fwd+bwd", with_gradients(fn, tensors))):
            seconds = first_call(run)
            found[name] = {"ms": round(median_ms(run), 4), "first_call_s": round(seconds, 2)}
    except Exception as error:
        for result in found.values():
            result.setdefault("error", f"{type(error).__name__}: {error}"[:120]) if "ms" not in result else None
    torch.cuda.empty_cache()
    return found


def rows_of(spec: str, shape: str, dtype: torch.dtype, floors: tuple[float, float], ours: Passes,
            others: dict[str, Passes]) -> list[dict[str, Any]]:  # fmt: skip
    """A row a pass, as the result files have them."""
    rows = []
    for floor, name in zip(floors, ("fwd", "fwd+bwd"), strict=True):
        row: dict[str, Any] = {"spec": spec, "shape": shape, "dtype": str(dtype)[6:], "pass": name, **ours[name]}
        row |= {"floor_ms": round(floor, 4), "floor": "bytes"}
        row["peers"] = {who: p[name]["ms"] for who, p in others.items() if "ms" in p[name]}
        row["peer_error"] = {who: p[name]["error"] for who, p in others.items() if "error" in p[name]}
        rows.append({k: v for k, v in row.items() if v != {}})
        share = f"  ({floor / float(ours[name]['ms']):.3f} of copy)" if "ms" in ours[name] else ""
        print(f"{spec} {shape} {row['dtype']} {name}: {ours[name]}{share}", row["peers"], row["peer_error"], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--skip", default="", help="peers to leave out, by a part of their name")
    options = parser.parse_args()
    copy = copy_bandwidth()
    print(f"copy {copy / 1e9:.0f} GB/s", flush=True)
    linear = psmc.load(EXAMPLES / "linear_recurrence.psm")
    logsumexp = psmc.load(EXAMPLES / "logsumexp.psm")
    shape = (8, 8192, 2048)
    rows: list[dict[str, Any]] = []
    command = "python benchmarks/pointwise.py --out benchmarks/results/pointwise.json"
    command += " --peers" if options.peers else ""
    command += f" --skip {options.skip}" if options.skip else ""

    def record(found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        write(options.out, rows, command, copy_gb_s=round(copy / 1e9))

    def ms(nbytes: float) -> float:
        return nbytes / copy * 1e3

    for dtype in (torch.float32, torch.bfloat16):
        element = shape[0] * shape[1] * shape[2] * (4 if dtype == torch.float32 else 2)
        others: dict[str, Passes] = {}
        ours = measure(lambda: (linear, gates(shape, dtype)))  # noqa: B023
        if options.peers:
            for name, make in peers(dtype, shape):
                if not options.skip or options.skip not in name:
                    others[name] = measure(make)
            try:
                others["jax (B,T,C)"] = {"fwd": {"ms": round(jax_ms(shape, dtype), 4)}, "fwd+bwd": {}}
            except Exception as error:
                others["jax (B,T,C)"] = {"fwd": {"error": f"{type(error).__name__}: {error}"[:120]}, "fwd+bwd": {}}
        record(rows_of("linear_recurrence", "B8 T8192 C2048", dtype, (ms(3 * element), ms(8 * element)), ours, others))
        ours = measure(lambda: (logsumexp, (gates(shape, dtype)[1],)))  # noqa: B023
        record(rows_of("logsumexp", "B8 T8192 C2048", dtype, (ms(2 * element), ms(5 * element)), ours, {}))
    for text, long in (("B1 T1048576 C64", (1, 1 << 20, 64)), ("B1 T65536 C2048", (1, 65536, 2048))):
        element = long[0] * long[1] * long[2] * 4
        ours = measure(lambda: (linear, gates(long, torch.float32)))  # noqa: B023
        record(rows_of("linear_recurrence", text, torch.float32, (ms(3 * element), ms(8 * element)), ours, {}))


if __name__ == "__main__":
    main()
