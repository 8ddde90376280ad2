"""Decays between the tokens of a chunk, by halving: products of steps alone, never a ratio of two.

A chunk has L tokens, L a power of two. Of two tokens s < t the smallest aligned block that holds both has s in its
earlier half and t in its later one, and the decay from s to t is that from s to the half's end times that from there to
t. So all pairs of one level are one matrix product of factors that hold nothing but products of steps: no step need be
positive or even nonzero, nothing overflows where steps are at most 1, and no digits cancel. Where logs of the steps are
known, products are sums of logs, which keep the digits of decays close to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """Decays of single tokens, [..., width]; width 1 is one number for all. `log`: it holds their logs."""

    value: Tensor
    log: bool


def spans_of(step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of the steps [..., L, width] of a chunk, L a power of two: (halves, since, until, whole).

    halves [levels, ..., L, width]: in blocks of 2^(l+1) tokens, from the later half's start up to and with each of its
    tokens, and from behind each token of the earlier half to that half's end. since, until [..., L, width]: from the
    chunk's start, and to its end; whole [..., width]: of all its tokens.
    """
    halves, since, until, whole = _Spans.apply(step.value, step.log)  # type: ignore[no-untyped-call]
    return halves, since, until, whole


def before_token(since: Tensor) -> Tensor:
    """Products up to each token [..., L, width], without the token itself."""
    return torch.cat([torch.ones_like(since[..., :1, :]), since[..., :-1, :]], -2)


def pairs_by_halves(halves: Tensor, z: Tensor, rows: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """M of `kit_decay.pair_products`."""
    shifts = tuple(shift for _, shift in rows)
    return list(_Pairs.apply(halves, z, shifts, *(x for x, _ in rows)))  # type: ignore[no-untyped-call]


def apply_by_halves(m: Tensor, c: Tensor, halves: Tensor, shift: int) -> Tensor:
    """As `kit_decay.apply_pairs`."""
    each = m.unflatten(-1, c.shape[-3:-1]).unflatten(-3, (c.shape[-3], -1))
    own = own_token(each) @ c  # [..., L, a, V]
    total = torch.zeros_like(own) if shift else own
    for level, (early, late) in enumerate(_levels(halves)):
        fed = _scaled(_half(c, level, 0, -3), early)  # [..., blocks, b c, V]
        given = (corner_of(each, level) @ fed).unflatten(-2, (1 << level, -1))
        given = given * (before_token(late) if shift else late)[..., None, :]
        total = total + torch.stack([torch.zeros_like(given), given], -4).flatten(-5, -3)
    return total.flatten(-3, -2)


def products(step: Tensor, log: bool, halves: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(since, until, whole) of `spans_of`, or their logs; `halves`: where to put those of each level, if anywhere."""
    since, whole = step.clone(memory_format=torch.contiguous_format), step
    until = torch.zeros_like(since) if log else torch.ones_like(since)
    for level in range(since.shape[-2].bit_length() - 1):
        early, late = _half(until, level, 0), _half(since, level, 1)
        if halves:
            _half(halves[level], level, 0).copy_(early)
            _half(halves[level], level, 1).copy_(late)
        first, second = whole.unflatten(-2, (-1, 2)).unbind(-2)
        for part, more in ((late, first), (early, second)):
            part.add_(more[..., None, :]) if log else part.mul_(more[..., None, :])
        whole = first + second if log else first * second
    return since, until, whole.squeeze(-2)


def _levels(halves: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(earlier, later) of each level, [..., blocks, 2^l, width]."""
    return [(_half(x, level, 0), _half(x, level, 1)) for level, x in enumerate(halves.unbind(0))]


def by_token(m: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """[..., L a, L c] as [..., L, a, L, c]."""
    each: Tensor = m.unflatten(-1, z.shape[-3:-1]).unflatten(-3, x.shape[-3:-1])
    return each


def _half(x: Tensor, level: int, late: int, axis: int = -2) -> Tensor:
    """The earlier or the later halves of all blocks, [..., blocks, 2^level, ...], of [..., L, ...]."""
    half: Tensor = x.unflatten(axis, (-1, 2, 1 << level)).select(axis - 1, late)
    return half


def corners(each: Tensor, level: int) -> Tensor:
    """Of [..., L, a, L, c] what joins a block's earlier tokens to its later ones, [..., blocks, 2^l, a, 2^l, c]."""
    halves = (-1, 2, 1 << level)
    corner: Tensor = each.unflatten(-2, halves).select(-3, 0).unflatten(-5, halves).select(-6, 1)
    return corner.diagonal(dim1=-6, dim2=-3).movedim(-1, -5)


def corner_of(each: Tensor, level: int) -> Tensor:
    """The same as matrices [..., blocks, 2^l a, 2^l c]."""
    return corners(each, level).flatten(-4, -3).flatten(-2)


def own_token(each: Tensor) -> Tensor:
    """Of [..., L, a, L, c] a token with itself, [..., L, a, c]."""
    return each.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


class _Spans(torch.autograd.Function):
    """Steps [..., L, width] to the parts of `Decay`. By hand for the sake of memory: what autograd would keep of the
    levels is what they give."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, log: bool) -> tuple[Tensor, ...]:
        halves = step.new_empty((step.shape[-2].bit_length() - 1, *step.shape))
        since, until, whole = products(step, log, halves.unbind(0))
        if log:
            halves, since, until, whole = halves.exp_(), since.exp_(), until.exp_(), whole.exp()
        ctx.log = log
        ctx.save_for_backward(step, halves, since, until, whole)
        return halves, since, until, whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        step, halves, since, until, whole = (x.conj() for x in ctx.saved_tensors)
        d_halves, d_since, d_until, d_whole = grads
        if ctx.log:
            d_whole, d_since, d_until = d_whole * whole, d_since * since, d_until * until
        else:
            d_since, d_until = (x.clone(memory_format=torch.contiguous_format) for x in (d_since, d_until))
        d_whole = d_whole.unsqueeze(-2)
        for level in reversed(range(halves.shape[0])):
            first = second = whole  # of the halves of each block, not of logs
            if not ctx.log:
                first = _half(halves[level], level, 0)[..., 0, :] * _half(step, level, 0)[..., 0, :]
                second = _half(halves[level], level, 1)[..., -1, :]
            given, of = [], []
            for late, total, more in ((1, d_since, first), (0, d_until, second)):
                part, half, d_half = (_half(x, level, late) for x in (total, halves[level], d_halves[level]))
                if ctx.log:
                    of.append(part.sum(-2))
                    given.append(d_whole)
                    part.addcmul_(d_half, half)
                else:
                    of.append((part.clone() * half).sum(-2))
                    given.append(d_whole * (second if late else first))
                    part.mul_(more[..., None, :]).add_(d_half)
            d_whole = torch.stack([x + y for x, y in zip(given, of, strict=True)], -2).flatten(-3, -2)
        return d_since + d_whole, None


class _Pairs(torch.autograd.Function):
    """M of `pair_products` for a decay over the key, of halves, z and one x for each shift. By hand: nothing scaled is
    kept, and gradients add up in place."""

    @staticmethod
    def forward(ctx: Any, halves: Tensor, z: Tensor, shifts: tuple[int, ...], *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.shifts = shifts
        ctx.save_for_backward(halves, z, *rows)
        found = [z.new_zeros((*x.shape[:-1], *z.shape[-3:-1])) for x in rows]  # [..., L, a, L, c]
        for m, x, shift in zip(found, rows, shifts, strict=True):
            if not shift:
                own_token(m).copy_((x[..., :, None, :] * z[..., None, :, :]).sum(-1))
        for level, (early, late) in enumerate(_levels(halves)):
            fed = _scaled(_half(z, level, 0, -3), early if level else None)
            for m, x, scale in zip(found, rows, _shifted(late, shifts), strict=True):
                corner = corners(m, level)
                corner.copy_((_scaled(_half(x, level, 1, -3), scale) @ fed.mT).view(corner.shape))
        return tuple(m.flatten(-4, -3).flatten(-2) for m in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        halves, z, *rows = (x.conj() for x in ctx.saved_tensors)
        given = [by_token(g, x, z) for g, x in zip(grads, rows, strict=True)]
        d_halves, d_z = torch.empty_like(halves), torch.zeros_like(z)
        d_rows = []
        for g, x, shift in zip(given, rows, ctx.shifts, strict=True):
            own = own_token(g)[..., None]  # [..., L, a, c, 1]
            d_rows.append(torch.zeros_like(x) if shift else _summed(own * z[..., None, :, :], -2))
            if not shift:
                d_z.add_(_summed(own * x[..., :, None, :], -3))
        for level, (early, late) in enumerate(_levels(halves)):
            fed = _half(z, level, 0, -3)  # [..., blocks, b, c, K]
            scaled = _scaled(fed, early if level else None)
            d_fed: list[Tensor] = []
            d_late: list[Tensor] = []
            for d, g, x, scale, shift in zip(d_rows, given, rows, _shifted(late, ctx.shifts), ctx.shifts, strict=True):
                low, reads = corner_of(g, level), _half(x, level, 1, -3)
                back = (low @ scaled).view(reads.shape)
                _half(d, level, 1, -3).add_(back * scale[..., None, :])
                d_scale = _summed(back * reads, -2)
                d_late.append(torch.nn.functional.pad(d_scale[..., 1:, :], (0, 0, 0, 1)) if shift else d_scale)
                d_fed.append(low.mT @ _scaled(reads, scale))
            _half(d_halves[level], level, 1).copy_(_added(d_late))
            back = _added(d_fed).view(fed.shape)
            _half(d_halves[level], level, 0).copy_(_summed(back * fed, -2) if level else torch.zeros_like(early))
            _half(d_z, level, 0, -3).add_(back * early[..., None, :] if level else back)
        return d_halves, d_z, None, *d_rows


def _summed(x: Tensor, axis: int) -> Tensor:
    return x.squeeze(axis) if x.shape[axis] == 1 else x.sum(axis)


def _added(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else _added([parts[0] + parts[1], *parts[2:]])


def _shifted(late: Tensor, shifts: Sequence[int]) -> list[Tensor]:
    without = before_token(late) if any(shifts) else late
    return [without if shift else late for shift in shifts]


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """[..., blocks, b, c, K] times [..., blocks, b, K or 1], as [..., blocks, b c, K]."""
    return (x if scale is None else x * scale[..., None, :]).flatten(-3, -2)
