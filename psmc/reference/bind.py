"""Arguments of the oracle against the spec: names, ranks, sizes, lanes, dtypes. Everything comes out expanded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from psmc.diagnostics import fail
from psmc.ir import Aggregator, Kind
from psmc.ir import Tensor as Declared
from psmc.ir.query import taps
from psmc.reference.evaluate import Env, Slot


def require(condition: bool, message: str) -> None:
    if not condition:
        fail("PSM690", message)


@dataclass(frozen=True)
class Problem:
    """A call with all tensors in the dtypes of their kinds and over all lanes: inputs `[B, T, *lanes, *dims]`, params
    `[*lanes, *dims]`, the initial state's components and tails `[rows, ...]`."""

    agg: Aggregator
    inputs: dict[str, Tensor]
    params: dict[str, Tensor]
    initial: dict[str, Tensor]
    lags: dict[str, int]
    batch: int
    length: int
    lanes: tuple[int, ...]
    base: Env = field(repr=False)

    def env(self, values: Mapping[Slot, Tensor]) -> Env:
        """Where expressions are evaluated: `values` and the params."""
        params = {("param", name, 0): value for name, value in self.params.items()}
        return Env({**params, **values}, self.base.dims, self.base.dtype, self.base.device)

    def full(self, value: Tensor, lead: tuple[int, ...], kind: Kind, rank: int) -> Tensor:
        """`value` `[..., *dims]` with all its axes, `[*lead, *lanes, *dims]`."""
        dims = value.shape[value.dim() - rank :]
        return self.base.of_kind(value, kind).expand([*lead, *self.lanes, *dims])


def tail(name: str) -> str:
    """The state's key of a tapped input's last tokens."""
    return f"{name}_tail"


def bind(
    agg: Aggregator,
    inputs: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    initial_state: Mapping[str, Tensor] | None,
) -> Problem:
    """Raises PsmcError PSM690 for arguments that do not fit."""
    lags = taps(agg)
    declared = {t.name: t for t in agg.leaf_inputs}
    initial = dict(initial_state or {})
    parts = {c.name: Declared(c.name, c.dims, c.kind) for c in agg.state}
    tails = {tail(name): declared[name] for name in lags}
    _names("input", inputs, set(declared))
    _names("param", params, {p.name for p in agg.params})
    require(initial.keys() <= parts.keys() | tails.keys(), f"'initial_state' has more than {sorted({*parts, *tails})}.")

    sizes = {d.name: d.size for d in agg.dims if d.size is not None}
    lanes: tuple[int, ...] | None = None
    lead: tuple[int, ...] | None = None
    for name, tensor in declared.items():
        shape = tuple(inputs[name].shape)
        _dims(sizes, tensor, shape, 2, inputs[name])
        require(lead in (None, shape[:2]), f"'{name}' is {list(shape)}, but batch and time are {lead} elsewhere.")
        lead = shape[:2]
        lanes = _join_lanes(name, lanes, shape[2 : len(shape) - len(tensor.dims)])
    require(lead is not None, "an aggregator without inputs has no batch and time.")
    assert lead is not None and lanes is not None
    for p in agg.params:
        shape = tuple(params[p.name].shape)
        _dims(sizes, p, shape, 0, params[p.name])
        if len(shape) > len(p.dims):
            lanes = _join_lanes(p.name, lanes, shape[: len(shape) - len(p.dims)])
    for name, value in initial.items():
        tensor = parts.get(name) or tails[name]
        _dims(sizes, tensor, tuple(value.shape), 1 if name in parts else 2, value)
        if name in tails:
            lag = lags[tensor.name]
            require(value.shape[1] == lag, f"'initial_state' of '{name}' must hold {lag} tokens, not {value.shape[1]}.")

    given = [*inputs.values(), *params.values(), *initial.values()]
    dtype = torch.float32
    for value in given:
        if value.is_floating_point() or value.is_complex():
            dtype = torch.promote_types(dtype, value.real.dtype if value.is_complex() else value.dtype)
    base = Env({}, sizes, dtype, given[0].device)

    def spread(value: Tensor, tensor: Declared, front: int) -> Tensor:
        return _over_lanes(base.of_kind(value, tensor.kind), front, len(tensor.dims), lanes)

    return Problem(
        agg,
        {name: spread(inputs[name], tensor, 2) for name, tensor in declared.items()},
        {p.name: spread(params[p.name], p, 0) for p in agg.params},
        {n: spread(v, parts[n], 1) if n in parts else spread(v, tails[n], 2) for n, v in initial.items()},
        lags, lead[0], lead[1], lanes, base,
    )  # fmt: skip


def _names(role: str, given: Mapping[str, Tensor], wanted: set[str]) -> None:
    require(given.keys() >= wanted, f"{role} {sorted(wanted - given.keys())} missing.")
    require(given.keys() <= wanted, f"no {role} is called {sorted(given.keys() - wanted)}.")


def _dims(sizes: dict[str, int], tensor: Declared, shape: tuple[int, ...], front: int, value: Tensor) -> None:
    """Learn the sizes of dims from one tensor, or compare them."""
    rank = len(tensor.dims)
    dims = ", ".join(("...", *tensor.dims))
    require(len(shape) >= front + rank, f"'{tensor.name}' is {list(shape)}: too few axes for [{dims}].")
    for dim, size in zip(tensor.dims, shape[len(shape) - rank :], strict=True):
        require(sizes.setdefault(dim, size) == size, f"dim '{dim}' of '{tensor.name}' is {size}, not {sizes[dim]}.")
    is_int = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    require(is_int if tensor.kind == "int" else True, f"'{tensor.name}' must hold ints, not {value.dtype}.")
    require(tensor.kind == "complex" or not value.is_complex(), f"'{tensor.name}' must not be complex.")


def _join_lanes(name: str, known: tuple[int, ...] | None, own: tuple[int, ...]) -> tuple[int, ...]:
    """The larger of two lists of lanes: equal or 1, the last axis a multiple."""
    if known is None or known == own:
        return own
    require(len(own) == len(known), f"'{name}' has {len(own)} lane axes, others have {len(known)}.")
    for place, (a, b) in enumerate(zip(known, own, strict=True)):
        last = place == len(own) - 1
        fits = a == b or 1 in (a, b) or (last and min(a, b) > 0 and max(a, b) % min(a, b) == 0)
        require(fits, f"lanes {list(own)} of '{name}' do not go with {list(known)}.")
    return tuple(max(a, b) if 0 not in (a, b) else 0 for a, b in zip(known, own, strict=True))


def _over_lanes(value: Tensor, front: int, rank: int, lanes: tuple[int, ...]) -> Tensor:
    own = value.shape[front : value.dim() - rank]
    if not own or not lanes:
        return value
    if lanes[-1] != own[-1]:
        value = value.repeat_interleave(lanes[-1] // own[-1], dim=front + len(own) - 1)
    return value.expand(*value.shape[:front], *lanes, *value.shape[value.dim() - rank :])
