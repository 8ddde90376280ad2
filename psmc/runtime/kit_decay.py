"""Decays between the tokens of a chunk: of one number a token by running sums, of vectors by ratios or by halving.

A ratio of two products since the chunk's start is exact to rounding as long as neither is far from 1. On a CPU, where
that can be looked at, a token takes ratios if all products up to it are within bounds, and halves (`kit_halves`) if one
is not: what is later decides nothing. One number a token of known log needs neither: sums that begin at each token are
as many as there are pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psmc.runtime.kit_halves import Step, apply_by_halves, before_token, by_token, pairs_by_halves, products, spans_of

MILD = exp(-12.0)  # a ratio of products that are no smaller has an error of at most 12 roundings


class Decay(NamedTuple):
    """Products of the steps of a chunk, as `kit_halves.spans_of` gives them; halves None: logs are known, and there are
    other ways. `inverse` is 1 / since within bounds, None where ratios of products are not taken, and `mild` [..., L]
    the tokens up to which all products are within them; None: all tokens."""

    step: Step
    since: Tensor
    until: Tensor
    whole: Tensor
    halves: Tensor | None
    inverse: Tensor | None
    mild: Tensor | None


def decay_of(step: Step, key: bool) -> Decay:
    """Steps [..., L, width], L a power of two; key: whether they are decays over the key."""
    x = step.value
    at_hand = x.device.type == "cpu" and type(x) is Tensor  # a fake tensor holds nothing that one could look at
    if not step.log or x.is_complex() or not (at_hand or (key and x.shape[-1] == 1)):  # complex numbers have no bounds
        halves, since, until, whole = spans_of(step)
        return Decay(step, since, until, whole, halves, None, None)
    since, until, whole, inverse = _Sums.apply(x)  # type: ignore[no-untyped-call]
    if not at_hand:
        return Decay(step, since, until, whole, None, None, None)
    seen, mild = since.detach(), None
    if seen.numel() and not (seen.min() >= MILD and seen.max() <= 1 / MILD):
        least, most = seen.amin(-1).cummin(-1).values, seen.amax(-1).cummax(-1).values
        mild = (least >= MILD) & (most <= 1 / MILD)
    return Decay(step, since, until, whole, None, inverse, mild)


def since_start(x: Tensor, decay: Decay | None, shift: int) -> Tensor:
    """Vectors that read, [..., L, a, K], with the decays since the chunk's start; shift as in `pair_products`."""
    if decay is None:
        return x
    return x * (before_token(decay.since) if shift else decay.since)[..., None, :]


def pair_products(
    rows: Sequence[tuple[Tensor, int]], scaled: Sequence[Tensor], z: Tensor, decay: Decay | None, same: Tensor | None
) -> list[Tensor]:
    """M[t a, s c] = Σ_k x[t, a, k] (decay from s to t)[k] z[s, c, k], 0 for s > t, [..., L a, L c], of each (x, shift).

    x [..., L, a, K], z [..., L, c, K]; scaled: each x as `since_start` gives it; shift 1: x reads the state before its
    token, so that s < t and t's own step is left out. same [..., L, L] bool: where a pair counts at all. Columns of one
    token stay together: where they cancel, as those of a delta rule do, sums over s c lose no digits.
    """
    if decay is not None and decay.inverse is not None:
        found = _near_pairs(rows, scaled, z, decay)
    else:
        found = _exact_pairs(rows, z, decay and decay.step, decay and decay.halves)
    if same is None:
        return found
    spread = same[..., :, None, :, None]
    return [
        torch.where(spread, by_token(m, x, z), 0.0).flatten(-4, -3).flatten(-2)
        for m, (x, _) in zip(found, rows, strict=True)
    ]


def apply_pairs(m: Tensor, c: Tensor, decay: Decay | None, shift: int) -> Tensor:
    """Σ_s M[t a, s c] (decay from s to t)[v] C[s, c, v], [..., L a, V], with a decay along the values.

    M as `pair_products` gives it, C [..., L, c, V].
    """
    if decay is None:
        return m @ c.flatten(-3, -2)
    if decay.inverse is None:
        assert decay.halves is not None
        return apply_by_halves(m, c, decay.halves, shift)
    near = m @ (c * decay.inverse[..., None, :]).flatten(-3, -2)
    near = since_start(near.unflatten(-2, (c.shape[-3], -1)), decay, shift).flatten(-3, -2)
    if decay.mild is None:
        return near
    far = _Far(decay.mild)
    exact = apply_by_halves(far.pick(m, 2), far.pick(c, 3), spans_of(far.step(decay))[0], shift)
    return far.join(near, exact)


def _lower(x: Tensor, z: Tensor, shift: int) -> Tensor:
    """[L a, L c] bool: where a pair counts, of x [..., L, a, K] and z [..., L, c, K]."""
    token = torch.arange(z.shape[-3], device=z.device)
    return (token - shift).repeat_interleave(x.shape[-2])[:, None] >= token.repeat_interleave(z.shape[-2])


def _exact_pairs(
    rows: Sequence[tuple[Tensor, int]], z: Tensor, step: Step | None, halves: Tensor | None
) -> list[Tensor]:
    """M by products of steps alone; halves None: they are yet to be found, if they are needed."""
    if step is not None and step.value.shape[-1] > 1:
        return pairs_by_halves(spans_of(step)[0] if halves is None else halves, z, rows)
    plain = [x.flatten(-3, -2) @ z.flatten(-3, -2).mT for x, _ in rows]
    if step is None:
        return [torch.where(_lower(x, z, shift), m, 0.0) for m, (x, shift) in zip(plain, rows, strict=True)]
    if halves is not None:
        one = torch.ones_like(step.value)[..., None]  # [..., L, 1, 1]
        ones = [(one.expand(*one.shape[:-2], x.shape[-2], 1), shift) for x, shift in rows]
        ratios = pairs_by_halves(halves, one.expand(*one.shape[:-2], z.shape[-2], 1), ones)
    else:
        token = torch.arange(z.shape[-3], device=z.device)
        after = torch.where(token[:, None] > token, step.value, 0.0).cumsum(-2).exp().tril()  # [..., L, L]
        both = after, torch.nn.functional.pad(after[..., :-1, :], (0, 0, 1, 0))
        ratios = [_columns(both[shift], x.shape[-2], z.shape[-2]) for x, shift in rows]
    return [m * ratio for m, ratio in zip(plain, ratios, strict=True)]


def _columns(ratio: Tensor, a: int, c: int) -> Tensor:
    """[..., L, L] as [..., L a, L c]."""
    if a == c == 1:
        return ratio
    whole = ratio[..., :, None, :, None].expand(*ratio.shape[:-1], a, ratio.shape[-1], c)
    return whole.flatten(-4, -3).flatten(-2)


def _near_pairs(rows: Sequence[tuple[Tensor, int]], scaled: Sequence[Tensor], z: Tensor, decay: Decay) -> list[Tensor]:
    """M by ratios where decays are mild."""
    assert decay.inverse is not None
    back = (z * decay.inverse[..., None, :]).flatten(-3, -2).mT
    found = [torch.where(_lower(x, z, shift), y.flatten(-3, -2) @ back, 0.0)
             for (x, shift), y in zip(rows, scaled, strict=True)]  # fmt: skip
    if decay.mild is None:
        return found
    far = _Far(decay.mild)
    exact = _exact_pairs([(far.pick(x, 3), shift) for x, shift in rows], far.pick(z, 3), far.step(decay), None)
    return [far.join(m, e) for m, e in zip(found, exact, strict=True)]


class _Far:
    """The chunks [..., L] some of whose tokens are not `mild`, as one axis; items None: all chunks."""

    def __init__(self, mild: Tensor) -> None:
        far = (~mild).any(-1).flatten()
        self.mild = mild
        self.items = None if bool(far.all()) else far.nonzero().squeeze(-1)

    def pick(self, x: Tensor, own: int) -> Tensor:
        """The chunks of x, which has `own` axes from the tokens on."""
        x = x.flatten(0, -own - 1)
        return x if self.items is None else x.index_select(0, self.items)

    def step(self, decay: Decay) -> Step:
        return Step(self.pick(decay.step.value, 2), decay.step.log)

    def join(self, near: Tensor, exact: Tensor) -> Tensor:
        """Rows [..., L a, width] of mild tokens, and the others of `exact`."""
        mild = self.mild.repeat_interleave(near.shape[-2] // self.mild.shape[-1], -1)[..., None]
        found = torch.where(self.pick(mild, 2), self.pick(near, 2), exact)
        if self.items is not None:
            found = near.flatten(0, -3).index_copy(0, self.items, found)
        return found.view_as(near)


class _Sums(torch.autograd.Function):
    """Logs of steps [..., L, width] to since, until, whole and the inverse of since. By hand, so that the sums of
    gradients are matrix products."""

    @staticmethod
    def forward(ctx: Any, log: Tensor) -> tuple[Tensor, ...]:
        since, until, whole = products(log, True, ())
        since, until, whole = since.exp_(), until.exp_(), whole.exp()
        inverse = since.clamp(MILD, 1 / MILD).reciprocal_()
        ctx.save_for_backward(since, until, whole, inverse)
        return since, until, whole, inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        since, until, whole, inverse = ctx.saved_tensors
        d_since, d_until, d_whole, d_inverse = grads
        # Beyond its bounds no row reads the inverse, and its gradient is 0.
        upto = torch.addcmul(d_since * since, d_inverse, inverse, value=-1)
        ones = torch.ones(2 * (since.shape[-2],), dtype=since.dtype, device=since.device)
        total: Tensor = ones.triu() @ upto + ones.tril(-1) @ (d_until * until) + (d_whole * whole)[..., None, :]
        return total
