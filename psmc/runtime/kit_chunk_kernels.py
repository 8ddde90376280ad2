"""Calls of the chunk kernels: one matrix state per lane, its readout and its last state, with their gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from psmc.runtime.kit_chunk_layer import chunk_layer, chunk_step, chunk_steps
from psmc.runtime.kit_chunk_made import chunk_made, chunk_made_value
from psmc.runtime.kit_chunk_plan import ChunkPlans
from psmc.runtime.kit_chunk_views import ChunkCall, Kept, Lanes, Made, _block, _folded, _readable


class ChunkKernels(ChunkPlans):
    """The kernels of the chunked plan. `table`: the kernels, what they fuse, and `tiles`, which the compiler wrote."""

    keeps = True  # states of a forward for its backward, where they are not more than its tensors

    def takes(self, key: int, value: int, device: torch.device) -> bool:
        """Whether there are kernels for this device and these sizes."""
        return self.runs_on(device) and 0 < key <= 256 and value > 0

    def runs_on(self, device: torch.device) -> bool:
        return device.type == "cuda" or self.interpreted

    layer, step, steps = chunk_layer, chunk_step, chunk_steps
    _prepared, _prepared_value = chunk_made, chunk_made_value

    def scan(
        self, q: Tensor, b: Tensor, c: Tensor, log: Tensor | None, start: Tensor | None, cu: Tensor | None = None,
        shift: int = 0, scale: float = 1.0, dtype: torch.dtype | None = None, number: Tensor | None = None,
        code: Tensor | None = None, log_value: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y_t = scale q_tᵀ S_(t - shift) [B, T, G, V] in `dtype` (q's), and the last state [N, G, K, V] in fp32, by
        kernels that fuse nothing.

        q, b [B, T, G, K], c [B, T, G, V]; log: log of the decay, None, [B, T, G] or [B, T, G, K]; start [N, G, K, V] or
        None; cu: N + 1 offsets of sequences in a batch of 1; number: [B, T, G], multiplies b (log not over K);
        log_value: log of a decay over the value, [B, T, G, V]. Differentiable in q, b, c, both logs, start and number.
        """
        wide = log is not None and log.dim() == 4
        decay = 2 if wide else int(log is not None or code is not None)
        keys = (q, b, log if wide else None)
        values = (log_value,) * len(self.table.params[1])
        shape = (c.shape[0], c.shape[1], max(q.shape[2], b.shape[2], c.shape[2]))
        y, final, _ = self.call(
            ChunkCall(start, None, None if wide else log, number, c, keys, values, (), shape, shift, scale, code, cu,
                      dtype or q.dtype, decay, log_value is not None)
        )  # fmt: skip
        return y, final

    def call(self, a: ChunkCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output [B, T, G, V], the last states [N, G, K, V] and [N, G, K] of z in fp32. Differentiable."""
        a = a if a.layout is not None else a._replace(layout=self.layout(a))
        wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in a.tensors)
        if not a.layout.warm[wanted] and self.compiles(a.c.device):
            a.layout.warm[wanted] = True
            self._warm(a, wanted)
        if wanted:
            found = _ChunkScan.apply(self, a, *a.tensors)  # type: ignore[no-untyped-call]
            return found[0], found[1], found[2]
        return self.forward(self.readable(a))[:3]

    def _warm(self, a: ChunkCall, wanted: bool) -> None:
        """Compiles the kernels of a kind of call that is new, those of its backward, too, if one is `wanted`."""
        flags = tuple(x is not None and x.requires_grad and wanted for x in a.tensors)
        sizes = a.c.shape[-1], *[k.shape[-1] for k in a.keys if k is not None]
        dtypes = [None if x is None else x.dtype for x in a.tensors]
        kind = (flags, sizes, a.decay, a.over, a.dtype, a.code is None, a.cu is None, *dtypes)
        if kind in self._kinds:
            return
        self._kinds.add(kind)

        def run(a: ChunkCall) -> None:
            a = self.readable(a)
            out, _, _, kept = self.forward(a, wanted)
            if wanted:
                self.backward(a, kept, torch.empty_like(out), None, None, flags)

        self.warm(a, run)

    def readable(self, a: ChunkCall) -> ChunkCall:
        """The call over tensors that kernels read as they lie."""
        a = a if a.layout is not None else a._replace(layout=self.layout(a))
        if a.layout.readable:
            return a
        a = a.of([_readable(at, x) for at, x in enumerate(a.tensors)])
        return a._replace(layout=self.layout(a))

    # --- launches

    def forward(self, a: ChunkCall, keep: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Kept]:
        """`call`, and what its backward needs, if `keep`."""
        plan = self.plan("forward", a)
        n = plan.lanes
        out = torch.empty(*a.shape, n.value, dtype=a.dtype, device=a.c.device)
        final, zfinal = self._matrices(n, n.sequences, a)
        if not out.numel():
            for x, start in ((final, a.start), (zfinal, a.zstart)):
                if x is not None:
                    x.zero_() if start is None else x.copy_(start)
            return out, final, zfinal, Kept(None, None, None, None, None)
        sums = self._sums(a)
        a, total = self.lifted(a, plan)
        made = self._prepared(a, plan, sums, total)
        zstates = self._norms(a, made, None, plan, a.zstart, zfinal)
        begin, last = a.start, final if plan.segments == 1 else None
        if plan.segments > 1:
            begin = self._starts(a, made, begin, final, None, plan)
        y = torch.empty_like(out) if keep and self.table.seen == "y" else None
        worth = self._worth(n, plan.bt, made) if keep else (False, False)
        states = self._states(n, plan.operand, a) if worth[1] else None
        self.run(
            "forward", a, n.sequences * n.lanes * plan.segments * -(-n.value // plan.bv),
            (made.q, made.b, made.pairs, made.total, made.vup, made.vdown, sums, begin, zstates, out, y, last, states,
             n.cu, n.first),
            (n.tokens, plan.segments, plan.segment, n.lanes, a.scale),
            (a.decay, a.over, a.shift, plan.precision, n.key, n.value, plan.bt, plan.bk, plan.bv, plan.stages),
            "scaled" if a.decay == 2 else "all", num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        seen = out if self.table.seen == "output" else y
        if not keep:
            return out, final, zfinal, Kept(None, None, None, None, None)
        return out, final, zfinal, Kept(seen, sums, states, zstates, made if worth[0] else None)

    def backward(
        self, a: ChunkCall, kept: Kept, do: Tensor, d_final: Tensor | None, d_zfinal: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> list[Tensor | None]:  # fmt: skip
        """Gradients of `a.tensors`, of those that are `wanted`."""
        plan = self.plan("gradients", a)
        n = plan.lanes
        d_start, d_zstart = self._matrices(n, n.sequences, a)
        given = a.of(wanted)
        keys, values = (
            [self._gradient(x, n, param, stored and bool(asked))
             for x, param, stored, asked in zip(xs, params, kinds, flags, strict=True)]
            for xs, params, kinds, flags in (
                (a.keys, self.table.params[0], self.table.grads[0], given.keys),
                (a.values, self.table.params[1], self.table.grads[1], given.values),
            )
        )  # fmt: skip
        bk = min(plan.bk, plan.bks)
        blocks = -(-n.key // bk)
        few = {"dtype": torch.float32, "device": a.c.device}
        lifted = self.table.lifted if any(given.scalars) else ()
        make: Any = torch.empty if a.cu is None else torch.zeros  # no chunk may hold some tokens
        shown = [n in lifted for n in self.table.lifted if n[0] == "s"] if self.table.lifted else given.numbers
        numbers = [make(a.shape, **few) if asked else None for asked in shown]
        each = (blocks, *a.shape)  # what adds up over the key comes in shares
        dlog = make(each, **few) if given.log or "log" in lifted else None
        dn = make(each, **few) if given.n or "n" in lifted else None
        dc = torch.empty(*a.shape, n.value, dtype=a.c.dtype, device=a.c.device)
        if not do.numel():
            for x, d in ((d_start, d_final), (d_zstart, d_zfinal)):
                if x is not None:
                    x.zero_() if d is None else x.copy_(d)
            return [d_start, d_zstart, None, None, dc, *keys, *values, *([None] * (len(a.numbers) + len(a.scalars)))]
        do = do.contiguous()
        raw, (a, total) = a, self.lifted(a, plan)
        made = kept.made or self._prepared(a, plan, kept.sums, total)
        dw = None
        if self.table.norm:
            dw = torch.empty(a.shape, **few)  # type: ignore[call-overload]
            self.run(
                "normed", a, n.chunks * n.lanes, (do, kept.seen, kept.sums, dw, n.cu, n.first, n.owner),
                (n.tokens, n.lanes), (n.value, plan.bt, plan.bv),
            )  # fmt: skip
        states = self.states(a, made, None, plan.bt) if kept.states is None else kept.states
        back = SimpleNamespace(do=do, seen=kept.seen, dw=dw, sums=kept.sums, begin=d_final, end=d_start)
        back.value = value = self._prepared_value(a, plan, made, back)
        costates = self.states(a, made, back, plan.bt)
        zcostates = self._norms(a, made, back, plan, d_zfinal, d_zstart)
        reached = [x for x, stored in zip(numbers, self.table.grads[2], strict=True) if stored]
        if a.decay == 2:
            self._key_gradients(a, plan, made, back, (states, costates, kept.zstates, zcostates), *keys, *reached)
        else:
            self.run(
                "gradients", a, n.chunks * n.lanes * blocks,
                (made.total, kept.sums, do, kept.seen, dw, value.q, value.b, value.pairs, value.total, states, costates,
                 kept.zstates, zcostates, *keys, *reached, dlog, dn, n.cu, n.first, n.owner),
                (n.tokens, n.batch * n.tokens, n.lanes, a.scale),
                (a.decay, a.over, a.shift, plan.precision, n.key, n.value, plan.bt, bk, plan.bv, plan.stages),
                num_warps=plan.warps, num_stages=plan.stages,
            )  # fmt: skip
        own = self.plan("values", a, plan.bt)
        self.near_then_far(
            "values", a, n.chunks * n.lanes * -(-n.value // own.bv),
            (made.q, made.b, made.pairs, made.total, made.vup, made.vdown, value.total, kept.sums, do, kept.seen,
             states if a.over else None, costates, dc, *values),
            (n.cu, n.first, n.owner), (n.tokens, n.lanes, a.scale),
            (a.decay, a.over, a.shift, own.precision, n.key, n.value, own.bt, min(own.bk, own.bks), own.bv,
             own.stages),
            a.over, num_warps=own.warps, num_stages=own.stages,
        )  # fmt: skip
        if lifted:
            found = {"log": dlog, "n": dn, **{f"s{k}": x for k, x in enumerate(numbers)}}
            scalars = self._scalar_gradients(raw, plan, [found[x] for x in lifted], blocks, given.scalars)
            return [d_start, d_zstart, None, None, dc, *keys, *values, *([None] * len(numbers)), *scalars]
        dlog, dn = (None if x is None else x[0] if blocks == 1 else x.sum(0) for x in (dlog, dn))
        return [d_start, d_zstart, dlog, dn, dc, *keys, *values, *numbers, *([None] * len(raw.scalars))]

    def _key_gradients(
        self, a: ChunkCall, plan: SimpleNamespace, made: Made, back: SimpleNamespace, states: Any, *given: Tensor | None
    ) -> None:
        """For a decay over the key. given: what the gradients of keys and of numbers go to."""
        n, p = plan.lanes, back.value.pairs
        reads = back.sums, back.do, back.seen, back.dw
        own = self.plan("key", a, plan.bt)
        if not a.over:
            p = torch.empty(*a.shape, plan.bt, dtype=plan.operand, device=a.c.device)
            self.run(
                "pairs", a, n.chunks * n.lanes, (*reads, p, n.cu, n.first, n.owner), (n.tokens, n.lanes, a.scale),
                (plan.precision, n.value, plan.bt, own.bv), num_warps=4,
            )  # fmt: skip
        bk = min(own.bk, own.bks)
        self.near_then_far(
            "key", a, n.chunks * n.lanes * -(-n.key // bk),
            (made.up, made.down, made.total, *reads, back.value.q, back.value.b, p, back.value.total, *states),
            (*given, n.cu, n.first, n.owner), (n.tokens, n.lanes, a.scale),
            (a.over, a.shift, own.precision, n.key, n.value, own.bt, bk, own.bv, own.stages),
            num_warps=own.warps, num_stages=own.stages,
        )  # fmt: skip

    def _scalar_gradients(
        self, a: ChunkCall, plan: SimpleNamespace, given: list[Tensor | None], blocks: int, wanted: tuple[Any, ...]
    ) -> list[Tensor | None]:
        """Gradients of what numbers a token are computed of, from theirs; of a param: each chunk's share."""
        n = plan.lanes
        made: list[Tensor | None] = []
        for (param, stored), x, asked in zip(self.table.scalars, a.scalars, wanted, strict=True):
            if not stored or not asked:
                made.append(None)
            elif param:
                made.append(torch.zeros(n.chunks, n.lanes, dtype=torch.float32, device=x.device))
            else:
                made.append(torch.empty(a.shape, dtype=x.dtype, device=x.device))
        stored_ones = [x for x, (_, stored) in zip(made, self.table.scalars, strict=True) if stored]
        self.run(
            "numbers", a, n.chunks * -(-n.lanes // plan.lane_block),
            (*given, *stored_ones, n.cu, n.first, n.owner), (n.tokens, n.batch * n.tokens, n.lanes),
            (blocks, n.key, n.value, plan.bt, plan.lane_block), "scalars", num_warps=4,
        )  # fmt: skip
        return made

    def states(self, a: ChunkCall, made: Made, back: SimpleNamespace | None, bt: int = 0) -> Tensor:
        """The state before each chunk, [chunks, G, K, V] as operands; with `back` the costate behind it."""
        plan = self.plan("states", a, bt)
        n = plan.lanes
        found = self._states(n, plan.operand, a)
        begin, end = (a.start, None) if back is None else (back.begin, back.end)
        if plan.segments > 1:
            begin, end = self._starts(a, made, begin, end, back, plan), None
        self._walk(a, made, begin, end, (None, None), found, back, plan)
        return found

    def _starts(
        self, a: ChunkCall, made: Made, first: Tensor | None, last: Tensor | None,
        back: SimpleNamespace | None, plan: SimpleNamespace,
    ) -> Tensor:  # fmt: skip
        """What each segment starts from, [N, S, G, K, V]; into `last`: where the last ends."""
        n = plan.lanes
        few: Any = {"dtype": torch.float32, "device": a.c.device}
        each = n.sequences, plan.segments, n.lanes
        ends, starts = (torch.empty(*each, n.key, n.value, **few) for _ in range(2))
        widths = n.key if a.decay == 2 else 1, n.value if a.over else 0
        left = [torch.empty(*each, w, **few) if w else None for w in widths]
        own = SimpleNamespace(**vars(self.plan("states", a, plan.bt)))
        own.segments, own.segment = plan.segments, plan.segment
        self._walk(a, made, None, ends, left, None, back, own)
        block = min(1024, _block(n.key * n.value))
        self.run(
            "join", a, n.sequences * n.lanes * -(-n.key * n.value // block), (first, ends, *left, starts, last),
            (plan.segments, n.lanes), (back is not None, a.decay, n.key, n.value, block), "none",
        )  # fmt: skip
        return starts

    def _walk(
        self, a: ChunkCall, made: Made, begin: Tensor | None, end: Tensor | None, left: Any,
        states: Tensor | None, back: SimpleNamespace | None, plan: SimpleNamespace,
    ) -> None:  # fmt: skip
        n = plan.lanes
        bk = min(plan.bk, plan.bks)
        blocks = -(-n.key // bk) * -(-n.value // plan.bv)
        given = back or SimpleNamespace(do=None, seen=None, sums=None, value=Made())
        self.run(
            "states", a, n.sequences * n.lanes * plan.segments * blocks,
            (made.q, made.b, made.total, made.vup, made.vdown, given.sums, given.do, given.seen, given.value.q,
             given.value.total, begin, end, *left, states, n.cu, n.first),
            (n.tokens, plan.segments, plan.segment, n.lanes, a.scale),
            (back is not None, a.decay, a.over, a.shift, plan.precision, n.key, n.value, plan.bt, bk, plan.bv,
             plan.stages),
            "scaled" if a.decay == 2 else "all", num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip

    def _norms(
        self, a: ChunkCall, made: Made, back: SimpleNamespace | None, plan: SimpleNamespace,
        first: Tensor | None, last: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """z before each chunk, [chunks, G, K] in fp32, if there is a z; with `back` its costate behind it. From `first`
        on; into `last` [N, G, K]: where it ends."""
        if not self.table.norm:
            return None
        n = plan.lanes
        shares, found = (
            torch.empty(n.chunks, n.lanes, n.key, dtype=torch.float32, device=a.c.device) for _ in range(2)
        )
        self.run(
            "shares", a, n.chunks * n.lanes,
            (made.q, made.b, made.total, None if back is None else back.dw, shares, n.cu, n.first, n.owner),
            (n.tokens, n.lanes, a.scale),
            (back is not None, a.decay, a.shift, plan.precision, n.key, plan.bt, plan.bk),
            "scaled" if a.decay == 2 else "all",
        )  # fmt: skip
        block = min(plan.bk, 32)
        self.run(
            "norms", a, n.sequences * n.lanes * -(-n.key // block),
            (made.total, shares, first, found, last, n.cu, n.first), (n.tokens, n.lanes),
            (back is not None, a.decay, plan.precision, n.key, plan.bt, block, 32), "none",
        )  # fmt: skip
        return found

    # --- sizes

    def _matrices(self, n: Lanes, count: int, a: ChunkCall) -> tuple[Tensor, Tensor | None]:
        options: Any = {"dtype": torch.float32, "device": a.c.device}
        z = torch.empty(count, n.lanes, n.key, **options) if self.table.norm else None
        return torch.empty(count, n.lanes, n.key, n.value, **options), z

    @staticmethod
    def _states(n: Lanes, operand: torch.dtype, a: ChunkCall) -> Tensor:
        return torch.empty(n.chunks, n.lanes, n.key, n.value, dtype=operand, device=a.c.device)

    def _sums(self, a: ChunkCall) -> Tensor | None:
        if not self.table.width:
            return None
        return torch.empty(*a.shape, self.table.width, dtype=torch.float32, device=a.c.device)

    def _worth(self, n: Lanes, bt: int, made: Made) -> tuple[bool, bool]:
        """Whether what was made ready, and then the states before each chunk, are kept for backward: all in all not
        more numbers a token than q, b, c and y have. To make states again takes one light kernel."""
        most = 2 * (n.key + n.value) if self.keeps else 0
        ready = sum(x.shape[-1] for x in made[:-1] if x is not None)
        keep = 0 < ready <= most
        return keep, n.key * n.value <= bt * (most - ready * keep)

    @staticmethod
    def _gradient(x: Tensor | None, n: Lanes, param: bool, wanted: bool) -> Tensor | None:
        if x is None or not wanted:
            return None
        if param:
            return torch.zeros(n.chunks, n.lanes, x.shape[-1], dtype=torch.float32, device=x.device)
        return torch.empty(n.batch, n.tokens, n.lanes, x.shape[-1], dtype=x.dtype, device=x.device)


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: ChunkKernels, a: ChunkCall, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        a = kernels.readable(a)
        out, final, zfinal, kept = kernels.forward(a, True)
        ctx.kernels, ctx.plain = kernels, a.of([None] * len(tensors))
        ctx.save_for_backward(*a.tensors, *kept.tensors)
        ctx.set_materialize_grads(False)
        return out, final, zfinal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.plain.tensors)
        tensors, kept = ctx.saved_tensors[:count], Kept.of(ctx.saved_tensors[count:])
        a: ChunkCall = ctx.plain.of(tensors)
        do, d_final, d_zfinal = grads
        if do is None:
            do = torch.zeros(*a.shape, a.c.shape[3], dtype=a.dtype, device=a.c.device)
        ends = [None if x is None else x.float().contiguous() for x in (d_final, d_zfinal)]
        wanted = ctx.needs_input_grad[2:]
        found = ctx.kernels.backward(a, kept, do, *ends, wanted)
        table = ctx.kernels.table
        params = (False,) * 5 + tuple(p for part in table.params for p in part)
        params += (False,) * len(a.numbers) + tuple(param for param, _ in table.scalars if a.scalars)
        whole: list[Tensor | None] = []
        for at, (x, d, param) in enumerate(zip(tensors, found, params, strict=True)):
            if x is None or d is None or not wanted[at]:
                whole.append(None)
            elif at < 2:
                whole.append(d)
            else:
                whole.append(_folded(d.sum(0)[None, None] if param else d, x))
        return None, None, *whole
