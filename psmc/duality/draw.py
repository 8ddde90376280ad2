"""Test inputs of a spec, drawn from its intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from psmc.ir import Aggregator, Block, Ref
from psmc.ir import Tensor as Declared
from psmc.ir.rewrite import walk

Data = Literal["mild", "hard"]
Tensors = dict[str, Tensor]
_SIZES = (4, 3, 5, 2)  # of the open dims, in order: unequal, so that no transposition passes
_MARGIN = 0.01  # kept from open ends, which rounding must not reach
_SMALL, _LARGE = 1e-3, 50.0


class Draw:
    """Random tensors of one spec: fp64, complex128 and int64, on the CPU."""

    def __init__(
        self, agg: Aggregator, sizes: Mapping[str, int], lanes: tuple[int, ...], seed: int, data: Data
    ) -> None:
        self.agg, self.lanes, self.data = agg, lanes, data
        open_dims = [d.name for d in agg.dims if d.size is None]
        self.sizes = {d: _SIZES[n % len(_SIZES)] for n, d in enumerate(open_dims)}
        self.sizes |= {d.name: d.size for d in agg.dims if d.size is not None} | dict(sizes)
        self.generator = torch.Generator().manual_seed(seed)
        self.gathers = _gathers(agg)

    def inputs(self, batch: int, length: int) -> Tensors:
        """[B, T, *lanes, *dims] by name."""
        return {t.name: self.tensor(t, (batch, length, *self.lanes), self.data) for t in self.agg.leaf_inputs}

    def params(self) -> Tensors:
        """[*lanes, *dims] by name; always mild."""
        return {t.name: self.tensor(t, self.lanes, "mild") for t in self.agg.params}

    def tensor(self, t: Declared, lead: tuple[int, ...], data: Data) -> Tensor:
        shape = (*lead, *(self.sizes[d] for d in t.dims))
        if t.kind == "int":
            return self._int(t, shape)
        if t.kind == "complex":
            parts = [self._free(t, shape, data) for _ in "ri"]
            return torch.complex(parts[0], parts[1]) * math.sqrt(0.5)
        lo = None if t.interval is None or t.interval.lo is None else float(t.interval.lo)
        hi = None if t.interval is None or t.interval.hi is None else float(t.interval.hi)
        if t.interval is None or (lo is None and hi is None):
            return self._free(t, shape, data)
        if lo is not None and hi is not None:
            x = lo + (hi - lo) * torch.sigmoid(self._normal(shape) * (1.5 if data == "mild" else 4.0))
            width = hi - lo
        else:
            width = abs(lo if lo is not None else hi or 0.0)
            far = self._normal(shape).abs() if data == "mild" else self._spread(shape)
            x = lo + far if lo is not None else (hi or 0.0) - far
        return self._inside(x, t, lo, hi, width)

    def _inside(self, x: Tensor, t: Declared, lo: float | None, hi: float | None, width: float) -> Tensor:
        """Away from open ends; now and then on closed ones."""
        assert t.interval is not None
        chance = torch.rand(x.shape, generator=self.generator)
        margin = max(_MARGIN * width, _SMALL)
        for end, is_open, side in ((lo, t.interval.lo_open, 1), (hi, t.interval.hi_open, -1)):
            if end is None:
                continue
            limit = end + side * margin * is_open
            x = x.clamp(min=limit) if side > 0 else x.clamp(max=limit)
            if not is_open and self.data == "hard":
                x = torch.where(chance < 0.1 if side > 0 else chance > 0.9, end, x)
        return x

    def _free(self, t: Declared, shape: tuple[int, ...], data: Data) -> Tensor:
        """Unbounded: normal, vectors of norm about 1; hard ones are near one another, scalars range over decades."""
        x = self._normal(shape)
        if not t.dims:
            return x if data == "mild" else torch.sign(x) * self._spread(shape) * 0.5
        if data == "hard" and len(shape) > len(t.dims) + 1:  # keys that repeat: cosine about 0.9
            base = self._normal((shape[0], 1, *shape[2:]))
            x = base * (math.sqrt(shape[-1]) / base.norm(dim=-1, keepdim=True)) + 0.3 * x
        return x / math.sqrt(shape[-1])

    def _spread(self, shape: tuple[int, ...]) -> Tensor:
        """Magnitudes from 1e-3 to 50 in one tensor."""
        u = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return torch.exp(math.log(_SMALL) + u * (math.log(_LARGE) - math.log(_SMALL)))

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _int(self, t: Declared, shape: tuple[int, ...]) -> Tensor:
        interval = t.interval
        lo = 0 if self.gathers else -3
        hi = min(self.sizes.values(), default=4) - 1 if self.gathers else 3
        if interval is not None and interval.lo is not None:
            lo = math.floor(interval.lo) + 1 if interval.lo_open else math.ceil(interval.lo)
            hi = max(hi, lo + 6)
        if interval is not None and interval.hi is not None:
            hi = math.ceil(interval.hi) - 1 if interval.hi_open else math.floor(interval.hi)
            lo = min(lo, hi) if interval.lo is not None else hi - 6
        if self.gathers:
            hi = max(lo, min(hi, min(self.sizes.values(), default=hi + 1) - 1))
        return torch.randint(lo, hi + 1, shape, generator=self.generator)


def _gathers(agg: Aggregator) -> bool:
    """Is an int tensor a position somewhere?"""
    blocks = [b for b in (agg.leaf, agg.combine, agg.recurrence, agg.output) if isinstance(b, Block)]
    values = [a.value for b in blocks for a in (*b.lets, *b.results)]
    return any(isinstance(s, Ref) for n in walk(*values) if isinstance(n, Ref) for s in n.subs)


def complex_of(real: torch.dtype) -> torch.dtype:
    """complex128 for fp64, else complex64."""
    return torch.complex128 if real == torch.float64 else torch.complex64
