"""The public face of a compiled aggregator: a parallel call, a step, states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_bind import ArgumentError, Call, Spec, bind_call, check_sizes
from psmc.runtime.kit_check import check_counter, check_cu_seqlens, check_flags, check_slots, check_state, tail_names
from psmc.runtime.kit_fused import FusedCalls
from psmc.runtime.kit_op import Operator
from psmc.runtime.kit_run import Rules, as_state, prepared, run_push, run_scan, run_step, start_state
from psmc.runtime.kit_taps import flip, places, tap_token, tap_tokens
from psmc.runtime.kit_tree import counter_rows, counter_start
from psmc.runtime.kit_values import check_results, check_slot_values, check_state_values, check_values, checks_wanted

State = dict[str, Tensor]


class Aggregator:
    """A sequence model's scan: call it on whole sequences, or `step` it token by token with the same result.

    Inputs are [B, T, *lanes, *dims] in the spec's order, params [*lanes, *dims] or [*dims]; see `help(agg)`.
    """

    def __init__(self, spec: Spec, rules: Rules, *, fold: str, kernels: Any = None) -> None:
        """`fold`: 'scan', 'left' or 'tree'; `kernels`: the module's Triton entry points. With a rule from Python (then
        `rules.extern` is what makes an aggregator of one, and this one) calls are plain PyTorch, never a custom op."""
        self.spec, self.rules, self.fold_order = spec, rules, fold
        self.operator = None if hasattr(rules, "extern") else Operator(spec, rules, fold, kernels)
        self._quick = None if self.operator is None else self.operator.quick  # steps that were checked before
        self._calls = FusedCalls(spec, rules) if hasattr(self.rules, "matrices") else None  # and whole calls
        self.checks = checks_wanted()  # values are read and checked, which waits for the device
        self.__name__ = spec.name

    def __deepcopy__(self, memo: dict[int, Any]) -> Aggregator:
        """Itself, as it holds nothing that trains; with a rule from Python, one with a copy of the rule."""
        if not hasattr(self.rules, "extern"):
            return self
        make, rule = self.rules.extern
        own = deepcopy(rule, memo)
        copied: Aggregator = make(own)
        copied.__class__ = type(self)
        for name, value in vars(self).items():
            vars(copied).setdefault(name, own if value is rule else value)
        return copied

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
        key = None
        if self._calls is not None and mask is None and reset is None and cu_seqlens is None:
            tensors = self._calls.ordered(args, kwargs)
            key = None if reverse or self.checks else self._calls.key("call", tensors, initial_state)
            known = self._calls.whole(key, tensors, initial_state)
            if known is not None:
                return known if return_state else known[0]
        call = bind_call(self.spec, args, kwargs, tokens=True)
        mask = check_flags(self.spec, "mask", mask, call)
        reset = check_flags(self.spec, "reset", reset, call)
        cu_seqlens = check_cu_seqlens(self.spec, cu_seqlens, call)
        state = self._checked(call, initial_state, call.leading[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        checks = self.checks and not torch.compiler.is_compiling()
        if checks:
            check_values(self.spec, call, mask, cu_seqlens)
            check_state_values(self.spec, state, self._begin(call))
        back = None
        if reverse:
            back = None if cu_seqlens is None else places(call, cu_seqlens, None)
            call = replace(call, inputs={k: flip(x, back) for k, x in call.inputs.items()})
            mask = None if mask is None else flip(mask, back)
            reset = None if reset is None else flip(reset, back)
        lags, tails = tap_tokens(self.spec, call, state, mask, reset, cu_seqlens)
        begin = None if state is None else {k: x for k, x in state.items() if k not in tail_names(self.spec)}
        cut = mask is not None or reset is not None or cu_seqlens is not None
        if self.operator is not None and self.operator.wanted(call, return_state or state is not None, cut):
            outputs, final = self.operator(call, lags, begin, mask, reset, cu_seqlens)
        else:
            x, p = prepared(self.spec, call, lags, hasattr(self.rules, "matrices"))
            outputs, final = run_scan(
                self.spec, self.rules, call, self.fold_order, x, p, begin, mask, reset, cu_seqlens
            )
        if checks:
            check_results(self.spec, outputs, final)
        if self._calls is not None:
            self._calls.learn(key, [*call.inputs.values(), *call.params.values()], call)
        found = tuple(flip(outputs[s.name], back) if reverse else outputs[s.name] for s in self.spec.outputs)
        out = found[0] if len(found) == 1 else found
        return (out, {**final, **tails}) if return_state else out

    def step(self, state: Mapping[str, Tensor] | None, *args: Tensor, **kwargs: Tensor) -> tuple[Any, State]:
        """One token, inputs [B, *lanes, *dims]: (output, new state). Functional and differentiable."""
        quick = self._quick or self._calls
        if quick is not None and not kwargs and not self.checks:
            known: tuple[Any, State] | None = quick.again(state, args, None, False)
            if known is not None:
                return known
        call = bind_call(self.spec, args, kwargs, tokens=False)
        before = self._checked(call, state, call.leading[0])
        if self.checks and not torch.compiler.is_compiling():
            check_values(self.spec, call, None, None)
            check_state_values(self.spec, before, self._begin(call))
        if self.operator is not None and self.operator.steps(call, before):
            if before is None:
                return self.operator.step(call, self._start(call), None, True)
            return self.operator.step(call, before, None, False)
        lags, tails = tap_token(self.spec, call, before)
        if hasattr(self.rules, "stepped") and self.rules.matrices.runs_on(call.device):
            after = self._start(call) if before is None else {k: x.clone() for k, x in before.items()}
            moved = self.rules.stepped(self.spec, self.rules, call, after, None)
            if moved is not None:
                self._learn_step(call, after, None)
                outs = tuple(moved[s.name] for s in self.spec.outputs)
                return outs[0] if len(outs) == 1 else outs, after
        x, p = prepared(self.spec, call, lags)
        if before is None:
            before = self._start(call)
        run = run_push if self.fold_order == "tree" else run_step
        outputs, after = run(self.spec, self.rules, call, before, x, p)
        found = tuple(outputs[s.name] for s in self.spec.outputs)
        return found[0] if len(found) == 1 else found, {**after, **tails}

    def step_(self, state: State, *args: Tensor, slots: Tensor | None = None, **kwargs: Tensor) -> Any:
        """One token, in place and without gradient: `state` is overwritten; with `slots` [B] the rows that it names.

        The tensors of a tree's state grow in number: there the dict is updated, not its tensors.
        """
        quick = self._quick or self._calls
        if quick is not None and not kwargs and not self.checks:
            known = quick.again(state, args, slots, True)
            if known is not None:
                return known[0]
        with torch.no_grad():
            return self._step_in_place(state, args, slots, kwargs)

    def _step_in_place(
        self, state: State, args: tuple[Tensor, ...], slots: Tensor | None, kwargs: dict[str, Tensor]
    ) -> Any:
        call = bind_call(self.spec, args, kwargs, tokens=False)
        count = check_slots(self.spec, slots, call, state)
        self._checked(call, state, count)
        if self.checks and not torch.compiler.is_compiling():
            check_slot_values(self.spec, slots, count)
            check_values(self.spec, call, None, None)
            check_state_values(self.spec, state, self._begin(call))
        if slots is not None and self.fold_order == "tree":
            return self._push_rows(state, slots, *args, **kwargs)
        if self.operator is not None and self.operator.steps(call, state):
            return self.operator.step(call, state, slots, True)[0]
        if hasattr(self.rules, "stepped") and self.rules.matrices.runs_on(call.device):
            moved = self.rules.stepped(self.spec, self.rules, call, state, slots)
            if moved is not None:
                self._learn_step(call, state, slots)
                outs = tuple(moved[s.name] for s in self.spec.outputs)
                return outs[0] if len(outs) == 1 else outs
        rows = state if slots is None else {k: x.index_select(0, slots) for k, x in state.items()}
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
        """The state before any token, [batch, *lanes, *dims]. Dims by name: `init_state(1, (16,), K=64, V=64)`.

        Raises ArgumentError if a size is missing, or not one.
        """
        lanes = tuple(lanes) if isinstance(lanes, Iterable) else (lanes,)
        known = {**self.spec.sizes, **(sizes or {}), **dims}
        check_sizes(self.spec, batch, lanes, known, dtype)
        call = Call({}, {}, known, (batch,), lanes, dtype, dtype, torch.device(device or "cpu"))
        state = self._start(call)
        for slot in self.spec.inputs:
            if slot.name in self.spec.taps:
                width = (batch, self.spec.taps[slot.name], *lanes, *(known[d] for d in slot.dims))
                state[f"{slot.name}_tail"] = torch.zeros(width, dtype=call.of_kind(slot.kind), device=call.device)
        return state

    def fold(
        self, *args: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None, **kwargs: Tensor
    ) -> State:
        """The product of all tokens' elements, every component, [B, *lanes, *dims]: what segments and ranks exchange.

        No tokens give the identity; taps read 0 before the first. Raises ArgumentError, too, if there is no such thing.
        """
        if self.fold_order != "scan":
            raise ArgumentError(f"PSM607: {self.spec.name} is not associative: tokens have no product of their own.")
        call = bind_call(self.spec, args, kwargs, tokens=True)
        mask = check_flags(self.spec, "mask", mask, call)
        cu_seqlens = check_cu_seqlens(self.spec, cu_seqlens, call)
        if self.checks:
            check_values(self.spec, call, mask, cu_seqlens)
        lags, _ = tap_tokens(self.spec, call, None, mask, None, cu_seqlens)
        rules = SimpleNamespace(**{k: v for k, v in vars(self.rules).items() if k != "start"})
        x, p = prepared(self.spec, call, lags)
        return run_scan(self.spec, rules, call, "scan", x, p, None, mask, None, cu_seqlens, whole=True)[1]

    def _learn_step(self, call: Call, state: State, slots: Tensor | None) -> None:
        if self._calls is not None:
            self._calls.learn_step([*call.inputs.values(), *call.params.values()], call, state, slots)

    def _checked(self, call: Call, state: Mapping[str, Tensor] | None, rows: int) -> State | None:
        check = check_counter if self.fold_order == "tree" else check_state
        return check(self.spec, call, state, rows)

    def _begin(self, call: Call) -> State:
        """What each component starts from, [*dims]."""
        return start_state(self.spec, self.rules, call, tuple(s.name for s in self.spec.components))

    def _start(self, call: Call) -> State:
        """Before any token; tails apart."""
        if self.fold_order == "tree":
            return counter_start(call.leading[0])
        slots = {s.name: s for s in self.spec.components}
        begin = start_state(self.spec, self.rules, call, self.spec.live)
        return {k: as_state(v, slots[k], call, call.leading[:1]).clone() for k, v in begin.items()}

    def _push_rows(self, state: State, slots: Tensor, *args: Tensor, **kwargs: Tensor) -> Any:
        """`step_` of some streams of a tree, which may be at positions of their own."""
        names = tail_names(self.spec)
        rows: list[int] = slots.tolist()
        counter = {k: x for k, x in state.items() if k not in names}
        tails = {k: x.index_select(0, slots) for k, x in state.items() if k in names}
        out, after = self.step({**counter_rows([(counter, r) for r in rows]), **tails}, *args, **kwargs)
        pushed = {r: i for i, r in enumerate(rows)}
        streams = range(counter["position"].shape[0])
        moved = {k: x for k, x in after.items() if k not in names}
        kept = counter_rows([(moved, pushed[r]) if r in pushed else (counter, r) for r in streams])
        for name in names:
            kept[name] = state[name].index_copy_(0, slots, after[name].to(state[name].dtype))
        state.clear()
        state.update(kept)
        return out
