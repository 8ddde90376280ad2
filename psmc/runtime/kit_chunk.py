"""Matrix states a chunk of tokens at a time, as batched matrix products.

    S_t = D_t S_{t-1} + U_t (W_tᵀ S_{t-1}) + B_t C_tᵀ        o_t = q_tᵀ S_t + p_tᵀ S_{t-1}

With γ_t the product of the decays since the chunk's start and M_XZ[t, s] = Σ_k X_t[k] (γ_t / γ_s)[k] Z_s[k],

    (I - M_WU) Y = Ŵ S_0 + M_WB C         M_W*, M_P*: γ_{t-1} for γ_t, strictly lower triangular
    O            = Q̂ S_0 + M_QU Y + M_QB C
    S_L          = γ_L S_0 + Ûᵀ Y + B̂ᵀ C

where hats hold the decays from or to the chunk's ends (Yang et al. 2024, arXiv 2406.06484; DeltaNet's WY form). All
but the S_0 of each chunk is computed for many chunks at once. Several columns of a token stand next to each other:
[..., L, columns, width] is [..., L columns, width], in the order in which they act.

Where U is -B (each column erases by the vector with which it writes), E = C - Y stands for both, with half as many
columns: (I + M_WB) E = C - Ŵ S_0, O = Q̂ S_0 + M_QB E, S_L = γ_L S_0 + B̂ᵀ E.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from psmc.runtime.kit_cut import Cut
from psmc.runtime.kit_decay import apply_pairs, decay_of, pair_products, since_start
from psmc.runtime.kit_halves import Step
from psmc.runtime.kit_layer import RECOMPUTE_BYTES, SEGMENT_BYTES
from psmc.runtime.kit_walk import solve, walk, walk_low_rank

CHUNK = {"cpu": 32, "cuda": 64}  # tokens: what a cache likes; as few launches as that allows

Rows = tuple[Tensor, ...]  # the columns of a factor, [B, T, G, width] each


class Factors(NamedTuple):
    """One layer's tokens, [B, T, G, width] each, over G lanes: decays over the key and over the value (None: 1), the
    columns of U (none with W there: U is -B), W, B, C, and the vectors that read the state after a token (q) and before
    it (p)."""

    key: Step | None
    value: Step | None
    u: Rows
    w: Rows
    b: Rows
    c: Rows
    q: Rows
    p: Rows

    def map(self, change: Callable[[Tensor, float], Any]) -> Factors:
        """`change` of every tensor and of what stands for no token there."""
        key, value = (s and Step(change(s.value, 0.0 if s.log else 1.0), s.log) for s in (self.key, self.value))
        u, w, b, c, q, p = (tuple(change(x, 0.0) for x in rows) for rows in self[2:])
        return Factors(key, value, u, w, b, c, q, p)


def chunk_scan(
    f: Factors,
    start: Tensor,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    size: int | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(qᵀ S_t for each q, pᵀ S_{t-1} for each p, [B, T, G, V] each; the state after the last token as `start`).

    start          [B, G, K, V]; with cu_seqlens [N + 1] of N packed sequences (B is 1) [N, G, K, V]
    valid, reset   [B, T] bool: a token that does not count changes nothing; before a reset token the state is 0 again
    size           tokens a chunk, a power of two

    No token changes a bit of what earlier ones give.
    """
    batch, length, lanes, _ = f.c[0].shape
    if length == 0:
        return [f.c[0] for _ in f.q], [f.c[0] for _ in f.p], start
    kind = "cpu" if start.device.type == "cpu" else "cuda"
    cut = Cut(length, size or _size(length, cu_seqlens, kind), cu_seqlens)
    if valid is not None:
        on = valid[..., None, None]
        f = f.map(lambda x, fill: torch.where(on, x, fill))
    f = f.map(cut.split)
    runs = None if reset is None else cut.split(reset, False)
    item = f.c[0].element_size() * batch * lanes
    per_chunk = item * cut.size * (cut.size + sum(x.shape[-1] for rows in f[2:] for x in rows))
    some = max(1, min(cut.count, SEGMENT_BYTES[kind] // max(per_chunk, 1)))
    kept = 4 * per_chunk * cut.count  # about that many tensors of each size are kept for backward
    recompute = kept > RECOMPUTE_BYTES[kind] and some < cut.count and torch.is_grad_enabled()
    carry = start if cut.row is None else torch.zeros_like(start[:1])
    found: list[list[Tensor]] = []
    after: list[Tensor] = []  # each chunk's, of packed sequences
    for piece, again, first, row in _few_chunks(f, runs, cut, some):
        args = (piece, again, carry, start, first, row)
        rows, states, carry = checkpoint(_run, *args, use_reentrant=False) if recompute else _run(*args)
        found.append(rows)
        after.append(states)
    joined = [cut.join(parts[0] if len(parts) == 1 else torch.cat(parts, 1)) for parts in zip(*found, strict=True)]
    final = carry if cut.row is None else cut.ends(torch.cat(after).flatten(0, 1), start)
    return joined[: len(f.q)], joined[len(f.q) :], final


def _size(length: int, cu_seqlens: Tensor | None, kind: str) -> int:
    """Tokens a chunk: not many more than a sequence has on average, since its last chunk may be next to empty."""
    mean = length if cu_seqlens is None else max(1, length // max(1, cu_seqlens.numel() - 1))
    return min(CHUNK[kind], 1 << (mean - 1).bit_length())


def _few_chunks(f: Factors, runs: Tensor | None, cut: Cut, some: int) -> Any:
    """Some chunks at a time: (factors, resets, first, row)."""
    if some >= cut.count:
        return [(f, runs, cut.first, cut.row)]
    split: list[Factors] = []
    columns: list[list[Any]] = []
    f.map(lambda x, _: columns.append(list(torch.split(x, some, 1))))
    for n in range(len(columns[0])):
        parts = iter([c[n] for c in columns])
        split.append(f.map(lambda x, _, parts=parts: next(parts)))  # type: ignore[misc]
    none: Sequence[Any] = [None] * len(split)
    again = none if runs is None else torch.split(runs, some, 1)
    first, row = (none if x is None else torch.split(x, some) for x in (cut.first, cut.row))
    return zip(split, again, first, row, strict=True)


def _run(
    f: Factors, reset: Tensor | None, carry: Tensor, start: Tensor, first: Tensor | None, row: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Some chunks [B, n, L, ...]: (what q and p read, [B, n, L, G, V] each; the states after each chunk where sequences
    end among them; the last of them). `carry` [B, G, K, V] comes before; with `first` and `row` a sequence begins at
    some chunks, from a row of `start`."""

    def side(*columns: Tensor) -> Tensor:
        """[B, n, G, L, columns, width]."""
        if len(columns) == 1:
            return columns[0].transpose(2, 3).contiguous().unsqueeze(-2)
        return torch.stack([x.transpose(2, 3) for x in columns], -2)

    key, value = (
        None if s is None else decay_of(Step(side(s.value).squeeze(-2), s.log), over_key)
        for s, over_key in zip(f[:2], (True, False), strict=True)
    )
    z, c, rank = side(*f.u, *f.b), side(*f.c), len(f.w)
    same = fresh = None
    if reset is not None:
        run = reset.to(torch.int32).cumsum(2)[:, :, None]  # [B, n, 1, L]
        same, fresh = run[..., :, None] == run[..., None, :], run == 0
    readers = {k: (side(*rows), shift) for k, rows, shift in (("w", f.w, 1), ("p", f.p, 1), ("q", f.q, 0)) if rows}
    scaled = [since_start(x, key, shift) for x, shift in readers.values()]
    pairs = dict(zip(readers, pair_products(list(readers.values()), scaled, z, key, same), strict=True))
    hats = {k: _kept(x, fresh) for k, x in zip(readers, scaled, strict=True)}  # [B, n, G, L, columns, K]
    last = None if same is None else same[..., -1, :]
    ends = _kept(z if key is None else z * key.until[..., None, :], last)  # z with the decays up to the chunk's end
    keep = torch.ones_like(c[..., -1, 0, :1]) if key is None else key.whole
    keep = _kept(keep, fresh if fresh is None else fresh[..., -1])[..., None]
    if rank and not f.u:
        work, gain = solve(-pairs.pop("w"), -hats.pop("w"), c)
        before, after, whole = walk_low_rank(keep, ends, c[..., :0, :], work, gain, carry, start, first, row)
    elif rank:
        each = pairs.pop("w").unflatten(-1, z.shape[-3:-1])
        own, others = (x.flatten(-2) for x in torch.split(each, [rank, z.shape[-2] - rank], -1))
        hat = hats.pop("w")
        fed = (others @ c.flatten(-3, -2)).unflatten(-2, hat.shape[-3:-1])
        before, after, whole = walk_low_rank(keep, ends, c, *solve(own, hat, fed), carry, start, first, row)
    else:
        gives = c if value is None else c * value.until[..., None, :]
        keep = keep if value is None else keep * value.whole[..., None, :]
        adds = ends.flatten(-3, -2).mT @ gives.flatten(-3, -2)
        before, after = walk(keep, adds, carry, start, first, row)
        whole = c
    found: dict[str, Sequence[Tensor]] = {}
    for k, hat in hats.items():
        o, shift = (hat.flatten(-3, -2) @ before).unflatten(-2, hat.shape[-3:-1]), readers[k][1]
        o = since_start(o, value, shift)
        o = o + apply_pairs(pairs[k], whole, value, shift).unflatten(-2, hat.shape[-3:-1])
        found[k] = [x.transpose(2, 3) for x in (o.unbind(-2) if o.shape[-2] > 1 else (o.squeeze(-2),))]
    return [*found.get("q", ()), *found.get("p", ())], after, after[-1]


def _kept(x: Tensor, where: Tensor | None) -> Tensor:
    return x if where is None else torch.where(where.reshape(where.shape + (1,) * (x.dim() - where.dim())), x, 0.0)
