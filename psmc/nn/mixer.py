"""A compiled aggregator as a token mixer: projections for all that its spec reads, an output gate, a way back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psmc.diagnostics import fail
from psmc.nn.ranges import Range
from psmc.nn.state import State, scoped, within

Init = Mapping[str, Tensor | float]


class ScanMixer(nn.Module):
    """[B, T, dim] -> [B, T, dim] through the scan of a spec; every input of it is projected from x.

        ScanMixer("examples/gla.psm", 512, heads=4)
        ScanMixer("examples/mamba2.psm", 512, heads=16, sizes={"N": 128, "P": 64}, shared=("B", "C"), conv=4)
        ScanMixer("examples/mingru.psm", 512, heads=1024)

    scan        a .psm file, or an aggregator that `psmc.load` or `psmc.aggregator` made
    heads       lanes of the scan; None for a spec whose dims hold the channels
    sizes       of dims that the spec does not fix; by default dim / heads (dim, where there are no heads)
    shared      inputs that all heads share: one lane, repeated
    conv        width of a causal depthwise convolution with SiLU on the unbounded inputs, 0 for none
    normalised  inputs brought to length 1 over their dims, as the keys of delta rules are
    gate        outputs are multiplied with silu of a projection of x
    init        first values of params, in place of `ranges`' rule

    Inputs land in the interval that the spec declares (`ranges`). Params are trained, and stay in theirs. Raises
    PsmcError PSM654.
    """

    def __init__(
        self, scan: str | Path | Any, dim: int, heads: int | None = None, *, sizes: Mapping[str, int] | None = None,
        shared: Sequence[str] = (), conv: int = 0, normalised: Sequence[str] = (), gate: bool = True,
        init: Init | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scan, declared = _resolved(scan)
        self.dim, self.lanes, self.conv = dim, () if heads is None else (heads,), conv
        self.normalised = tuple(normalised)
        if dim < 1 or conv < 0 or (heads is not None and heads < 1):
            fail("PSM654", f"dim {dim}, heads {heads}, conv {conv}: widths are from 1 on.")
        spec = declared
        self.sizes = _sizes(spec, dim, heads, sizes or {})
        known = {t.name for t in (*spec.inputs, *spec.params)}
        for name in (*shared, *self.normalised, *(init or {})):
            if name not in known:
                helps = (f"It has {', '.join(sorted(known))}.",)
                fail("PSM654", f"'{spec.name}' has no input or param '{name}'.", helps=helps)
        if not spec.inputs:
            fail("PSM654", f"'{spec.name}' has no inputs that could be projected from tokens.")
        whole = [t.name for t in (*spec.inputs, *spec.params) if t.kind not in ("real", "complex")]
        if whole:
            fail(
                "PSM654", f"'{spec.name}' reads whole numbers ('{whole[0]}'), which no projection gives.",
                helps=("Call the compiled aggregator itself.",),
            )  # fmt: skip
        one = (1,) * len(self.lanes)
        self.slots = [_Slot(t, self.sizes, one if t.name in shared else self.lanes) for t in spec.inputs]
        generator = torch.Generator().manual_seed(0)
        # Projections that a convolution takes stand first.
        self.slots.sort(key=lambda s: not s.free)
        self.mixed = sum(s.width for s in self.slots if s.free) if conv else 0
        total = sum(s.width for s in self.slots)
        self.outputs = sum(
            math.prod((*self.lanes, *(self.sizes[d] for d in o.dims))) * (2 if o.kind == "complex" else 1)
            for o in self.scan.spec.outputs
        )
        self.into = nn.Linear(dim, total, bias=False)
        with torch.device("cpu"):  # what is unbounded needs none
            rows = [s.range.input_bias(s.width, generator) for s in self.slots if not s.free]
            bias = torch.cat(rows) if rows else torch.empty(0)
        self.bias = nn.Parameter(bias.to(self.into.weight.device))
        self.gate = nn.Linear(dim, self.outputs, bias=False) if gate else None
        self.norm = nn.LayerNorm(self.outputs)
        self.out = nn.Linear(self.outputs, dim, bias=False)
        if conv:
            bound = (1 / conv) ** 0.5
            self.kernel = nn.Parameter(torch.empty(self.mixed, 1, conv).uniform_(-bound, bound))
        self.params = nn.ParameterDict()
        self.ranges: dict[str, Range] = {}
        for tensor in spec.params:
            dims = [self.sizes[d] for d in tensor.dims]
            shape = (*self.lanes, *dims) if heads is not None else tuple(dims)
            self.ranges[tensor.name] = _range(tensor)
            with torch.device("cpu"):
                start = _start(tensor, shape, self.ranges[tensor.name], (init or {}).get(tensor.name), generator)
            self.params[tensor.name] = nn.Parameter(start.to(self.into.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, False)[0]

    def prefill(self, x: Tensor) -> tuple[Tensor, State]:
        """All tokens at once, and the state after them."""
        y, state = self._run(x, True)
        assert state is not None
        return y, state

    def init_state(self, batch: int) -> State:
        w = self.into.weight
        state: State = self.scan.init_state(batch, self.lanes, w.device, sizes=self._free_sizes(), dtype=_wide(w.dtype))
        found = within(state, "scan")
        if self.conv > 1:
            found["tail"] = w.new_zeros(batch, self.conv - 1, self.mixed)
        return found

    def step(self, x: Tensor, state: State, in_place: bool = False) -> tuple[Tensor, State]:
        """One token [B, dim]."""
        z, after = self.into(x), State()
        if self.conv:
            window = z[:, None, : self.mixed]
            if self.conv > 1:
                window = torch.cat([state["tail"].to(z.dtype), window], 1)
                after["tail"] = window[:, 1:]
            mixed = F.silu(torch.einsum("btc,ct->bc", window, self.kernel.squeeze(1)))
            z = torch.cat([mixed, z[:, self.mixed :]], -1)
        inputs, params = self._inputs(z), self._params()
        held = scoped(state, "scan")
        if in_place and not torch.is_grad_enabled():
            y = self.scan.step_(held, **inputs, **params)
        else:
            y, held = self.scan.step(held, **inputs, **params)
        return self._leave(x, y), after | within(held, "scan")

    def _run(self, x: Tensor, keep: bool) -> tuple[Tensor, State | None]:
        z, tail = self.into(x), None
        if self.conv:
            raw = z[..., : self.mixed]
            padded = F.pad(raw, (0, 0, self.conv - 1, 0))
            tail = padded[:, padded.shape[1] - self.conv + 1 :].clone() if keep else None
            mixed = F.conv1d(padded.transpose(1, 2), self.kernel, groups=self.mixed).transpose(1, 2)
            z = torch.cat([F.silu(mixed), z[..., self.mixed :]], -1)
        inputs, params = self._inputs(z), self._params()
        if not keep:
            return self._leave(x, self.scan(**inputs, **params)), None
        y, state = self.scan(**inputs, **params, return_state=True)
        after = within(state, "scan")
        if self.conv > 1 and tail is not None:
            after["tail"] = tail
        return self._leave(x, y), after

    def _inputs(self, z: Tensor) -> dict[str, Tensor]:
        """What the spec reads, all of one dtype; what is bounded is computed in the parameters'."""
        found, bias = {}, iter(self.bias.split([s.width for s in self.slots if not s.free]))
        for slot, part in zip(self.slots, z.split([s.width for s in self.slots], -1), strict=True):
            value = part if slot.free else slot.range.place(part + next(bias)).to(z.dtype)
            if slot.complex:
                value = torch.complex(*value.to(_wide(value.dtype)).chunk(2, -1))
            value = value.unflatten(-1, (*slot.lanes, *slot.dims) or (1,))
            if not (slot.lanes or slot.dims):
                value = value.squeeze(-1)
            if slot.name in self.normalised:
                value = F.normalize(value, dim=-1)
            found[slot.name] = value
        return found

    def _params(self) -> dict[str, Tensor]:
        return {name: self.ranges[name].place(p) for name, p in self.params.items()}

    def _leave(self, x: Tensor, y: Any) -> Tensor:
        parts = []
        for value, slot in zip(y if isinstance(y, tuple) else (y,), self.scan.spec.outputs, strict=True):
            value = torch.view_as_real(value).flatten(-2) if value.is_complex() else value
            rank = len(self.lanes) + len(slot.dims)
            parts.append(value.flatten(x.dim() - 1) if rank or value.dim() > x.dim() - 1 else value.unsqueeze(-1))
        whole = self.norm((parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(x.dtype))
        if self.gate is not None:
            whole = whole * F.silu(self.gate(x))
        return self.out(whole)  # type: ignore[no-any-return]

    def _free_sizes(self) -> dict[str, int]:
        return {d: n for d, n in self.sizes.items() if d in self.scan.spec.dims}


class _Slot:
    """An input: how many numbers a token it takes, of which shape, in which interval."""

    def __init__(self, tensor: Any, sizes: Mapping[str, int], lanes: tuple[int, ...]) -> None:
        self.name, self.lanes = tensor.name, lanes
        self.dims = tuple(sizes[d] for d in tensor.dims)
        self.complex = tensor.kind == "complex"
        self.range = _range(tensor)

    @property
    def free(self) -> bool:
        return self.range == Range()

    @property
    def width(self) -> int:
        return math.prod((*self.lanes, *self.dims)) * (2 if self.complex else 1)


def _resolved(scan: Any) -> tuple[Any, Any]:
    """(the compiled aggregator, the spec as declared)."""
    if isinstance(scan, (str, Path)):
        from psmc.api import load

        scan = load(scan)
    declared = getattr(scan, "declared", None)
    if declared is None:
        fail(
            "PSM654", f"a scan is a .psm file or a compiled aggregator, not {type(scan).__name__}.",
            helps=("ScanMixer('gla.psm', dim, heads=4), or ScanMixer(psmc.load('gla.psm'), dim, heads=4).",),
        )  # fmt: skip
    if hasattr(scan.rules, "extern"):
        fail("PSM654", f"'{declared.name}' takes its rule from Python.", helps=("Use psmc.nn.PrefixScannable.",))
    return scan, declared


def _sizes(spec: Any, dim: int, heads: int | None, given: Mapping[str, int]) -> dict[str, int]:
    names = {d.name: d.size for d in spec.dims}
    for name in given:
        if name not in names:
            fail("PSM654", f"'{spec.name}' has no dim '{name}'.", helps=(f"It has {', '.join(names) or 'none'}.",))
    out: dict[str, int] = {}
    for name, fixed in names.items():
        size = given.get(name, fixed)
        if size is None and heads is not None and dim % heads:
            fail(
                "PSM654", f"the size of '{name}' is dim / heads by default, but {dim} / {heads} is no whole number.",
                helps=(f"Say it: sizes={{'{name}': 64}}.",),
            )  # fmt: skip
        out[name] = size if size is not None else dim if heads is None else dim // heads
        if fixed is not None and out[name] != fixed:
            fail("PSM654", f"'{spec.name}' fixes '{name}' to {fixed}, so it cannot be {out[name]}.")
    return out


def _range(tensor: Any) -> Range:
    if tensor.interval is None:
        return Range()
    low, high = tensor.interval.lo, tensor.interval.hi
    return Range(None if low is None else float(low), None if high is None else float(high))


def _start(tensor: Any, shape: tuple[int, ...], range_: Range, given: Any, generator: torch.Generator) -> Tensor:
    """A param before `place`."""
    if tensor.kind == "complex":
        fail("PSM654", f"the param '{tensor.name}' is complex; ScanMixer trains real ones.")
    if given is None:
        return range_.param(math.prod(shape), generator).reshape(shape)
    wanted = torch.as_tensor(given, dtype=torch.float64).expand(shape)
    return _unplaced(range_, wanted, tensor.name).to(torch.get_default_dtype())


def _unplaced(range_: Range, value: Tensor, name: str) -> Tensor:
    """The inverse of `place`."""
    low, high = range_
    if low is None and high is None:
        return value
    if (low is not None and (value <= low).any()) or (high is not None and (value >= high).any()):
        fail("PSM654", f"init of '{name}' lies outside of the interval that the spec declares.")
    if low is not None and high is not None:
        share = (value - low) / (high - low)
        return torch.log(share / (1 - share))
    distance = value - low if low is not None else (high or 0.0) - value
    return distance + torch.log(-torch.expm1(-distance))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
