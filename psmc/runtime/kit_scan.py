"""Scans in PyTorch, differentiable by autograd: no loop over T where the rule is associative.

An element is a flat dict of tensors, [B, T, *lanes, *dims] each (expanded views are welcome); a state is the same
without T and holds only the live components. `combine(l, r)` maps two elements to an element, `advance(s, r)` a
state and an element to a state; both are batched over the leading axes.

The identity is never combined in. A token that does not count, a restart, a missing initial state: all are *selected*,
with both operands of an unselected combine replaced by a real element that carries no gradient, so that neither values
nor gradients are poisoned by what is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

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
