"""One token at a time by the step kernel: what its shapes fix is worked out once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_calls import Kernel
from psmc.runtime.kit_lanes import LaneShape, _power_of_two, real_dtype


class StepPlan:
    """A step of one shape and layout: inputs [B, ...], params, and whether it moves the state in place."""

    def __init__(
        self, table: Any, kernel: Kernel, inputs: Sequence[Tensor], params: Sequence[Tensor], in_place: bool
    ) -> None:
        self.places: tuple[tuple[int, ...], tuple[int, ...]] = table.forward
        self.in_place = in_place
        self.batch = inputs[0].shape[0]
        lanes = self.lanes = LaneShape(table, tuple(x.shape[1:] for x in inputs), tuple(p.shape for p in params))
        real = real_dtype([*inputs, *params])
        dtypes = {"real": real, "complex": torch.complex64, "int": torch.int64, "bool": torch.bool}
        whole = (self.batch, *lanes.full)
        self.outputs = [(whole, dtypes[kind], _model(whole, dtypes[kind], inputs)) for _, kind in table.outputs]
        self.launch = None
        strides = {at: self._stride(at, inputs[at]) for at in self.places[0]}
        self.arguments = [(at, strides[at] is not None) for at in self.places[0]]
        for at in self.places[1]:
            place = len(inputs) + at
            self.arguments.append((place, self._stride(place, params[at]) is not None))
        if self.batch and lanes.count:
            rows = [self._width(at) if strides[at] is None else strides[at] for at in self.places[0]]
            vector = math.gcd(lanes.count, 4, *(n for n in rows if n is not None))
            block = min(1024, _power_of_two(lanes.count))
            numbers = [n // vector for n in (lanes.count, *rows) if n is not None]
            self.launch = kernel.launch(
                self.batch * -(-lanes.count // block),
                numbers,
                (*lanes.flat_maps(self.places), block, vector),
                inputs[0].device,
            )

    def _stride(self, at: int, x: Tensor) -> int | None:
        """Lanes from one row of an input to the next; None: it is read from a copy. Of a param, 0 or None."""
        lanes = self.lanes
        ready = lanes.maps[at] is not None and (lanes.kinds[at] == "complex") <= x.is_complex()
        if not ready or x.is_conj() or x.is_neg():
            return None
        if at >= lanes.inputs:
            return 0 if x.is_contiguous() else None
        if not x[:1].is_contiguous():
            return None
        return x.stride(0) if self.batch > 1 else self._width(at)

    def _width(self, at: int) -> int:
        """The lanes of a contiguous row."""
        own = self.lanes.maps[at]
        return self.lanes.count if own is None else math.prod(n for _, n in self.lanes.axes[at])

    def __call__(
        self, state: Sequence[Tensor], tensors: Sequence[Tensor], slots: Tensor | None
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        """The outputs of one token, and the state after it: row b (or slots[b]) of `state` [rows, ...] moves on.
        `tensors`: the inputs and params that this plan was made for, or others of their shapes and layouts."""
        device = tensors[0].device
        outputs = [
            torch.empty(shape, dtype=dtype, device=device) if like is None else torch.empty_like(tensors[like])
            for shape, dtype, like in self.outputs
        ]
        after = state if self.in_place else [torch.empty_like(s) for s in state]
        if self.launch is not None:
            args = [tensors[at] if ready else self._ready(at, tensors[at]) for at, ready in self.arguments]
            self.launch(*args, *outputs, *state, *after, slots)
        return outputs, after

    def _ready(self, at: int, x: Tensor) -> Tensor:
        return self.lanes.tensor(at, x, 1 if at < self.lanes.inputs else 0)


def _model(shape: tuple[int, ...], dtype: torch.dtype, inputs: Sequence[Tensor]) -> int | None:
    """An input that such a tensor can be made like: the quickest way to make one."""
    found = (at for at, x in enumerate(inputs) if x.shape == shape and x.dtype == dtype and x.is_contiguous())
    return next(found, None)


class Steps:
    """Plans of steps that passed all checks, by what the checks look at: the next such step goes straight to a kernel.

    `names`: the state's tensors, in the kernel's order; `inputs`: how many of the arguments are inputs.
    """

    def __init__(self, names: tuple[str, ...], inputs: int, table: Any, kernel: Kernel) -> None:
        self.names, self.inputs, self.table, self.kernel = names, inputs, table, kernel
        self._known: dict[Any, StepPlan] = {}

    def again(self, state: Any, args: Sequence[Any], slots: Any, in_place: bool) -> tuple[Any, Any] | None:
        """The outputs and the state after the token, if a step like this is known. None, too, if these tensors are not
        for the kernel: autograd watches, something traces."""
        if torch.compiler.is_compiling() or type(state) is not dict or len(state) != len(self.names):
            return None
        try:
            before = [state[name] for name in self.names]
        except KeyError:
            return None
        key: list[Any] = [in_place]
        for x in (*args, *before) if slots is None else (*args, *before, slots):
            kind = type(x)
            if kind is not Tensor and kind is not torch.nn.Parameter:
                return None
            if x.requires_grad and not in_place and torch.is_grad_enabled():
                return None
            key.append((x.shape, x.stride(), x.dtype, x.device, x.is_neg(), x.is_conj()))
        plan = self._known.get(tuple(key))
        return None if plan is None else self._run(plan, state, before, args, slots)

    def first(self, state: Any, args: Sequence[Any], slots: Tensor | None, in_place: bool) -> tuple[Any, Any]:
        """The same of a step that has just been checked."""
        before = [state[name] for name in self.names]
        inputs, params = args[: self.inputs], args[self.inputs :]
        plan = StepPlan(self.table, self.kernel, inputs, params, in_place)
        tensors = (*args, *before) if slots is None else (*args, *before, slots)
        if len(self._known) >= 256:
            self._known.clear()
        key = [(x.shape, x.stride(), x.dtype, x.device, x.is_neg(), x.is_conj()) for x in tensors]
        self._known[in_place, *key] = plan
        return self._run(plan, state, before, args, slots)

    def _run(
        self, plan: StepPlan, state: Any, before: list[Tensor], args: Sequence[Any], slots: Tensor | None
    ) -> tuple[Any, Any]:
        outputs, after = plan(before, args, slots)
        moved = state if plan.in_place else dict(zip(self.names, after, strict=False))
        return outputs[0] if len(outputs) == 1 else tuple(outputs), moved
