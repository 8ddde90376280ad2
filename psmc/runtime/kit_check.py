"""The border, continued: states, flags and packing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from psmc.runtime.kit_bind import ArgumentError, Call, Slot, Spec


def check_flags(spec: Spec, name: str, flags: Any, call: Call) -> Tensor | None:
    """mask and reset: [B, T] of bools or ints, as bool."""
    if flags is None:
        return None
    where = f"PSM604: {spec.name}: '{name}'"
    if not isinstance(flags, Tensor):
        raise ArgumentError(f"{where} must be a tensor [B, T], not {type(flags).__name__}.")
    if tuple(flags.shape) != call.leading:
        raise ArgumentError(f"{where} must be [B, T] = {list(call.leading)}, but it is {list(flags.shape)}.")
    if flags.device != call.device:
        raise ArgumentError(f"{where} is on {flags.device}, the inputs on {call.device}.")
    if flags.is_floating_point() or flags.is_complex():
        raise ArgumentError(f"{where} is {flags.dtype}; pass bools (True: the token counts, or restarts).")
    return flags if flags.dtype == torch.bool else flags != 0


def check_cu_seqlens(spec: Spec, cu_seqlens: Any, call: Call) -> Tensor | None:
    """N + 1 ascending token offsets on the inputs' device; B must be 1. On a GPU their values are not read (a sync)."""
    if cu_seqlens is None:
        return None
    where = f"PSM606: {spec.name}: 'cu_seqlens'"
    batch, length = call.leading
    if not isinstance(cu_seqlens, Tensor):
        raise ArgumentError(f"{where} must be a tensor of N + 1 offsets, not {type(cu_seqlens).__name__}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{where} must be N + 1 offsets, int32 or int64, but it is {list(cu_seqlens.shape)}, {cu_seqlens.dtype}."
        )
    if batch != 1:
        raise ArgumentError(f"{where} packs the sequences in a batch of 1, but B is {batch}.")
    if cu_seqlens.device != call.device:
        raise ArgumentError(f"{where} is on {cu_seqlens.device}, the inputs on {call.device}.")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != length or sorted(offsets) != offsets:
            raise ArgumentError(f"{where} must rise from 0 to T = {length}, but it is {offsets}.")
    return cu_seqlens


def check_slots(spec: Spec, slots: Any, call: Call, state: Any) -> int:
    """How many rows a state has that `step_` changes; `slots` [B]: the rows, different ones (not checked: a sync)."""
    if not isinstance(state, Mapping):
        raise ArgumentError(f"PSM605: {spec.name}: step_ changes a state: pass what init_state or a call returned.")
    if slots is None:
        return call.leading[0]
    if not isinstance(slots, Tensor) or slots.dtype != torch.int64 or tuple(slots.shape) != call.leading:
        given = f"{slots.dtype}, {list(slots.shape)}" if isinstance(slots, Tensor) else type(slots).__name__
        raise ArgumentError(
            f"PSM605: {spec.name}: 'slots' must be an int64 tensor [B] = {list(call.leading)}, not {given}."
        )
    if slots.device != call.device:
        raise ArgumentError(f"PSM605: {spec.name}: 'slots' is on {slots.device}, the inputs on {call.device}.")
    rows = [x for x in state.values() if isinstance(x, Tensor) and x.dim()]
    return rows[0].shape[0] if rows else 0


def check_state(spec: Spec, call: Call, state: Any, rows: int) -> dict[str, Tensor] | None:
    """An initial state: exactly the live components and the tails, [rows, *lanes, *dims], in the state's dtypes."""
    if state is None:
        return None
    slots = {s.name: s for s in spec.components if s.name in spec.live}
    _check_names(spec, state, [*slots, *tail_names(spec)])
    parts = {k: _component(spec, call, k, state[k], slot, rows) for k, slot in slots.items()}
    return {**parts, **_tails(spec, call, state, rows)}


def check_counter(spec: Spec, call: Call, state: Any, rows: int) -> dict[str, Tensor] | None:
    """The state of a tree: `position` [rows], and for each set bit k of one the roots and folds of that level."""
    if state is None:
        return None
    position = state.get("position") if isinstance(state, Mapping) else None
    if not isinstance(position, Tensor) or position.dtype != torch.int64 or tuple(position.shape) != (rows,):
        raise ArgumentError(
            f"PSM605: {spec.name}: the state of a tree has 'position', an int64 tensor [{rows}]; "
            "pass what init_state, a call or a step returned."
        )
    bits = sorted({k for p in position.tolist() for k in range(p.bit_length()) if p >> k & 1})
    keys = {f"{s.name}.{part}.{k}": s for s in spec.components for part in ("root", "fold") for k in bits}
    _check_names(spec, state, ["position", *keys, *tail_names(spec)])
    parts = {k: _component(spec, call, k, state[k], slot, rows) for k, slot in keys.items()}
    return {"position": position, **parts, **_tails(spec, call, state, rows)}


def check_rule(spec: Spec, found: Any, l: Mapping[str, Tensor], r: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: E741
    """What a rule from Python made of two elements: every component and no other, in their shape."""
    names = [s.name for s in spec.components]
    if not isinstance(found, Mapping) or set(found) != set(names):
        given = type(found).__name__
        if isinstance(found, Mapping):
            given = f"of {', '.join(map(str, found)) or 'nothing'}"
        raise ArgumentError(f"PSM296: {spec.name}: the rule has to return a dict of {', '.join(names)}, not {given}.")
    for name in names:
        want, x = torch.broadcast_shapes(l[name].shape, r[name].shape), found[name]
        if not isinstance(x, Tensor) or x.shape != want:
            given = str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"PSM296: {spec.name}: the rule has to return '{name}' as {list(want)}, not {given}.")
    return {name: found[name] for name in names}


def tail_names(spec: Spec) -> list[str]:
    """Keys of a state that hold the last tokens of an input."""
    return [f"{name}_tail" for name in spec.taps]


def _check_names(spec: Spec, state: Any, wanted: list[str]) -> None:
    if not isinstance(state, Mapping):
        raise ArgumentError(f"PSM605: {spec.name}: a state is a dict of tensors, not {type(state).__name__}.")
    if set(state) != set(wanted):
        passed = ", ".join(map(str, state)) or "nothing"
        raise ArgumentError(f"PSM605: {spec.name}: a state holds {', '.join(wanted)}, but {passed} was passed.")


def _component(spec: Spec, call: Call, key: str, x: Any, slot: Slot, rows: int) -> Tensor:
    if not isinstance(x, Tensor):
        _refuse_state(spec, key, f"must be a tensor, not {type(x).__name__}")
    want = (rows, *call.lanes, *(call.sizes[d] for d in slot.dims))
    if tuple(x.shape) != want:
        shape = ", ".join(("rows", "*lanes", *slot.dims))
        tokens = len(call.leading) == 1 and call.lanes and tuple(x.shape) == (rows, *want[2:])
        hint = ". A step takes one token, without T: did you pass [B, T, ...]?" if tokens else ""
        _refuse_state(spec, key, f"must be [{shape}] = {list(want)}, but it is {list(x.shape)}", hint)
    return _placed(spec, call, key, x, call.of_kind(slot.kind))


def _tails(spec: Spec, call: Call, state: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
    """The last tokens of tapped inputs, [rows, W, *lanes, *dims], in the inputs' dtypes."""
    out = {}
    inputs = {s.name: s for s in spec.inputs}
    for source, longest in spec.taps.items():
        key, slot = f"{source}_tail", inputs[source]
        x = state[key]
        if not isinstance(x, Tensor):
            _refuse_state(spec, key, f"must be a tensor, not {type(x).__name__}")
        want = (rows, longest, *call.lanes, *(call.sizes[d] for d in slot.dims))
        if tuple(x.shape) != want:
            shape = ", ".join(("rows", str(longest), "*lanes", *slot.dims))
            _refuse_state(spec, key, f"must be [{shape}] = {list(want)}, but it is {list(x.shape)}")
        out[key] = _placed(spec, call, key, x, call.inputs[source].dtype)
    return out


def _placed(spec: Spec, call: Call, key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.device != call.device:
        _refuse_state(spec, key, f"is on {x.device}, the inputs on {call.device}")
    rank = (x.is_complex(), x.is_floating_point())
    if rank > (dtype.is_complex, dtype.is_floating_point):
        _refuse_state(spec, key, f"is {x.dtype}, but it holds {dtype}")
    return x.to(dtype)


def _refuse_state(spec: Spec, key: str, why: str, hint: str = "") -> NoReturn:
    raise ArgumentError(f"PSM605: {spec.name}: state '{key}' {why}{hint or '.'}")
