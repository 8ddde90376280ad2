"""What the processes of a search run. Each sends what it found, or why it failed, and ends."""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psmc.duality.batch import DTYPES, Batch
from psmc.duality.draw import Data, Draw, complex_of
from psmc.duality.report import Path, Setting
from psmc.duality.report import Row as Compared
from psmc.plan.tiles import Row, changed
from psmc.runtime.kit_tuned import tuning_place
from psmc.tuning.module import Loaded, Target
from psmc.tuning.shape import Shape

_DRAWN = 256  # tokens that are drawn; longer sequences repeat them
# How far another tile may be from the first one at the shapes that are timed: relative, in the 2-norm.
_APART = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 5e-3}


class Checked(NamedTuple):
    """The error nearest to its limit, or furthest past it, and of what; the rows that each shape reads."""

    error: float
    where: str
    right: bool
    used: tuple[frozenset[str], ...]


class _Sizes(NamedTuple):
    """Of a check: what is run at small sizes, and how many tokens at the lanes and dims that are asked for."""

    batch: int
    lanes: tuple[int, ...]
    lengths: tuple[int, ...]
    data: tuple[Data, ...]
    paths: tuple[Path, ...]
    tokens: int


_CHECKED = _Sizes(2, (3,), (1, 280), ("mild", "hard"), ("scan", "flags", "packed"), 150)
_QUICK = _Sizes(1, (1,), (17,), ("mild",), ("packed",), 37)


Job = tuple[int, str, tuple[Row, ...]]  # which shape, 'fwd' or 'fwd+bwd', rows instead of the shipped ones


class Timed(NamedTuple):
    """Median ms; how far the results are from what they have to be, and whether another order explains that."""

    ms: float
    error: float
    right: bool


def run(work: Callable[..., Iterator[Any]], send: Connection, *args: Any) -> None:
    """All that `work` yields goes to `send` as ('found', it), then ('done', None) or ('failed', why)."""
    warnings.simplefilter("ignore")
    if not os.environ.get("PSMC_DEBUG"):  # what compilers say there is reported anyway
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    try:
        for found in work(*args):
            send.send(("found", found))
        send.send(("done", None))
    except Exception as error:
        said = " ".join(str(error).split())
        send.send(("failed", f"{type(error).__name__}: {said}"[:160]))
    send.close()


def place(target: Target) -> Iterator[tuple[tuple[str, str], tuple[Row, ...]]]:
    """The device and the version of triton; the rows that the module is shipped with."""
    loaded = Loaded(target)
    yield tuning_place(), loaded.shipped


def check(target: Target, instead: Sequence[Row]) -> Iterator[Checked]:
    """The module with some of its tiles replaced against the fp64 oracle, in buffers full of NaN: outputs, final state
    and gradients, at small odd sizes with masks and packing, then at the lanes and dims of each shape."""
    torch.set_deterministic_debug_mode("warn")  # without which nothing is filled
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    loaded = Loaded(target)
    used: list[frozenset[str]] = []
    worst: Compared | None = None
    for row in _compared(target, loaded, instead, used):
        worst = row if worst is None or _share(row) > _share(worst) else worst
        if not row.passed:
            break
    assert worst is not None
    error, where = _nearest(worst)
    yield Checked(error, where, worst.passed, tuple(used))


def _compared(
    target: Target, loaded: Loaded, instead: Sequence[Row], used: list[frozenset[str]]
) -> Iterator[Compared]:
    sizes = _QUICK if target.quick else _CHECKED
    setting = Setting(target.device, (target.dtype,), batch=sizes.batch, lanes=sizes.lanes)
    wherever = {(row.kernel, row.size): row.numbers for row in instead}  # small keys read other rows
    loaded.install([replace(r, numbers=wherever.get((r.kernel, r.size), r.numbers)) for r in loaded.shipped])
    for length in sizes.lengths:
        for kind in sizes.data:
            yield from Batch(loaded.agg, setting, target.dtype, length, kind).rows(sizes.paths)
    for shape in target.shapes:
        loaded.install(changed(loaded.shipped, instead))
        own = replace(setting, batch=1, lanes=shape.lanes, sizes=dict(shape.sizes))
        length = min(shape.tokens, sizes.tokens)
        yield from Batch(loaded.agg, own, target.dtype, length, "mild").rows(("scan",))
        used.append(frozenset(loaded.used))


def _errors(row: Compared) -> list[tuple[float, float, str]]:
    """(error, its limit, of what)"""
    outputs, state, gradients = row.limits
    named = [(e, gradients, f"d{k}") for k, e in row.gradients.items()]
    return [(row.outputs, outputs, "outputs"), (row.state or 0.0, state, "the final state"), *named]


def _share(row: Compared) -> float:
    if row.causal is False:
        return math.inf
    return max(e / limit if math.isfinite(e) else math.inf for e, limit, _ in _errors(row))


def _nearest(row: Compared) -> tuple[float, str]:
    error, limit, what = max(_errors(row), key=lambda x: x[0] / x[1] if math.isfinite(x[0]) else math.inf)
    if row.causal is False and error <= limit:
        return error, "earlier outputs, which later tokens change"
    return error, what


def clock(target: Target, base: Sequence[Row], jobs: Sequence[Job]) -> Iterator[Timed]:
    """For each job the median time of a call. With the rows `base`, which are right, a call gives what it should."""
    loaded = Loaded(target)
    calls: dict[tuple[int, str], Callable[[], list[Tensor]]] = {}
    wanted: dict[tuple[int, str], list[Tensor]] = {}
    for at, way, instead in jobs:
        key = at, way
        if key not in calls:
            calls[key] = _call(loaded, target, target.shapes[at], way)
            loaded.install(changed(loaded.shipped, base))
            wanted[key] = calls[key]()
        loaded.install(changed(loaded.shipped, instead))
        found = calls[key]()
        error = max((_apart(x, y) for x, y in zip(found, wanted[key], strict=True)), default=0.0)
        right = error <= _APART[target.dtype]
        yield Timed(_median(calls[key], target) if right else math.inf, error, right)


def _apart(x: Tensor, y: Tensor) -> float:
    """Relative, in the 2-norm; what is not finite must be so in both."""
    x, y = (torch.view_as_real(z) if z.is_complex() else z for z in (x, y))
    finite = torch.isfinite(y)
    if not torch.equal(torch.isfinite(x), finite):
        return math.inf
    gap, size = (torch.where(finite, z.float(), 0.0).norm() for z in (x.float() - y.float(), y))
    return float(gap / size.clamp(min=1e-30))


def _call(loaded: Loaded, target: Target, shape: Shape, way: str) -> Callable[[], list[Tensor]]:
    """A call of the aggregator on inputs of this shape: its outputs, or all gradients."""
    agg = loaded.agg
    draw = Draw(agg.declared, dict(shape.sizes), shape.lanes, 0, "mild")
    dtype = DTYPES[target.dtype]

    def made(x: Tensor) -> Tensor:
        return x.to(target.device, dtype if x.is_floating_point() else complex_of(dtype) if x.is_complex() else x.dtype)

    drawn = {k: made(x) for k, x in draw.inputs(1, min(shape.tokens, _DRAWN)).items()}
    times = -(-shape.tokens // _DRAWN)
    inputs = {k: x.repeat(shape.batch, times, *[1] * (x.dim() - 2))[:, : shape.tokens] for k, x in drawn.items()}
    tensors = {**{k: x.contiguous() for k, x in inputs.items()}, **{k: made(x) for k, x in draw.params().items()}}
    if way == "fwd":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return _listed(agg(**tensors))

        return forward
    leaves = [x.requires_grad_() for x in tensors.values() if x.is_floating_point() or x.is_complex()]
    smooth = [y.requires_grad for y in _listed(agg(**tensors))]
    generator = torch.Generator(target.device).manual_seed(0)
    given: list[Tensor] = []

    def both() -> list[Tensor]:
        out = [y for y, s in zip(_listed(agg(**tensors)), smooth, strict=True) if s]
        if not given:
            given.extend(torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device) for y in out)
        grads = torch.autograd.grad(out, leaves, given, allow_unused=True)
        return [*(y.detach() for y in out), *(g for g in grads if g is not None)]

    return both


def _listed(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def _median(call: Callable[[], Any], target: Target) -> float:
    if target.device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=10, rep=40, return_mode="median"))
    began = time.perf_counter()
    times: list[float] = []
    while len(times) < 3 and (not times or time.perf_counter() - began < 0.2):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
