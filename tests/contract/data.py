"""Arguments for a spec: deterministic tensors inside the declared intervals, with every option of a call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from psmc.ir import Aggregator, Interval
from psmc.ir import Tensor as Declared
from psmc.ir.query import taps
from psmc.reference import fold

Tensors = dict[str, Tensor]
SIZES = (3, 2, 4)  # of a spec's dims in order: no two alike, so that a transposition shows


@dataclass(frozen=True)
class Case:
    """One way to call a spec. `grouped`: every other tensor has fewer lanes; `strided`: no axis is contiguous."""

    length: int = 65
    batch: int = 2
    lanes: tuple[int, ...] = ()
    grouped: bool = False
    strided: bool = False
    mask: bool = False
    reset: bool = False
    initial: bool = False
    packed: bool = False
    reverse: bool = False
    seed: int = 0

    def __str__(self) -> str:
        flags = ("grouped", "strided", "mask", "reset", "initial", "packed", "reverse")
        lanes = "x".join(map(str, self.lanes)) or "0"
        return "-".join((f"T{self.length}", f"lanes{lanes}", *(f for f in flags if getattr(self, f))))


@dataclass
class Batch:
    """The tensors of a call by name. `offsets` is cu_seqlens as a list, for the oracle."""

    agg: Aggregator
    case: Case
    inputs: Tensors
    params: Tensors
    initial: Tensors | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    offsets: list[int] | None = None

    def map(self, change: Any) -> Batch:
        """The same with `change` applied to every tensor; flags stay flags."""
        over = lambda tensors: {k: change(x) for k, x in tensors.items()}  # noqa: E731
        flags = {k: v.to(change(next(iter(self.inputs.values()))).device) if isinstance(v, Tensor) else v
                 for k, v in self.flags.items()}  # fmt: skip
        initial = None if self.initial is None else over(self.initial)
        return replace(self, inputs=over(self.inputs), params=over(self.params), initial=initial, flags=flags)

    def lower(self, dtype: torch.dtype) -> Batch:
        """In `dtype`; complex tensors and states as that computes."""

        def change(x: Tensor, real: torch.dtype) -> Tensor:
            if x.is_complex():
                return x.to(torch.complex64)
            return x.to(real) if x.is_floating_point() else x

        kept = (
            None
            if self.initial is None
            else {k: change(x, dtype if k.endswith("_tail") else torch.float32) for k, x in self.initial.items()}
        )
        return replace(self.map(lambda x: change(x, dtype)), initial=kept)

    def leaves(self) -> Tensors:
        """Everything that has a gradient, by a name of its own."""
        parts = (("", self.inputs), ("", self.params), ("initial ", self.initial or {}))
        return {f"{front}{k}": x for front, part in parts for k, x in part.items() if _smooth(x)}

    def require_grad(self) -> Batch:
        """Fresh leaves."""
        return self.map(lambda x: x.detach().clone(memory_format=torch.preserve_format).requires_grad_(_smooth(x)))


def _smooth(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def make(
    agg: Aggregator,
    case: Case,
    dtype: torch.dtype = torch.float64,
    *,
    live: tuple[str, ...] = (),
    sizes: Mapping[str, int] | None = None,
    intervals: Mapping[str, Interval] | None = None,
    extern: Any = None,
) -> Batch:
    """fp64 tensors whose values `dtype` holds exactly, so that an oracle in fp64 sees what is tested.

    live        components of an initial state (it is what the oracle has after a few tokens of other data)
    intervals   narrower domains than the spec declares, where it leaves them open
    """
    generator = torch.Generator().manual_seed(case.seed)
    sizes = {d.name: d.size or (sizes or {}).get(d.name, SIZES[i % 3]) for i, d in enumerate(agg.dims)}
    batch = 1 if case.packed else case.batch
    known = dict(intervals or {})

    def draw(tensor: Declared, lead: tuple[int, ...], lanes: tuple[int, ...]) -> Tensor:
        shape = (*lead, *lanes, *(sizes[d] for d in tensor.dims))
        value = sample(shape, tensor.kind, known.get(tensor.name, tensor.interval), generator)
        return quantised(value, dtype)

    def inputs(length: int, rows: int) -> Tensors:
        return {
            t.name: draw(t, (rows, length), fewer(case.lanes, i) if case.grouped else case.lanes)
            for i, t in enumerate(agg.leaf_inputs)
        }

    params = {}
    for i, t in enumerate(agg.params):
        own = fewer(case.lanes, i) if case.grouped else case.lanes
        params[t.name] = draw(t, (), own if (i + case.seed) % 2 == 0 else ())
    flags: dict[str, Any] = {"reverse": True} if case.reverse else {}
    offsets = None
    if case.packed:
        offsets = uneven(case.length)
        flags["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int64 if case.seed % 2 else torch.int32)
    rows = batch if offsets is None else len(offsets) - 1
    initial = None
    if case.initial:
        _, state = fold(agg, inputs(max((3, *taps(agg).values())), rows), params, extern=extern)
        wanted = (*live, *(f"{name}_tail" for name in taps(agg)))
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        initial = {k: quantised(state[k].detach(), dtype if k.endswith("_tail") else kept).contiguous() for k in wanted}
    tensors = inputs(case.length, batch)
    if case.mask:
        mask = torch.rand(batch, case.length, generator=generator) > 0.2
        for b in range(batch):
            mask[b, : b + 1] = False  # left padding
        if case.length > 3:
            mask[:, case.length // 2 : case.length // 2 + 2] = False
        flags["mask"] = mask
        for k, x in tensors.items():
            tensors[k] = poisoned(x, mask)
    if case.reset:
        flags["reset"] = torch.rand(batch, case.length, generator=generator) < max(0.05, 2 / max(case.length, 1))
    if case.strided:
        tensors = {k: scattered(x) for k, x in tensors.items()}
        params = {k: scattered(x) for k, x in params.items()}
        initial = None if initial is None else {k: scattered(x) for k, x in initial.items()}
    return Batch(agg, case, tensors, params, initial, flags, offsets)


def sample(shape: tuple[int, ...], kind: str, interval: Interval | None, generator: torch.Generator) -> Tensor:
    """Values inside an interval, away from its ends half of the time; moderate ones where it is open."""
    lo = None if interval is None or interval.lo is None else float(interval.lo)
    hi = None if interval is None or interval.hi is None else float(interval.hi)
    if kind == "int":
        low, high = int(lo if lo is not None else 0), int(hi if hi is not None else 5)
        return torch.randint(low, high + 1, shape, generator=generator)
    if kind == "complex":
        parts = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 0.5
        return torch.complex(parts[0], parts[1])
    unit = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.96 + 0.02
    if lo is None and hi is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5
    if lo is not None and hi is not None:
        return lo + (hi - lo) * unit
    spread = -torch.log(unit) * 0.5 + 0.02
    return hi - spread if lo is None and hi is not None else (lo or 0.0) + spread


def fewer(lanes: tuple[int, ...], which: int) -> tuple[int, ...]:
    """Grouped lanes: all of them for every other tensor, else half of the last axis and one of the first."""
    if not lanes or which % 2 == 0:
        return lanes
    last = lanes[-1] // 2 if lanes[-1] % 2 == 0 else 1
    return (*(1 for _ in lanes[:-1]), last)


def uneven(length: int) -> list[int]:
    """Offsets of packed sequences: one token, none at all at the start, the middle and the end, and long ones."""
    return sorted((0, 0, min(1, length), length // 3, length // 3, length - length // 8, length, length))


def poisoned(x: Tensor, mask: Tensor) -> Tensor:
    """NaN at masked tokens (a large number for integers)."""
    flag = mask.reshape(mask.shape + (1,) * (x.dim() - 2))
    return torch.where(flag, x, math.nan if _smooth(x) else 0)


def scattered(x: Tensor) -> Tensor:
    """The same values with no axis contiguous."""
    room = torch.zeros([2 * n for n in reversed(x.shape)], dtype=x.dtype)
    view = room[tuple(slice(0, None, 2) for _ in x.shape)].permute(*range(x.dim() - 1, -1, -1)) if x.dim() else room
    return view.copy_(x)


def quantised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to what `dtype` holds, in fp64."""
    if x.is_complex():
        return torch.complex(quantised(x.real, dtype), quantised(x.imag, dtype)) if dtype != torch.float64 else x
    return x.to(dtype).to(torch.float64) if x.is_floating_point() else x
