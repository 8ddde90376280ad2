"""What the shape of a chunked call fixes, worked out once: blocks, the split of time, strides, launches."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_ahead import Compiling, _ghost, _processors, compiling_ahead
from psmc.runtime.kit_calls import Kernel
from psmc.runtime.kit_chunk_views import ChunkCall, Lanes, _block, _is_readable

_PRECISION = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}
_MOST_LAYOUTS = 256  # remembered


class Layout:
    """Of all calls over tensors of the same shapes, strides and dtypes: whether kernels read them as they lie, strides
    of what kernels begin with, blocks by kernel, launches by kernel and arguments, and the layout that has its numbers
    computed."""

    __slots__ = ("blocks", "launches", "lifted", "readable", "strides", "warm")

    def __init__(self, a: ChunkCall) -> None:
        self.readable = all(x is None or _is_readable(at, x) for at, x in enumerate(a.tensors))
        self.strides = {"all": a.strides, "scaled": a.scaled.strides, "scalars": a.scalar_strides, "none": ()}
        self.lifted: Layout | None = None
        self.warm = [False, False]  # whether kernels of calls without and with gradients have been asked for
        self.blocks: dict[Any, SimpleNamespace] = {}
        self.launches: dict[Any, Any] = {}


class ChunkPlans(Compiling):
    """Of one table of kernels. `processors` is the GPU's number of multiprocessors."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.interpreted: bool = table.interpreted
        self.processors: int | None = 1 if self.interpreted else None
        self._kernels: dict[str, Kernel] = {}
        self._layouts: dict[Any, Layout] = {}
        self._kinds = set[Any]()  # of calls, whose kernels are compiled
        self._tuned: Any = None

    def layout(self, a: ChunkCall) -> Layout:
        if self._tuned != (self.table.tiles, self.processors):
            self._tuned = self.table.tiles, self.processors
            self._layouts.clear()
        plain = a.shape, a.shift, a.scale, a.code is None, a.dtype, a.decay, a.over, a.c.device
        packed = a.cu if a.cu is None else (a.cu.shape, a.cu.dtype)
        key = (plain, packed, *[None if x is None else (x.shape, x.stride(), x.dtype) for x in a.tensors])
        found = self._layouts.get(key)
        if found is None:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            found = self._layouts[key] = Layout(a)
        return found

    def run(self, *args: Any, **options: Any) -> None:
        """Launches a kernel."""
        launch, tensors = self.launcher(*args, **options)
        launch(*tensors)

    def near_then_far(
        self, name: str, a: ChunkCall, grid: int, before: tuple[Any, ...], behind: tuple[Any, ...],
        numbers: tuple[float, ...], constants: tuple[Any, ...], decays: bool = True, **options: int,
    ) -> None:  # fmt: skip
        """Launches a kernel, and if it has `decays` to scale by, once more, for those of its programs that found the
        decays beyond what one reference a chunk can scale: a way of its own, which would slow the usual one down.
        before, behind: the tensors on either side of what programs found."""
        near = torch.empty(grid, dtype=torch.int8, device=a.c.device) if decays else None
        for far in (False, True)[: 1 + decays]:
            self.run(name, a, grid, (*before, near, *behind), numbers, (*constants, far), **options)

    def launcher(
        self, name: str, a: ChunkCall, grid: int, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...],
        constants: tuple[Any, ...], own: str = "all", **options: int,
    ) -> tuple[Any, tuple[Tensor | None, ...]]:  # fmt: skip
        """A kernel's launch, and the tensors that it takes. own: which of the call's own tensors it begins with, their
        strides behind them: all; scaled, which leaves out those over the key; scalars, and the code; none."""
        layout = a.layout or self.layout(a)
        if own == "all":
            first = a.placed
        else:
            first = () if own == "none" else (*a.scalars, a.code) if own == "scalars" else a.scaled.placed
        given = (*first, *tensors)
        key = (name, own, numbers, constants, *[x is None for x in given])
        launch = layout.launches.get(key)
        if launch is None:
            kernel = self._kernels.get(name) or self._kernels.setdefault(name, Kernel(getattr(self.table, name)))
            strides = len(first), layout.strides[own]
            launch = kernel.launch(grid, numbers, constants, a.c.device, strides=strides, **options)
            layout.launches[key] = launch
        return launch, given

    def lifted(self, a: ChunkCall, plan: SimpleNamespace) -> tuple[ChunkCall, Tensor | None]:
        """The call with its numbers a token computed; for a decay of one a token the sums of its logs, [chunks, G, 2,
        BT]."""
        n, few = plan.lanes, {"dtype": torch.float32, "device": a.c.device}
        names = self.table.lifted
        if a.decay != 1 and not names:
            return a, None
        made = {x: torch.empty(a.shape, **few) for x in names if x != "log"}  # type: ignore[call-overload]
        total = None
        if a.decay == 1:
            total = torch.empty(n.chunks, n.lanes, 2, plan.bt, **few)  # type: ignore[call-overload]
        self.run(
            "sums", a, n.chunks * -(-n.lanes // plan.lane_block), (*made.values(), total, n.cu, n.first, n.owner),
            (n.tokens, n.lanes), (plan.precision, n.key, n.value, plan.bt, plan.lane_block),
            "scalars" if names else "all", num_warps=4,
        )  # fmt: skip
        if not names:
            return a, total
        layout = a.layout or self.layout(a)
        whole = a._replace(n=made.pop("n", None), numbers=tuple(made.values()), scalars=(), layout=layout.lifted)
        if layout.lifted is None:
            layout.lifted = self.layout(whole)
            whole = whole._replace(layout=layout.lifted)
        return whole, total

    def warm(self, a: ChunkCall, run: Callable[[ChunkCall], None]) -> None:
        """Has threads compile what `run` launches of the call, which it does over tensors without memory."""
        with compiling_ahead(a.c.device):
            code = None if a.code is None else _ghost(a.code)
            run(a.of([None if x is None else _ghost(x) for x in a.tensors])._replace(layout=None, code=code))

    def plan(self, kernel: str, a: ChunkCall, bt: int = 0) -> SimpleNamespace:
        """Blocks, warps and the split of time for one kernel of a call; `bt`: tokens a chunk, if set already."""
        blocks = (a.layout or self.layout(a)).blocks
        plan = blocks.get((kernel, bt))
        if plan is None:
            plan = blocks[kernel, bt] = self._blocks(kernel, a, bt)
        if a.cu is None:
            return plan
        lengths = (a.cu[1:] - a.cu[:-1] + plan.bt - 1) // plan.bt
        ends = lengths.cumsum(0)
        owner = torch.searchsorted(ends, torch.arange(plan.lanes.chunks, device=a.cu.device), right=True)
        owner = torch.where(owner < plan.lanes.sequences, owner, -1)
        lanes = plan.lanes._replace(cu=a.cu, first=ends - lengths, owner=owner)
        return SimpleNamespace(**{**vars(plan), "lanes": lanes})

    def _blocks(self, kernel: str, a: ChunkCall, bt: int) -> SimpleNamespace:
        (batch, tokens, lanes), cu = a.shape, a.cu
        key, value = next(k for k in a.keys if k is not None).shape[-1], a.c.shape[-1]
        dtype = a.c.dtype
        for k in self.table.operands:
            own = a.keys[k]
            dtype = dtype if own is None else torch.promote_types(dtype, own.dtype)
        bk = _block(key)
        sizes = self.table.tiles[kernel][2 if dtype == torch.bfloat16 else 4]
        tokens_of, bv, bks, warps, stages = next(tile for largest, tile in sizes if bk <= largest)
        bt = bt or tokens_of
        bv = min(bv, _block(value))
        sequences = batch if cu is None else cu.shape[0] - 1
        chunks = batch * -(-tokens // bt) if cu is None else -(-tokens // bt) + sequences
        wide = -(-value // bv) * (-(-key // bks) if kernel == "states" else 1)
        segments, segment = self._split(a.c, sequences * lanes * wide, tokens, bt)
        return SimpleNamespace(
            lanes=Lanes(batch, tokens, lanes, key, value, sequences, chunks, None, None, None), bt=bt,
            lane_block=min(16, 1 << (lanes - 1).bit_length()), bk=bk, bks=bks, bv=bv,
            warps=warps, stages=stages, segments=segments, segment=segment,
            precision=_PRECISION[dtype], operand=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        )  # fmt: skip

    def _split(self, like: Tensor, programs: int, tokens: int, bt: int) -> tuple[int, int]:
        """(segments, tokens in each): a second reading pays where the GPU would stand idle otherwise. Two programs a
        processor run at once; one more than that would be a second wave of its own."""
        processors = self.processors or _processors(like.device)
        segments = 1
        if 0 < programs < processors:
            segments = min(2 * processors // programs, tokens // (8 * bt))
        if segments < 3:
            return 1, max(-(-tokens // bt), 1) * bt
        each = -(-tokens // (segments * bt)) * bt
        return -(-tokens // each), each
