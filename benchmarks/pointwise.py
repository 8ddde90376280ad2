"""Pointwise scans on a GPU: psmc against what else there is, each in its own best layout, in one run.

    python benchmarks/pointwise.py --out benchmarks/results/pointwise.json [--peers] [--quick]
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
from benchmarks.measure import copy_bandwidth, first_call, median_ms, show, with_gradients, write

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

            def op(l: Any, r: Any) -> Any:  # noqa: E741
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

    def op(l: Any, r: Any) -> Any:  # noqa: E741
        return l[0] * r[0], l[1] * r[0] + r[1]

    fn = jax.jit(lambda a, b: jax.lax.associative_scan(op, (a, b), axis=1)[1])
    fn(a, b).block_until_ready()
    start = time.perf_counter()
    for _ in range(rep):
        out = fn(a, b)
    out.block_until_ready()
    return (time.perf_counter() - start) / rep * 1e3


def measure(name: str, make: Callable[[], Case], nbytes: tuple[int, int], copy: float) -> dict[str, Any]:
    """ms and fraction of the copy bandwidth over the least bytes, forward and forward + backward."""
    row: dict[str, Any] = {"who": name}
    try:
        fn, tensors = make()
        row["first_fwd_s"] = round(first_call(lambda: fn(*tensors)), 2)
        ms = median_ms(lambda: fn(*tensors))
        row["fwd_ms"], row["fwd_frac"] = round(ms, 4), round(nbytes[0] / ms * 1e3 / copy, 3)
        both = with_gradients(fn, tensors)
        row["first_both_s"] = round(first_call(both), 2)
        ms = median_ms(both)
        row["both_ms"], row["both_frac"] = round(ms, 4), round(nbytes[1] / ms * 1e3 / copy, 3)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:120]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fp32 only")
    options = parser.parse_args()
    copy = copy_bandwidth()
    print(f"copy {copy / 1e9:.0f} GB/s", flush=True)
    linear = psmc.load(EXAMPLES / "linear_recurrence.psm")
    logsumexp = psmc.load(EXAMPLES / "logsumexp.psm")
    shape = (8, 8192, 2048)
    rows: list[dict[str, Any]] = []

    def record(spec: str, text: str, dtype: torch.dtype, found: dict[str, Any], floor: tuple[float, float]) -> None:
        found = {"spec": spec, "shape": text, "dtype": str(dtype)[6:], **found}
        print("  ".join(f"{k}={v}" for k, v in found.items()), flush=True)
        found["floor_ms"] = [round(f, 4) for f in floor]
        rows.append(found)

    for dtype in (torch.float32,) if options.quick else (torch.float32, torch.bfloat16):
        element = shape[0] * shape[1] * shape[2] * (4 if dtype == torch.float32 else 2)
        nbytes = (3 * element, 8 * element)
        floor = (nbytes[0] / copy * 1e3, nbytes[1] / copy * 1e3)
        text = "B8 T8192 C2048"
        record("linear_recurrence", text, dtype, measure("psmc", lambda: (linear, gates(shape, dtype)), nbytes, copy), floor)  # noqa: B023
        if options.peers:
            for name, make in peers(dtype, shape):
                record("linear_recurrence", text, dtype, measure(name, make, nbytes, copy), floor)
                torch.cuda.empty_cache()
            try:
                ms = jax_ms(shape, dtype)
                found = {"who": "jax associative_scan (B,T,C)", "fwd_ms": round(ms, 4), "fwd_frac": round(nbytes[0] / ms * 1e3 / copy, 3)}
            except Exception as error:
                found = {"who": "jax associative_scan (B,T,C)", "error": f"{type(error).__name__}: {error}"[:120]}
            record("linear_recurrence", text, dtype, found, floor)
        one = 2 * element  # log-sum-exp: one stream in, one out
        found = measure("psmc", lambda: (logsumexp, (gates(shape, dtype)[1],)), (one, 4 * element), copy)  # noqa: B023
        record("logsumexp", text, dtype, found, (one / copy * 1e3, 2 * one / copy * 1e3))
    for text, long in (("B1 T1048576 C64", (1, 1 << 20, 64)), ("B1 T65536 C2048", (1, 65536, 2048))):
        element = long[0] * long[1] * long[2] * 4
        nbytes = (3 * element, 8 * element)
        found = measure("psmc", lambda: (linear, gates(long, torch.float32)), nbytes, copy)  # noqa: B023
        record("linear_recurrence", text, torch.float32, found, (nbytes[0] / copy * 1e3, nbytes[1] / copy * 1e3))
    command = "python benchmarks/pointwise.py --out benchmarks/results/pointwise.json" + (" --peers" if options.peers else "")
    write(options.out, rows, command, copy_gb_s=round(copy / 1e9))


if __name__ == "__main__":
    main()
