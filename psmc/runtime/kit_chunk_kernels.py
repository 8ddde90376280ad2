"""Calls of the chunk kernels: one matrix state per lane, its readout and its last state, with their gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from psmc.runtime.kit_chunk_layer import LayerFactors, matrix_layer, simple_layer
from psmc.runtime.kit_chunk_views import (
    Lanes,
    _block,
    _laid,
    _matrices,
    _multiprocessors,
    _places,
    _rows_of,
    _strides,
)

_PRECISION = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}


class ChunkKernels:
    """The kernels of the chunked plan. `table`: the kernels and `tiles`, which the compiler wrote."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.interpreted: bool = table.interpreted
        self.processors: int | None = 1 if self.interpreted else None

    def takes(self, key: int, value: int, device: torch.device) -> bool:
        """Whether there are kernels for this device and these sizes."""
        return self.runs_on(device) and 0 < key <= 256 and value > 0

    def runs_on(self, device: torch.device) -> bool:
        return device.type == "cuda" or self.interpreted

    def scan(
        self, q: Tensor, b: Tensor, c: Tensor, log: Tensor | None, start: Tensor | None, cu: Tensor | None = None,
        shift: int = 0, scale: float = 1.0, dtype: torch.dtype | None = None, number: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y_t = scale q_tᵀ S_(t - shift) [B, T, G, V] in `dtype` (q's), and the last state [N, G, K, V] in fp32.

        q, b [B, T, G, K], c [B, T, G, V]; log: log of the decay, None, [B, T, G] or [B, T, G, K]; start [N, G, K, V] or
        None; cu: N + 1 offsets of sequences in a batch of 1; number: [B, T, G], multiplies b (log not over K).
        Differentiable in q, b, c, log, start and number.
        """
        found: tuple[Tensor, Tensor] = _ChunkScan.apply(
            self, q, b, c, log, start, cu, shift, scale, dtype or q.dtype, number
        )  # type: ignore[no-untyped-call]
        return found

    def layer(
        self, call: Any, layer: Any, sizes: list[int], widths: list[int], found: dict[str, Tensor],
        start: Tensor | None, mask: Tensor | None, reset: Tensor | None, cu: Tensor | None,
    ) -> tuple[list[list[Tensor]], list[Tensor]] | None:  # fmt: skip
        """`matrix_layer` with these kernels."""
        return matrix_layer(self, call, layer, sizes, widths, found, start, mask, reset, cu)

    def step(
        self, call: Any, layer: Any, outer: list[int], found: dict[str, Tensor], states: list[Tensor],
        slots: Tensor | None,
    ) -> list[Tensor] | None:  # fmt: skip
        """One token, in place: each component's readout [B, 1, G, V] as its state [rows, G, K, V] moves on, in the rows
        that `slots` [B] names. None: not for the kernel."""
        f = LayerFactors(call, layer, tuple(outer), found, None, None)
        sides = [(n, shift) for n, shift in (("q0", 0), ("p0", 1)) if n in f]
        if not simple_layer(layer, f) or layer.columns != 1 or len(layer.reads) != 1 or len(sides) != 1:
            return None
        if not all(self.takes(s.shape[2], s.shape[3], s.device) and s.dtype == torch.float32 for s in states):
            return None
        name, shift = sides[0]
        dtype = call.dtype if all(p[0] in layer.shown for p in layer.reads[0].parts) else torch.float32
        q, b, log = _laid(f.rows(name)), _laid(f.rows("b0")), f.log()
        number = f.number(0)
        b = b if number is None else b * number.unsqueeze(-1)
        outputs = []
        for j, state in enumerate(states):
            c = _laid(f.rows(f"c0_{j}" if j else "c0", layer.vectors[j]))
            batch, _, lanes, key = q.shape
            value = state.shape[3]
            y = torch.empty(batch, 1, lanes, value, dtype=dtype, device=q.device)
            bk, bv = _block(key), min(_block(value), 64)
            kind = 0 if log is None else log.dim() - 2
            self.table.step[(batch * lanes * -(-value // bv),)](
                state, q, b, c, log, y, slots, *state.stride(), *_rows_of(q, b, c, log), lanes, f.scale(name), kind,
                shift, key, value, bk, bv, num_warps=4 if bk * bv >= 4096 else 1,
            )  # fmt: skip
            outputs.append(y)
        return outputs

    # --- launches

    def forward(
        self, q: Tensor, b: Tensor, c: Tensor, log: Tensor | None, start: Tensor | None, cu: Tensor | None, shift: int,
        scale: float, dtype: torch.dtype, number: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        how = self.plan("forward", q, b, c, log, cu)
        n = how.lanes
        y = torch.empty(n.batch, n.tokens, n.lanes, n.value, dtype=dtype, device=q.device)
        final = _matrices(n, n.sequences, q)
        if not n.batch * n.tokens * n.lanes:
            return y, final.zero_() if start is None else final.copy_(start)
        pairs = self._pairs(q, b, log, shift, how)
        begin, last = start, final
        if how.segments > 1:
            begin = self._starts(b, c, log, start, final, False, shift, 1.0, how, number)
            last = None  # type: ignore[assignment]
        grid = (n.sequences * n.lanes * how.segments * -(-n.value // how.bv),)
        self.table.forward[grid](
            q, b, c, log, number, pairs, begin, y, last, None, n.cu, n.first, *_strides(q, b, c, log, number), n.tokens,
            how.segments, how.segment, n.lanes, scale, how.decay, shift, how.precision, n.key, n.value, how.bt, how.bk,
            how.bv, how.stages, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        return y, final

    def backward(
        self, dy: Tensor, d_final: Tensor | None, q: Tensor, b: Tensor, c: Tensor, log: Tensor | None,
        start: Tensor | None, cu: Tensor | None, shift: int, scale: float, d_log: bool,
        number: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
        """Gradients of q, b, c, log (in fp32; None if not wanted), start and number (in fp32)."""
        how = self.plan("gradients", q, b, c, log, cu)
        n = how.lanes
        dq, db, dc = (
            torch.empty(n.batch, n.tokens, n.lanes, w, dtype=x.dtype, device=q.device)
            for x, w in ((q, n.key), (b, n.key), (c, n.value))
        )
        d_start = _matrices(n, n.sequences, q)
        dlog = torch.zeros(log.shape, dtype=torch.float32, device=q.device) if log is not None and d_log else None
        dn = None if number is None else torch.zeros(number.shape, dtype=torch.float32, device=q.device)
        if not dy.numel():
            return dq, db, dc, dlog, d_start.zero_() if d_final is None else d_final.float(), dn
        dy = dy.contiguous()
        states = self.states(b, c, log, start, None, False, shift, 1.0, cu, how.bt, number)
        costates = self.states(q, dy, log, d_final, d_start, True, shift, scale, cu, how.bt)
        pairs = self._pairs(q, b, log, shift, how)
        grid = (n.chunks * n.lanes,)
        shared = (n.tokens, n.lanes, scale)
        strides = _strides(q, b, c, log)
        kinds = (how.decay, shift, how.precision, n.key, n.value, how.bt, how.bk, how.bv, how.stages)
        self.table.gradients[grid](
            q, b, c, log, number, pairs, dy, states, costates, dq, db, dc, dlog, dn, n.cu, n.first, n.owner, *strides,
            *_places(number), *shared, *kinds,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        if how.decay == 2:
            inner = self.plan("inner", q, b, c, log, cu, how.bt)
            self.table.inner[grid](
                q, b, c, log, dy, dq, db, dlog, n.cu, n.first, n.owner, *strides, *shared, shift, how.precision, n.key,
                n.value, how.bt, how.bk, _block(n.value), 16, num_warps=inner.warps,
            )  # fmt: skip
        return dq, db, dc, dlog, d_start, dn

    def states(
        self, x: Tensor, z: Tensor, log: Tensor | None, start: Tensor | None, end: Tensor | None, back: bool,
        shift: int, scale: float, cu: Tensor | None, bt: int = 0, number: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The state before each chunk (behind it, if `back`), [chunks, G, K, V] as operands; into `end`: the last."""
        how = self.plan("states", x, x, z, log, cu, bt)
        n = how.lanes
        states = torch.empty(n.chunks, n.lanes, n.key, n.value, dtype=how.operand, device=x.device)
        if how.segments > 1:
            end = _matrices(n, n.sequences, x) if end is None else end
            start = self._starts(x, z, log, start, end, back, shift, scale, how, number)
            end = None
        self._walk(x, z, log, start, end, None, states, back, shift, scale, how, number)
        return states

    def _starts(
        self, x: Tensor, z: Tensor, log: Tensor | None, start: Tensor | None, last: Tensor, back: bool, shift: int,
        scale: float, how: SimpleNamespace, number: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """What each segment starts from, [N, S, G, K, V]; into `last`: where the last ends."""
        n = how.lanes
        ends, starts = (_matrices(n, n.sequences * how.segments, x) for _ in range(2))
        width = n.key if how.decay == 2 else 1
        left = torch.empty(n.sequences, how.segments, n.lanes, width, dtype=torch.float32, device=x.device)
        own = self.plan("states", x, x, z, log, n.cu, how.bt)
        own.segments, own.segment = how.segments, how.segment
        self._walk(x, z, log, None, ends, left, None, back, shift, scale, own, number)
        block = min(1024, _block(n.key * n.value))
        self.table.join[(n.sequences * n.lanes * -(-n.key * n.value // block),)](
            start, ends, left, starts, last, how.segments, n.lanes, back, how.decay, n.key, n.value, block
        )
        return starts

    def _walk(
        self, x: Tensor, z: Tensor, log: Tensor | None, start: Tensor | None, end: Tensor | None, left: Tensor | None,
        states: Tensor | None, back: bool, shift: int, scale: float, how: SimpleNamespace,
        number: Tensor | None,
    ) -> None:  # fmt: skip
        n = how.lanes
        bk = min(how.bk, how.bks)
        blocks = -(-n.key // bk) * -(-n.value // how.bv)
        self.table.states[(n.sequences * n.lanes * how.segments * blocks,)](
            x, z, log, number, start, end, left, states, n.cu, n.first, *_strides(x, z, log, number), n.tokens,
            how.segments, how.segment, n.lanes, scale, back, how.decay, shift, how.precision, n.key, n.value, how.bt,
            bk, how.bv, how.stages, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip

    def _pairs(self, q: Tensor, b: Tensor, log: Tensor | None, shift: int, how: SimpleNamespace) -> Tensor | None:
        """A of every chunk for a decay over the key, [B, T, G, BT] as operands."""
        if how.decay != 2:
            return None
        n = how.lanes
        pairs = torch.empty(n.batch, n.tokens, n.lanes, how.bt, dtype=how.operand, device=q.device)
        own = self.plan("pairs", q, b, b, log, n.cu, how.bt)
        self.table.pairs[(n.chunks * n.lanes,)](
            q, b, log, pairs, n.cu, n.first, n.owner, *_places(q), *_places(b), *_places(log), n.tokens, n.lanes, shift,
            how.precision, n.key, how.bt, how.bk, 16, num_warps=own.warps,
        )  # fmt: skip
        return pairs

    # --- sizes

    def plan(
        self, kernel: str, q: Tensor, b: Tensor, c: Tensor, log: Tensor | None, cu: Tensor | None, bt: int = 0
    ) -> SimpleNamespace:
        """Blocks, warps and the split of time for one kernel of a call; `bt`: tokens a chunk, if set already."""
        batch, tokens, lanes, key = q.shape
        value = c.shape[-1]
        dtype = torch.promote_types(torch.promote_types(q.dtype, b.dtype), c.dtype)
        decay = 0 if log is None else 1 if log.dim() == 3 else 2
        bk = _block(key)
        sizes = self.table.tiles[kernel][2 if dtype == torch.bfloat16 else 4]
        own, bv, bks, warps, stages = next(tile for largest, tile in sizes if bk <= largest)
        bt = bt or own
        bv = min(bv, _block(value))
        sequences = batch if cu is None else cu.shape[0] - 1
        chunks = batch * -(-tokens // bt) if cu is None else -(-tokens // bt) + sequences
        first = owner = None
        if cu is not None:
            lengths = (cu[1:] - cu[:-1] + bt - 1) // bt
            ends = lengths.cumsum(0)
            first = ends - lengths
            numbers = torch.arange(chunks, device=cu.device)
            owner = torch.searchsorted(ends, numbers, right=True)
            owner = torch.where(owner < sequences, owner, -1)
        wide = -(-value // bv) * (-(-key // bks) if kernel == "states" else 1)
        segments, segment = self._split(q, sequences * lanes * wide, tokens, bt)
        return SimpleNamespace(
            lanes=Lanes(batch, tokens, lanes, key, value, sequences, chunks, cu, first, owner), decay=decay, bt=bt,
            bk=bk, bks=bks, bv=bv, warps=warps, stages=stages, segments=segments, segment=segment,
            precision=_PRECISION[dtype], operand=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        )  # fmt: skip

    def _split(self, like: Tensor, programs: int, tokens: int, bt: int) -> tuple[int, int]:
        """(segments, tokens in each): a second reading pays where the GPU would stand idle otherwise."""
        processors = self.processors or _multiprocessors(like.device)
        segments = 1
        if 0 < programs < processors:
            segments = min(-(-2 * processors // programs), tokens // (8 * bt))
        if segments < 3:
            return 1, max(-(-tokens // bt), 1) * bt
        each = -(-tokens // (segments * bt)) * bt
        return -(-tokens // each), each


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: ChunkKernels, q: Tensor, b: Tensor, c: Tensor, log: Tensor | None, start: Tensor | None,
        cu: Tensor | None, shift: int, scale: float, dtype: torch.dtype, number: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, b, c = _laid(q), _laid(b), _laid(c)
        log = None if log is None else _laid(log)
        number = None if number is None else _laid(number)
        start = None if start is None else start.float().contiguous()
        ctx.kernels, ctx.shift, ctx.scale = kernels, shift, scale
        ctx.save_for_backward(q, b, c, log, start, cu, number)
        ctx.set_materialize_grads(False)
        return kernels.forward(q, b, c, log, start, cu, shift, scale, dtype, number)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        q, b, c, log, start, cu, number = ctx.saved_tensors
        dy, d_final = grads
        if dy is None:
            dy = torch.zeros(*c.shape[:3], c.shape[3], dtype=q.dtype, device=q.device)
        d_final = None if d_final is None else d_final.float().contiguous()
        dq, db, dc, dlog, d_start, dn = ctx.kernels.backward(
            dy, d_final, q, b, c, log, start, cu, ctx.shift, ctx.scale, ctx.needs_input_grad[4], number
        )
        dlog = None if dlog is None else dlog.to(log.dtype)
        dn = None if dn is None or number is None else dn.to(number.dtype)
        return None, dq, db, dc, dlog, d_start if ctx.needs_input_grad[5] else None, *[None] * 4, dn
