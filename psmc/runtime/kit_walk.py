"""States from chunk to chunk, and the triangular solve of a low-rank transition; both with a backward by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_halves import corner_of, corners, own_token


def walk(
    keep: Tensor, adds: Tensor, carry: Tensor, start: Tensor, first: Tensor | None, row: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S' = keep S + adds: the states before each chunk [B, n, G, K, V]; and that after the last one [1, B, G, K, V], or
    those after each where sequences end among them, [n, B, ...].

    keep [B, n, G, K, V or 1], adds [B, n, G, K, V], carry [B, G, K, V] before the first chunk. With first [n] bool and
    row [n] a sequence begins at some chunks, from a row of start [N, G, K, V].
    """
    enter = None if row is None else start.index_select(0, row)
    lead = (x.transpose(0, 1).flatten(1, 2) for x in (keep, adds))
    before, after = _Walk.apply(first, *lead, carry.flatten(0, 1), enter)  # type: ignore[no-untyped-call]
    return before.unflatten(1, carry.shape[:2]).transpose(0, 1), after.unflatten(1, carry.shape[:2])


def walk_low_rank(
    keep: Tensor, ends: Tensor, c: Tensor, work: Tensor, gain: Tensor, carry: Tensor, start: Tensor,
    first: Tensor | None, row: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """S' = keep S + endsᵀ [Y, C] with Y = work S + gain: what `walk` gives, and [Y, C] [B, n, G, L, columns, V].

    ends [B, n, G, L, columns, K], c [..., L, rest, V], work [..., L, rank, K], gain [..., L, rank, V].
    """
    enter = None if row is None else start.index_select(0, row)
    lead = (x.transpose(0, 1).flatten(1, 2) for x in (keep, ends, c, work, gain))
    found = _LowRank.apply(first, *lead, carry.flatten(0, 1), enter)  # type: ignore[no-untyped-call]
    before, after, whole = (x.unflatten(1, carry.shape[:2]) for x in found)
    return before.transpose(0, 1), after, whole.transpose(0, 1)


def solve(m: Tensor, hat: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
    """(I - M)⁻¹ times hat and fed, [..., L, rank, width] each. M [..., L rank, L rank] is 0 from its own token on, and
    what gradient it is given there means nothing.

    The inverse is put together from those of blocks: exact on correlated keys, where a product of powers would lose all
    digits.
    """
    work, gain = _Solve.apply(m, hat, fed)  # type: ignore[no-untyped-call]
    return work, gain


class _Walk(torch.autograd.Function):
    """`walk` over [n, lanes, ...]."""

    @staticmethod
    def forward(
        ctx: Any, first: Tensor | None, keep: Tensor, adds: Tensor, state: Tensor, enter: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        before, after, into = _room(adds, first)
        for n, out in enumerate(into):
            state = _entered(before, n, state, first, enter)
            state = torch.addcmul(adds[n], keep[n], state, out=out)
        ctx.save_for_backward(first, keep, before)
        return before, after

    @staticmethod
    def backward(ctx: Any, d_before: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        first, keep, before = _saved(ctx)
        back = _Back(first, d_after)
        for n in reversed(range(len(before))):
            back.step(n, torch.addcmul(d_before[n], keep[n], back.state))
        d_adds, d_carry, d_enter = back.found()
        return None, _like_keep(d_adds, before, keep), d_adds, d_carry, d_enter


class _LowRank(torch.autograd.Function):
    """`walk_low_rank` over [n, lanes, ...]."""

    @staticmethod
    def forward(
        ctx: Any, first: Tensor | None, keep: Tensor, ends: Tensor, c: Tensor, work: Tensor, gain: Tensor,
        state: Tensor, enter: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rank = work.shape[-2]
        before, after, into = _room(state.expand(len(c), *state.shape), first)
        whole = c.new_empty((*ends.shape[:-1], c.shape[-1]))
        whole[..., rank:, :] = c
        rows, given = ends.flatten(-3, -2), whole.flatten(-3, -2)
        left, right = work.flatten(-3, -2), gain.flatten(-3, -2)
        for n, out in enumerate(into):
            state = _entered(before, n, state, first, enter)
            if whole.shape[-2] == rank:
                torch.baddbmm(right[n], left[n], state, out=given[n])
            else:
                whole[n, :, :, :rank] = torch.baddbmm(right[n], left[n], state).view(gain.shape[1:])
            state = torch.mul(keep[n], state, out=out).baddbmm_(rows[n].mT, given[n])
        ctx.save_for_backward(first, keep, ends, work, before, whole)
        return before, after, whole

    @staticmethod
    def backward(ctx: Any, d_before: Tensor, d_after: Tensor, d_whole: Tensor) -> tuple[Tensor | None, ...]:
        first, keep, ends, work, before, whole = _saved(ctx)
        rows, left, rank = ends.flatten(-3, -2), work.flatten(-3, -2).mT, work.shape[-2]
        back, given = _Back(first, d_after), []
        for n in reversed(range(len(before))):
            given.append(torch.baddbmm(d_whole[n].flatten(-3, -2), rows[n], back.state))
            d_y = given[-1].unflatten(-2, ends.shape[-3:-1])[..., :rank, :].flatten(-3, -2)
            back.step(n, torch.baddbmm(torch.addcmul(d_before[n], keep[n], back.state), left[n], d_y))
        states, d_carry, d_enter = back.found()
        d_all = torch.stack(given[::-1]).unflatten(-2, ends.shape[-3:-1])
        d_y, d_c = torch.split(d_all, [rank, ends.shape[-2] - rank], -2)
        d_ends = (whole.flatten(-3, -2) @ states.mT).unflatten(-2, ends.shape[-3:-1])
        d_work = (d_y.flatten(-3, -2) @ before.mT).unflatten(-2, work.shape[-3:-1])
        return None, _like_keep(states, before, keep), d_ends, d_c, d_work, d_y, d_carry, d_enter


def _room(like: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Room for the states before and after [n, lanes, K, V]; where each chunk puts its own."""
    before = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    after = torch.empty_like(before if first is not None else before[:1])
    return before, after, list(after) if first is not None else [*before[1:], after[0]]


def _entered(before: Tensor, n: int, state: Tensor, first: Tensor | None, enter: Tensor | None) -> Tensor:
    """The state before chunk n, which is put where it belongs."""
    if first is None or enter is None:
        return before[n].copy_(state) if n == 0 else state
    return before[n].copy_(torch.where(first[n], enter[n], state))


def _saved(ctx: Any) -> tuple[Any, ...]:
    return tuple(None if x is None else x.conj() for x in ctx.saved_tensors)


class _Back:
    """Gradients of states from the last chunk to the first; `state`: of that after the chunk."""

    def __init__(self, first: Tensor | None, d_after: Tensor) -> None:
        self.first, self.d_after, self.state = first, d_after, d_after[-1]
        self.after: list[Tensor] = []
        self.enter: list[Tensor] = []

    def step(self, n: int, before: Tensor) -> None:
        """before: of the state before chunk n."""
        self.after.append(self.state)
        if self.first is not None:
            self.enter.append(torch.where(self.first[n], before, 0.0))
            before = torch.where(self.first[n], 0.0, before)
        self.state = before + self.d_after[n - 1] if self.first is not None and n else before

    def found(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the states after each chunk, of the carry, and of the states that enter."""
        return torch.stack(self.after[::-1]), self.state, torch.stack(self.enter[::-1]) if self.enter else None


def _like_keep(states: Tensor, before: Tensor, keep: Tensor) -> Tensor:
    return (states * before).sum_to_size(keep.shape)


class _Solve(torch.autograd.Function):
    """`solve`, whose inverse is kept."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, hat: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
        inverse = _inverse(m, hat.shape[-2])
        work, gain = ((inverse @ x.flatten(-3, -2)).view(x.shape) for x in (hat, fed))
        ctx.save_for_backward(m, inverse, work, gain)
        return work, gain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        m, inverse, work, gain = _saved(ctx)
        rows = [g.flatten(-3, -2) for g in grads]
        if torch.is_grad_enabled():  # of second derivatives: nothing knows how the inverse came about
            found = [torch.linalg.solve_triangular(-m.mT, g, upper=True, unitriangular=True) for g in rows]
        else:
            found = [inverse.mT @ g for g in rows]
        d_m = found[0] @ work.flatten(-3, -2).mT + found[1] @ gain.flatten(-3, -2).mT
        return d_m, *(x.view(y.shape) for x, y in zip(found, (work, gain), strict=True))


def _inverse(m: Tensor, rank: int) -> Tensor:
    """(I - M)⁻¹ [..., L rank, L rank]: what joins a block's halves is the later inverse, times M, times the earlier."""
    each = m.unflatten(-1, (-1, rank)).unflatten(-3, (-1, rank))  # [..., L, rank, L, rank]
    inverse = torch.zeros_like(each, memory_format=torch.contiguous_format)
    own_token(inverse).copy_(torch.eye(rank, dtype=m.dtype, device=m.device))
    for level in range(each.shape[-2].bit_length() - 1):
        blocks = inverse.unflatten(-2, (-1, 1 << level)).unflatten(-5, (-1, 1 << level))
        blocks = blocks.diagonal(dim1=-6, dim2=-3).movedim(-1, -5).flatten(-4, -3).flatten(-2)
        early, late = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        out = corners(inverse, level)
        out.copy_((late @ (corner_of(each, level) @ early)).view(out.shape))
    return inverse.flatten(-4, -3).flatten(-2)
