"""Inputs read some tokens earlier, and time run backwards: index arithmetic on whole sequences, no loop over T."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from psmc.runtime.kit_bind import Call, Spec, all_lanes
from psmc.runtime.kit_scan import _flag

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
    if not spec.taps:
        return {}, {}
    where = places(call, cu_seqlens, reset)
    lags: dict[str, Tensor] = {}
    tails: Tails = {}
    for name, longest in spec.taps.items():
        x = _whole(spec, call, name)
        tail = None if state is None else state[f"{name}_tail"]
        if mask is not None:
            x = torch.where(_flag(mask, x), x, x.new_zeros(()))
        for lag in range(1, longest + 1):
            lags[f"{name}_lag{lag}"] = lagged(x, lag, where, tail)
        tails[f"{name}_tail"] = next_tail(x, longest, where, tail)
    return lags, tails


def tap_token(spec: Spec, call: Call, state: Tails | None) -> tuple[dict[str, Tensor], Tails]:
    """The same for one token."""
    if not spec.taps:
        return {}, {}
    lags: dict[str, Tensor] = {}
    tails: Tails = {}
    for name, longest in spec.taps.items():
        x = _whole(spec, call, name)
        past = x.new_zeros(x.shape[0], longest, *x.shape[1:]) if state is None else state[f"{name}_tail"]
        for lag in range(1, longest + 1):
            lags[f"{name}_lag{lag}"] = past[:, longest - lag]
        tails[f"{name}_tail"] = torch.cat([past[:, 1:], x.unsqueeze(1)], 1)
    return lags, tails


def _whole(spec: Spec, call: Call, name: str) -> Tensor:
    (slot,) = (s for s in spec.inputs if s.name == name)
    x = call.inputs[name]
    return all_lanes(x, x.dim() - len(slot.dims), call.lanes)


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


def lagged(x: Tensor, lag: int, where: Places, tail: Tensor | None) -> Tensor:
    """x read `lag` tokens earlier: [B, T, ...]; from the tail [rows, W, ...] or 0 before a sequence's start, 0 across a
    restart. `x` holds 0 at masked tokens already."""
    length = x.shape[1]
    shifted = torch.cat([x.new_zeros(x.shape[0], min(lag, length), *x.shape[2:]), x[:, : max(length - lag, 0)]], 1)
    inside = _flag(where.since >= lag, x)
    out = torch.where(inside, shifted, x.new_zeros(()))
    if tail is None:
        return out
    width = tail.shape[1]
    slot = (width + where.at - lag).clamp(0, width - 1)
    early = _flag((where.at < lag) & ~where.restarted, x)
    return torch.where(early, tail[where.row, slot].to(x.dtype), out)


def next_tail(x: Tensor, width: int, where: Places, tail: Tensor | None) -> Tensor:
    """The last `width` tokens of each sequence, oldest first, [rows, W, ...]: older ones from the old tail, 0 before a
    restart."""
    rows, length = where.end.numel(), x.shape[1]
    back = torch.arange(width, 0, -1, device=x.device)  # how far before the end
    token = where.end[:, None] - back
    inside = token >= where.begin[:, None]
    if length == 0:
        return x.new_zeros(rows, width, *x.shape[2:]) if tail is None else tail.to(x.dtype)
    batch = torch.arange(rows, device=x.device).clamp(max=x.shape[0] - 1)  # packed sequences share row 0
    last = (where.end - 1).clamp(min=0)
    empty = where.end <= where.begin
    reach = torch.where(where.restarted[batch, last] & ~empty, where.since[batch, last] + 1, length + width + 1)
    kept = back[None, :] <= reach[:, None]
    out = torch.where(_flag(inside & kept, x), x[batch[:, None], token.clamp(0, length - 1)], x.new_zeros(()))
    if tail is None:
        return out
    slot = (width + token - where.begin[:, None]).clamp(0, width - 1)
    older = tail[torch.arange(rows, device=x.device)[:, None], slot].to(x.dtype)
    return torch.where(_flag(~inside & kept, x), older, out)


def flip(x: Tensor, where: Places | None) -> Tensor:
    """Time reversed within each sequence; `where` None: each row is one sequence."""
    if where is None:
        return x.flip(1)
    mirror = where.begin[where.row] + where.end[where.row] - 1 - torch.arange(x.shape[1], device=x.device)
    return x[:, mirror[0].clamp(0, max(x.shape[1] - 1, 0))]
