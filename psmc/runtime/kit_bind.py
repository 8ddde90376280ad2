"""The border of a compiled aggregator: what was passed, checked against the spec, with the spec's own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class ArgumentError(ValueError):
    """A call that does not fit the spec; the message says what was expected and what came."""


@dataclass(frozen=True)
class Slot:
    """A declared tensor: inputs are [B, T, *lanes, *dims], params [*lanes, *dims] or [*dims], states [B, *lanes, *dims]."""

    name: str
    dims: tuple[str, ...] = ()
    kind: str = "real"


@dataclass(frozen=True)
class Spec:
    """A spec's border, as data. `taps`: how many tokens back an input is read; `previous`: the readout reads prev."""

    name: str
    digest: str
    inputs: tuple[Slot, ...]
    params: tuple[Slot, ...]
    components: tuple[Slot, ...]
    live: tuple[str, ...]
    outputs: tuple[Slot, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    dims: tuple[str, ...] = ()
    taps: Mapping[str, int] = field(default_factory=dict)
    previous: bool = False


@dataclass
class Call:
    """One checked call: tensors by name, dim sizes, the lanes, the dtype of outputs and that of the state."""

    inputs: dict[str, Tensor]
    params: dict[str, Tensor]
    sizes: dict[str, int]
    leading: tuple[int, ...]
    lanes: tuple[int, ...]
    dtype: torch.dtype
    compute: torch.dtype
    device: torch.device

    @property
    def n(self) -> SimpleNamespace:
        return SimpleNamespace(**self.sizes)

    def of_kind(self, kind: str, dtype: torch.dtype | None = None) -> torch.dtype:
        """The torch dtype of an element kind; real ones are `dtype`, by default the state's."""
        real = dtype or self.compute
        return {"real": real, "complex": complex_of(real), "int": torch.int64, "bool": torch.bool}[kind]


_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}
_REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32}
_ACCEPTED = {
    "real": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "complex": (torch.complex64, torch.complex128, torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "int": (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}


def complex_of(real: torch.dtype) -> torch.dtype:
    return _COMPLEX.get(real, torch.complex64)


def bind_call(spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any], tokens: bool) -> Call:
    """Checks names, ranks, sizes, dtypes and devices. `tokens`: inputs have a T axis. Raises ArgumentError."""
    slots = (*spec.inputs, *spec.params)
    given = _by_name(spec, slots, args, kwargs)
    lead = 2 if tokens else 1
    lanes_rank = _lane_axes(spec, given, lead)
    sizes = dict(spec.sizes)
    owner = dict.fromkeys(sizes, "the spec")
    lanes = [1] * lanes_rank
    first = given[spec.inputs[0].name] if spec.inputs else given[slots[0].name]
    leading = tuple(first.shape[:lead]) if spec.inputs else (1,) * lead
    dtype: torch.dtype | None = None
    params = {s.name for s in spec.params}
    for slot in slots:
        x = given[slot.name]
        shape = x.shape
        front = 0 if slot.name in params else lead
        if front and tuple(shape[:front]) != leading:
            _refuse(spec, slot, x, f"its leading sizes differ from those of '{spec.inputs[0].name}', {list(leading)}")
        if x.device != first.device:
            _refuse(spec, slot, x, f"it is on {x.device}, '{spec.inputs[0].name}' on {first.device}")
        if x.dtype not in _ACCEPTED[slot.kind]:
            _refuse(spec, slot, x, f"its dtype {x.dtype} is not one of a {slot.kind} tensor")
        for dim, size in zip(slot.dims, shape[len(shape) - len(slot.dims) :], strict=True):
            if sizes.setdefault(dim, size) != size:
                _refuse(spec, slot, x, f"{dim} is {size} here, but {sizes[dim]} in {owner[dim]}")
            owner.setdefault(dim, f"'{slot.name}'")
        here = shape[front : len(shape) - len(slot.dims)]
        for axis in range(-len(here), 0):
            lanes[axis] = max(lanes[axis], here[axis])
        if slot.kind != "int":
            real = _REAL.get(x.dtype, x.dtype)
            dtype = real if dtype is None or dtype == real else torch.promote_types(dtype, real)
    _check_lanes(spec, slots, given, params, lead, lanes)
    missing = [d for d in spec.dims if d not in sizes]
    if missing:
        raise ArgumentError(f"PSM603: {spec.name}: no argument tells the size of {', '.join(missing)}.")
    dtype = dtype or torch.get_default_dtype()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {s.name: given[s.name] for s in spec.inputs}
    return Call(
        inputs, {s.name: given[s.name] for s in spec.params}, sizes, leading, tuple(lanes), dtype, compute, first.device
    )  # fmt: skip


def _by_name(spec: Spec, slots: tuple[Slot, ...], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    names = [s.name for s in slots]
    if len(args) > len(names):
        raise ArgumentError(
            f"PSM601: {spec.name}({', '.join(names)}) takes {len(names)} tensors, {len(args)} were passed."
        )
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise ArgumentError(f"PSM601: {spec.name} has no argument '{name}'; it takes {', '.join(names)}.")
        if name in given:
            raise ArgumentError(f"PSM601: {spec.name}: '{name}' was passed twice.")
        given[name] = value
    absent = [n for n in names if n not in given]
    if absent:
        raise ArgumentError(f"PSM601: {spec.name}({', '.join(names)}): {', '.join(absent)} missing.")
    for slot in slots:
        if not isinstance(given[slot.name], Tensor):
            kind = type(given[slot.name]).__name__
            raise ArgumentError(f"PSM601: {spec.name}: '{slot.name}' must be a tensor, not {kind}.")
    return given


def _lane_axes(spec: Spec, given: Mapping[str, Tensor], lead: int) -> int:
    """How many lane axes all inputs have."""
    ranks = {s.name: given[s.name].dim() - lead - len(s.dims) for s in spec.inputs}
    for slot in spec.inputs:
        if ranks[slot.name] < 0 or ranks[slot.name] != ranks[spec.inputs[0].name]:
            first = spec.inputs[0]
            other = "" if slot is first else f", while '{first.name}' has {ranks[first.name]} lane axes"
            _refuse(spec, slot, given[slot.name], f"it has {given[slot.name].dim()} axes{other}", lead)
    rank = next(iter(ranks.values()), 0)
    for slot in spec.params:
        if given[slot.name].dim() - len(slot.dims) not in range(0, rank + 1):
            _refuse(spec, slot, given[slot.name], f"it has {given[slot.name].dim()} axes", 0)
    return rank


def _check_lanes(
    spec: Spec, slots: tuple[Slot, ...], given: Mapping[str, Tensor], params: set[str], lead: int, lanes: list[int]
) -> None:
    for slot in slots:
        x = given[slot.name]
        here = x.shape[0 if slot.name in params else lead : x.dim() - len(slot.dims)]
        for axis in range(-len(here), 0):
            size, whole = here[axis], lanes[axis]
            grouped = axis == -1 and size and whole % size == 0
            if size not in (1, whole) and not grouped:
                why = "must divide" if axis == -1 else "must be 1 or"
                _refuse(spec, slot, x, f"its lane axis of {size} {why} {whole}")


def _refuse(spec: Spec, slot: Slot, x: Tensor, why: str, lead: int = 2) -> None:
    front = "B, T, *lanes" if lead == 2 else "B, *lanes" if lead == 1 else "*lanes"
    if slot in spec.params:
        front = "*lanes"
    want = ", ".join((front, *slot.dims))
    raise ArgumentError(
        f"PSM602: {spec.name}: '{slot.name}' must be [{want}], but it is {list(x.shape)}: {why}."
        + (" Did you pass [B, H, T, ...]? psmc wants time before the lanes." if lead == 2 and x.dim() > 3 else "")
    )


def spread(x: Tensor, axis: int, lanes: tuple[int, ...]) -> Tensor:
    """Grouped lanes made whole: on the last lane axis (the one before `axis` from the left) the shorter repeats."""
    if not lanes or axis < 1:
        return x
    at = axis - 1
    size, whole = x.shape[at], lanes[-1]
    if size in (1, whole):
        return x
    return x.unsqueeze(at + 1).expand(*x.shape[: at + 1], whole // size, *x.shape[at + 1 :]).flatten(at, at + 1)


def check_flags(spec: Spec, name: str, flags: Tensor | None, leading: tuple[int, ...]) -> Tensor | None:
    """mask and reset: [B, T], as bool."""
    if flags is None:
        return None
    if tuple(flags.shape) != leading:
        raise ArgumentError(
            f"PSM604: {spec.name}: '{name}' must be [B, T] = {list(leading)}, but it is {list(flags.shape)}."
        )
    return flags if flags.dtype == torch.bool else flags != 0


def check_state(spec: Spec, call: Call, state: Mapping[str, Any] | None, rows: int) -> dict[str, Tensor] | None:
    """An initial state: exactly the live components and tails, [rows, *lanes, *dims], in the state's dtypes."""
    if state is None:
        return None
    slots = {s.name: s for s in spec.components if s.name in spec.live}
    names = [*slots, *(f"{x}_tail" for x in spec.taps)]
    if set(state) != set(names):
        raise ArgumentError(
            f"PSM605: {spec.name}: the state holds {', '.join(names)}, but {', '.join(state)} was passed."
        )
    out = {}
    for name, slot in slots.items():
        x = state[name]
        want = (rows, *call.lanes, *(call.sizes[d] for d in slot.dims))
        if tuple(x.shape) != want:
            shape = ", ".join(("rows", "*lanes", *slot.dims))
            raise ArgumentError(
                f"PSM605: {spec.name}: state '{name}' must be [{shape}] = {list(want)}, but it is {list(x.shape)}."
            )
        if x.device != call.device:
            raise ArgumentError(f"PSM605: {spec.name}: state '{name}' is on {x.device}, the inputs on {call.device}.")
        out[name] = x.to(call.of_kind(slot.kind))
    inputs = {s.name: s for s in spec.inputs}
    for source, longest in spec.taps.items():
        x = state[f"{source}_tail"]
        like = call.inputs[source]
        want = (rows, longest, *like.shape[len(call.leading) :])
        if tuple(x.shape) != want:
            shape = ", ".join(("rows", str(longest), "*lanes", *inputs[source].dims))
            raise ArgumentError(
                f"PSM605: {spec.name}: state '{source}_tail' must be [{shape}] = {list(want)}, but it is {list(x.shape)}."
            )
        out[f"{source}_tail"] = x.to(like.dtype)
    return out


def check_cu_seqlens(spec: Spec, cu_seqlens: Tensor | None, leading: tuple[int, ...]) -> Tensor | None:
    """N + 1 ascending token offsets on the inputs' device; B must be 1. Their values are not read (no host sync)."""
    if cu_seqlens is None:
        return None
    if leading[0] != 1:
        raise ArgumentError(
            f"PSM606: {spec.name}: with 'cu_seqlens' the sequences are packed in a batch of 1, not {leading[0]}."
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(f"PSM606: {spec.name}: 'cu_seqlens' must be N + 1 int32 or int64 offsets.")
    return cu_seqlens
