"""Scans h = a h + b by others, each in the layout that it wants: (B, C, T) or (B, T, C)."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import device

Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
Size = tuple[int, int, int]  # B, T, C


def gates(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made = torch.Generator(device=device()).manual_seed(0)
    a = torch.rand(shape, device=device(), generator=made) * 0.2 + 0.8
    b = torch.randn(shape, device=device(), generator=made)
    return a.to(dtype), b.to(dtype)


def channels_first(size: Size) -> Size:
    return size[0], size[2], size[1]


def triton_scalar(size: Size, dtype: torch.dtype) -> Case:
    from accelerated_scan.scalar import scan

    return scan, gates(channels_first(size), dtype)


def warp(size: Size, dtype: torch.dtype) -> Case:
    from accelerated_scan.warp import scan

    return scan, gates(channels_first(size), dtype)


def _torch_scan(dim: int) -> Callable[..., Tensor]:
    from torch._higher_order_ops.associative_scan import associative_scan

    def op(l: Any, r: Any) -> Any:
        return l[0] * r[0], l[1] * r[0] + r[1]

    mode = "pointwise" if device() == "cuda" else "generic"
    scan: Callable[..., Tensor] = torch.compile(
        lambda a, b: associative_scan(op, (a, b), dim=dim, combine_mode=mode)[1]
    )
    return scan


def torch_last(size: Size, dtype: torch.dtype) -> Case:
    return _torch_scan(2), gates(channels_first(size), dtype)


def torch_middle(size: Size, dtype: torch.dtype) -> Case:
    return _torch_scan(1), gates(size, dtype)


def hgrn(size: Size, dtype: torch.dtype) -> Case:
    from fla.ops.hgrn import chunk_hgrn

    a, b = gates(size, dtype)
    return lambda x, g: chunk_hgrn(x, g)[0], (b, a.float().log().to(dtype))


def jax_ms(size: Size, dtype: torch.dtype, back: bool, rep: int = 20) -> float:
    """jax.lax.associative_scan, jitted, (B, T, C); wall clock over `rep` calls."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    kind = jnp.float32 if dtype == torch.float32 else jnp.bfloat16
    a = jax.random.uniform(jax.random.PRNGKey(0), size, kind) * 0.2 + 0.8
    b, w = (jax.random.normal(jax.random.PRNGKey(n), size, kind) for n in (1, 2))

    def op(l: Any, r: Any) -> Any:
        return l[0] * r[0], l[1] * r[0] + r[1]

    def scan(a: Any, b: Any) -> Any:
        return jax.lax.associative_scan(op, (a, b), axis=1)[1]

    def both(a: Any, b: Any) -> Any:
        return jax.vjp(scan, a, b)[1](w)

    fn = jax.jit(both if back else scan)
    jax.block_until_ready(fn(a, b))
    start = time.perf_counter()
    for _ in range(rep):
        out = fn(a, b)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / rep * 1e3


# name -> (its package, what makes the scan and its tensors)
PEERS: dict[str, tuple[str, Callable[[Size, torch.dtype], Case]]] = {
    "accelerated-scan triton (B,C,T)": ("accelerated_scan", triton_scalar),
    "accelerated-scan warp (B,C,T)": ("accelerated_scan", warp),
    "torch associative_scan (B,C,T)": ("torch", torch_last),
    "torch associative_scan (B,T,C)": ("torch", torch_middle),
    "fla chunk_hgrn (B,T,C)": ("fla", hgrn),
}
JAX = "jax (B,T,C)"


def names() -> list[str]:
    """Of those that are installed."""
    found = [name for name, (package, _) in PEERS.items() if importlib.util.find_spec(package)]
    return found + ([JAX] if importlib.util.find_spec("jax") else [])
