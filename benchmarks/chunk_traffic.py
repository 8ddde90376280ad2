"""Launches and bytes of one call of each chunked spec, counted on tensors without data: no GPU needed.

    python benchmarks/chunk_traffic.py [gla mamba2 ...]

Every operator of torch and every kernel counts the tensors that it takes and gives once each: what caches save or lose
is not in it. Floor: inputs and output once; backward: those, the output's cotangent and every gradient.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import psmc  # noqa: E402
from benchmarks.measure import show  # noqa: E402

SPECS = ("linear_attention", "retnet", "mamba2", "gla", "hgrn2", "gated_rfa", "rwkv6", "mlstm", "value_gate",
         "grid_gate", "two_writes")
SHAPE = (8, 4096, 16, 128, 128)
_FREE = ("empty", "new_empty", "detach", "_unsafe_view", "alias", "device", "promote_types")
BANDWIDTH = 4.27e12  # bytes/s of a device copy on an H200


def size_of(*values: Any) -> int:
    """Bytes of the tensors among them; what is broadcast counts as it lies."""
    total = 0
    for x in values:
        if isinstance(x, Tensor):
            seen = [n for n, s in zip(x.shape, x.stride(), strict=True) if s]
            total += x.element_size() * prod(seen)
        elif isinstance(x, (list, tuple)):
            total += size_of(*x)
    return total


class Counted(TorchDispatchMode):
    """What runs: (launches, bytes) by name. Views and allocations are free."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, name: str, size: int) -> None:
        self.launches[name] += 1
        self.bytes[name] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        alias = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not alias and not name.startswith(_FREE):
            self.add(name, size_of(found, *([] if name.startswith(("zeros", "full", "zero_")) else args)))
        return found


class Launch:
    """A kernel that only counts."""

    def __init__(self, name: str, counted: Counted) -> None:
        self.name, self.counted = name, counted

    def __getitem__(self, grid: Any) -> Launch:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        distinct = {id(x): x for x in args if isinstance(x, Tensor)}
        self.counted.add(f"<{self.name}>", size_of(*distinct.values()))


def call(name: str, shape: tuple[int, ...], backward: bool) -> tuple[Counted, int]:
    """What one call counts, and its floor in bytes."""
    b, t, h, *widths = shape
    agg = psmc.load(str(ROOT / "examples" / f"{name}.psm"))
    sizes = dict(zip(agg.spec.dims, widths, strict=False))
    x: dict[str, Tensor] = {}
    fake = FakeTensorMode()
    with fake:
        for slot in agg.spec.inputs:
            own = (b, t, h, *(sizes[d] for d in slot.dims))
            x[slot.name] = torch.empty(own, dtype=torch.bfloat16, requires_grad=backward)
        for slot in agg.spec.params:
            x[slot.name] = torch.empty(h, *(sizes[d] for d in slot.dims), requires_grad=backward)
    counted = Counted()
    made = agg.rules.matrices
    kernels = {k for k, v in vars(made.table).items() if callable(v) or hasattr(v, "fn")}
    before, flag = made.table, made.interpreted
    made.table = SimpleNamespace(**{k: Launch(k, counted) if k in kernels else v for k, v in vars(before).items()})
    made.interpreted, made.processors = True, 132
    try:
        with torch.set_grad_enabled(backward), fake, counted:
            y = agg(**x)
            if backward:
                torch.autograd.grad(y, list(x.values()), torch.empty_like(y))
    finally:
        made.table, made.interpreted = before, flag
    own = size_of(*x.values())
    return counted, 3 * own + 2 * size_of(y) if backward else own + size_of(y)


def rows(names: tuple[str, ...], shape: tuple[int, ...] = SHAPE) -> Iterator[dict[str, Any]]:
    for name in names:
        for kind in ("fwd", "fwd+bwd"):
            found, floor = call(name, shape, kind != "fwd")
            total = sum(found.bytes.values())
            kernels = {k: v for k, v in found.launches.items() if k.startswith("<")}
            torch_bytes = sum(v for k, v in found.bytes.items() if not k.startswith("<"))
            yield {"spec": name, "pass": kind, "launches": sum(found.launches.values()),
                   "kernels": sum(kernels.values()), "GB": round(total / 1e9, 2),
                   "torch_GB": round(torch_bytes / 1e9, 2), "floor_GB": round(floor / 1e9, 2),
                   "ms_at_copy_speed": round(total / BANDWIDTH * 1e3, 3),
                   "floor_ms": round(floor / BANDWIDTH * 1e3, 3)}  # fmt: skip


def main() -> None:
    for row in rows(tuple(sys.argv[1:]) or SPECS):
        show([row])


if __name__ == "__main__":
    main()
