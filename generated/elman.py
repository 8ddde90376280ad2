"""elman: h' = tanh(W h + x), x the projected token. Elman 1990.

    aggregator elman {
      '''h' = tanh(W h + x), x the projected token. Elman 1990.'''
      dim H
      input x[H]
      param W[H, H]
      state h[H] = 0

      lift {
        h[i] = x[i]
      }

      combine (l, r) {
        h[i] = tanh(sum[j] W[i, j] * l.h[j] + r.h[i])
      }

      output y[i] = h[i]

      associative: no
      order: left
    }

Associativity: not claimed; the order of combines is part of the meaning.
Plan: left. 'order: left': the fold from the left is the meaning.

Written by psmc; regenerate with: psmc compile elman.psm
The runtime holds what this spec needs of it. Needs torch; nothing else.

   62  the spec's mathematics: tensors are [..., *dims], leading axes broadcast
   89  Scans in PyTorch, differentiable by autograd: no loop over T where the rule is associative
  407  A layer over a batch of sequences: masks, restarts and packing on top of the scans, a stretch of time at once
  569  The border of a compiled aggregator: what was passed, checked against the spec, with the spec's own names
  839  The border, continued: states, flags and packing
  963  What the border sees only by reading tensors: values, checked where `checks` or PSMC_CHECK=1 asks for it
 1039  Inputs read some tokens earlier, and time run backwards: index arithmetic on whole sequences, no loop over T
 1102  One checked call in PyTorch: lift, the scan of the plan, readout
 1232  The scan as an operator of torch: one graph node for torch.compile, with its own backward
 1500  The public face of a compiled aggregator: a parallel call, a step, states
 1700  the spec's border
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from math import isqrt
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["elman"]


# --- the spec's mathematics: tensors are [..., *dims], leading axes broadcast

def lift(x, p, n):
    return {"h": x.x}


def combine(l, r, p, n):
    h = torch.tanh(torch.einsum("...ij,...j->...i", p.W, l.h) + r.h)
    return {"h": h}


def advance(l, r, p, n):
    h = torch.tanh(torch.einsum("...ij,...j->...i", p.W, l.h) + r.h)
    return {"h": h}


def output(s, prev, x, p, n):
    return {"y": s.h}


def identity(n, like):
    h = like.new_full((n.H,), 0)
    return {"h": h}


KERNELS = None

# --- Scans in PyTorch, differentiable by autograd: no loop over T where the rule is associative.

GO_ON, RESTART = -2, -1  # what `entry` says of a token besides the row of the initial state that enters there

Values = dict[str, Tensor]
Rule = Callable[[Values, Values], Values]


class Scan(NamedTuple):
    """`prefix`, `previous`: [B, T, ...]; `carry`: the state after the last token, [B, ...]; `exists` [B]: whether any
    element or initial state is in `carry` (None: in all of them)."""

    prefix: Values
    previous: Values | None
    carry: Values
    exists: Tensor | None


def blocked_scan(
    combine: Rule,
    advance: Rule,
    elements: Values,
    empty: Values,
    *,
    carry: Values | None = None,
    exists: Tensor | None = None,
    initial: Values | None = None,
    initial_exists: Tensor | None = None,
    valid: Tensor | None = None,
    entry: Tensor | None = None,
    previous: bool = False,
    block: int | None = None,
) -> Scan:
    """All prefixes of an associative rule: three passes over about sqrt(T) steps, each batched over all blocks.

    elements  the tokens, all components          empty    the live components before anything, [*dims]: only selected
    carry     the state before token 0, [B, ...]  exists   [B] bool: rows of `carry` that hold something (None: all)
    valid     [B, T] bool: tokens that count      entry    [B, T] of `scan_entries`: restarts
    initial   rows that `entry` names, [N, ...]   initial_exists   [N] bool, as `exists`
    block     tokens a block; None chooses        previous   also return the prefixes before each token
    """
    live = tuple(empty)
    batch, length = _leading(elements)
    if length == 0:
        return _nothing(elements, empty, carry, exists, previous)
    before, before_exists = carry, exists
    pieces: list[Values] = []
    if valid is None and entry is None and exists is None:
        lengths = _pieces(length, carry is None, block)
        for (count, size), x in zip(lengths, _split(elements, [c * s for c, s in lengths]), strict=True):
            if carry is None:
                prefix = {k: x[k] for k in live}  # one token: it is the first prefix
                carry = {k: x[k][:, 0] for k in live}
            else:
                prefix, carry = _plain_piece(combine, advance, x, carry, count, size)
            pieces.append(prefix)
    else:
        like = next(iter(elements.values()))
        valid = torch.ones((batch, length), dtype=torch.bool, device=like.device) if valid is None else valid
        entry = torch.full((batch, length), GO_ON, device=like.device) if entry is None else entry
        donor = _donor(elements, valid)
        before = _start(elements, empty) if carry is None else carry
        if exists is None:
            exists = torch.full((batch,), carry is not None, device=like.device)
        before_exists, carry = exists, before
        rule = _Guarded(combine, advance, empty, donor, initial, initial_exists)
        lengths = _pieces(length, False, block)
        sizes = [c * s for c, s in lengths]
        parts = zip(
            lengths, _split(elements, sizes), torch.split(valid, sizes, 1), torch.split(entry, sizes, 1), strict=True
        )
        for (count, size), x, v, e in parts:
            prefix, carry, exists = _guarded_piece(rule, x, v, e, carry, exists, count, size)
            pieces.append(prefix)
    prefix = _cat(pieces)
    shifted = _previous(prefix, before, before_exists, empty, entry, initial, initial_exists) if previous else None
    return Scan(prefix, shifted, carry or {}, exists)


def sequential_scan(
    advance: Rule,
    elements: Values,
    empty: Values,
    *,
    carry: Values | None = None,
    initial: Values | None = None,
    valid: Tensor | None = None,
    entry: Tensor | None = None,
    previous: bool = False,
) -> Scan:
    """`order: left`: one token after another is the meaning, and the start `empty` is combined with the first token.

    `advance` may read anything of a token: for components that are not among `elements`, `empty` is [*lanes, *dims].
    """
    live = tuple(empty)
    length = _leading(elements)[1]
    if length == 0:
        return _nothing(elements, empty, carry, None, previous)
    start = _start(elements, empty)
    before = start if carry is None else carry
    state, states = before, []
    donor = None if valid is None else _donor(elements, valid)
    flags = [None] * length if valid is None else valid.unbind(1)
    entries = [None] * length if entry is None else entry.unbind(1)
    for x, v, e in zip(_unbind(elements), flags, entries, strict=True):
        if e is not None:
            rows, named = _rows(start, initial, None, e)
            state = _pick(e == GO_ON, state, _pick(named, rows, start))
        if v is None or donor is None:
            state = _fit(advance(state, x), state, live)
        else:
            state = _pick(v, _fit(advance(state, _pick(v, x, donor)), state, live), state)
        states.append(state)
    prefix = {k: torch.stack([s[k] for s in states], 1) for k in live}
    shifted = _previous(prefix, before, None, empty, entry, initial, None) if previous else None
    return Scan(prefix, shifted, state, None)


class _Guarded(NamedTuple):
    """The rule and what stands in for operands that are not there."""

    combine: Rule
    advance: Rule
    empty: Values
    donor: Values
    initial: Values | None
    initial_exists: Tensor | None

    def join(self, rule: Rule, both: Tensor, l: Values, r: Values) -> Values:  # noqa: E741
        """rule(l, r) where `both`, and a value of no consequence elsewhere."""
        return _fit(rule(_pick(both, l, self.donor), _pick(both, r, self.donor)), r, tuple(l))

    def attach(
        self, carry: Values, exists: Tensor, y: Values, has: Tensor, cut: Tensor, row: Tensor
    ) -> tuple[Values, Tensor]:
        """The prefix from what precedes a block (`carry` where it `exists`) and the block's own product y (where it
        `has` one) since the last restart, if the block has one (`cut`), which let in the initial state `row`."""
        if self.initial is None:
            base, base_exists = carry, exists & ~cut
        else:
            entered, entered_exists = _rows(self.empty, self.initial, self.initial_exists, row)
            base, base_exists = _pick(cut, entered, carry), torch.where(cut, entered_exists, exists)
        joined = self.join(self.advance, base_exists & has, base, y)
        alone = _pick(has, {k: y[k] for k in carry}, _pick(base_exists, base, self.empty))
        return _pick(base_exists & has, joined, alone), base_exists | has


def _plain_piece(
    combine: Rule,
    advance: Rule,
    elements: Values,
    carry: Values,
    count: int,
    size: int,
) -> tuple[Values, Values]:
    """Every token counts and none restarts: `count` blocks of `size` tokens after `carry`."""
    live = tuple(carry)
    local: list[Values] = []  # within each block, [B, count, ...] each
    for x in _unbind(_blocks(elements, count, size), 2):
        local.append(_fit(combine(local[-1], x), x, tuple(x)) if local else x)
    carries = [carry]  # before each block, and after the last
    for total in _unbind(local[-1]):
        carries.append(_fit(advance(carries[-1], total), total, live))
    before, after = _stack(carries[:-1], 1), _stack(carries[1:], 1)
    prefixes = [_fit(advance(before, y), y, live) for y in local[:-1]]
    return {k: v.flatten(1, 2) for k, v in _stack([*prefixes, after], 2).items()}, carries[-1]


def _guarded_piece(
    rule: _Guarded,
    elements: Values,
    valid: Tensor,
    entry: Tensor,
    carry: Values,
    exists: Tensor,
    count: int,
    size: int,
) -> tuple[Values, Values, Tensor]:
    """As `_plain_piece`, with tokens that do not count, restarts, and a carry that need not exist."""
    local: list[tuple[Values, Tensor, Tensor, Tensor]] = []
    flags = zip(*(torch.unflatten(f, 1, (count, size)).unbind(2) for f in (valid, entry)), strict=True)
    for x, (v, e) in zip(_unbind(_blocks(elements, count, size), 2), flags, strict=True):
        start = e != GO_ON
        if not local:
            local.append((x, v, start, e))
            continue
        y, has, cut, row = local[-1]
        both = has & v & ~start
        y = _pick(both, rule.join(rule.combine, both, y, x), _pick(v, x, y))
        local.append((y, v | (has & ~start), cut | start, torch.where(start, e, row)))
    totals, *marks = local[-1]
    carries, known = [carry], [exists]
    for y, has, cut, row in zip(_unbind(totals), *(m.unbind(1) for m in marks), strict=True):
        state, some = rule.attach(carries[-1], known[-1], y, has, cut, row)
        carries.append(state)
        known.append(some)
    before, before_exists, after = _stack(carries[:-1], 1), torch.stack(known[:-1], 1), _stack(carries[1:], 1)
    prefixes = [rule.attach(before, before_exists, *part)[0] for part in local[:-1]]
    return {k: v.flatten(1, 2) for k, v in _stack([*prefixes, after], 2).items()}, carries[-1], known[-1]


def _pieces(length: int, peel: bool, block: int | None) -> list[tuple[int, int]]:
    """(blocks, tokens a block) of each piece: one token alone if there is nothing before it, then a square that takes
    the fewest steps (two passes over a block, one over the blocks), then what that leaves."""
    pieces = [(1, 1)] if peel else []
    length -= len(pieces)
    while length:
        size = max(1, min(block or isqrt(length // 2), length))
        pieces.append((length // size, size))
        length %= size
    return pieces


def _previous(
    prefix: Values,
    before: Values | None,
    exists: Tensor | None,
    empty: Values,
    entry: Tensor | None,
    initial: Values | None,
    initial_exists: Tensor | None,
) -> Values:
    """The prefixes before each token: shifted by one, and the start again at every restart."""
    first = _start(prefix, empty)
    if before is not None:
        first = before if exists is None else _pick(exists, before, first)
    shifted = {k: torch.cat([first[k].unsqueeze(1), p[:, :-1]], 1) for k, p in prefix.items()}
    if entry is None:
        return shifted
    if initial is None:
        return _pick(entry == GO_ON, shifted, empty)
    rows, rows_exist = _rows(empty, initial, initial_exists, entry)
    return _pick(entry == GO_ON, shifted, _pick(rows_exist, rows, empty))


def _rows(empty: Values, initial: Values | None, initial_exists: Tensor | None, row: Tensor) -> tuple[Values, Tensor]:
    """The initial states `row` names (any, where it names none) and whether it names one that exists."""
    index = row.clamp(min=0)
    named = row >= 0 if initial_exists is None else (row >= 0) & initial_exists[index]
    return (empty if initial is None else {k: initial[k][index] for k in empty}), named


def _donor(tensors: Values, valid: Tensor) -> Values:
    """The first token that counts, without gradient and leading axes; ones (zeros for integers) if none does."""
    flat, length = valid.reshape(-1), valid.shape[1]
    if flat.numel() == 0:
        return {k: torch.ones(x.shape[2:], dtype=x.dtype, device=x.device) for k, x in tensors.items()}
    first, some = flat.to(torch.int8).argmax().reshape(1), flat.any()
    found = {k: x.detach()[first // length, first % length][0] for k, x in tensors.items()}
    return {k: torch.where(some, x, torch.full_like(x, x.is_floating_point())) for k, x in found.items()}


def _nothing(
    elements: Values,
    empty: Values,
    carry: Values | None,
    exists: Tensor | None,
    previous: bool,
) -> Scan:
    """The scan of no tokens."""
    carry = _start(elements, empty) if carry is None else carry
    prefix = {k: s.unsqueeze(1)[:, :0] for k, s in carry.items()}
    return Scan(prefix, prefix if previous else None, carry, exists)


def _start(elements: Values, empty: Values) -> Values:
    """`empty` as a state of the elements' batch and lanes."""
    batch = _leading(elements)[0]
    shapes = {k: elements[k].shape[2:] if k in elements else e.shape for k, e in empty.items()}
    return {k: e.to(elements.get(k, e).dtype).expand(batch, *shapes[k]) for k, e in empty.items()}


def _fit(values: Values, like: Values, names: tuple[str, ...]) -> Values:
    """What a rule returned, at the full shape of its right operand (a constant comes without leading axes)."""
    return {k: values[k] if values[k].shape == like[k].shape else values[k].expand_as(like[k]) for k in names}


def _pick(flag: Tensor, yes: Values, no: Values) -> Values:
    """torch.where by component; the flag's axes are the leading ones."""
    return {k: torch.where(_flag(flag, y if y.dim() >= no[k].dim() else no[k]), y, no[k]) for k, y in yes.items()}


def _flag(flag: Tensor, like: Tensor) -> Tensor:
    return flag.reshape(flag.shape + (1,) * (like.dim() - flag.dim()))


def _leading(tensors: Values) -> tuple[int, int]:
    """(B, T)."""
    shape = next(iter(tensors.values())).shape
    return shape[0], shape[1]


def _blocks(elements: Values, count: int, size: int) -> Values:
    return {k: torch.unflatten(x, 1, (count, size)) for k, x in elements.items()}


def _unbind(tensors: Values, dim: int = 1) -> list[Values]:
    """One dict a position; backward is one stack, where indexing would add up full-size zeros."""
    rows = zip(*(x.unbind(dim) for x in tensors.values()), strict=True)
    return [dict(zip(tensors, row, strict=True)) for row in rows]


def _split(tensors: Values, sizes: list[int]) -> list[Values]:
    """Consecutive stretches of time."""
    if len(sizes) == 1:
        return [tensors]
    parts = zip(*(torch.split(x, sizes, 1) for x in tensors.values()), strict=True)
    return [dict(zip(tensors, part, strict=True)) for part in parts]


def _stack(rows: list[Values], dim: int) -> Values:
    return {k: torch.stack([row[k] for row in rows], dim) for k in rows[0]}


def _cat(rows: list[Values], dim: int = 1) -> Values:
    return rows[0] if len(rows) == 1 else {k: torch.cat([row[k] for row in rows], dim) for k in rows[0]}


# --- A layer over a batch of sequences: masks, restarts and packing on top of the scans, a stretch of time at once.

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


# --- The border of a compiled aggregator: what was passed, checked against the spec, with the spec's own names.


class ArgumentError(ValueError):
    """A call that does not fit the spec; the message says what was expected and what came."""


class Fields:
    """Values by name as attributes, as the functions of a spec read them; torch.compile traces it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@dataclass(frozen=True)
class Slot:
    """A declared tensor: an input is [B, T, *lanes, *dims], a param [*lanes, *dims] or [*dims], a state [B, *lanes,
    *dims]. `within`: (low, high, brackets), its interval; None: no bound."""

    name: str
    dims: tuple[str, ...] = ()
    kind: str = "real"
    within: tuple[float | None, float | None, str] | None = None


@dataclass(frozen=True)
class Spec:
    """A spec's border, as data. `taps`: how many tokens back an input is read; `previous`: the readout reads prev;
    `levels`: those of a tree's counter that the readout reads."""

    name: str
    digest: str
    inputs: tuple[Slot, ...]
    params: tuple[Slot, ...]
    components: tuple[Slot, ...]
    live: tuple[str, ...]
    outputs: tuple[Slot, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    dims: tuple[str, ...] = ()
    taps: Mapping[str, int] = field(default_factory=dict)
    previous: bool = False
    levels: int = 0


@dataclass
class Call:
    """One checked call: tensors by name, dim sizes, [B, T] or [B], the lanes; `dtype` is the outputs', what the inputs
    promote to, `compute` that of the state and of all arithmetic."""

    inputs: dict[str, Tensor]
    params: dict[str, Tensor]
    sizes: dict[str, int]
    leading: tuple[int, ...]
    lanes: tuple[int, ...]
    dtype: torch.dtype
    compute: torch.dtype
    device: torch.device

    @property
    def n(self) -> Fields:
        """The sizes of the dims; and, under a name that no dim can have, how precise the inputs are."""
        return Fields({**self.sizes, "__dtype__": self.dtype})

    def of_kind(self, kind: str, dtype: torch.dtype | None = None) -> torch.dtype:
        """The torch dtype of an element kind; real ones are `dtype`, by default the state's."""
        real = dtype or self.compute
        return {"real": real, "complex": complex_of(real), "int": torch.int64, "bool": torch.bool}[kind]


_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}
_REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32}
_ACCEPTED = {
    "real": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "complex": (torch.complex64, torch.complex128, torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "int": (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}


def complex_of(real: torch.dtype) -> torch.dtype:
    return _COMPLEX.get(real, torch.complex64)


_SEEN: dict[Any, Call] = {}  # calls that passed the checks, by digest, tokens, then shape, dtype, device of each
_MOST = 1024
_NONE = torch.empty(0)
_PLAIN = (Tensor, torch.nn.Parameter)  # what traces has shapes that are no keys


def bind_call(spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any], tokens: bool) -> Call:
    """Checks names, ranks, sizes, dtypes and devices. `tokens`: inputs have a T axis. Raises ArgumentError."""
    if kwargs:
        rest = [s.name for s in (*spec.inputs, *spec.params)][len(args) :]
        if kwargs.keys() == set(rest):
            args, kwargs = (*args, *(kwargs[name] for name in rest)), {}
    if kwargs or torch.compiler.is_compiling() or not all(type(x) in _PLAIN for x in args):
        return _bind(spec, args, kwargs, tokens)
    key = (spec.digest, tokens, *((x.shape, x.dtype, x.device, x.layout) for x in args))
    like = _SEEN.get(key)
    if like is None:
        if len(_SEEN) >= _MOST:
            _SEEN.clear()
        like = _bind(spec, args, kwargs, tokens)
        _SEEN[key] = replace(like, inputs=dict.fromkeys(like.inputs, _NONE), params=dict.fromkeys(like.params, _NONE))
    count = len(spec.inputs)
    inputs = dict(zip(like.inputs, args, strict=False))
    params = dict(zip(like.params, args[count:], strict=False))
    return Call(inputs, params, like.sizes, like.leading, like.lanes, like.dtype, like.compute, like.device)


def _bind(spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any], tokens: bool) -> Call:
    given = _by_name(spec, args, kwargs)
    inputs, params = ({s.name: given[s.name] for s in part} for part in (spec.inputs, spec.params))
    lead = 2 if tokens else 1
    first = spec.inputs[0]
    rank = _lane_axes(spec, given, lead)
    leading, device = tuple(given[first.name].shape[:lead]), given[first.name].device
    sizes = dict(spec.sizes)
    owner = dict.fromkeys(sizes, "the spec")
    lanes = [1] * rank
    for slot in (*spec.inputs, *spec.params):
        x = given[slot.name]
        front = lead if slot.name in inputs else 0
        shape = x.shape
        end = len(shape) - len(slot.dims)
        if front and tuple(shape[:front]) != leading:
            hint = tokens and end > 2 and shape[0] == leading[0] and _heads_first(shape, given[first.name].shape)
            _refuse(spec, slot, x, lead, f"its leading sizes are not those of '{first.name}', {list(leading)}", hint)
        if x.device != device:
            raise ArgumentError(f"PSM602: {spec.name}: '{slot.name}' is on {x.device}, '{first.name}' on {device}.")
        if x.dtype not in _ACCEPTED[slot.kind]:
            names = ", ".join(str(t).removeprefix("torch.") for t in _ACCEPTED[slot.kind])
            raise ArgumentError(
                f"PSM602: {spec.name}: '{slot.name}' is {x.dtype}, but it is a tensor of {slot.kind} numbers: {names}."
            )
        for dim, size in zip(slot.dims, shape[end:], strict=True):
            if sizes.setdefault(dim, size) != size:
                _refuse(spec, slot, x, lead, f"{dim} is {size} here, but {sizes[dim]} in {owner[dim]}")
            if not size:
                _refuse(spec, slot, x, lead, f"{dim} is 0, but a dim has at least one position")
            owner.setdefault(dim, f"'{slot.name}'")
        for axis, size in enumerate(shape[front:end]):
            lanes[axis] = size if lanes[axis] == 1 else max(lanes[axis], size) if size else 0
    _check_lanes(spec, given, lead, lanes)
    missing = [d for d in spec.dims if d not in sizes]
    if missing:
        raise ArgumentError(f"PSM603: {spec.name}: no argument tells the size of {', '.join(missing)}.")
    dtype = _promoted(inputs.values()) or _promoted(params.values()) or torch.get_default_dtype()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return Call(inputs, params, sizes, leading, tuple(lanes), dtype, compute, device)


def _promoted(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The real dtype that holds all but the ints."""
    dtype: torch.dtype | None = None
    for x in tensors:
        if x.is_floating_point() or x.is_complex():
            real = _REAL.get(x.dtype, x.dtype)
            dtype = real if dtype is None or dtype == real else torch.promote_types(dtype, real)
    return dtype


def _by_name(spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    names = [s.name for s in (*spec.inputs, *spec.params)]
    usage = f"{spec.name}({', '.join(names)})"
    if len(args) > len(names):
        raise ArgumentError(f"PSM601: {usage} takes {len(names)} tensors, but {len(args)} were passed.")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise ArgumentError(f"PSM601: {usage} has no argument '{name}'.")
        if name in given:
            raise ArgumentError(f"PSM601: {usage}: '{name}' was passed twice.")
        given[name] = value
    absent = [n for n in names if n not in given]
    if absent:
        raise ArgumentError(f"PSM601: {usage}: {', '.join(absent)} missing.")
    for name in names:
        if not isinstance(given[name], Tensor):
            raise ArgumentError(f"PSM601: {usage}: '{name}' must be a tensor, not {type(given[name]).__name__}.")
        if given[name].layout is not torch.strided:
            raise ArgumentError(f"PSM602: {spec.name}: '{name}' must be a dense tensor, not {given[name].layout}.")
    return given


def _lane_axes(spec: Spec, given: Mapping[str, Tensor], lead: int) -> int:
    """How many lane axes the inputs have: all the same number. A param has as many, or none."""
    first = spec.inputs[0]
    rank = max(0, given[first.name].dim() - lead - len(first.dims))
    for slot in (*spec.inputs, *spec.params):
        x = given[slot.name]
        is_param = slot in spec.params
        axes = x.dim() - len(slot.dims) - (0 if is_param else lead)
        if axes != rank and not (is_param and axes == 0):
            why = f"it has {_axes(x.dim())}" if axes < 0 else f"it has {_axes(axes, 'lane ')}"
            _refuse(spec, slot, x, lead, why + ("" if slot is first else f", while '{first.name}' has {rank}"))
    return rank


def _heads_first(shape: Sequence[int], first: Sequence[int]) -> bool:
    """Whether [B, T, ...] reads as if heads were put before time, here or in both, here in groups."""
    return shape[2] == first[1] or (shape[2:3] == first[2:3] and shape[1] > 0 and first[1] % shape[1] == 0)


def _axes(count: int, kind: str = "") -> str:
    return f"{count} {kind}{'axis' if count == 1 else 'axes'}"


def _check_lanes(spec: Spec, given: Mapping[str, Tensor], lead: int, lanes: list[int]) -> None:
    slots = (*spec.inputs, *spec.params)

    def front(slot: Slot) -> tuple[int, ...]:
        x = given[slot.name]
        return tuple(x.shape[0 if slot in spec.params else lead : x.dim() - len(slot.dims)])

    for slot in slots:
        x = given[slot.name]
        for axis, (size, whole) in enumerate(zip(front(slot), lanes, strict=False)):
            last = axis == len(lanes) - 1
            if size not in (1, whole) and not (last and size and whole % size == 0):
                why = "does not divide" if last else "is neither 1 nor"
                owner = next(s.name for s in slots if front(s)[axis : axis + 1] == (whole,))
                _refuse(spec, slot, x, lead, f"its lane axis of {size} {why} {whole}, that of '{owner}'", lead == 2)


def _refuse(spec: Spec, slot: Slot, x: Tensor, lead: int, why: str, hint: bool = False) -> NoReturn:
    """A shape that does not fit. `hint`: heads may have been put before time."""
    front = () if slot in spec.params else ("B", "T")[:lead]
    want = ", ".join((*front, "*lanes", *slot.dims))
    swapped = hint and slot in spec.inputs and x.dim() - len(slot.dims) > 2
    raise ArgumentError(
        f"PSM602: {spec.name}: '{slot.name}' must be [{want}], but it is {list(x.shape)}: {why}."
        + (f" Did you pass [{', '.join(('B', 'H', 'T', *slot.dims))}]? Time comes before the lanes." if swapped else "")
    )


def check_sizes(spec: Spec, batch: Any, lanes: Sequence[Any], dims: Mapping[str, Any], dtype: Any) -> None:
    """What `init_state` makes tensors of: batch and lanes from 0 on, every dim from 1 on, a float dtype."""
    where = f"PSM603: {spec.name}"
    stray = sorted(dims.keys() - set(spec.dims))
    if stray:
        raise ArgumentError(f"{where} has no dim {', '.join(stray)}; it has {', '.join(spec.dims) or 'none'}.")
    read = (*spec.components, *(s for s in spec.inputs if s.name in spec.taps))
    missing = sorted({d for s in read for d in s.dims} - dims.keys())
    if missing:
        raise ArgumentError(f"{where}: init_state needs the size of {', '.join(missing)}.")
    counts = ("batch", batch, 0), *(("lanes", n, 0) for n in lanes), *((k, n, 1) for k, n in dims.items())
    for name, size, least in counts:
        if not hasattr(size, "__index__") or size < least:
            raise ArgumentError(f"{where}: init_state: {name} is a whole number from {least} on, not {size!r}.")
    for name, size in spec.sizes.items():
        if dims[name] != size:
            raise ArgumentError(f"{where}: init_state: {name} is {size} in the spec, not {dims[name]!r}.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(f"{where}: init_state: dtype is a float dtype of torch, not {dtype!r}.")


def spread(x: Tensor, axis: int, lanes: tuple[int, ...]) -> Tensor:
    """Grouped lanes made whole: on the last lane axis (the one before `axis` from the left) the shorter repeats."""
    if not lanes or axis < 1:
        return x
    at = axis - 1
    size, whole = x.shape[at], lanes[-1]
    if size in (1, whole):
        return x
    return x.unsqueeze(at + 1).expand(*x.shape[: at + 1], whole // size, *x.shape[at + 1 :]).flatten(at, at + 1)


# --- The border, continued: states, flags and packing.


def check_flags(spec: Spec, name: str, flags: Any, call: Call) -> Tensor | None:
    """mask and reset: [B, T] of bools or ints, as bool."""
    if flags is None:
        return None
    where = f"PSM604: {spec.name}: '{name}'"
    if not isinstance(flags, Tensor):
        raise ArgumentError(f"{where} must be a tensor [B, T], not {type(flags).__name__}.")
    if tuple(flags.shape) != call.leading:
        raise ArgumentError(f"{where} must be [B, T] = {list(call.leading)}, but it is {list(flags.shape)}.")
    if flags.device != call.device:
        raise ArgumentError(f"{where} is on {flags.device}, the inputs on {call.device}.")
    if flags.is_floating_point() or flags.is_complex():
        raise ArgumentError(f"{where} is {flags.dtype}; pass bools (True: the token counts, or restarts).")
    return flags if flags.dtype == torch.bool else flags != 0


def check_cu_seqlens(spec: Spec, cu_seqlens: Any, call: Call) -> Tensor | None:
    """N + 1 ascending token offsets on the inputs' device; B must be 1. On a GPU their values are not read (a sync)."""
    if cu_seqlens is None:
        return None
    where = f"PSM606: {spec.name}: 'cu_seqlens'"
    batch, length = call.leading
    if not isinstance(cu_seqlens, Tensor):
        raise ArgumentError(f"{where} must be a tensor of N + 1 offsets, not {type(cu_seqlens).__name__}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{where} must be N + 1 offsets, int32 or int64, but it is {list(cu_seqlens.shape)}, {cu_seqlens.dtype}."
        )
    if batch != 1:
        raise ArgumentError(f"{where} packs the sequences in a batch of 1, but B is {batch}.")
    if cu_seqlens.device != call.device:
        raise ArgumentError(f"{where} is on {cu_seqlens.device}, the inputs on {call.device}.")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != length or sorted(offsets) != offsets:
            raise ArgumentError(f"{where} must rise from 0 to T = {length}, but it is {offsets}.")
    return cu_seqlens


def check_slots(spec: Spec, slots: Any, call: Call, state: Any) -> int:
    """How many rows a state has that `step_` changes; `slots` [B]: the rows, different ones (not checked: a sync)."""
    if not isinstance(state, Mapping):
        raise ArgumentError(f"PSM605: {spec.name}: step_ changes a state: pass what init_state or a call returned.")
    if slots is None:
        return call.leading[0]
    if not isinstance(slots, Tensor) or slots.dtype != torch.int64 or tuple(slots.shape) != call.leading:
        given = f"{slots.dtype}, {list(slots.shape)}" if isinstance(slots, Tensor) else type(slots).__name__
        raise ArgumentError(
            f"PSM605: {spec.name}: 'slots' must be an int64 tensor [B] = {list(call.leading)}, not {given}."
        )
    if slots.device != call.device:
        raise ArgumentError(f"PSM605: {spec.name}: 'slots' is on {slots.device}, the inputs on {call.device}.")
    rows = [x for x in state.values() if isinstance(x, Tensor) and x.dim()]
    return rows[0].shape[0] if rows else 0


def check_state(spec: Spec, call: Call, state: Any, rows: int) -> dict[str, Tensor] | None:
    """An initial state: exactly the live components and the tails, [rows, *lanes, *dims], in the state's dtypes."""
    if state is None:
        return None
    slots = {s.name: s for s in spec.components if s.name in spec.live}
    _check_names(spec, state, [*slots, *tail_names(spec)])
    parts = {k: _component(spec, call, k, state[k], slot, rows) for k, slot in slots.items()}
    return {**parts, **_tails(spec, call, state, rows)}


def tail_names(spec: Spec) -> list[str]:
    """Keys of a state that hold the last tokens of an input."""
    return [f"{name}_tail" for name in spec.taps]


def _check_names(spec: Spec, state: Any, wanted: list[str]) -> None:
    if not isinstance(state, Mapping):
        raise ArgumentError(f"PSM605: {spec.name}: a state is a dict of tensors, not {type(state).__name__}.")
    if set(state) != set(wanted):
        passed = ", ".join(map(str, state)) or "nothing"
        raise ArgumentError(f"PSM605: {spec.name}: a state holds {', '.join(wanted)}, but {passed} was passed.")


def _component(spec: Spec, call: Call, key: str, x: Any, slot: Slot, rows: int) -> Tensor:
    if not isinstance(x, Tensor):
        _refuse_state(spec, key, f"must be a tensor, not {type(x).__name__}")
    want = (rows, *call.lanes, *(call.sizes[d] for d in slot.dims))
    if tuple(x.shape) != want:
        shape = ", ".join(("rows", "*lanes", *slot.dims))
        tokens = len(call.leading) == 1 and call.lanes and tuple(x.shape) == (rows, *want[2:])
        hint = ". A step takes one token, without T: did you pass [B, T, ...]?" if tokens else ""
        _refuse_state(spec, key, f"must be [{shape}] = {list(want)}, but it is {list(x.shape)}", hint)
    return _placed(spec, call, key, x, call.of_kind(slot.kind))


def _tails(spec: Spec, call: Call, state: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
    """The last tokens of tapped inputs, [rows, W, *lanes, *dims], in the inputs' dtypes."""
    out = {}
    inputs = {s.name: s for s in spec.inputs}
    for source, longest in spec.taps.items():
        key, slot = f"{source}_tail", inputs[source]
        x = state[key]
        if not isinstance(x, Tensor):
            _refuse_state(spec, key, f"must be a tensor, not {type(x).__name__}")
        want = (rows, longest, *call.lanes, *(call.sizes[d] for d in slot.dims))
        if tuple(x.shape) != want:
            shape = ", ".join(("rows", str(longest), "*lanes", *slot.dims))
            _refuse_state(spec, key, f"must be [{shape}] = {list(want)}, but it is {list(x.shape)}")
        out[key] = _placed(spec, call, key, x, call.inputs[source].dtype)
    return out


def _placed(spec: Spec, call: Call, key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.device != call.device:
        _refuse_state(spec, key, f"is on {x.device}, the inputs on {call.device}")
    rank = (x.is_complex(), x.is_floating_point())
    if rank > (dtype.is_complex, dtype.is_floating_point):
        _refuse_state(spec, key, f"is {x.dtype}, but it holds {dtype}")
    return x.to(dtype)


def _refuse_state(spec: Spec, key: str, why: str, hint: str = "") -> NoReturn:
    raise ArgumentError(f"PSM605: {spec.name}: state '{key}' {why}{hint or '.'}")


# --- What the border sees only by reading tensors: values, checked where `checks` or PSMC_CHECK=1 asks for it.


def checks_wanted() -> bool:
    """Whether aggregators check values from their start."""
    return os.environ.get("PSMC_CHECK", "") not in ("", "0")


def check_values(spec: Spec, call: Call, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Inputs and params are finite and in their intervals, masked tokens apart; offsets rise from 0 to T."""
    for slot in spec.inputs:
        _check(spec, slot, slot.name, call.inputs[slot.name], counts=mask)
    for slot in spec.params:
        _check(spec, slot, slot.name, call.params[slot.name])
    if cu_seqlens is not None:
        offsets, length = cu_seqlens.tolist(), call.leading[1]
        if offsets[0] != 0 or offsets[-1] != length or sorted(offsets) != offsets:
            raise ArgumentError(f"PSM606: {spec.name}: 'cu_seqlens' must rise from 0 to T = {length}, not {offsets}.")


def check_state_values(spec: Spec, state: Mapping[str, Tensor] | None, start: Mapping[str, Tensor]) -> None:
    """A state's values are numbers, and in their intervals or what a sequence starts from."""
    slots = {s.name: s for s in spec.components}
    for name, x in (state or {}).items():
        slot = slots.get(name, Slot(name))
        _check(spec, slot, f"state '{name}'", x, free=start.get(name), finite=False)


def check_slot_values(spec: Spec, slots: Tensor | None, rows: int) -> None:
    """Rows of the state, different ones."""
    chosen = [] if slots is None else slots.tolist()
    for at, row in enumerate(chosen):
        if not 0 <= row < rows:
            raise ArgumentError(f"PSM608: {spec.name}: slots[{at}] is {row}, but the state has {rows} rows.")
        if row in chosen[:at]:
            raise ArgumentError(f"PSM608: {spec.name}: slots[{at}] is {row}, as slots[{chosen.index(row)}] is.")


def check_results(spec: Spec, outputs: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """No output and no state is NaN."""
    for name, x in outputs.items():
        _check(spec, Slot(name), f"output '{name}'", x, finite=False)
    for name, x in state.items():
        _check(spec, Slot(name), f"final state '{name}'", x, finite=False)


def _check(
    spec: Spec, slot: Slot, name: str, x: Tensor, *, counts: Tensor | None = None, free: Tensor | None = None,
    finite: bool = True,
) -> None:  # fmt: skip
    """`counts` [B, T]: which tokens do; `free`: values that are allowed wherever the interval is."""
    x = x.detach()
    bad = ~torch.isfinite(x) if finite else torch.isnan(x)
    if slot.within is not None and not x.is_complex():
        low, high, ends = slot.within
        value, outside = x.double(), torch.zeros_like(bad)
        if low is not None:
            outside |= value <= low if ends[0] == "(" else value < low
        if high is not None:
            outside |= value >= high if ends[1] == ")" else value > high
        bad |= outside if free is None else outside & (x != free)
    if counts is not None:
        bad &= counts.reshape(*counts.shape, *[1] * (x.dim() - 2))
    if not bool(bad.any()):
        return
    at = bad.nonzero()[0].tolist()
    found = x[tuple(at)].item()
    quoted = name if "'" in name else f"'{name}'"
    where = f"PSM608: {spec.name}: {quoted}{at if at else ''} is {found}"
    if slot.within is not None and found == found and abs(found) != torch.inf:
        low, high, ends = slot.within
        bounds = f"{'-inf' if low is None else f'{low:g}'}, {'inf' if high is None else f'{high:g}'}"
        raise ArgumentError(f"{where}, outside of its interval {ends[0]}{bounds}{ends[1]}.")
    raise ArgumentError(f"{where}{'' if found != found else ', but it must be finite'}.")


# --- Inputs read some tokens earlier, and time run backwards: index arithmetic on whole sequences, no loop over T.

Tails = dict[str, Tensor]


def tap_tokens(
    spec: Spec,
    call: Call,
    state: Tails | None,
    mask: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[dict[str, Tensor], Tails]:
    """Inputs read some tokens earlier, as inputs `name_lagK` over all lanes; and the tails after the last token."""
    return {}, {}


def tap_token(spec: Spec, call: Call, state: Tails | None) -> tuple[dict[str, Tensor], Tails]:
    """The same for one token."""
    return {}, {}


class Places(NamedTuple):
    """Where each token stands: the `row` of its sequence, `at` which place in it, `since` how far after the last reset
    (its place, if there was none), whether it is after one (`restarted`), [B, T] each; `begin`, `end` [rows]."""

    row: Tensor
    at: Tensor
    since: Tensor
    begin: Tensor
    end: Tensor
    restarted: Tensor


def places(call: Call, cu_seqlens: Tensor | None, reset: Tensor | None) -> Places:
    """Token places of a dense batch, or of N packed sequences in one row."""
    (batch, length), device = call.leading, call.device
    token = torch.arange(length, device=device).expand(batch, length)
    if cu_seqlens is None:
        row = torch.arange(batch, device=device)[:, None].expand(batch, length)
        begin = torch.zeros(batch, dtype=torch.int64, device=device)
        end = begin + length
        at = token
    else:
        bounds = cu_seqlens.long()
        row = (torch.searchsorted(bounds, token.contiguous(), right=True) - 1).clamp(0, bounds.shape[0] - 2)
        begin, end = bounds[:-1], bounds[1:]
        at = token - begin[row]
    if reset is None:
        return Places(row, at, at, begin, end, torch.zeros(batch, length, dtype=torch.bool, device=device))
    last = torch.where(reset, token, -1).cummax(1).values if length else token
    restarted = last >= token - at
    return Places(row, at, torch.where(restarted, token - last, at), begin, end, restarted)


def flip(x: Tensor, where: Places | None) -> Tensor:
    """Time reversed within each sequence; `where` None: each row is one sequence."""
    if where is None:
        return x.flip(1)
    mirror = where.begin[where.row] + where.end[where.row] - 1 - torch.arange(x.shape[1], device=x.device)
    return x[:, mirror[0].clamp(0, max(x.shape[1] - 1, 0))]


# --- One checked call in PyTorch: lift, the scan of the plan, readout. Differentiable by autograd.

Rules = SimpleNamespace  # the functions of the spec: lift, combine, advance, output, identity, (start), (recurrence)


def as_state(value: Tensor, slot: Slot, call: Call, leading: tuple[int, ...]) -> Tensor:
    """A component in full, [*leading, *lanes, *dims], in its dtype: rules return what they read of the leading axes."""
    rank = len(slot.dims)
    dims = value.shape[value.dim() - rank :]
    return value.to(call.of_kind(slot.kind)).expand((*leading, *call.lanes, *dims))


def prepared(spec: Spec, call: Call, lags: Values, lazily: bool = False) -> tuple[Any, Values]:
    """Inputs and params in the dtypes of computation, grouped lanes made whole; `lags`: the taps, `name_lagK`.

    `lazily`: an input is converted when it is first read.
    """
    raw = [(s.name, s, call.inputs[s.name]) for s in spec.inputs]
    for s in spec.inputs:
        raw += [(f"{s.name}_lag{k}", s, lags[f"{s.name}_lag{k}"]) for k in range(1, spec.taps.get(s.name, 0) + 1)]
    params = {s.name: _prepared(s, call.params[s.name], call) for s in spec.params}
    return {name: _prepared(slot, value, call) for name, slot, value in raw}, params


def _prepared(slot: Slot, value: Tensor, call: Call) -> Tensor:
    return spread(value.to(call.of_kind(slot.kind)), value.dim() - len(slot.dims), call.lanes)


def start_state(spec: Spec, rules: Rules, call: Call, names: tuple[str, ...]) -> Values:
    """Where a sequence starts, [*dims] each."""
    begin = getattr(rules, "start", rules.identity)
    found: Values = begin(call.n, torch.empty((), dtype=call.compute, device=call.device))
    kinds = {s.name: s.kind for s in spec.components}
    return {k: found[k].to(call.of_kind(kinds[k])) for k in names}


def transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp) transforms this call. Then it is plain PyTorch: kernels, and gradients that
    are written by hand, know nothing of it."""
    return bool(torch._C._are_functorch_transforms_active())


def in_full_precision(run: Callable[..., tuple[Values, Values]]) -> Callable[..., tuple[Values, Values]]:
    """A run without autocast: what surrounds a call does not change its arithmetic (a rule from Python may want it)."""

    @wraps(run)
    def wrapped(spec: Spec, rules: Rules, call: Call, *args: Any, **kwargs: Any) -> tuple[Values, Values]:
        kind = call.device.type
        if hasattr(rules, "extern") or kind == "meta" or not torch.is_autocast_enabled(kind):
            return run(spec, rules, call, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return run(spec, rules, call, *args, **kwargs)

    return wrapped


@in_full_precision
def run_scan(
    spec: Spec, rules: Rules, call: Call, fold: str, x: Values, p: Values, initial: Values | None,
    mask: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, whole: bool = False,
) -> tuple[Values, Values]:  # fmt: skip
    """Outputs [B, T, *lanes, *dims] by name, and the final state. `whole`: no readout, all components of the state.

    x: inputs (taps as `name_lagK`) and p: params, as `prepared` returns them. `fold`: 'scan', 'left' or 'tree'.
    """
    params, n = Fields(p), call.n
    slots = {s.name: s for s in spec.components}
    live = tuple(slots) if whole or fold == "tree" else spec.live

    def lift(tokens: Values) -> Values:
        leading = next(iter(tokens.values())).shape[:2]
        element = rules.lift(Fields(tokens), params, n)
        return {k: as_state(v, slots[k], call, leading) for k, v in element.items()}

    def combine(l: Values, r: Values) -> Values:  # noqa: E741
        joined: Values = rules.combine(Fields(l), Fields(r), params, n)
        return {k: v.to(l[k].dtype) for k, v in joined.items()}

    def advance(l: Values, r: Values) -> Values:  # noqa: E741
        rule = rules.combine if whole else rules.advance
        moved: Values = rule(Fields(l), Fields(r), params, n)
        return {k: v.to(l[k].dtype) for k, v in moved.items() if k in l}

    def recur(state: Values, tokens: Values) -> Values:
        moved: Values = rules.recurrence(Fields(state), Fields(tokens), params, n)
        leading = next(iter(tokens.values())).shape[:1]
        return {k: as_state(moved[k], slots[k], call, leading) for k in state}

    def output(prefix: Values, previous: Values | None, tokens: Values) -> Values:
        before = Fields(previous) if previous is not None else None
        levels = []
        found = rules.output(Fields(prefix), before, Fields(tokens), params, n, *levels)
        return {s.name: as_output(found[s.name], s, call, next(iter(prefix.values())).shape[:2]) for s in spec.outputs}

    empty = start_state(spec, rules, call, live)
    sequences = hasattr(rules, "recurrence")
    rows = call.leading[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    restart = None
    if hasattr(rules, "start") and fold == "scan":
        restart = {k: as_state(v, slots[k], call, (1,)) for k, v in empty.items()}
    final: Values
    outputs, final = scan_tokens(
        lift, combine, advance,
        None if whole else output, x, empty, initial, restart=restart, valid=mask, reset=reset, cu_seqlens=cu_seqlens,
        previous=spec.previous and not whole, left=fold == "left",
    )  # fmt: skip
    final = {k: as_state(v, slots[k], call, (rows,)) for k, v in final.items()}
    return outputs, final or {k: as_state(v, slots[k], call, (rows,)) for k, v in empty.items()}


def as_output(value: Tensor, slot: Slot, call: Call, leading: tuple[int, ...]) -> Tensor:
    """An output in full and in the dtype that the inputs promote to."""
    rank = len(slot.dims)
    dims = value.shape[value.dim() - rank :]
    kind = "complex" if value.is_complex() else slot.kind
    return value.to(call.of_kind(kind, call.dtype)).expand((*leading, *call.lanes, *dims))


@in_full_precision
def run_step(spec: Spec, rules: Rules, call: Call, state: Values, x: Values, p: Values) -> tuple[Values, Values]:
    """One token for every row: (outputs [B, *lanes, *dims], the state after it); not of a tree."""
    params, n = Fields(p), call.n
    slots = {s.name: s for s in spec.components}
    tokens, before = Fields(x), Fields(state)
    moved = rules.advance(before, Fields(rules.lift(tokens, params, n)), params, n)
    after = {k: as_state(moved[k], slots[k], call, call.leading) for k in spec.live}
    found = rules.output(Fields(after), None, tokens, params, n)
    return {s.name: as_output(found[s.name], s, call, call.leading) for s in spec.outputs}, after


# --- The scan as an operator of torch: one graph node for torch.compile, with its own backward.

_FORWARD = (
    "(Tensor[] inputs, Tensor[] params, Tensor[] initial, Tensor? mask, Tensor? reset, Tensor? cu_seqlens, bool save)"
    " -> Tensor[]"
)
_BACKWARD = (
    "(Tensor[] grads, Tensor[] inputs, Tensor[] params, Tensor[] initial, Tensor? mask, Tensor? reset,"
    " Tensor? cu_seqlens, Tensor[] results) -> Tensor[]"
)


class Given(NamedTuple):
    """The tensors of a call as the operator takes them; `inputs` end with the taps, `initial` may be empty."""

    inputs: list[Tensor]
    params: list[Tensor]
    initial: list[Tensor]
    mask: Tensor | None
    reset: Tensor | None
    cu_seqlens: Tensor | None


class Operator:
    """psmc::<name>_<digest> and its backward, registered once per process whoever imports the module how often.

    results: the outputs, then the live components of the final state, then what the kernels save for backward.
    """

    def __init__(self, spec: Spec, rules: Rules, fold: str, kernels: Any) -> None:
        self.spec, self.rules, self.fold, self.kernels = spec, rules, fold, kernels
        self.extras = tuple((s, lag) for s in spec.inputs for lag in range(1, spec.taps.get(s.name, 0) + 1))
        self.live = tuple(s for s in spec.components if s.name in spec.live)
        self.quick = None if kernels is None or self.extras or fold == "tree" else kernels.steps(len(spec.inputs))
        name = f"{spec.name}_{spec.digest}"
        if not hasattr(torch.ops.psmc, name):
            self._register(name)
        self.op = getattr(torch.ops.psmc, name).default

    def wanted(self, call: Call, carries: bool, cut: bool) -> bool:
        """Kernels where there are some for this device and dtype, one node of a compiled graph; else plain autograd.

        `carries`: a state goes in or out; that of a tree is not of one shape, and such calls are traced. `cut`: tokens
        are masked, packed or begin anew, which the kernels of a tree do not do.
        """
        tree = self.fold == "tree"
        kernels = self._kernels(call) and not (tree and (carries or cut))
        return kernels or (torch.compiler.is_compiling() and not (tree and carries))

    def _kernels(self, call: Call, given: Given | None = None) -> bool:
        """`given`: of this very call, where flags matter."""
        if self.kernels is None or call.compute != torch.float32 or transformed():
            return False
        return bool(call.device.type == "cuda" or self.kernels.interpreted)

    def __call__(
        self, call: Call, extra: Values, initial: Values | None, mask: Tensor | None, reset: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Values, Values]:  # fmt: skip
        """As `run_scan`; `extra` holds the taps as `name_lagK`."""
        inputs = [*call.inputs.values(), *(extra[f"{s.name}_lag{lag}"] for s, lag in self.extras)]
        params = list(call.params.values())
        begin = [] if initial is None else [initial[s.name] for s in self.live]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *params, *begin))
        if torch.compiler.is_compiling():
            results = self.op(inputs, params, begin, mask, reset, cu_seqlens, save)
        else:  # the same without the dispatcher, whose first call imports half of torch
            given = Given(inputs, params, begin, mask, reset, cu_seqlens)
            apply: Any = Eager.apply
            results = apply(self, given, *inputs, *params, *begin) if save else self._launch(given, False)
        outputs = {s.name: x for s, x in zip(self.spec.outputs, results, strict=False)}
        return outputs, {s.name: x for s, x in zip(self.live, results[len(outputs) :], strict=False)}

    def steps(self, call: Call, state: Values | None) -> bool:
        """Whether the step kernel takes this token: no gradient is wanted, no taps, a state in the kernels' dtype."""
        if not self._kernels(call) or self.extras or self.fold == "tree" or torch.compiler.is_compiling():
            return False
        tensors = (*call.inputs.values(), *call.params.values(), *(state or {}).values())
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return False
        return state is None or all(
            state[s.name].dtype == call.of_kind(s.kind) and state[s.name].is_contiguous() for s in self.live
        )

    def step(self, call: Call, state: Values, slots: Tensor | None, in_place: bool) -> tuple[Any, Values]:
        """One token by the step kernel: (outputs, the state after it); `slots`: the rows that move on."""
        assert self.quick is not None
        tensors = (*call.inputs.values(), *call.params.values())
        found: tuple[Any, Values] = self.quick.first(state, tensors, slots, in_place)
        return found

    def _register(self, name: str) -> None:
        forward = torch.library.custom_op(f"psmc::{name}", self._forward, mutates_args=(), schema=_FORWARD)
        backward = torch.library.custom_op(f"psmc::{name}_backward", self._backward, mutates_args=(), schema=_BACKWARD)
        forward.register_fake(lambda *args: self._fake(Given(*args[:-1]), args[-1]))
        backward.register_fake(lambda grads, inputs, params, initial, *rest: _like(inputs, params, initial))
        forward.register_autograd(self._differentiate, setup_context=self._remember)

    def _call(self, given: Given) -> Call:
        return bind_call(self.spec, [*given.inputs[: len(self.spec.inputs)], *given.params], {}, tokens=True)

    def _forward(
        self, inputs: list[Tensor], params: list[Tensor], initial: list[Tensor], mask: Tensor | None,
        reset: Tensor | None, cu_seqlens: Tensor | None, save: bool,
    ) -> list[Tensor]:  # fmt: skip
        given = Given(inputs, params, initial, mask, reset, cu_seqlens)
        if self._kernels(self._call(given), given):
            return self._launch(given, save)
        found, final = self._run(given)
        results = (*found.values(), *(final[s.name] for s in self.live))
        return [x.clone(memory_format=torch.contiguous_format) for x in results]

    def _launch(self, given: Given, save: bool) -> list[Tensor]:
        inputs, params, initial, mask, reset, cu_seqlens = given
        outputs, finals, saved = self.kernels.scan_forward(
            inputs, params, initial or None, token_code(mask, reset), cu_seqlens, save
        )
        return [*outputs, *finals, *saved]

    def _launch_backward(self, given: Given, grads: list[Tensor], results: list[Tensor]) -> list[Tensor | None]:
        """Gradients of inputs, params and the initial state in one list, None where there is none."""
        inputs, params, initial, mask, reset, cu_seqlens = given
        count = len(self.spec.outputs)
        found = self.kernels.scan_backward(
            grads[:count], grads[count:], inputs, params, initial or None, results[count + len(self.live) :],
            token_code(mask, reset), cu_seqlens,
        )  # fmt: skip
        parts = zip(found, (inputs, params, initial), strict=True)
        return [g for part, like in parts for g in (part or [None] * len(like))]

    def _run(self, given: Given) -> tuple[Values, Values]:
        call = self._call(given)
        taps = zip(self.extras, given.inputs[len(self.spec.inputs) :], strict=True)
        lags = {f"{slot.name}_lag{lag}": value for (slot, lag), value in taps}
        x, p = prepared(self.spec, call, lags, hasattr(self.rules, "matrices"))
        begin = {s.name: v for s, v in zip(self.live, given.initial, strict=True)} if given.initial else None
        return run_scan(self.spec, self.rules, call, self.fold, x, p, begin, given.mask, given.reset, given.cu_seqlens)

    def _fake(self, given: Given, save: bool) -> list[Tensor]:
        call = self._call(given)
        rows = call.leading[0] if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
        like = given.inputs[0]

        def empty(leading: tuple[int, ...], slot: Slot, dtype: torch.dtype | None = None) -> Tensor:
            shape = (*leading, *call.lanes, *(call.sizes[d] for d in slot.dims))
            return like.new_empty(shape, dtype=call.of_kind(slot.kind, dtype))

        results = [empty(call.leading, s, call.dtype) for s in self.spec.outputs]
        results += [empty((rows,), s) for s in self.live]
        if save and self._kernels(call, given):
            slots = {s.name: s for s in self.live}
            for name in self.kernels.saved_components():
                results.append(empty((self.kernels.saved_rows(math.prod(call.leading), rows),), slots[name]))
        return results

    def _remember(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        given = Given(*inputs[:-1])
        ctx.counts = [len(part) for part in given[:3]]
        saved = output if self.kernels is not None else []
        ctx.save_for_backward(*given.inputs, *given.params, *given.initial, *given[3:], *saved)

    def _differentiate(self, ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        parts: list[list[Tensor]] = []
        for count in ctx.counts:
            parts.append(saved[:count])
            saved = saved[count:]
        mask, reset, cu_seqlens, *results = saved
        given = Given(parts[0], parts[1], parts[2], mask, reset, cu_seqlens)
        used = grads[: len(self.spec.outputs) + len(self.live)]
        like = self._fake(given, False) if any(g is None for g in used) else used
        dense = [torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(used, like, strict=True)]  # type: ignore[arg-type]
        backward = getattr(torch.ops.psmc, f"{self.spec.name}_{self.spec.digest}_backward").default
        found = iter(backward(dense, *given, results if self._kernels(self._call(given), given) else []))
        split = [[g if _smooth(x) else None for x, g in zip(part, found, strict=False)] for part in parts]
        return (*split, None, None, None, None)

    def _backward(
        self, grads: list[Tensor], inputs: list[Tensor], params: list[Tensor], initial: list[Tensor],
        mask: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, results: list[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        given = Given(inputs, params, initial, mask, reset, cu_seqlens)
        everything = [*inputs, *params, *initial]
        kernels = self._kernels(self._call(given), given)
        flat = self._launch_backward(given, grads, results) if kernels else self._transpose(given, grads)
        return [
            torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            if g is None
            else (g if kernels else g.clone(memory_format=torch.contiguous_format))
            for g, x in zip(flat, everything, strict=True)
        ]

    def _transpose(self, given: Given, grads: list[Tensor], again: bool = False) -> list[Tensor | None]:
        """Autograd through a run of its own; `again`: what it gives is differentiated, too."""

        def fresh(x: Tensor) -> Tensor:  # of views, so that no gradient takes the way from one argument to another
            return x.view_as(x) if again else x.detach().requires_grad_(_smooth(x))

        with _recorded():
            inputs, params, initial = ([fresh(x) for x in part] for part in (given.inputs, given.params, given.initial))
            out, final = self._run(given._replace(inputs=inputs, params=params, initial=initial))
            pairs = zip((*out.values(), *(final[s.name] for s in self.live)), grads, strict=True)
            reached = [(y, g) for y, g in pairs if y.requires_grad]
            leaves = [*inputs, *params, *initial]
            wanted = [x for x in leaves if x.requires_grad]
            if not reached or not wanted:
                return [None] * len(leaves)
            results, cotangents = ([pair[side] for pair in reached] for side in (0, 1))
            found = iter(torch.autograd.grad(results, wanted, cotangents, allow_unused=True, create_graph=again))
        return [next(found) if x.requires_grad else None for x in leaves]


class Eager(torch.autograd.Function):
    """The kernels under autograd, outside of compiled graphs."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, given: Given, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = operator._launch(given, True)
        ctx.operator, ctx.counts = operator, [len(part) for part in given[:3]]
        ctx.flags, ctx.results = given[3:], len(operator.spec.outputs) + len(operator.live)
        ctx.save_for_backward(*tensors, *results)
        ctx.mark_non_differentiable(*(x for x in results if not _smooth(x)))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        parts: list[list[Tensor]] = []
        for count in ctx.counts:
            parts.append(saved[:count])
            saved = saved[count:]
        given = Given(parts[0], parts[1], parts[2], *ctx.flags)
        dense = [g.contiguous() for g in grads[: ctx.results]]
        if torch.is_grad_enabled():  # for gradients of gradients, which the kernels know nothing of
            return (None, None, *ctx.operator._transpose(given, dense, True))
        return (None, None, *ctx.operator._launch_backward(given, dense, saved))


def token_code(mask: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """[B, T] int8 for the kernels, None where nothing is said. Bit 0: the token counts; bit 1: a restart before it."""
    if reset is None:
        return None if mask is None else mask.to(torch.int8)
    return (torch.ones_like(reset) if mask is None else mask).to(torch.int8) + 2 * reset.to(torch.int8)


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd inside an operator's kernel, where torch's dispatcher leaves it out."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther)
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    try:
        for key in keys:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        with torch.enable_grad():
            yield
    finally:
        for key, excluded in zip(keys, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def _smooth(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _like(*parts: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for part in parts for x in part]


# --- The public face of a compiled aggregator: a parallel call, a step, states.

State = dict[str, Tensor]


class Aggregator:
    """A sequence model's scan: call it on whole sequences, or `step` it token by token with the same result.

    Inputs are [B, T, *lanes, *dims] in the spec's order, params [*lanes, *dims] or [*dims]; see `help(agg)`.
    """

    def __init__(self, spec: Spec, rules: Rules, *, fold: str, kernels: Any = None) -> None:
        """`fold`: 'scan', 'left' or 'tree'; `kernels`: the module's Triton entry points. With a rule from Python (then
        `rules.extern` is what makes an aggregator of one, and this one) calls are plain PyTorch, never a custom op."""
        self.spec, self.rules, self.fold_order = spec, rules, fold
        self.operator = Operator(spec, rules, fold, kernels)
        self._quick = None if self.operator is None else self.operator.quick  # steps that were checked before
        self._calls = None  # and whole calls
        self.checks = checks_wanted()  # values are read and checked, which waits for the device
        self.__name__ = spec.name

    def __deepcopy__(self, memo: dict[int, Any]) -> Aggregator:
        """Itself, as it holds nothing that trains; with a rule from Python, one with a copy of the rule."""
        return self

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
        x, p = prepared(self.spec, call, lags)
        if before is None:
            before = self._start(call)
        run = run_step
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
        if self.operator is not None and self.operator.steps(call, state):
            return self.operator.step(call, state, slots, True)[0]
        rows = state if slots is None else {k: x.index_select(0, slots) for k, x in state.items()}
        out, after = self.step(rows, *args, **kwargs)
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

    def _checked(self, call: Call, state: Mapping[str, Tensor] | None, rows: int) -> State | None:
        check = check_state
        return check(self.spec, call, state, rows)

    def _begin(self, call: Call) -> State:
        """What each component starts from, [*dims]."""
        return start_state(self.spec, self.rules, call, tuple(s.name for s in self.spec.components))

    def _start(self, call: Call) -> State:
        """Before any token; tails apart."""
        slots = {s.name: s for s in self.spec.components}
        begin = start_state(self.spec, self.rules, call, self.spec.live)
        return {k: as_state(v, slots[k], call, call.leading[:1]).clone() for k, v in begin.items()}


# --- the spec's border

SPEC = Spec(
    name='elman',
    digest='88f4cf37962216aa',
    inputs=(Slot('x', ('H',)),),
    params=(Slot('W', ('H', 'H')),),
    components=(Slot('h', ('H',)),),
    live=('h',),
    outputs=(Slot('y', ('H',)),),
    sizes={},
    dims=('H',),
    taps={},
    previous=False,
)

elman = Aggregator(SPEC, SimpleNamespace(lift=lift, combine=combine, advance=advance, output=output, identity=identity), fold="left", kernels=KERNELS)
