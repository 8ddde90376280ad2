"""The public face of a compiled aggregator: a parallel call, a step, states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_bind import (
    ArgumentError,
    Call,
    Spec,
    bind_call,
    check_cu_seqlens,
    check_flags,
    check_state,
)
from psmc.runtime.kit_op import Operator
from psmc.runtime.kit_run import Rules, as_output, as_state, prepared, run_scan, run_step, start_state
from psmc.runtime.kit_scan import Values
from psmc.runtime.kit_taps import Places, flip, lagged, next_tail, places
from psmc.runtime.kit_tree import counter_prefix, counter_push, counter_start

State = dict[str, Tensor]


class Aggregator:
    """A sequence model's scan: call it on whole sequences, or `step` it token by token with the same result.

    Inputs are [B, T, *lanes, *dims] in the spec's order, params [*lanes, *dims] or [*dims]; see `help(agg)`.
    """

    def __init__(self, spec: Spec, rules: Rules, *, fold: str, kernels: Any = None, plain: bool = False) -> None:
        """`fold`: 'scan', 'left' or 'tree'; `kernels`: the module's Triton entry points; `plain`: never a custom op."""
        self.spec, self.rules, self.fold_order = spec, rules, fold
        self.operator = None if plain or fold == "tree" else Operator(spec, rules, fold, kernels)
        self.__name__ = spec.name

    def __repr__(self) -> str:
        named = ", ".join(s.name for s in (*self.spec.inputs, *self.spec.params))
        return f"<aggregator {self.spec.name}({named}) -> {', '.join(s.name for s in self.spec.outputs)}>"

    def __call__(
        self,
        *args: Tensor,
        initial_state: Mapping[str, Tensor] | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        reverse: bool = False,
        **kwargs: Tensor,
    ) -> Any:
        """All tokens at once: the output (a tuple if there are several), and with `return_state` the state after them.

        initial_state  what `init_state`, a call or a step returned; None is the start
        cu_seqlens     N + 1 offsets: N sequences packed in a batch of 1, states [N, ...]
        mask, reset    [B, T]: tokens that count (the others leave the state alone, and their outputs are 0); tokens
                       before which the state starts anew
        reverse        run each sequence from its last token to its first

        Raises ArgumentError if a shape, dtype or device does not fit the spec.
        """
        call = bind_call(self.spec, args, kwargs, tokens=True)
        mask = check_flags(self.spec, "mask", mask, call.leading)
        reset = check_flags(self.spec, "reset", reset, call.leading)
        cu_seqlens = check_cu_seqlens(self.spec, cu_seqlens, call.leading)
        rows = call.leading[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        initial = self._initial(call, initial_state, rows)
        back = places(*call.leading, call.device, cu_seqlens, None) if reverse and cu_seqlens is not None else None
        if reverse:
            call = replace(call, inputs={k: flip(x, back) for k, x in call.inputs.items()})
            mask = None if mask is None else flip(mask, back)
            reset = None if reset is None else flip(reset, back)
        carried: Values | None = None if initial is None else {k: v for k, v in initial.items() if not k.endswith("_tail")}
        extra, tails = self._taps(call, initial, mask, reset, cu_seqlens)
        if self.operator is not None and self.operator.wanted(call):
            outputs, final = self.operator(call, extra, carried, mask, reset, cu_seqlens)
        else:
            x, p = prepared(self.spec, call)
            outputs, final = run_scan(
                self.spec, self.rules, call, self.fold_order, {**x, **self._prepare_taps(call, extra)}, p, carried,
                mask, reset, cu_seqlens,
            )  # fmt: skip
        found = tuple(flip(outputs[s.name], back) if reverse else outputs[s.name] for s in self.spec.outputs)
        out = found[0] if len(found) == 1 else found
        return (out, {**final, **tails}) if return_state else out

    def step(self, state: Mapping[str, Tensor] | None, *args: Tensor, **kwargs: Tensor) -> tuple[Any, State]:
        """One token, inputs [B, *lanes, *dims]: (output, new state). Functional and differentiable."""
        call = bind_call(self.spec, args, kwargs, tokens=False)
        initial = self._initial(call, state, call.leading[0])
        x, p = prepared(self.spec, call)
        tails: Values = {}
        for name, longest in self.spec.taps.items():
            now = call.inputs[name]
            zeros = now.new_zeros(now.shape[0], longest, *now.shape[1:])
            past = zeros if initial is None else initial[f"{name}_tail"]
            tails[f"{name}_tail"] = torch.cat([past[:, 1:], now.unsqueeze(1)], 1)
            for lag in range(1, longest + 1):
                x[f"{name}_lag{lag}"] = self._prepare_taps(call, {f"{name}_lag{lag}": past[:, longest - lag]})[f"{name}_lag{lag}"]
        if self.fold_order == "tree":
            outputs, after = self._push(call, initial, x, p)
        else:
            before = initial or self.init_state(call.leading[0], call.lanes, call.device, sizes=call.sizes, dtype=call.compute)
            outputs, after = run_step(self.spec, self.rules, call, self.fold_order, before, x, p)
        found = tuple(outputs[s.name] for s in self.spec.outputs)
        return found[0] if len(found) == 1 else found, {**after, **tails}

    @torch.no_grad()
    def step_(self, state: State, *args: Tensor, slots: Tensor | None = None, **kwargs: Tensor) -> Any:
        """One token, in place and without gradient: `state` is overwritten; with `slots` [B] the rows that it names."""
        rows = state if slots is None else {k: v.index_select(0, slots) for k, v in state.items()}
        out, after = self.step(rows, *args, **kwargs)
        if self.fold_order == "tree":
            state.clear()
            state.update(after)
            return out
        for name, value in after.items():
            if slots is None:
                state[name].copy_(value)
            else:
                state[name].index_copy_(0, slots, value.to(state[name].dtype))
        return out

    def init_state(
        self,
        batch: int,
        lanes: tuple[int, ...] | int = (),
        device: torch.device | str | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
        dtype: torch.dtype = torch.float32,
        **dims: int,
    ) -> State:
        """The state before any token, [batch, *lanes, *dims]. Sizes of dims by name: `init_state(1, (16,), K=64, V=64)`."""
        lanes = (lanes,) if isinstance(lanes, int) else tuple(lanes)
        known = {**self.spec.sizes, **(sizes or {}), **dims}
        needed = {d for s in (*self.spec.components, *self.spec.inputs) for d in s.dims if s.name in (*self.spec.live, *self.spec.taps)}
        missing = sorted(needed - known.keys())
        if missing:
            raise ArgumentError(f"PSM603: {self.spec.name}: init_state needs the size of {', '.join(missing)}.")
        place = torch.device(device or "cpu")
        call = Call({}, {}, known, (batch,), lanes, dtype, dtype, place)
        if self.fold_order == "tree":
            return counter_start(batch)
        slots = {s.name: s for s in self.spec.components}
        begin = start_state(self.spec, self.rules, call, self.spec.live)
        state = {k: as_state(v, slots[k], call, (batch,)).clone() for k, v in begin.items()}
        for slot in self.spec.inputs:
            if slot.name in self.spec.taps:
                width = (batch, self.spec.taps[slot.name], *lanes, *(known[d] for d in slot.dims))
                state[f"{slot.name}_tail"] = torch.zeros(width, dtype=call.of_kind(slot.kind), device=place)
        return state

    def fold(self, *args: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None, **kwargs: Tensor) -> State:
        """The product of all tokens' elements, every component, [B, *lanes, *dims]: what segments and ranks exchange."""
        if self.fold_order != "scan":
            raise ArgumentError(f"PSM607: {self.spec.name} is not associative: tokens have no product of their own.")
        call = bind_call(self.spec, args, kwargs, tokens=True)
        mask = check_flags(self.spec, "mask", mask, call.leading)
        x, p = prepared(self.spec, call)
        extra, _ = self._taps(call, None, mask, None, cu_seqlens)
        rules = SimpleNamespace(**{k: v for k, v in vars(self.rules).items() if k != "start"})
        tokens = {**x, **self._prepare_taps(call, extra)}
        return run_scan(self.spec, rules, call, "scan", tokens, p, None, mask, None, cu_seqlens, whole=True)[1]

    def _initial(self, call: Call, state: Mapping[str, Tensor] | None, rows: int) -> State | None:
        if self.fold_order == "tree":
            return None if state is None else dict(state)
        return check_state(self.spec, call, state, rows)

    def _push(self, call: Call, counter: State | None, x: Values, p: Values) -> tuple[Values, State]:
        params, n = SimpleNamespace(**p), call.n
        slots = {s.name: s for s in self.spec.components}

        def combine(l: Values, r: Values) -> Values:  # noqa: E741
            joined: Values = self.rules.combine(SimpleNamespace(**l), SimpleNamespace(**r), params, n)
            return joined

        counter = counter_start(call.leading[0]) if counter is None else counter
        element = self.rules.lift(SimpleNamespace(**x), params, n)
        leaf = {k: as_state(v, slots[k], call, call.leading) for k, v in element.items()}
        prefix, after = counter_push(combine, counter, leaf)
        before = None
        if self.spec.previous:
            empty = start_state(self.spec, self.rules, call, tuple(slots))
            like = {k: v.unsqueeze(1) for k, v in leaf.items()}
            before = SimpleNamespace(**counter_prefix(counter, like, empty))
        found = self.rules.output(SimpleNamespace(**prefix), before, SimpleNamespace(**x), params, n)
        return {s.name: as_output(found[s.name], s, call, call.leading) for s in self.spec.outputs}, after

    def _taps(
        self, call: Call, initial: State | None, mask: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Values, State]:
        """Inputs read some tokens earlier, as inputs of their own; and the tails after the last token."""
        if not self.spec.taps:
            return {}, {}
        where: Places = places(*call.leading, call.device, cu_seqlens, reset)
        extra: Values = {}
        tails: State = {}
        for name, longest in self.spec.taps.items():
            x = call.inputs[name]
            tail = None if initial is None else initial[f"{name}_tail"]
            if mask is not None:
                x = torch.where(mask.reshape(mask.shape + (1,) * (x.dim() - 2)), x, torch.zeros((), dtype=x.dtype, device=x.device))
            for lag in range(1, longest + 1):
                extra[f"{name}_lag{lag}"] = lagged(x, lag, where, tail)
            tails[f"{name}_tail"] = next_tail(x, longest, where, tail)
        return extra, tails

    def _prepare_taps(self, call: Call, extra: Values) -> Values:
        out = {}
        for slot in self.spec.inputs:
            for lag in range(1, self.spec.taps.get(slot.name, 0) + 1):
                name = f"{slot.name}_lag{lag}"
                if name in extra:
                    narrow = replace(call, inputs={slot.name: extra[name]})
                    out[name] = prepared(replace(self.spec, inputs=(slot,), params=()), narrow)[0][slot.name]
        return out
