"""Decays between the tokens of a chunk, by halving: products of steps alone, never a ratio of two.

A chunk has L tokens, L a power of two. Of two tokens s < t the smallest aligned block that holds both has s in its
earlier half and t in its later one, and the decay from s to t is that from s to the half's end times that from there to
t. So all pairs of one level are one matrix product of factors that hold nothing but products of steps: no step need be
positive or even nonzero, nothing overflows where steps are at most 1, and no digits cancel. Where logs of the steps are
known, products are sums of logs, which keep the digits of decays close to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """Decays of single tokens, [..., width]; width 1 is one number for all. `log`: it holds their logs."""

    value: Tensor
    log: bool


class Decay(NamedTuple):
    """Products of the steps of a chunk. levels[l] = (later, earlier), [..., blocks, 2^l, width] each: in blocks of
    2^(l+1) tokens, from the later half's start up to and with each of its tokens, and from behind each token of the
    earlier half to that half's end (None: 1). since, until [..., L, width]: the same from the chunk's start, and to its
    end; whole [..., width]: of all its tokens."""

    levels: tuple[tuple[Tensor, Tensor | None], ...]
    since: Tensor
    until: Tensor
    whole: Tensor


def decay_of(step: Step) -> Decay:
    """Steps [..., L, width], L a power of two."""
    join = torch.add if step.log else torch.mul
    whole = step.value  # [..., blocks, width]
    since = whole.unsqueeze(-2)  # [..., blocks, b, width]
    until = torch.zeros_like(since) if step.log else torch.ones_like(since)
    levels: list[tuple[Tensor, Tensor | None]] = []
    while whole.shape[-2] > 1:
        early, late = since.unflatten(-3, (-1, 2)).unbind(-3)
        to_half, to_end = until.unflatten(-3, (-1, 2)).unbind(-3)
        first, second = whole.unflatten(-2, (-1, 2)).unbind(-2)
        earlier = to_half if levels else None
        levels.append((late.exp(), earlier if earlier is None else earlier.exp()) if step.log else (late, earlier))
        since = torch.cat([early, join(late, first[..., None, :])], -2)
        until = torch.cat([join(to_half, second[..., None, :]), to_end], -2)
        whole = join(first, second)
    ends = since.squeeze(-3), until.squeeze(-3), whole.squeeze(-2)
    return Decay(tuple(levels), *(x.exp() if step.log else x for x in ends))


def before_token(since: Tensor) -> Tensor:
    """Products up to each token [..., L, width], without the token itself."""
    return torch.cat([torch.ones_like(since[..., :1, :]), since[..., :-1, :]], -2)


def pair_products(
    rows: Sequence[tuple[Tensor, int]], z: Tensor, decay: Decay | None, same: Tensor | None
) -> list[Tensor]:
    """M[t a, s c] = Σ_k x_t[a, k] (decay from s to t)[k] z_s[c, k], 0 for s > t, [..., L a, L c], for each (x, shift).

    x [..., L, a, K], z [..., L, c, K]; shift 1: x reads the state before its token, so that s < t and t's own step is
    left out. same [..., L, L] bool: where a pair counts at all.
    """
    if decay is None or decay.since.shape[-1] == 1:
        found = [_scaled(x, z, decay, shift) for x, shift in rows]
    else:
        found = _by_level(rows, z, decay)
    if same is None:
        return found
    spread = same[..., :, None, :, None]
    return [
        torch.where(spread, _by_token(m, x, z), 0.0).flatten(-4, -3).flatten(-2)
        for m, (x, _) in zip(found, rows, strict=True)
    ]  # fmt: skip


def _by_token(m: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """[..., L a, L c] as [..., L, a, L, c]."""
    each: Tensor = m.unflatten(-1, z.shape[-3:-1]).unflatten(-3, x.shape[-3:-1])
    return each


def _scaled(x: Tensor, z: Tensor, decay: Decay | None, shift: int) -> Tensor:
    """One decay for all of the key, or none: a plain product times a matrix."""
    m = x.flatten(-3, -2) @ z.flatten(-3, -2).mT
    size, a, c = x.shape[-3], x.shape[-2], z.shape[-2]
    if decay is None:
        if a == c == 1:
            return m.tril(-shift)
        token = torch.arange(size, device=x.device)
        ratio = (token[:, None] - shift >= token).to(x.dtype)
    else:
        ratio = _ratios(decay)
        if shift:
            ratio = torch.cat([torch.zeros_like(ratio[..., :1, :]), ratio[..., :-1, :]], -2)
    if a == c == 1:
        return m * ratio
    whole = _by_token(m, x, z) * ratio[..., :, None, :, None]
    return whole.flatten(-4, -3).flatten(-2)


def _ratios(decay: Decay) -> Tensor:
    """[..., L, L]: the decay from s to t, of one number a token."""
    low = [later if earlier is None else later * earlier.mT for later, earlier in decay.levels]
    return _lower(torch.ones_like(decay.since)[..., None], low)


def _by_level(rows: Sequence[tuple[Tensor, int]], z: Tensor, decay: Decay) -> list[Tensor]:
    """A decay of its own for each entry of the key."""
    lows: list[list[Tensor]] = [[] for _ in rows]
    for later, earlier in decay.levels:
        halves = (-1, 2, later.shape[-2])
        early, _ = z.unflatten(-3, halves).unbind(-4)  # [..., blocks, b, c, K]
        early = (early if earlier is None else early * earlier[..., None, :]).flatten(-3, -2)
        scale = (later, before_token(later) if any(shift for _, shift in rows) else later)
        for low, (x, shift) in zip(lows, rows, strict=True):
            _, late = x.unflatten(-3, halves).unbind(-4)
            low.append((late * scale[shift][..., None, :]).flatten(-3, -2) @ early.mT)
    owns = [x @ z.mT for x, _ in rows]  # of a token with itself
    return [
        _lower(torch.zeros_like(own) if shift else own, low)
        for own, (_, shift), low in zip(owns, rows, lows, strict=True)
    ]


def _lower(diagonal: Tensor, low: Sequence[Tensor]) -> Tensor:
    """The block triangle [..., L a, L c] over its diagonal [..., L, a, c]; low[l] [..., blocks, 2^l a, 2^l c]."""
    m = diagonal
    for below in low:
        early, late = m.unflatten(-3, (-1, 2)).unbind(-3)
        upper = torch.nn.functional.pad(early, (0, early.shape[-1]))
        m = torch.cat([upper, torch.cat([below, late], -1)], -2)
    return m.squeeze(-3)


def apply_pairs(m: Tensor, c: Tensor, decay: Decay | None, shift: int) -> Tensor:
    """Σ_s M[t a, s c] (decay from s to t)[v] C_s[c, v], [..., L a, V], with a decay along the values.

    M as `pair_products` gives it, C [..., L, c, V].
    """
    if decay is None:
        return m @ c.flatten(-3, -2)
    size, count = c.shape[-3], c.shape[-2]
    own = _on_diagonal(m, size, count) @ c  # [..., L, a, V]
    total = torch.zeros_like(own) if shift else own
    for later, earlier in decay.levels:
        b = later.shape[-2]
        early, _ = c.unflatten(-3, (-1, 2, b)).unbind(-4)
        early = (early if earlier is None else early * earlier[..., None, :]).flatten(-3, -2)  # [..., blocks, b c, V]
        corner = _on_diagonal(m, size // (2 * b), 2 * b * count)  # [..., blocks, 2 b a, 2 b c]
        low = corner[..., corner.shape[-2] // 2 :, : b * count]
        late = (low @ early).unflatten(-2, (b, -1)) * (before_token(later) if shift else later)[..., None, :]
        total = total + torch.stack([torch.zeros_like(late), late], -4).flatten(-5, -3)
    return total.flatten(-3, -2)


def _on_diagonal(m: Tensor, blocks: int, width: int) -> Tensor:
    """The blocks on the diagonal of a matrix, [..., blocks, rows, width]."""
    each: Tensor = m.unflatten(-1, (blocks, width)).unflatten(-3, (blocks, -1))
    return each.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
