"""One checked call in PyTorch: lift, the scan of the plan, readout. Differentiable by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_bind import ArgumentError, Call, Fields, Slot, Spec, spread
from psmc.runtime.kit_forest import tree_tokens
from psmc.runtime.kit_layer import fill_masked, scan_tokens
from psmc.runtime.kit_scan import Values, _flag
from psmc.runtime.kit_tree import LevelError, counter_levels, counter_prefix, counter_push

Rules = SimpleNamespace  # the functions of the spec: lift, combine, advance, output, identity, (start), (recurrence)


def as_state(value: Tensor, slot: Slot, call: Call, leading: tuple[int, ...]) -> Tensor:
    """A component in full, [*leading, *lanes, *dims], in its dtype: rules return what they read of the leading axes."""
    rank = len(slot.dims)
    dims = value.shape[value.dim() - rank :]
    return value.to(call.of_kind(slot.kind)).expand((*leading, *call.lanes, *dims))


def prepared(spec: Spec, call: Call, lags: Values, lazily: bool = False) -> tuple[Any, Values]:
    """Inputs and params in the dtypes of computation, grouped lanes made whole; `lags`: the taps, `name_lagK`.

    `lazily`: an input is converted when it is first read.
    """
    raw = [(s.name, s, call.inputs[s.name]) for s in spec.inputs]
    for s in spec.inputs:
        raw += [(f"{s.name}_lag{k}", s, lags[f"{s.name}_lag{k}"]) for k in range(1, spec.taps.get(s.name, 0) + 1)]
    params = {s.name: _prepared(s, call.params[s.name], call) for s in spec.params}
    if lazily:
        return Prepared({name: (slot, value) for name, slot, value in raw}, call), params
    return {name: _prepared(slot, value, call) for name, slot, value in raw}, params


class Prepared(Mapping[str, Tensor]):
    """Inputs by name, each in the dtype of computation from its first reading on, wherever that is: a reading without
    gradient leaves none out of later ones."""

    def __init__(self, raw: Mapping[str, tuple[Slot, Tensor]], call: Call) -> None:
        self._raw, self._call, self._made = raw, call, dict[str, Tensor]()
        self._grad = torch.is_grad_enabled()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            with torch.set_grad_enabled(self._grad):
                self._made[name] = _prepared(*self._raw[name], self._call)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)


class Tokens:
    """The same as attributes, as the functions of a spec read them."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Tensor:
        return self._values[name]


def _prepared(slot: Slot, value: Tensor, call: Call) -> Tensor:
    return spread(value.to(call.of_kind(slot.kind)), value.dim() - len(slot.dims), call.lanes)


def start_state(spec: Spec, rules: Rules, call: Call, names: tuple[str, ...]) -> Values:
    """Where a sequence starts, [*dims] each."""
    begin = getattr(rules, "start", rules.identity)
    found: Values = begin(call.n, torch.empty((), dtype=call.compute, device=call.device))
    kinds = {s.name: s.kind for s in spec.components}
    return {k: found[k].to(call.of_kind(kinds[k])) for k in names}


def transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp) transforms this call. Then it is plain PyTorch: kernels, and gradients that
    are written by hand, know nothing of it."""
    return bool(torch._C._are_functorch_transforms_active())


def in_full_precision(run: Callable[..., tuple[Values, Values]]) -> Callable[..., tuple[Values, Values]]:
    """A run without autocast: what surrounds a call does not change its arithmetic (a rule from Python may want it)."""

    @wraps(run)
    def wrapped(spec: Spec, rules: Rules, call: Call, *args: Any, **kwargs: Any) -> tuple[Values, Values]:
        kind = call.device.type
        if hasattr(rules, "extern") or kind == "meta" or not torch.is_autocast_enabled(kind):
            return run(spec, rules, call, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return run(spec, rules, call, *args, **kwargs)

    return wrapped


@in_full_precision
def run_scan(
    spec: Spec, rules: Rules, call: Call, fold: str, x: Values, p: Values, initial: Values | None,
    mask: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, whole: bool = False,
) -> tuple[Values, Values]:  # fmt: skip
    """Outputs [B, T, *lanes, *dims] by name, and the final state. `whole`: no readout, all components of the state.

    x: inputs (taps as `name_lagK`) and p: params, as `prepared` returns them. `fold`: 'scan', 'left' or 'tree'.
    """
    if hasattr(rules, "layers") and not whole and not transformed():
        layered: tuple[Values, Values] = rules.layered(spec, rules, call, x, p, initial, mask, reset, cu_seqlens)
        return layered
    params, n = Fields(p), call.n
    slots = {s.name: s for s in spec.components}
    live = tuple(slots) if whole or fold == "tree" else spec.live

    def lift(tokens: Values) -> Values:
        leading = next(iter(tokens.values())).shape[:2]
        element = rules.lift(Fields(tokens), params, n)
        return {k: as_state(v, slots[k], call, leading) for k, v in element.items()}

    def combine(l: Values, r: Values) -> Values:  # noqa: E741
        joined: Values = rules.combine(Fields(l), Fields(r), params, n)
        return {k: v.to(l[k].dtype) for k, v in joined.items()}

    def advance(l: Values, r: Values) -> Values:  # noqa: E741
        rule = rules.combine if whole else rules.advance
        moved: Values = rule(Fields(l), Fields(r), params, n)
        return {k: v.to(l[k].dtype) for k, v in moved.items() if k in l}

    def recur(state: Values, tokens: Values) -> Values:
        moved: Values = rules.recurrence(Fields(state), Fields(tokens), params, n)
        leading = next(iter(tokens.values())).shape[:1]
        return {k: as_state(moved[k], slots[k], call, leading) for k in state}

    def output(prefix: Values, previous: Values | None, tokens: Values) -> Values:
        before = Fields(previous) if previous is not None else None
        levels = [] if not spec.levels else [_held_levels(spec, prefix), _held_levels(spec, previous)]
        found = rules.output(Fields(prefix), before, Fields(tokens), params, n, *levels)
        return {s.name: as_output(found[s.name], s, call, next(iter(prefix.values())).shape[:2]) for s in spec.outputs}

    empty = start_state(spec, rules, call, live)
    sequences = hasattr(rules, "recurrence")
    if sequences:
        empty = {k: as_state(v, slots[k], call, ()) for k, v in empty.items()}
    rows = call.leading[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    restart = None
    if hasattr(rules, "start") and fold == "scan":
        restart = {k: as_state(v, slots[k], call, (1,)) for k, v in empty.items()}
    if fold == "tree":
        x = fill_masked(x, mask)
        try:
            prefix, before, counter = tree_tokens(
                combine, lift(x), empty, initial, valid=mask, reset=reset, cu_seqlens=cu_seqlens,
                previous=spec.previous and not whole, levels=0 if whole else spec.levels,
            )  # fmt: skip
        except LevelError as error:
            raise ArgumentError(f"PSM609: {spec.name}: {error}.") from None
        if whole:
            return {}, counter
        outputs = output(fill_masked(prefix, mask), before and fill_masked(before, mask), x)
        if mask is not None:
            outputs = {k: torch.where(_flag(mask, v), v, 0) for k, v in outputs.items()}
        return outputs, counter
    final: Values
    outputs, final = scan_tokens(
        (lambda tokens: tokens) if sequences else lift, combine, recur if sequences else advance,
        None if whole else output, x, empty, initial, restart=restart, valid=mask, reset=reset, cu_seqlens=cu_seqlens,
        previous=spec.previous and not whole, left=fold == "left",
    )  # fmt: skip
    final = {k: as_state(v, slots[k], call, (rows,)) for k, v in final.items()}
    return outputs, final or {k: as_state(v, slots[k], call, (rows,)) for k, v in empty.items()}


def as_output(value: Tensor, slot: Slot, call: Call, leading: tuple[int, ...]) -> Tensor:
    """An output in full and in the dtype that the inputs promote to."""
    rank = len(slot.dims)
    dims = value.shape[value.dim() - rank :]
    kind = "complex" if value.is_complex() else slot.kind
    return value.to(call.of_kind(kind, call.dtype)).expand((*leading, *call.lanes, *dims))


@in_full_precision
def run_step(spec: Spec, rules: Rules, call: Call, state: Values, x: Values, p: Values) -> tuple[Values, Values]:
    """One token for every row: (outputs [B, *lanes, *dims], the state after it); not of a tree."""
    params, n = Fields(p), call.n
    slots = {s.name: s for s in spec.components}
    tokens, before = Fields(x), Fields(state)
    if hasattr(rules, "recurrence"):
        moved = rules.recurrence(before, tokens, params, n)
    else:
        moved = rules.advance(before, Fields(rules.lift(tokens, params, n)), params, n)
    after = {k: as_state(moved[k], slots[k], call, call.leading) for k in spec.live}
    found = rules.output(Fields(after), before if spec.previous else None, tokens, params, n)
    return {s.name: as_output(found[s.name], s, call, call.leading) for s in spec.outputs}, after


def _held_levels(spec: Spec, prefix: Values | None) -> Fields | None:
    """What a counter holds, [.., *lanes, levels, *dims], from a tensor a level."""
    if prefix is None:
        return None
    found = {}
    for slot in spec.components:
        parts = [prefix[f"{slot.name}.root.{k}"] for k in range(spec.levels)]
        found[slot.name] = torch.stack(parts, parts[0].dim() - len(slot.dims))
    return Fields(found)


@in_full_precision
def run_push(spec: Spec, rules: Rules, call: Call, state: Values, x: Values, p: Values) -> tuple[Values, Values]:
    """One token of a tree: (outputs, the counter after it)."""
    params, n, tokens = Fields(p), call.n, Fields(x)
    slots = {s.name: s for s in spec.components}

    def combine(l: Values, r: Values) -> Values:  # noqa: E741
        joined: Values = rules.combine(Fields(l), Fields(r), params, n)
        return {k: v.to(l[k].dtype) for k, v in joined.items()}

    element = rules.lift(tokens, params, n)
    leaf = {k: as_state(v, slots[k], call, call.leading) for k, v in element.items()}
    prefix, after = counter_push(combine, state, leaf)
    before, levels = None, []
    like = {k: v.unsqueeze(1) for k, v in leaf.items()}
    if spec.previous or spec.levels:
        empty = start_state(spec, rules, call, tuple(slots))
        before = Fields(counter_prefix(state, like, empty))
    try:
        for c in (after, state) if spec.levels else ():
            levels.append(_held_levels(spec, counter_levels(c, like, spec.levels, empty)))
    except LevelError as error:
        raise ArgumentError(f"PSM609: {spec.name}: {error}.") from None
    found = rules.output(Fields(prefix), before, tokens, params, n, *levels)
    return {s.name: as_output(found[s.name], s, call, call.leading) for s in spec.outputs}, after
