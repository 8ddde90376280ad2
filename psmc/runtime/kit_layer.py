"""A layer over a batch of sequences: masks, restarts and packing on top of the scans, a stretch of time at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from psmc.runtime.kit_scan import (
    GO_ON,
    RESTART,
    Rule,
    Values,
    _cat,
    _donor,
    _flag,
    _leading,
    _split,
    blocked_scan,
    sequential_scan,
)

SEGMENT_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}  # elements lifted at once: a cache's worth; enough to fill a GPU
RECOMPUTE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # elements of a whole call from which on backward recomputes them


def scan_tokens(
    lift: Callable[[Values], Values],
    combine: Rule,
    advance: Rule,
    output: Callable[[Values, Values | None, Values], Values] | None,
    inputs: Values,
    empty: Values,
    initial: Values | None = None,
    *,
    initial_exists: Tensor | None = None,
    restart: Values | None = None,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    previous: bool = False,
    left: bool = False,
    segment: int | None = None,
    recompute: bool | None = None,
) -> tuple[Values, Values]:
    """A whole layer, some tokens at a time, so that elements of matrix states never fill the memory.

    inputs      [B, T, ...] each (taps as shifted copies); masked tokens are filled here, before `lift` sees them
    lift        inputs -> elements;  output   (prefix, previous or None, inputs) -> outputs; None: outputs is {}
    initial     [B, ...], or [N, ...] with cu_seqlens [N + 1] (then B is 1);  initial_exists   [B] or [N] bool
    restart     [1, ...] where a sequence without `initial` and a reset begin, if that counts (None: with nothing)
    left        the sequential scan instead of the blocked one
    segment     tokens lifted at once; None: by the size of an element
    recompute   keep only the states between segments for backward; None: by the size of all elements

    Returns (outputs, 0 at masked tokens; final state, [B, ...] or [N, ...]).
    """
    inputs = fill_masked(inputs, valid)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.long()
    batch, length = _leading(inputs)
    if initial is None and restart is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        initial = {k: s.expand(rows, *s.shape[1:]) for k, s in restart.items()}
    entry = scan_entries(batch, length, reset=reset, cu_seqlens=cu_seqlens, initial=initial is not None)
    entering = initial if cu_seqlens is not None else None
    if restart is not None and reset is not None and entry is not None:  # one row more, for the resets
        named = 0 if entering is None else next(iter(entering.values())).shape[0]
        entering = restart if entering is None else {k: torch.cat([s, restart[k]]) for k, s in entering.items()}
        entry = torch.where(entry == RESTART, named, entry)
    with torch.no_grad():
        size = sum(v.numel() * v.element_size() for v in lift({k: x[:, :1] for k, x in inputs.items()}).values())
    kind = "cpu" if next(iter(inputs.values())).device.type == "cpu" else "cuda"
    segment_bytes, limit = SEGMENT_BYTES[kind], RECOMPUTE_BYTES[kind]
    segment = segment or max(16, min(length, segment_bytes // max(size, 1)))
    if recompute is None:
        recompute = size * length > limit and length > segment
    ends = None if cu_seqlens is None else _Ends(cu_seqlens, length, segment)

    def body(x: Values, v: Any, e: Any, carry: Any, exists: Any, rows: Any) -> tuple[Any, ...]:
        if left:
            scan = sequential_scan(
                advance, lift(x), empty, carry=carry, initial=entering, valid=v, entry=e, previous=previous
            )
        else:
            scan = blocked_scan(
                combine, advance, lift(x), empty, carry=carry, exists=exists, initial=entering,
                initial_exists=initial_exists, valid=v, entry=e, previous=previous,
            )  # fmt: skip
        # Before the first token that counts a state may be infinite: no readout of it may meet a gradient.
        read, before = fill_masked(scan.prefix, v), scan.previous and fill_masked(scan.previous, v)
        outputs = {} if output is None else output(read, before, x)
        if v is not None:
            outputs = {k: torch.where(_flag(v, o), o, torch.zeros_like(o)) for k, o in outputs.items()}
        final = {} if rows is None else {k: s[0].index_select(0, rows) for k, s in scan.prefix.items()}
        return outputs, scan.carry, scan.exists, final

    carry, exists = (None, None) if ends else (initial, initial_exists if initial else None)
    sizes = [min(segment, length - at) for at in range(0, length, segment)] or [0]
    masks = [None] * len(sizes) if valid is None else torch.split(valid, sizes, 1)
    entries = [None] * len(sizes) if entry is None else torch.split(entry, sizes, 1)
    last = [None] * len(sizes) if ends is None else ends.rows.unbind(0)
    outputs, finals = [], []
    for args in zip(_split(inputs, sizes), masks, entries, last, strict=True):
        x, v, e, r = args
        if recompute and torch.is_grad_enabled():
            out, carry, exists, final = checkpoint(body, x, v, e, carry, exists, r, use_reentrant=False)
        else:
            out, carry, exists, final = body(x, v, e, carry, exists, r)
        outputs.append(out)
        finals.append(final)
    return _cat(outputs), ends.gather(_cat(finals, 0), initial, empty) if ends else carry or {}


class _Ends:
    """Where packed sequences end, segment by segment: `rows` [segments, W] are the last tokens of the (at most W)
    sequences that end in a segment, so that their states are kept and no others. No host sync."""

    def __init__(self, cu_seqlens: Tensor, length: int, segment: int) -> None:
        count, device = cu_seqlens.numel() - 1, cu_seqlens.device
        self.last = cu_seqlens[1:] - 1
        self.nonempty = cu_seqlens[1:] > cu_seqlens[:-1]
        segments, width = max(1, -(-length // segment)), min(count, segment)
        total = segments * segment
        end = torch.zeros(total + 1, dtype=torch.int64, device=device)
        end = end.scatter(0, torch.where(self.nonempty, self.last, total).long(), 1)[:-1].view(segments, segment)
        slot = end.cumsum(1) - 1
        token = torch.arange(segment, device=device).expand(segments, segment)
        rows = torch.zeros(segments, width + 1, dtype=torch.int64, device=device)
        self.rows = rows.scatter(1, torch.where(end > 0, slot, width), token)[:, :width]
        last = self.last.clamp(min=0)
        self.place = torch.where(self.nonempty, last // segment * width + slot.reshape(-1)[last], 0)
        if length == 0:
            self.rows = self.rows[:, :0]

    def gather(self, kept: Values, initial: Values | None, empty: Values) -> Values:
        """[N, ...]: the state after each sequence's last token; of an empty sequence what it started from."""
        final = {}
        for k, s in kept.items():
            start = empty[k].to(s.dtype) if initial is None else initial[k]
            if s.shape[0] == 0:
                final[k] = start.expand(self.last.numel(), *s.shape[1:])
            else:
                final[k] = torch.where(_flag(self.nonempty, s), s.index_select(0, self.place), start)
        return final


def scan_entries(
    batch: int,
    length: int,
    *,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial: bool = False,
    device: torch.device | None = None,
) -> Tensor | None:
    """[B, T] int64: GO_ON, RESTART (from nothing), or the row of the initial state that enters at this token.

    `reset` [B, T] bool; `cu_seqlens` [N + 1]: N sequences in one row; `initial`: there are initial states [N, ...].
    None if no token restarts. Without `cu_seqlens` an initial state is the scan's carry, not an entry.
    """
    if reset is None and cu_seqlens is None:
        return None
    device = cu_seqlens.device if cu_seqlens is not None else reset.device if reset is not None else device
    entry = torch.full((batch, length), GO_ON, dtype=torch.int64, device=device)
    if cu_seqlens is not None:
        token = torch.arange(length, device=device)
        cu_seqlens = cu_seqlens.long()
        row = torch.searchsorted(cu_seqlens, token, right=True) - 1
        starts = cu_seqlens[row] == token
        inside = row < cu_seqlens.numel() - 1
        entry = torch.where(starts, torch.where(inside, row, RESTART) if initial else RESTART, entry)
    return entry if reset is None else torch.where(reset, RESTART, entry)


def fill_masked(tensors: Values, valid: Tensor | None) -> Values:
    """Replace what masked tokens hold (it may be NaN) by a valid token's values, without gradient. valid: [B, T]."""
    if valid is None or valid.numel() == 0:
        return tensors
    donor = _donor(tensors, valid)
    return {k: torch.where(_flag(valid, x), x, donor[k]) for k, x in tensors.items()}
