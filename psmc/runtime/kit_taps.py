"""Inputs read some tokens earlier, and time run backwards: index arithmetic on whole sequences, no loop over T."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where each token stands: `row` of its sequence, `at` its place in it, `since` its distance from the last restart
    (at least the place where there was none), all [B, T]; `end` [rows]: one past the last token; `restart`: [B, T]."""

    row: Tensor
    at: Tensor
    since: Tensor
    begin: Tensor
    end: Tensor
    restarted: Tensor


def places(batch: int, length: int, device: torch.device, cu_seqlens: Tensor | None, reset: Tensor | None) -> Places:
    """Token places of a dense batch, or of N packed sequences in one row."""
    token = torch.arange(length, device=device).expand(batch, length)
    if cu_seqlens is None:
        row = torch.arange(batch, device=device)[:, None].expand(batch, length)
        begin = torch.zeros(batch, dtype=torch.int64, device=device)
        end = begin + length
        at = token
    else:
        row = (torch.searchsorted(cu_seqlens, token.contiguous(), right=True) - 1).clamp(0, cu_seqlens.numel() - 2)
        begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        at = token - begin[row]
    if reset is None:
        return Places(row, at, at, begin, end, torch.zeros(batch, length, dtype=torch.bool, device=device))
    last = torch.where(reset, token, -1).cummax(1).values if length else token
    restarted = last >= token - at
    return Places(row, at, torch.where(restarted, token - last, at), begin, end, restarted)


def lagged(x: Tensor, lag: int, where: Places, tail: Tensor | None) -> Tensor:
    """x read `lag` tokens earlier: [B, T, ...]; from the tail [rows, W, ...] or 0 before a sequence's start, 0 across a
    restart. `x` holds 0 at masked tokens already."""
    length = x.shape[1]
    shifted = torch.cat([x.new_zeros(x.shape[0], min(lag, length), *x.shape[2:]), x[:, : max(length - lag, 0)]], 1)
    inside = _flag_like(where.since >= lag, x)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    out = torch.where(inside, shifted, zero)
    if tail is None:
        return out
    width = tail.shape[1]
    slot = (width + where.at - lag).clamp(0, width - 1)
    early = _flag_like((where.at < lag) & ~where.restarted, x)
    return torch.where(early, tail[where.row, slot].to(x.dtype), out)


def next_tail(x: Tensor, width: int, where: Places, tail: Tensor | None) -> Tensor:
    """The last `width` tokens of each sequence, oldest first, [rows, W, ...]: older ones from the old tail, 0 before a
    restart."""
    rows, length = where.end.numel(), x.shape[1]
    back = torch.arange(width, 0, -1, device=x.device)  # how far before the end
    token = where.end[:, None] - back
    inside = token >= where.begin[:, None]
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    if length == 0:
        old = x.new_zeros(rows, width, *x.shape[2:]) if tail is None else tail.to(x.dtype)
        return old
    batch = (
        torch.arange(rows, device=x.device)
        if x.shape[0] == rows
        else torch.zeros(rows, dtype=torch.int64, device=x.device)
    )
    last = (where.end - 1).clamp(min=0)
    empty = where.end <= where.begin
    reach = torch.where(where.restarted[batch, last] & ~empty, where.since[batch, last] + 1, length + width + 1)
    kept = back[None, :] <= reach[:, None]
    out = torch.where(_flag_like(inside & kept, x), x[batch[:, None], token.clamp(0, length - 1)], zero)
    if tail is None:
        return out
    slot = (width + token - where.begin[:, None]).clamp(0, width - 1)
    older = tail[torch.arange(rows, device=x.device)[:, None], slot].to(x.dtype)
    return torch.where(_flag_like(~inside & kept, x), older, out)


def flip(x: Tensor, where: Places | None) -> Tensor:
    """Time reversed within each sequence; `where` None: each row is one sequence."""
    if where is None:
        return x.flip(1)
    mirror = where.begin[where.row] + where.end[where.row] - 1 - torch.arange(x.shape[1], device=x.device)
    return x[:, mirror[0].clamp(0, max(x.shape[1] - 1, 0))]


def _flag_like(flag: Tensor, x: Tensor) -> Tensor:
    return flag.reshape(flag.shape + (1,) * (x.dim() - flag.dim()))
