"""Calls of the pointwise kernels: shapes to grids and tiles, buffers, one launch (three where time is split)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_lanes import LaneShape, _empty, _plain, _power_of_two, _processors, _real, real_dtype

_SHAPES = 256  # remembered shapes


class PointwiseKernels:
    """The kernels of one spec behind tensors in the spec's own order.

    Inputs are [B, T, *lanes, *dims] (declared ones, then taps), params [*lanes, *dims] or [*dims], states
    [N, *lanes, *dims]; lanes of size 1 and grouped ones need not be expanded. `table` is what the compiler wrote: the
    kernels, and the places of the tensors that each takes. `processors` is the GPU's number of multiprocessors.
    """

    def __init__(self, table: Any) -> None:
        self.table = table
        self.interpreted: bool = table.interpreted
        self.processors: int | None = 1 if self.interpreted else None
        self.segment_tiles = 16  # a segment has at least as many
        self._lanes: dict[Any, LaneShape] = {}

    def saved_components(self, dtype: torch.dtype, flagged: bool = False) -> tuple[str, ...]:
        """The live components that `scan_forward` saves beside outputs of that dtype; `flagged`: with a mask or resets
        (then an output is 0 at masked tokens, and does not stand for the state)."""
        reused = [] if flagged else [c for c, _, always in self.table.reused if always or dtype == torch.float32]
        return tuple(self.table.live[c][0] for c in self.table.backward[3] if c not in reused)

    def scan_forward(
        self, inputs: list[Tensor], params: list[Tensor], initial: list[Tensor] | None, code: Tensor | None,
        cu: Tensor | None, save: bool,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        """Outputs [B, T, ...], the state after the last token [N, ...], and saved components [B, T, ...]."""
        table, lanes = self.table, self._shape(inputs, params)
        batch, length = inputs[0].shape[:2]
        rows = batch if cu is None else cu.numel() - 1
        dtype = real_dtype([*inputs, *params])
        device = inputs[0].device
        outputs = [_empty((batch, length, *lanes.full), kind, dtype, device) for _, kind in table.outputs]
        finals = [_empty((rows, *lanes.full), kind, torch.float32, device) for _, kind in table.live]
        names = self.saved_components(dtype, code is not None) if save else ()
        saved = {
            name: _empty((batch, length, *lanes.full), kind, torch.float32, device)
            for name, kind in table.live if name in names
        }  # fmt: skip
        if rows and lanes.count:
            args, maps = lanes.arguments(table.forward, inputs, params)
            begin = [None] * len(table.live) if initial is None else [_plain(x) for x in initial]
            joined = initial is not None or table.counts
            kinds = self._kinds(code, cu, rows, length, joined)
            span = self._span("forward", lanes, rows, length, inputs)
            carry: list[Tensor | None] = [None] * len(table.live_scalars)
            if span.segments > 1:
                carry = self._carries(span, lanes, inputs, params, begin, kinds, cu, joined)
            tensors = [*outputs, *(saved.get(name) for name, _ in table.live), *begin, *finals]
            table.forward_kernel[span.grid](
                *args, *map(_real, tensors), *carry, kinds, cu, *span.numbers, *maps, joined, span.even, *span.tile,
                num_warps=span.warps,
            )  # fmt: skip
        return outputs, finals, [saved[name] for name in names]

    def scan_backward(
        self, d_outputs: list[Tensor], d_finals: list[Tensor], inputs: list[Tensor], params: list[Tensor],
        initial: list[Tensor] | None, outputs: list[Tensor], saved: list[Tensor], code: Tensor | None,
        cu: Tensor | None,
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None] | None]:  # fmt: skip
        """Gradients of inputs and params in their own shapes, and of the initial state; None where there is none."""
        table, lanes = self.table, self._shape(inputs, params)
        batch, length = inputs[0].shape[:2]
        rows = batch if cu is None else cu.numel() - 1
        device = inputs[0].device
        d_inputs: list[Tensor | None] = [None] * len(inputs)
        d_params: list[Tensor | None] = [None] * len(params)
        d_initial: list[Tensor | None] | None = None
        if initial is not None:
            d_initial = [torch.empty_like(x, memory_format=torch.contiguous_format) if place in table.smooth else None
                         for place, x in enumerate(initial)]  # fmt: skip
        if not (rows and lanes.count):
            zeros = [torch.zeros_like(x) for x in inputs], [torch.zeros_like(x) for x in params]
            return [*zeros[0]], [*zeros[1]], d_initial

        names = self.saved_components(real_dtype([*inputs, *params]), code is not None)
        kept = dict(zip(names, saved, strict=True))
        states = {c: outputs[o] for c, o, _ in table.reused}
        states = {c: kept[name] if (name := table.live[c][0]) in kept else states[c] for c in table.backward[3]}
        joined = initial is not None or table.counts
        kinds = self._kinds(code, cu, rows, length, joined)
        span = self._span("backward", lanes, rows, length, inputs)
        args, maps = lanes.arguments(table.backward, inputs, params)
        cotangents = [_plain(d_outputs[o]) for o in table.backward[2]]
        begin = [None if initial is None else _plain(initial[c]) for c in table.backward[3]]
        ends = [_plain(d_finals[c]) for c in table.smooth]
        firsts = [None if d_initial is None else d_initial[c] for c in table.smooth]
        whole = {x: self._gradient(inputs[x], table.inputs[x][2], lanes.maps[x], (batch, length, *lanes.full))
                 for x in table.input_shares}  # fmt: skip
        parts = {p: _empty((rows * span.segments, *lanes.full), table.params[p][2], torch.float32, device)
                 for p in table.param_shares}  # fmt: skip
        carry: list[Tensor | None] = [None] * table.smooth_scalars
        if span.segments > 1:
            carry = self._backward_carries(span, lanes, inputs, params, d_outputs, states, initial, ends, kinds, cu)
        tensors = [*cotangents, *states.values(), *begin, *ends, *firsts, *whole.values(), *parts.values()]
        table.backward_kernel[span.grid](
            *args, *map(_real, tensors), *carry, kinds, cu, *span.numbers, *maps, joined, *span.tile,
            num_warps=span.warps,
        )  # fmt: skip
        for x, g in whole.items():
            d_inputs[x] = lanes.reduced(g, inputs[x], table.inputs[x][1], 2)
        for p, g in parts.items():
            d_params[p] = lanes.reduced(g.sum(0), params[p], table.params[p][1], 0)
        return d_inputs, d_params, d_initial

    def step_in_place(
        self, state: list[Tensor], inputs: list[Tensor], params: list[Tensor], slots: Tensor | None
    ) -> list[Tensor]:
        """The outputs of one token, inputs [B, ...]: row b (or slots[b]) of `state` [rows, ...] moves on in place."""
        table = self.table
        batch = inputs[0].shape[0]
        tokens = [x.unsqueeze(1) for x in inputs]
        lanes = self._shape(tokens, params)
        dtype = real_dtype([*inputs, *params])
        outputs = [_empty((batch, *lanes.full), kind, dtype, inputs[0].device) for _, kind in table.outputs]
        if batch and lanes.count:
            args, maps = lanes.arguments(table.forward, tokens, params)
            block = min(1024, _power_of_two(lanes.count))
            vector = math.gcd(lanes.count, 4)
            table.step_kernel[(batch * -(-lanes.count // block),)](
                *args, *map(_real, outputs), *map(_real, state), slots, lanes.count // vector, *maps, block, vector
            )
        return outputs

    # --- pieces

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
        each_rows, chunks, width, warps, stages, vector = self.table.tiles[direction][4 if wide else 2]
        while width > 1 and width >= 2 * lanes.count:
            width, chunks = width // 2, min(2 * chunks, 64)
        tokens, vector = each_rows * chunks, math.gcd(vector, lanes.count)
        programs = rows * -(-lanes.count // width)
        processors = self.processors or _processors(inputs[0].device)
        segments, each = 1, length
        if programs < 2 * processors:
            segments = min(-(-4 * processors // programs), length // (self.segment_tiles * tokens))
            if segments > 3:
                each = -(-length // (segments * tokens)) * tokens
            segments = -(-length // each) if each else 1
        return SimpleNamespace(
            tile=(each_rows, chunks, width, vector, stages), warps=warps, programs=programs, segments=segments,
            grid=(programs * segments,), numbers=(length, lanes.count // vector, segments, each),
            even=lanes.count % width == 0,
        )  # fmt: skip

    def _kinds(self, code: Tensor | None, cu: Tensor | None, rows: int, length: int, joined: bool) -> Tensor | None:
        """Kinds of tokens: `code`, with the tokens marked that have nothing before them."""
        if code is None or self.table.counts:
            return code
        kinds = torch.empty_like(code, memory_format=torch.contiguous_format)
        self.table.kind_kernel[(rows,)](code.contiguous(), kinds, cu, length, joined, 256)
        return kinds

    def _carries(
        self, span: SimpleNamespace, lanes: LaneShape, inputs: list[Tensor], params: list[Tensor],
        begin: Sequence[Tensor | None], kinds: Tensor | None, cu: Tensor | None, joined: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        """What is before each segment, [N, S + 1, C] a live scalar."""
        table, device = self.table, inputs[0].device
        rows = span.programs // -(-lanes.count // span.tile[2])
        folds = [_empty((rows, span.segments, lanes.count), k, torch.float32, device) for k in table.element_scalars]
        carry = [_empty((rows, span.segments + 1, lanes.count), k, torch.float32, device) for k in table.live_scalars]
        fold_kinds = None
        if kinds is not None:
            fold_kinds = torch.empty((rows, span.segments, lanes.count), dtype=torch.int8, device=device)
        args, maps = lanes.arguments(table.fold, inputs, params)
        table.fold_kernel[span.grid](
            *args, *folds, fold_kinds, kinds, cu, *span.numbers, *maps, *span.tile, num_warps=span.warps
        )
        table.carry_kernel[(span.programs,)](
            *folds, *map(_real, begin), *carry, fold_kinds, cu, *span.numbers, joined, *span.tile, num_warps=span.warps
        )
        return [*carry]

    def _backward_carries(
        self, span: SimpleNamespace, lanes: LaneShape, inputs: list[Tensor], params: list[Tensor],
        d_outputs: list[Tensor], states: dict[int, Tensor], initial: list[Tensor] | None, ends: list[Tensor],
        kinds: Tensor | None, cu: Tensor | None,
    ) -> list[Tensor | None]:  # fmt: skip
        """The cotangents after each segment, [N, S, C] a live scalar."""
        table, device = self.table, inputs[0].device
        rows = span.programs // -(-lanes.count // span.tile[2])
        shape = (rows, span.segments, lanes.count)
        folds = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(table.entries)]
        carry = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(table.smooth_scalars)]
        cuts = None if kinds is None else torch.empty(shape, dtype=torch.int8, device=device)
        args, maps = lanes.arguments(table.backward_fold, inputs, params)
        _, _, outputs, used = table.backward_fold
        begin = [None if initial is None else _plain(initial[c]) for c in used]
        tensors = [*(_plain(d_outputs[o]) for o in outputs), *(states[c] for c in used), *begin]
        table.backward_fold_kernel[span.grid](
            *args, *map(_real, tensors), *folds, cuts, kinds, cu, *span.numbers, *maps, *span.tile, num_warps=span.warps
        )
        table.backward_carry_kernel[(span.programs,)](
            *folds, *map(_real, ends), *carry, cuts, cu, *span.numbers, *span.tile, num_warps=span.warps
        )
        return [*carry]

    def _gradient(self, x: Tensor, kind: str, lane_map: tuple[int, int] | None, shape: tuple[int, ...]) -> Tensor:
        """A buffer for an input's gradient in all lanes; fp32 if it has to be summed."""
        dtype = torch.float32 if kind == "complex" or lane_map != (1, 1) else x.dtype
        return _empty(shape, kind, dtype, x.device)
