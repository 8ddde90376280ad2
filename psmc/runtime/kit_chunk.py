"""Matrix states a chunk of tokens at a time, as batched matrix products.

    S_t = D_t S_{t-1} + U_t (W_tᵀ S_{t-1}) + B_t C_tᵀ        o_t = q_tᵀ S_t + p_tᵀ S_{t-1}

With γ_t the product of the decays since the chunk's start and M_XZ[t, s] = Σ_k X_t[k] (γ_t / γ_s)[k] Z_s[k],

    (I - M_WU) Y = Ŵ S_0 + M_WB C         M_W*, M_P*: γ_{t-1} for γ_t, strictly lower triangular
    O            = Q̂ S_0 + M_QU Y + M_QB C
    S_L          = γ_L S_0 + Ûᵀ Y + B̂ᵀ C

where hats hold the decays from or to the chunk's ends (Yang et al. 2024, arXiv 2406.06484; DeltaNet's WY form). All
but the S_0 of each chunk is computed for all chunks at once. Every exponent is a sum of logs of later decays only, so
nothing overflows where decays are at most 1; a decay along the values is applied entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Rows = tuple[Tensor, ...]  # columns of a factor: [..., L, width] each, the same for all tokens of a chunk's batch


class Factors(NamedTuple):
    """One layer's tokens, [..., T, width] each: logs of the decay over the key and over the value (width 1: one number;
    None: no decay), the columns of U, W, B, C, and the queries (q, p), either of which may be None."""

    log_key: Tensor | None
    log_value: Tensor | None
    u: Rows
    w: Rows
    b: Rows
    c: Rows
    queries: tuple[tuple[Tensor | None, Tensor | None], ...]


def chunk_scan(
    f: Factors, start: Tensor, valid: Tensor | None = None, reset: Tensor | None = None, size: int | None = None
) -> tuple[list[Tensor], Tensor]:
    """(one [..., T, V] for each query, the state after the last token [..., K, V]); start [..., K, V].

    valid, reset: [..., T] bool, broadcasting: a token that does not count changes nothing, and its rows of the result
    are 0; before a reset token the state is 0 again. `size`: tokens a chunk.
    """
    length = f.b[0].shape[-2]
    if length == 0:
        return [f.c[0] for _ in f.queries], start
    wide = (f.log_key is not None and f.log_key.shape[-1] > 1) or f.log_value is not None
    size = size or min(16 if wide else 64, length)
    count = -(-length // size)

    def cut(x: Tensor) -> Tensor:
        """[..., T, w] to [..., chunks, L, w], zeros behind the end."""
        x = torch.nn.functional.pad(x, (0, 0, 0, count * size - length)) if count * size > length else x
        return x.reshape(*x.shape[:-2], count, size, x.shape[-1])

    if valid is not None:
        on = valid[..., None]
        f = _where_valid(f, on)
    chunks = _Chunk(
        _closed(f.log_key, cut),
        _closed(f.log_value, cut),
        tuple(map(cut, f.u)),
        tuple(map(cut, f.w)),
        tuple(map(cut, f.b)),
        tuple(map(cut, f.c)),
        None if reset is None else cut(reset[..., None].to(torch.int32)),
        size,
    )
    keep, gain = chunks.transition()
    states = []
    state = start
    for n in range(count):
        states.append(state)
        state = chunks.carry(state, keep, gain, n)
    before = torch.stack(states, -3)
    outputs = []
    for q, p in f.queries:
        o = _total([chunks.read(cut(r), before, shift) for shift, r in enumerate((q, p)) if r is not None])
        o = o.flatten(-3, -2)[..., :length, :]
        outputs.append(
            o if valid is None else torch.where(valid[..., None], o, torch.zeros((), dtype=o.dtype, device=o.device))
        )
    return outputs, state


def _where_valid(f: Factors, on: Tensor) -> Factors:
    def zero(x: Any) -> Any:
        return None if x is None else torch.where(on, x, torch.zeros((), dtype=x.dtype, device=x.device))

    u, w, b, c = (tuple(zero(x) for x in part) for part in (f.u, f.w, f.b, f.c))
    queries = tuple((zero(q), zero(p)) for q, p in f.queries)
    return Factors(zero(f.log_key), zero(f.log_value), u, w, b, c, queries)


def _closed(log: Tensor | None, cut: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Logs from which differences can be taken: a decay of 0 is one that underflows."""
    return None if log is None else cut(log.clamp(min=-104.0 if log.dtype == torch.float32 else -746.0))


class _Chunk:
    """All chunks of a layer; factors are [..., chunks, L, width]."""

    def __init__(
        self,
        log_key: Tensor | None,
        log_value: Tensor | None,
        u: Rows,
        w: Rows,
        b: Rows,
        c: Rows,
        reset: Tensor | None,
        size: int,
    ) -> None:
        self.size, self.b, self.c, self.u, self.rank = size, b, c, u, len(u)
        # Cumulative logs, with the token (0) and without it (1).
        self.key = _sums(log_key)
        self.value = _sums(log_value)
        token = torch.arange(size, device=b[0].device)
        self.later = (token[:, None] >= token, token[:, None] > token)
        self.fresh: Tensor | None = None  # [..., L]: no reset up to here
        self.same: Tensor | None = None  # [..., L, L]: no reset between
        if reset is not None:
            run = reset.cumsum(-2)[..., 0]
            self.fresh = run == 0
            self.same = run[..., :, None] == run[..., None, :]
        self.y: tuple[list[Tensor], list[Tensor]] = ([], [])  # Y = y[0] S_0 + y[1], a column of U each
        if self.rank:
            self._solve(w)

    def _solve(self, w: Rows) -> None:
        """Y by forward substitution, over all columns of all tokens of a chunk."""
        rank, size = self.rank, self.size
        rows = torch.cat([torch.cat([self.product(x, u, 1) for u in self.u], -1) for x in w], -2)
        work = torch.cat([self.hat(x, 1) for x in w], -2)
        gain = torch.cat(
            [_total([self.product(x, b, 1) @ c for b, c in zip(self.b, self.c, strict=True)]) for x in w], -2
        )
        # Columns of one token do not see each other: ordered by token, the system is strictly lower triangular.
        order = torch.arange(rank * size, device=rows.device).view(rank, size).T.flatten()
        unit = torch.eye(rank * size, dtype=rows.dtype, device=rows.device) - rows[..., order, :][..., :, order]
        both = torch.linalg.solve_triangular(
            unit, torch.cat([work, gain], -1)[..., order, :], upper=False, unitriangular=True
        )
        back = torch.argsort(order)
        both = both[..., back, :].unflatten(-2, (rank, size))
        width = work.shape[-1]
        self.y = ([x[..., :width] for x in both.unbind(-3)], [x[..., width:] for x in both.unbind(-3)])

    def product(self, x: Tensor, z: Tensor, shift: int) -> Tensor:
        """M_XZ [..., L, L]; shift 1: x reads the state before its token."""
        mask = self.later[shift] if self.same is None else self.later[shift] & self.same
        if self.key is None:
            return torch.where(mask, x @ z.mT, torch.zeros((), dtype=x.dtype, device=x.device))
        to, since = self.key[shift], self.key[0]
        if to.shape[-1] == 1:
            return (x @ z.mT) * _ratio(to - since.mT, mask, x)
        ratio = _ratio(to[..., :, None, :] - since[..., None, :, :], mask[..., None], x)
        return torch.einsum("...tk,...tsk,...sk->...ts", x, ratio, z)

    def apply(self, m: Tensor, c: Tensor, shift: int) -> Tensor:
        """M C, with the decay along the values."""
        if self.value is None:
            return m @ c
        to, since = self.value[shift], self.value[0]
        ratio = _ratio(to[..., :, None, :] - since[..., None, :, :], self.later[shift][..., None], c)
        return torch.einsum("...ts,...tsv,...sv->...tv", m, ratio, c)

    def hat(self, x: Tensor, shift: int) -> Tensor:
        """X with the decays since the chunk's start; 0 behind a reset."""
        x = x if self.key is None else x * self.key[shift].to(x.dtype).exp()
        return (
            x
            if self.fresh is None
            else torch.where(self.fresh[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        )

    def to_end(self, z: Tensor, logs: tuple[Tensor, Tensor] | None) -> Tensor:
        """Z with the decays up to the chunk's end."""
        return z if logs is None else z * (logs[0][..., -1:, :] - logs[0]).to(z.dtype).exp()

    def transition(self) -> tuple[Tensor, Tensor]:
        """S_L = keep ∘ S_0 + gain: keep is [..., K or 1, V or 1] (elementwise), or [..., K, K] with a transition."""
        last = None if self.same is None else self.same[..., -1, :, None]

        def ended(z: Tensor) -> Tensor:
            z = self.to_end(z, self.key)
            return z if last is None else torch.where(last, z, torch.zeros((), dtype=z.dtype, device=z.device))

        gain = _total([ended(b).mT @ self.to_end(c, self.value) for b, c in zip(self.b, self.c, strict=True)])
        like = self.b[0]
        key = torch.ones_like(like[..., -1, :1]) if self.key is None else self.key[0][..., -1, :].to(like.dtype).exp()
        if self.fresh is not None:
            key = torch.where(self.fresh[..., -1, None], key, torch.zeros((), dtype=key.dtype, device=key.device))
        if not self.rank:
            value = (
                torch.ones_like(like[..., -1, :1])
                if self.value is None
                else self.value[0][..., -1, :].to(like.dtype).exp()
            )
            return key[..., :, None] * value[..., None, :], gain
        through = _total([ended(u).mT @ y for u, y in zip(self.u, self.y[0], strict=True)])
        gain = gain + _total([ended(u).mT @ y for u, y in zip(self.u, self.y[1], strict=True)])
        return torch.diag_embed(key.expand(*key.shape[:-1], like.shape[-1])) + through, gain

    def carry(self, state: Tensor, keep: Tensor, gain: Tensor, n: int) -> Tensor:
        """The state after chunk n."""
        here = keep[..., n, :, :]
        return (here @ state if self.rank else here * state) + gain[..., n, :, :]

    def read(self, q: Tensor, before: Tensor, shift: int) -> Tensor:
        """q_tᵀ S_t (shift 0) or q_tᵀ S_{t-1} (shift 1), [..., chunks, L, V]; before: S_0 of each chunk."""
        o = self.hat(q, shift) @ before
        if self.value is not None:
            o = o * self.value[shift].to(o.dtype).exp()
        for b, c in zip(self.b, self.c, strict=True):
            o = o + self.apply(self.product(q, b, shift), c, shift)
        for u, through, gain in zip(self.u, *self.y, strict=True):
            o = o + self.product(q, u, shift) @ (through @ before + gain)
        return o


def _sums(log: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if log is None:
        return None
    # In double: behind a strong decay a sum is large, and what counts is its differences to later ones.
    with_token = log.double().cumsum(-2)
    return with_token, with_token - log


def _ratio(exponent: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """exp where the mask is, else 0."""
    low = torch.full((), -torch.inf, dtype=like.dtype, device=like.device)
    return torch.where(mask, exponent.to(like.dtype), low).exp()


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
