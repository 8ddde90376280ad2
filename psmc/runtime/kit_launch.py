"""Calls of the pointwise kernels: shapes to grids and tiles, buffers, one launch (three where time is split)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_ahead import Compiling, _ghost, _processors, compiling_ahead
from psmc.runtime.kit_calls import Kernel, Launch
from psmc.runtime.kit_lanes import LaneShape, _plain, real_dtype
from psmc.runtime.kit_step import Steps

_SHAPES = 1024  # remembered shapes
_DTYPES = {"real": torch.float32, "complex": torch.complex64, "int": torch.int64, "bool": torch.bool}


class PointwiseKernels(Compiling):
    """The kernels of one spec behind tensors in the spec's own order.

    Inputs are [B, T, *lanes, *dims] (declared ones, then taps), params [*lanes, *dims] or [*dims], states
    [N, *lanes, *dims]; lanes of size 1 and grouped ones need not be expanded. `table` is what the compiler wrote: the
    kernels, and the places of the tensors that each takes. `processors` is the GPU's number of multiprocessors.
    """

    def __init__(self, table: Any, exact: bool = False) -> None:
        """`exact`: outputs are in the dtype of the state, whatever that of the inputs."""
        self.table, self.exact = table, exact
        self.interpreted: bool = table.interpreted
        self.processors: int | None = 1 if self.interpreted else None
        self.segment_tiles = 8  # a segment has at least as many
        self.kernels = {k.removesuffix("_kernel"): Kernel(v) for k, v in vars(table).items() if k.endswith("_kernel")}
        self._plans: dict[Any, Any] = {}
        self._families: dict[Any, Any] = {}
        self._lanes: dict[Any, LaneShape] = {}
        self._tuned: Any = None

    def saved_components(self) -> tuple[str, ...]:
        """The live components whose values `scan_forward` saves."""
        return tuple(self.table.live[c][0] for c in self.table.saved)

    def saved_rows(self, tokens: int, rows: int) -> int:
        """How many states are kept of so many tokens in `rows` sequences: one before every `every` tokens (of token t,
        in sequence n, at row t // every + n), and those before what is left over, `every` to a sequence, at the end."""
        every: int = self.table.every
        return tokens // every + rows * (1 + every)

    def scan_forward(
        self, inputs: list[Tensor], params: list[Tensor], initial: list[Tensor] | None, code: Tensor | None,
        cu: Tensor | None, save: bool,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        """Outputs [B, T, ...], the state after the last token [N, ...], and saved components [saved_rows, ...]."""
        plan = self._planned(self._forward_plan, inputs, params, initial, code is not None, cu, save)
        device = inputs[0].device
        outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.outputs]
        finals = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.finals]
        saved = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.saved]
        if plan.launch is not None:
            table = self.table
            args = plan.lanes.tensors(table.forward, inputs, params)
            begin = plan.nothing if initial is None else [_plain(x) for x in initial]
            offsets = _no_offsets(device) if cu is None else cu
            kinds = self._kinds(plan, code, offsets)
            carry = [finals[c] for c in table.live_owners]  # read only where there are segments
            if plan.folds is not None:
                carry = self._carries(plan, inputs, params, begin, kinds, offsets)
            kept = [None if at is None else saved[at] for at in plan.kept]
            plan.launch(*args, *outputs, *kept, *begin, *finals, *carry, kinds, offsets)
        return outputs, finals, saved

    def scan_backward(
        self, d_outputs: list[Tensor], d_finals: list[Tensor], inputs: list[Tensor], params: list[Tensor],
        initial: list[Tensor] | None, saved: list[Tensor], code: Tensor | None, cu: Tensor | None,
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None] | None]:  # fmt: skip
        """Gradients of inputs and params in their own shapes, and of the initial state; None where there is none."""
        table = self.table
        plan = self._planned(self._backward_plan, inputs, params, initial, code is not None, cu, True)
        device = inputs[0].device
        d_inputs: list[Tensor | None] = [None] * len(inputs)
        d_params: list[Tensor | None] = [None] * len(params)
        d_initial: list[Tensor | None] | None = None
        if initial is not None:
            d_initial = [torch.empty_like(x, memory_format=torch.contiguous_format) if place in table.smooth else None
                         for place, x in enumerate(initial)]  # fmt: skip
        if plan.launch is None:
            zeros = [torch.zeros_like(x) for x in inputs], [torch.zeros_like(x) for x in params]
            return [*zeros[0]], [*zeros[1]], d_initial

        offsets = _no_offsets(device) if cu is None else cu
        kinds = self._kinds(plan, code, offsets)
        args = plan.lanes.tensors(table.backward, inputs, params)
        cotangents = [_plain(d_outputs[o]) for o in table.backward[2]]
        ends = [_plain(d_finals[c]) for c in table.smooth]
        firsts = [None if d_initial is None else d_initial[c] for c in table.smooth]
        whole = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.whole]
        parts = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.parts]
        carry = [ends[c] for c in table.smooth_owners]  # read only where there are segments
        if plan.folds is not None:
            carry = self._backward_carries(plan, inputs, params, d_outputs, saved, ends, kinds, offsets)
        tensors = [*cotangents, *saved, *ends, *firsts, *whole, *parts]
        plan.launch(*args, *tensors, *carry, kinds, offsets)
        for x, g in zip(table.input_shares, whole, strict=True):
            d_inputs[x] = plan.lanes.reduced(g, inputs[x], table.inputs[x][1], 2)
        for p, g in zip(table.param_shares, parts, strict=True):
            d_params[p] = plan.lanes.reduced(g.sum(0), params[p], table.params[p][1], 0)
        return d_inputs, d_params, d_initial

    def steps(self, inputs: int) -> Steps:
        """The step kernel, for a spec with so many inputs."""
        return Steps(tuple(name for name, _ in self.table.live), inputs, self.table, self.kernels["step"])

    # --- what a shape fixes

    def _planned(
        self, make: Callable[..., Any], inputs: Sequence[Tensor], params: Sequence[Tensor],
        initial: Sequence[Tensor] | None, flagged: bool, cu: Tensor | None, save: bool,
    ) -> Any:  # fmt: skip
        """The plan of a call's shapes. The second shape of a kind of call is the sign that shapes vary: from then on a
        split of time, which long sequences of few lanes need, must not wait for the compiler."""
        tuned = self.table.tiles, self.processors, self.segment_tiles, self.table.every
        if tuned != self._tuned:
            self._plans.clear()
            self._families.clear()
            self._tuned = tuned
        starts = None if initial is None else tuple([x.dtype for x in initial])
        kind = make.__name__, starts, flagged, save
        packed = 0 if cu is None else cu.shape[0]
        key = (
            kind,
            packed,
            cu is None or cu.dtype,
            *[(x.shape, x.dtype, x.device) for x in inputs],
            *[(p.shape, p.dtype) for p in params],
        )
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _SHAPES:
                self._plans.clear()
            batch, length = inputs[0].shape[:2]
            rows = batch if cu is None else packed - 1
            plan = self._plans[key] = make(inputs, params, initial is not None, flagged, rows, length, packed > 0, save)
            if inputs[0].device.type == "meta":
                return plan
            family = (kind, *[(x.shape[2:], x.dtype) for x in inputs], *[(p.shape, p.dtype) for p in params])
            self._families[family] = count = self._families.get(family, 0) + 1
            if plan.launch is None:
                return plan
            if count == 2:
                self._warm(make, plan, inputs, params, initial is not None, flagged)
            elif count == 1 and make == self._forward_plan and self.compiles(inputs[0].device):
                self._ahead(inputs, params, initial, flagged, cu, save)
        return plan

    def _ahead(
        self, inputs: Sequence[Tensor], params: Sequence[Tensor], initial: Sequence[Tensor] | None, flagged: bool,
        cu: Tensor | None, save: bool,
    ) -> None:  # fmt: skip
        """Has threads compile what a call launches, and its backward, if something is saved for one."""
        with compiling_ahead(inputs[0].device):
            xs, ps = ([_ghost(x) for x in part] for part in (inputs, params))
            code = torch.empty(inputs[0].shape[:2], dtype=torch.int8, device="meta") if flagged else None
            offsets = None if cu is None else _ghost(cu)
            begin = None if initial is None else [_ghost(x) for x in initial]
            outputs, finals, saved = self.scan_forward(xs, ps, begin, code, offsets, save)
            if save:
                self.scan_backward(outputs, finals, xs, ps, begin, saved, code, offsets)

    def _basis(
        self, direction: str, inputs: Sequence[Tensor], params: Sequence[Tensor], initial: bool, flagged: bool,
        rows: int, length: int, packed: bool,
    ) -> SimpleNamespace:  # fmt: skip
        """What both directions have in common; `launch` is None if there is nothing to run."""
        lanes, device = self._shape(inputs, params), inputs[0].device
        joined, tokens = initial or self.table.counts, math.prod(inputs[0].shape[:2])
        basis = SimpleNamespace(
            lanes=lanes, rows=rows, length=length, joined=joined, launch=None, folds=None, kinds=None,
            numbers=None, segments=1, span=None, device=device, rest=tokens // self.table.every + rows,
        )  # fmt: skip
        if rows and lanes.count:
            span = basis.span = self._span(direction, lanes, rows, length, inputs)
            basis.segments = span.segments
            basis.numbers = (*span.numbers, int(packed), basis.rest)
            if flagged and not self.table.counts:
                basis.kinds = self.kernels["kind"].launch(rows, (length, int(packed)), (joined, 256), device)
        return basis

    def _forward_plan(
        self, inputs: Sequence[Tensor], params: Sequence[Tensor], initial: bool, flagged: bool, rows: int, length: int,
        packed: bool, save: bool,
    ) -> SimpleNamespace:  # fmt: skip
        table = self.table
        plan = self._basis("forward", inputs, params, initial, flagged, rows, length, packed)
        lanes, span = plan.lanes, plan.span
        real = {**_DTYPES, "real": self._real(inputs, params)}
        names = self.saved_components() if save else ()
        tokens = (*inputs[0].shape[:2], *lanes.full)
        plan.outputs = [(tokens, real[kind]) for _, kind in table.outputs]
        plan.finals = [((rows, *lanes.full), _DTYPES[kind]) for _, kind in table.live]
        kinds = dict(table.live)
        kept = (self.saved_rows(math.prod(tokens[:2]), rows), *lanes.full)
        plan.saved = [(kept, _DTYPES[kinds[name]]) for name in names]
        plan.kept = [names.index(name) if name in names else None for name, _ in table.live]
        plan.nothing = [None] * len(table.live)
        if span is not None:
            maps = lanes.flat_maps(table.forward)
            plan.launch = self.kernels["forward"].launch(
                span.programs * span.segments, plan.numbers, (*maps, lanes.count, plan.joined, table.every, *span.tile),
                plan.device, num_warps=span.warps,
            )  # fmt: skip
            plan.folds = self._fold_plan(plan) if span.segments > 1 else None
        return plan

    def _fold_plan(self, plan: SimpleNamespace) -> SimpleNamespace:
        table, span, lanes = self.table, plan.span, plan.lanes
        rows, segments = plan.rows, plan.segments
        return SimpleNamespace(
            folds=[((rows, segments, lanes.count), _DTYPES[k]) for k in table.element_scalars],
            carry=[((rows, segments + 1, lanes.count), _DTYPES[k]) for k in table.live_scalars],
            kinds=((rows, segments, lanes.count), torch.int8),
            fold=self.kernels["fold"].launch(
                span.programs * segments, plan.numbers, (*lanes.flat_maps(table.fold), lanes.count, *span.tile),
                plan.device, num_warps=span.warps,
            ),
            join=self._join("carry", plan, len(table.element_scalars), (plan.joined,)),
        )

    def _backward_plan(
        self, inputs: Sequence[Tensor], params: Sequence[Tensor], initial: bool, flagged: bool, rows: int, length: int,
        packed: bool, save: bool,
    ) -> SimpleNamespace:  # fmt: skip
        table = self.table
        plan = self._basis("backward", inputs, params, initial, flagged, rows, length, packed)
        lanes, span = plan.lanes, plan.span
        if span is not None:
            tokens = (*inputs[0].shape[:2], *lanes.full)
            plan.whole = []
            for x in table.input_shares:
                kind = table.inputs[x][2]
                summed = kind == "complex" or lanes.maps[x] != (1, 1)  # in fp32, as it has to be summed
                plan.whole.append((tokens, _DTYPES[kind] if summed else inputs[x].dtype))
            shape = (rows * span.segments, *lanes.full)
            plan.parts = [(shape, _DTYPES[table.params[p][2]]) for p in table.param_shares]
            maps = lanes.flat_maps(table.backward)
            plan.launch = self.kernels["backward"].launch(
                span.programs * span.segments, plan.numbers, (*maps, lanes.count, plan.joined, *span.tile), plan.device,
                num_warps=span.warps,
            )  # fmt: skip
            plan.folds = self._backward_fold_plan(plan) if span.segments > 1 else None
        return plan

    def _backward_fold_plan(self, plan: SimpleNamespace) -> SimpleNamespace:
        table, span, lanes = self.table, plan.span, plan.lanes
        shape = (plan.rows, plan.segments, lanes.count)
        return SimpleNamespace(
            folds=[(shape, torch.float32)] * table.entries,
            carry=[(shape, torch.float32)] * table.smooth_scalars,
            kinds=(shape, torch.int8),
            fold=self.kernels["backward_fold"].launch(
                span.programs * span.segments, plan.numbers,
                (*lanes.flat_maps(table.backward_fold), lanes.count, plan.joined, *span.tile), plan.device,
                num_warps=span.warps,
            ),
            join=self._join("backward_carry", plan, table.entries, ()),
        )  # fmt: skip

    def _join(self, kernel: str, plan: SimpleNamespace, scalars: int, constants: tuple[Any, ...]) -> Launch:
        """The scan of the segments' products, so many scalars each, by programs of few lanes."""
        count = plan.lanes.count
        rows, chunks, width, warps = (2, 2, 2, 1) if self.interpreted else (8, 128, 4, 8)
        while chunks > 16 and chunks * scalars > 512:
            chunks //= 2
        grid = plan.rows * -(-count // width)
        return self.kernels[kernel].launch(
            grid, plan.numbers, (count, *constants, rows, chunks, width), plan.device, num_warps=warps
        )

    def _warm(
        self, make: Callable[..., Any], plan: SimpleNamespace, inputs: Sequence[Tensor], params: Sequence[Tensor],
        initial: bool, flagged: bool,
    ) -> None:  # fmt: skip
        """Compiles the kernels of a split of time; buffers of their own count as aligned."""
        table = self.table
        back = make == self._backward_plan
        found = (self._backward_fold_plan if back else self._fold_plan)(plan)
        folds, carry = [d for _, d in found.folds], [d for _, d in found.carry]
        kinds, offsets = torch.int8 if flagged else None, torch.int64
        states = [_DTYPES[kind] for _, kind in table.live]
        if back:
            _, _, outputs, used = table.backward_fold
            real = self._real(inputs, params)
            args = plan.lanes.tensors(table.backward_fold, inputs, params)
            args += [{**_DTYPES, "real": real}[table.outputs[o][1]] for o in outputs]
            args += [states[c] for c in used]
            begin = [states[c] for c in table.smooth]
        else:
            args = plan.lanes.tensors(table.fold, inputs, params)
            begin = [s if initial else None for s in states]
        found.fold.warm(*args, *folds, kinds, kinds, offsets)
        found.join.warm(*folds, *begin, *carry, kinds, offsets)

    def _real(self, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> torch.dtype:
        """Of the outputs."""
        return torch.float32 if self.exact else real_dtype([*inputs, *params])

    def _shape(self, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> LaneShape:
        key = (tuple(x.shape[2:] for x in inputs), tuple(p.shape for p in params))
        found = self._lanes.get(key)
        if found is None:
            if len(self._lanes) >= _SHAPES:
                self._lanes.clear()
            found = self._lanes[key] = LaneShape(self.table, *key)
        return found

    def _span(
        self, direction: str, lanes: LaneShape, rows: int, length: int, inputs: Sequence[Tensor]
    ) -> SimpleNamespace:
        """Tile, grid, and the split of time: programs enough to keep every multiprocessor loading."""
        wide = any(x.element_size() >= 4 and lanes.maps[at] == (1, 1) for at, x in enumerate(inputs))
        each_rows, width, warps, stages = self.table.tiles[direction][4 if wide else 2]
        every = self.table.every if self.table.saved else 1
        if direction == "backward" and every > 1:
            each_rows = every  # the states are run again from one that was kept
        while width > 64 and width >= 2 * lanes.count:
            width, warps = width // 2, max(1, warps // 2)
        tokens = max(each_rows, every)
        programs = rows * -(-lanes.count // width)
        processors = self.processors or _processors(inputs[0].device)
        segments, each = 1, length
        if programs * warps < processors:
            segments = min(-(-7 * processors // (programs * warps)), length // (self.segment_tiles * tokens))
            if segments > 3:
                each = -(-length // (segments * tokens)) * tokens
            segments = -(-length // each) if each else 1
            if segments > 1:
                warps = max(1, min(warps, width // 64))  # segments are threads enough
        return SimpleNamespace(
            tile=(each_rows, width, max(1, width // (32 * warps)), stages), warps=warps, programs=programs,
            segments=segments, numbers=(length, segments, each),
        )  # fmt: skip

    # --- launches beside the main one

    def _kinds(self, plan: SimpleNamespace, code: Tensor | None, offsets: Tensor) -> Tensor | None:
        """Kinds of tokens: `code`, with the tokens marked that have nothing before them."""
        if code is None or plan.kinds is None:
            return code
        kinds = torch.empty_like(code, memory_format=torch.contiguous_format)
        plan.kinds(code.contiguous(), kinds, offsets)
        return kinds

    def _carries(
        self, plan: SimpleNamespace, inputs: list[Tensor], params: list[Tensor], begin: Sequence[Tensor | None],
        kinds: Tensor | None, offsets: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """What is before each segment, [N, S + 1, C] a live scalar."""
        folds, carry, fold_kinds = _buffers(plan.folds, kinds, offsets.device)
        args = plan.lanes.tensors(self.table.fold, inputs, params)
        plan.folds.fold(*args, *folds, fold_kinds, kinds, offsets)
        plan.folds.join(*folds, *begin, *carry, fold_kinds, offsets)
        return carry

    def _backward_carries(
        self, plan: SimpleNamespace, inputs: list[Tensor], params: list[Tensor], d_outputs: list[Tensor],
        saved: list[Tensor], ends: list[Tensor], kinds: Tensor | None, offsets: Tensor,
    ) -> list[Tensor]:
        """The cotangents after each segment, [N, S, C] a live scalar."""
        folds, carry, cuts = _buffers(plan.folds, kinds, offsets.device)
        args = plan.lanes.tensors(self.table.backward_fold, inputs, params)
        _, _, outputs, used = self.table.backward_fold
        tensors = [*(_plain(d_outputs[o]) for o in outputs), *(saved if used else ())]
        plan.folds.fold(*args, *tensors, *folds, cuts, kinds, offsets)
        plan.folds.join(*folds, *ends, *carry, cuts, offsets)
        return carry


def _buffers(
    folds: SimpleNamespace, kinds: Tensor | None, device: torch.device
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    made = ([torch.empty(s, dtype=d, device=device) for s, d in group] for group in (folds.folds, folds.carry))
    flags = None if kinds is None else torch.empty(folds.kinds[0], dtype=folds.kinds[1], device=device)
    return next(made), next(made), flags


_OFFSETS: dict[torch.device, Tensor] = {}


def _no_offsets(device: torch.device) -> Tensor:
    """In place of cu_seqlens where there is none: packed or not, the same kernel runs."""
    found = _OFFSETS.get(device)
    if found is None:
        found = _OFFSETS[device] = torch.empty(0, dtype=torch.int64, device=device)
    return found
