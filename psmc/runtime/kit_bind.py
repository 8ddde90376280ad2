"""The border of a compiled aggregator: what was passed, checked against the spec, with the spec's own names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor


class ArgumentError(ValueError):
    """A call that does not fit the spec; the message says what was expected and what came."""


class Fields:
    """Values by name as attributes, as the functions of a spec read them; torch.compile traces it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@dataclass(frozen=True)
class Slot:
    """A declared tensor: an input is [B, T, *lanes, *dims], a param [*lanes, *dims] or [*dims], a state [B, *lanes,
    *dims]. `within`: (low, high, brackets), its interval; None: no bound."""

    name: str
    dims: tuple[str, ...] = ()
    kind: str = "real"
    within: tuple[float | None, float | None, str] | None = None


@dataclass(frozen=True)
class Spec:
    """A spec's border, as data. `taps`: how many tokens back an input is read; `previous`: the readout reads prev;
    `levels`: those of a tree's counter that the readout reads."""

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
    levels: int = 0


@dataclass
class Call:
    """One checked call: tensors by name, dim sizes, [B, T] or [B], the lanes; `dtype` is the outputs', what the inputs
    promote to, `compute` that of the state and of all arithmetic."""

    inputs: dict[str, Tensor]
    params: dict[str, Tensor]
    sizes: dict[str, int]
    leading: tuple[int, ...]
    lanes: tuple[int, ...]
    dtype: torch.dtype
    compute: torch.dtype
    device: torch.device

    @property
    def n(self) -> Fields:
        """The sizes of the dims; and, under a name that no dim can have, how precise the inputs are."""
        return Fields({**self.sizes, "__dtype__": self.dtype})

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


_SEEN: dict[Any, Call] = {}  # calls that passed the checks, by digest, tokens, then shape, dtype, device of each
_MOST = 1024
_NONE = torch.empty(0)
_PLAIN = (Tensor, torch.nn.Parameter)  # what traces has shapes that are no keys


def bind_call(spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any], tokens: bool) -> Call:
    """Checks names, ranks, sizes, dtypes and devices. `tokens`: inputs have a T axis. Raises ArgumentError."""
    if kwargs:
        rest = [s.name for s in (*spec.inputs, *spec.params)][len(args) :]
        if kwargs.keys() == set(rest):
            args, kwargs = (*args, *(kwargs[name] for name in rest)), {}
    if kwargs or torch.compiler.is_compiling() or not all(type(x) in _PLAIN for x in args):
        return _bind(spec, args, kwargs, tokens)
    key = (spec.digest, tokens, *((x.shape, x.dtype, x.device, x.layout) for x in args))
    like = _SEEN.get(key)
    if like is None:
        if len(_SEEN) >= _MOST:
            _SEEN.clear()
        like = _bind(spec, args, kwargs, tokens)
        _SEEN[key] = replace(like, inputs=dict.fromkeys(like.inputs, _NONE), params=dict.fromkeys(like.params, _NONE))
    count = len(spec.inputs)
    inputs = dict(zip(like.inputs, args, strict=False))
    params = dict(zip(like.params, args[count:], strict=False))
    return Call(inputs, params, like.sizes, like.leading, like.lanes, like.dtype, like.compute, like.device)


def _bind(spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any], tokens: bool) -> Call:
    given = _by_name(spec, args, kwargs)
    inputs, params = ({s.name: given[s.name] for s in part} for part in (spec.inputs, spec.params))
    lead = 2 if tokens else 1
    first = spec.inputs[0]
    rank = _lane_axes(spec, given, lead)
    leading, device = tuple(given[first.name].shape[:lead]), given[first.name].device
    sizes = dict(spec.sizes)
    owner = dict.fromkeys(sizes, "the spec")
    lanes = [1] * rank
    for slot in (*spec.inputs, *spec.params):
        x = given[slot.name]
        front = lead if slot.name in inputs else 0
        shape = x.shape
        end = len(shape) - len(slot.dims)
        if front and tuple(shape[:front]) != leading:
            hint = tokens and end > 2 and shape[0] == leading[0] and _heads_first(shape, given[first.name].shape)
            _refuse(spec, slot, x, lead, f"its leading sizes are not those of '{first.name}', {list(leading)}", hint)
        if x.device != device:
            raise ArgumentError(f"PSM602: {spec.name}: '{slot.name}' is on {x.device}, '{first.name}' on {device}.")
        if x.dtype not in _ACCEPTED[slot.kind]:
            names = ", ".join(str(t).removeprefix("torch.") for t in _ACCEPTED[slot.kind])
            raise ArgumentError(
                f"PSM602: {spec.name}: '{slot.name}' is {x.dtype}, but it is a tensor of {slot.kind} numbers: {names}."
            )
        for dim, size in zip(slot.dims, shape[end:], strict=True):
            if sizes.setdefault(dim, size) != size:
                _refuse(spec, slot, x, lead, f"{dim} is {size} here, but {sizes[dim]} in {owner[dim]}")
            if not size:
                _refuse(spec, slot, x, lead, f"{dim} is 0, but a dim has at least one position")
            owner.setdefault(dim, f"'{slot.name}'")
        for axis, size in enumerate(shape[front:end]):
            lanes[axis] = size if lanes[axis] == 1 else max(lanes[axis], size) if size else 0
    _check_lanes(spec, given, lead, lanes)
    missing = [d for d in spec.dims if d not in sizes]
    if missing:
        raise ArgumentError(f"PSM603: {spec.name}: no argument tells the size of {', '.join(missing)}.")
    dtype = _promoted(inputs.values()) or _promoted(params.values()) or torch.get_default_dtype()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return Call(inputs, params, sizes, leading, tuple(lanes), dtype, compute, device)


def _promoted(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The real dtype that holds all but the ints."""
    dtype: torch.dtype | None = None
    for x in tensors:
        if x.is_floating_point() or x.is_complex():
            real = _REAL.get(x.dtype, x.dtype)
            dtype = real if dtype is None or dtype == real else torch.promote_types(dtype, real)
    return dtype


def _by_name(spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    names = [s.name for s in (*spec.inputs, *spec.params)]
    usage = f"{spec.name}({', '.join(names)})"
    if len(args) > len(names):
        raise ArgumentError(f"PSM601: {usage} takes {len(names)} tensors, but {len(args)} were passed.")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise ArgumentError(f"PSM601: {usage} has no argument '{name}'.")
        if name in given:
            raise ArgumentError(f"PSM601: {usage}: '{name}' was passed twice.")
        given[name] = value
    absent = [n for n in names if n not in given]
    if absent:
        raise ArgumentError(f"PSM601: {usage}: {', '.join(absent)} missing.")
    for name in names:
        if not isinstance(given[name], Tensor):
            raise ArgumentError(f"PSM601: {usage}: '{name}' must be a tensor, not {type(given[name]).__name__}.")
        if given[name].layout is not torch.strided:
            raise ArgumentError(f"PSM602: {spec.name}: '{name}' must be a dense tensor, not {given[name].layout}.")
    return given


def _lane_axes(spec: Spec, given: Mapping[str, Tensor], lead: int) -> int:
    """How many lane axes the inputs have: all the same number. A param has as many, or none."""
    first = spec.inputs[0]
    rank = max(0, given[first.name].dim() - lead - len(first.dims))
    for slot in (*spec.inputs, *spec.params):
        x = given[slot.name]
        is_param = slot in spec.params
        axes = x.dim() - len(slot.dims) - (0 if is_param else lead)
        if axes != rank and not (is_param and axes == 0):
            why = f"it has {_axes(x.dim())}" if axes < 0 else f"it has {_axes(axes, 'lane ')}"
            _refuse(spec, slot, x, lead, why + ("" if slot is first else f", while '{first.name}' has {rank}"))
    return rank


def _heads_first(shape: Sequence[int], first: Sequence[int]) -> bool:
    """Whether [B, T, ...] reads as if heads were put before time, here or in both, here in groups."""
    return shape[2] == first[1] or (shape[2:3] == first[2:3] and shape[1] > 0 and first[1] % shape[1] == 0)


def _axes(count: int, kind: str = "") -> str:
    return f"{count} {kind}{'axis' if count == 1 else 'axes'}"


def _check_lanes(spec: Spec, given: Mapping[str, Tensor], lead: int, lanes: list[int]) -> None:
    slots = (*spec.inputs, *spec.params)

    def front(slot: Slot) -> tuple[int, ...]:
        x = given[slot.name]
        return tuple(x.shape[0 if slot in spec.params else lead : x.dim() - len(slot.dims)])

    for slot in slots:
        x = given[slot.name]
        for axis, (size, whole) in enumerate(zip(front(slot), lanes, strict=False)):
            last = axis == len(lanes) - 1
            if size not in (1, whole) and not (last and size and whole % size == 0):
                why = "does not divide" if last else "is neither 1 nor"
                owner = next(s.name for s in slots if front(s)[axis : axis + 1] == (whole,))
                _refuse(spec, slot, x, lead, f"its lane axis of {size} {why} {whole}, that of '{owner}'", lead == 2)


def _refuse(spec: Spec, slot: Slot, x: Tensor, lead: int, why: str, hint: bool = False) -> NoReturn:
    """A shape that does not fit. `hint`: heads may have been put before time."""
    front = () if slot in spec.params else ("B", "T")[:lead]
    want = ", ".join((*front, "*lanes", *slot.dims))
    swapped = hint and slot in spec.inputs and x.dim() - len(slot.dims) > 2
    raise ArgumentError(
        f"PSM602: {spec.name}: '{slot.name}' must be [{want}], but it is {list(x.shape)}: {why}."
        + (f" Did you pass [{', '.join(('B', 'H', 'T', *slot.dims))}]? Time comes before the lanes." if swapped else "")
    )


def check_sizes(spec: Spec, batch: Any, lanes: Sequence[Any], dims: Mapping[str, Any], dtype: Any) -> None:
    """What `init_state` makes tensors of: batch and lanes from 0 on, every dim from 1 on, a float dtype."""
    where = f"PSM603: {spec.name}"
    stray = sorted(dims.keys() - set(spec.dims))
    if stray:
        raise ArgumentError(f"{where} has no dim {', '.join(stray)}; it has {', '.join(spec.dims) or 'none'}.")
    read = (*spec.components, *(s for s in spec.inputs if s.name in spec.taps))
    missing = sorted({d for s in read for d in s.dims} - dims.keys())
    if missing:
        raise ArgumentError(f"{where}: init_state needs the size of {', '.join(missing)}.")
    counts = ("batch", batch, 0), *(("lanes", n, 0) for n in lanes), *((k, n, 1) for k, n in dims.items())
    for name, size, least in counts:
        if not hasattr(size, "__index__") or size < least:
            raise ArgumentError(f"{where}: init_state: {name} is a whole number from {least} on, not {size!r}.")
    for name, size in spec.sizes.items():
        if dims[name] != size:
            raise ArgumentError(f"{where}: init_state: {name} is {size} in the spec, not {dims[name]!r}.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(f"{where}: init_state: dtype is a float dtype of torch, not {dtype!r}.")


def spread(x: Tensor, axis: int, lanes: tuple[int, ...]) -> Tensor:
    """Grouped lanes made whole: on the last lane axis (the one before `axis` from the left) the shorter repeats."""
    if not lanes or axis < 1:
        return x
    at = axis - 1
    size, whole = x.shape[at], lanes[-1]
    if size in (1, whole):
        return x
    return x.unsqueeze(at + 1).expand(*x.shape[: at + 1], whole // size, *x.shape[at + 1 :]).flatten(at, at + 1)


def all_lanes(x: Tensor, axis: int, lanes: tuple[int, ...]) -> Tensor:
    """`spread`, and lane axes of one repeated as well; the lanes of `x` end before `axis`."""
    whole = spread(x, axis, lanes)
    return whole.expand(*x.shape[: axis - len(lanes)], *lanes, *x.shape[axis:])
