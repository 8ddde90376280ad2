"""Calls of the tree kernels: stages of blocks and their buffers; launches up the stages, then down again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psmc.runtime.kit_lanes import LaneShape, _plain, _power_of_two, real_dtype


class TreeSlot(NamedTuple):
    """A tensor of the spec. `lanes`: its dims that are lanes; `rank`: of all its dims; `axes`, `sizes`: those among
    them that are written out, which lie last in memory, as one axis [F]."""

    name: str
    lanes: tuple[str, ...]
    kind: str
    rank: int
    axes: tuple[int, ...]
    sizes: tuple[int, ...]


class TreeKernels:
    """The kernels of one spec behind tensors in the spec's own order, for whole sequences from their start.

    Inputs are [B, T, *lanes, *dims] (declared ones, then taps), params [*lanes, *dims] or [*dims]. `table` is what the
    compiler wrote: the kernels, and the places of the tensors that each takes. Nothing is saved for the backward, which
    computes the nodes again.
    """

    def __init__(self, table: Any) -> None:
        self.table = table
        self.interpreted: bool = table.interpreted

    def saved_components(self) -> tuple[str, ...]:
        return ()

    def saved_rows(self, tokens: int, rows: int) -> int:
        return 0

    def scan_forward(
        self, inputs: list[Tensor], params: list[Tensor], initial: None, code: None, cu: None, save: bool
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Outputs [B, T, ...]; a tree's state is not made here, and nothing is saved."""
        call = TreeCall(self.table, inputs, params)
        dtype = real_dtype([*inputs, *params])
        outputs = [call.tokens(slot, dtype) for slot in self.table.outputs]
        if call.programs(0):
            above = call.prefixes(call.nodes())
            tensors, maps = call.arguments(self.table.token_inputs)
            call.launch("prefix", 0, [*tensors, *outputs, above[0]], maps)
        return [call.declared(x, slot) for x, slot in zip(outputs, self.table.outputs, strict=True)], [], []

    def scan_backward(
        self, d_outputs: list[Tensor], d_finals: list[Tensor], inputs: list[Tensor], params: list[Tensor],
        initial: None, saved: list[Tensor], code: None, cu: None,
    ) -> tuple[list[Tensor | None], list[Tensor | None], None]:  # fmt: skip
        """Gradients of inputs and params in their own shapes."""
        table, call = self.table, TreeCall(self.table, inputs, params)
        if not call.programs(0):
            return [torch.zeros_like(x) for x in inputs], [torch.zeros_like(x) for x in params], None
        nodes = call.nodes()
        above = call.prefixes(nodes)
        tensors, maps = call.arguments(table.back_inputs)
        cotangents = [_written(d_outputs[at], table.outputs[at]) for at in table.cotangents]
        grads: list[Any] = [
            call.tokens(table.inputs[at], call.gradient_dtype(at), whole) for at, whole in table.input_shares
        ]
        counts = [call.batch * call.blocks(stage) for stage in range(len(call.sizes))]
        sums = torch.empty((sum(counts), len(table.param_shares), call.lanes.count), device=call.device)

        def back(stage: int, given: list[Any], results: list[Any], out: list[Any], whole: bool) -> None:
            name, lane_maps = ("upper_backward", call.param_maps) if stage else ("backward", maps)
            leaves: list[Any] = [nodes[stage], *call.params] if stage else tensors
            tail = (call.sizes[stage - 1] if stage else 0, sum(counts[:stage]))
            call.launch(name, stage, [*leaves, *given, above[stage], *results, *out, sums], lane_maps, tail, (whole,))

        top = len(call.sizes) - 1
        given: list[list[Any]] = [cotangents]
        for stage in range(top):  # upwards: cotangents of the prefixes of the stage above
            ends: list[Any] = [call.buffer(stage + 1), call.buffer(stage + 1)]
            back(stage, given[stage], [None, *ends], [None] * (len(grads) if stage == 0 else 1), False)
            given.append(ends)
        above_nodes: Tensor | None = None
        for stage in range(top, -1, -1):  # downwards: those of the nodes
            out = [call.buffer(stage)] if stage else grads
            back(stage, given[stage], [above_nodes, None, None], out, True)
            above_nodes = out[0] if stage else None
        d_inputs: list[Tensor | None] = [None] * len(inputs)
        for (at, _), g in zip(table.input_shares, grads, strict=True):
            d_inputs[at] = call.reduced(g, inputs[at], table.inputs[at], 2)
        return d_inputs, call.param_gradients(sums.sum(0)), None


class TreeCall:
    """One call's shapes and buffers. `sizes`: the nodes of each stage, less than a block in the last."""

    def __init__(self, table: Any, inputs: list[Tensor], params: list[Tensor]) -> None:
        self.table, self.inputs, self.given_params = table, inputs, params
        self.device = inputs[0].device
        self.batch, length = inputs[0].shape[:2]
        self.sizes = [length]
        while self.sizes[-1] >= table.size:
            self.sizes.append(self.sizes[-1] // table.size)
        rows = SimpleNamespace(
            dims=table.dims, inputs=[slot[:3] for slot in table.inputs], params=[slot[:3] for slot in table.params]
        )
        shapes = tuple(_lane_sizes(x, slot)[2:] for x, slot in zip(inputs, table.inputs, strict=True))
        own = tuple(_lane_sizes(p, slot) for p, slot in zip(params, table.params, strict=True))
        self.lanes = LaneShape(rows, shapes, own)
        slots = enumerate(zip(params, table.params, strict=True), len(inputs))
        ready = [self._ready(p, slot, at, 0) for at, (p, slot) in slots]
        self.params = [x for x, _ in ready]
        self.param_maps = [n for _, pair in ready for n in pair]

    def blocks(self, stage: int) -> int:
        size: int = self.table.size
        return -(-self.sizes[stage] // size)

    def programs(self, stage: int) -> int:
        return self.batch * self.blocks(stage) * self.lanes.count

    def arguments(self, places: Sequence[int]) -> tuple[list[Tensor], list[int]]:
        """These inputs and all params, and their lane maps."""
        ready = [self._ready(self.inputs[at], self.table.inputs[at], at, 2) for at in places]
        return [*(x for x, _ in ready), *self.params], [*(n for _, pair in ready for n in pair), *self.param_maps]

    def launch(
        self, name: str, stage: int, tensors: Sequence[Any], maps: Sequence[int], more: Sequence[int] = (),
        flags: Sequence[bool] = (),
    ) -> None:  # fmt: skip
        n, count = self.sizes[stage], self.lanes.count
        (largest,) = self.table.tiles["backward" if "backward" in name else "forward"][4]
        width = min(largest, _power_of_two(count))
        blocks = n // self.table.size if "roots" in name else self.blocks(stage)
        kernel = getattr(self.table, f"{name}_kernel")
        kernel[(self.batch * blocks * -(-count // width),)](
            *tensors, n, self.batch, count, *more, *maps, *flags, width, num_warps=max(1, width // 32)
        )

    def nodes(self) -> list[Tensor | None]:
        """The nodes of each stage above the tokens, [scalar, B, n, C]."""
        found: list[Tensor | None] = [None]
        tensors, maps = self.arguments(self.table.lift_inputs)
        for stage in range(1, len(self.sizes)):
            found.append(self.buffer(stage))
            if stage == 1:
                self.launch("roots", 0, [*tensors, found[1]], maps)
            else:
                self.launch("upper_roots", stage - 1, [found[stage - 1], *self.params, found[stage]], self.param_maps)
        return found

    def prefixes(self, nodes: list[Tensor | None]) -> list[Tensor | None]:
        """For each stage the prefixes of the stage above."""
        above: list[Tensor | None] = [None] * len(self.sizes)
        for stage in range(len(self.sizes) - 1, 0, -1):
            above[stage - 1] = self.buffer(stage)
            tensors = [nodes[stage], *self.params, above[stage - 1], above[stage]]
            self.launch("upper_prefix", stage, tensors, self.param_maps)
        return above

    def buffer(self, stage: int) -> Tensor:
        shape = (self.table.scalars, self.batch, self.sizes[stage], self.lanes.count)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def tokens(self, slot: TreeSlot, dtype: torch.dtype, whole: bool = True) -> Tensor:
        """A buffer [B, T, *lanes, F]; `whole`: kernels write all of it."""
        shape = (self.batch, self.sizes[0], *self.lanes.full, *([math.prod(slot.sizes)] if slot.axes else []))
        return (torch.empty if whole else torch.zeros)(shape, dtype=dtype, device=self.device)

    def gradient_dtype(self, at: int) -> torch.dtype:
        """fp32 where an input's gradient has to be summed."""
        return self.inputs[at].dtype if self.lanes.maps[at] == (1, 1) else torch.float32

    def declared(self, x: Tensor, slot: TreeSlot) -> Tensor:
        """[.., lanes, F] with its dims in the order of the spec."""
        if not slot.axes:
            return x
        x = x.unflatten(-1, slot.sizes)
        front = x.dim() - slot.rank
        return x.movedim(list(range(-len(slot.axes), 0)), [front + a for a in slot.axes]).contiguous()

    def reduced(self, grad: Tensor, like: Tensor, slot: TreeSlot, lead: int) -> Tensor:
        """A gradient in all lanes summed to the shape and dtype of its tensor."""
        if not slot.axes:
            plain: Tensor = self.lanes.reduced(grad, like, slot.lanes, lead)
            return plain
        front = like.dim() - slot.rank
        last = list(range(-len(slot.axes), 0))
        own = like.movedim([front + a for a in slot.axes], last).flatten(-len(slot.axes)).movedim(-1, 0)
        found: Tensor = self.lanes.reduced(grad.movedim(-1, 0), own, slot.lanes, lead + 1)
        found = found.movedim(0, -1).unflatten(-1, slot.sizes)
        return found.movedim(last, [front + a for a in slot.axes])

    def param_gradients(self, sums: Tensor) -> list[Tensor | None]:
        """From a row of lanes for each scalar that has a share."""
        found: list[Tensor | None] = []
        for place, (p, slot) in enumerate(zip(self.given_params, self.table.params, strict=True)):
            whole = sums.new_zeros((math.prod(slot.sizes), self.lanes.count))
            rows = [(at, n) for n, (owner, at) in enumerate(self.table.param_shares) if owner == place]
            for at, n in rows:
                whole[at] = sums[n]
            if not rows:
                found.append(None)
                continue
            full = whole.reshape(-1, *self.lanes.full).movedim(0, -1)
            found.append(self.reduced(full if slot.axes else full[..., 0], p, slot, 0))
        return found

    def _ready(self, x: Tensor, slot: TreeSlot, at: int, lead: int) -> tuple[Tensor, tuple[int, int]]:
        """A tensor as the kernels take it, and its lane map."""
        x, lane_map = _written(x, slot), self.lanes.maps[at]
        if lane_map is None:
            tail = x.shape[-1:] if slot.axes else ()
            x = x.reshape(*x.shape[:lead], *(own for _, own in self.lanes.axes[at]), *tail)
            x = x.expand(*x.shape[:lead], *(full for full, _ in self.lanes.axes[at]), *tail).contiguous()
        return x, lane_map or (1, 1)


def _written(x: Tensor, slot: TreeSlot) -> Tensor:
    """Contiguous, with its written-out dims last and flat."""
    if not slot.axes:
        return _plain(x)
    front = x.dim() - slot.rank
    last = list(range(-len(slot.axes), 0))
    return _plain(x.movedim([front + a for a in slot.axes], last).flatten(-len(slot.axes)))


def _lane_sizes(x: Tensor, slot: TreeSlot) -> tuple[int, ...]:
    """The shape without written-out dims."""
    front = x.dim() - slot.rank
    return tuple(n for a, n in enumerate(x.shape) if a - front not in slot.axes)
