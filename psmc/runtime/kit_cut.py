"""Sequences cut into chunks of tokens, so that no chunk holds tokens of two: dense batches, and packed ones."""

from __future__ import annotations

import torch
from torch import Tensor


class Cut:
    """Time [B, T, ...] as chunks [B, chunks, L, ...] and back, without a look at what is on the device.

    A dense batch is padded at its end. Of N packed sequences each begins a chunk of its own, so that what a sequence
    gives does not depend on its neighbours; there are as many chunks as that may need, and some hold no token.

    tokens      [chunks, L] bool: where a token lies; None: everywhere but behind the end of a dense batch
    first, row  [chunks] bool, int64: a sequence begins here, and which; None for a dense batch
    """

    def __init__(self, length: int, size: int, cu_seqlens: Tensor | None) -> None:
        self.length, self.size = length, size
        self.tokens: Tensor | None = None
        self.first: Tensor | None = None
        self.row: Tensor | None = None
        if cu_seqlens is None:
            self.count = -(-length // size)
            return
        bounds = cu_seqlens.long()
        sequences = bounds.numel() - 1
        self.count = length // size + sequences
        begin, end = bounds[:-1], bounds[1:]
        self.nonempty = end > begin
        chunks = (end - begin + size - 1) // size
        behind = chunks.cumsum(0)
        ahead = behind - chunks
        here = torch.arange(self.count, device=bounds.device)
        self.row = torch.searchsorted(behind, here, right=True).clamp(max=sequences - 1)
        self.first = here == ahead[self.row]
        place = torch.arange(size, device=bounds.device)
        token = (begin[self.row] + (here - ahead[self.row]) * size)[:, None] + place
        self.tokens = token < end[self.row][:, None]
        self.source = token.clamp(0, max(length - 1, 0)).flatten()
        self.last = (behind - 1).clamp(0)
        time = torch.arange(length, device=bounds.device)
        of = (torch.searchsorted(bounds, time, right=True) - 1).clamp(0, sequences - 1)
        self.target = (ahead[of] * size + time - begin[of]).clamp(0, self.count * size - 1)

    def split(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, ...] to [B, chunks, L, ...]; `fill` where there is no token."""
        if self.tokens is not None:
            x = x.index_select(1, self.source).unflatten(1, (self.count, self.size))
            return torch.where(self.tokens.reshape(self.tokens.shape + (1,) * (x.dim() - 3)), x, fill)
        behind = self.count * self.size - self.length
        if behind:
            x = torch.cat([x, x.new_full((), fill).expand(x.shape[0], behind, *x.shape[2:])], 1)
        chunks: Tensor = x.unflatten(1, (self.count, self.size))
        return chunks

    def join(self, x: Tensor) -> Tensor:
        """[B, chunks, L, ...] to [B, T, ...]."""
        x = x.flatten(1, 2)
        return x[:, : self.length] if self.tokens is None else x.index_select(1, self.target)

    def ends(self, after: Tensor, start: Tensor) -> Tensor:
        """[N, ...]: of `after` [chunks, ...] the states behind packed sequences' last tokens; an empty one's start."""
        some = self.nonempty.reshape(-1, *(1 for _ in start.shape[1:]))
        return torch.where(some, after.index_select(0, self.last), start)
