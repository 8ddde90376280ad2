"""How a chunk kernel sees its tensors: rows and strides, and what a call's kernels share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Lanes(NamedTuple):
    """What a call's kernels share. `batch`, `tokens` as the rows lie; `sequences`, `chunks`: how many there may be;
    `cu`, `first`, `owner`: offsets, the first chunk of each sequence, and the sequence of each chunk (-1: none)."""

    batch: int
    tokens: int
    lanes: int
    key: int
    value: int
    sequences: int
    chunks: int
    cu: Tensor | None
    first: Tensor | None
    owner: Tensor | None


class ChunkCall(NamedTuple):
    """One call. keys: what q, b and a log over the key are made of, [B, T, G, K] each, or [1, 1, G, K] of a param; c
    [B, T, G, V]; values: what the readout and a log over the value read, likewise; numbers [B, T, G] for the readout;
    log, n [B, T, G]; start [N, G, K, V] and zstart [N, G, K] in fp32; scalars [B, T, G], or [1, 1, G] of a param: what
    kernels compute numbers, log and n of, which are left out then. A tensor may have fewer lanes, each for several of
    the G in turn.

    shape: B, T, G; shift, scale: y_t = scale qᵀ S_(t - shift); code [B, T] int8: bit 0 a token counts, bit 1 the state
    is new before it; cu: N + 1 offsets of sequences in a batch of 1; dtype: of the output; decay: 0 none, 1 a number a
    token, 2 over the key; over: over the value, too; layout: what all of this fixes, of kit_chunk_plan.
    """

    start: Tensor | None
    zstart: Tensor | None
    log: Tensor | None
    n: Tensor | None
    c: Tensor
    keys: tuple[Tensor | None, ...]
    values: tuple[Tensor | None, ...]
    numbers: tuple[Tensor | None, ...]
    shape: tuple[int, int, int]
    shift: int
    scale: float
    code: Tensor | None
    cu: Tensor | None
    dtype: torch.dtype
    decay: int
    over: bool
    scalars: tuple[Tensor, ...] = ()
    layout: Any = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a gradient may be wanted of, in order."""
        return (*self[:5], *self.keys, *self.values, *self.numbers, *self.scalars)

    def of(self, tensors: Any) -> ChunkCall:
        """The same call over other `tensors`."""
        a, b, c = len(self.keys), len(self.values), len(self.numbers)
        rest = tuple(tensors[5:])
        return self._replace(
            start=tensors[0], zstart=tensors[1], log=tensors[2], n=tensors[3], c=tensors[4], keys=rest[:a],
            values=rest[a : a + b], numbers=rest[a + b : a + b + c], scalars=rest[a + b + c :],
        )  # fmt: skip

    @property
    def scaled(self) -> ChunkCall:
        """What is left to read where q and b lie scaled."""
        return self._replace(keys=(None,) * len(self.keys)) if self.decay == 2 else self

    @property
    def placed(self) -> tuple[Tensor | None, ...]:
        """The tensors with which all kernels begin."""
        return (*self.keys, self.c, *self.values, *self.numbers, self.log, self.n, self.code)

    @property
    def strides(self) -> tuple[int, ...]:
        """What follows them: strides of tokens and lanes, and lanes to one, of each but the code."""
        return self._strides(self.placed[:-1])

    @property
    def scalar_strides(self) -> tuple[int, ...]:
        """The same of the scalars."""
        return self._strides(self.scalars)

    def _strides(self, tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
        found: list[int] = []
        for x in tensors:
            if x is None:
                found += (0, 0, 1)
            else:  # of a param, tokens lie on top of each other
                token = 0 if x.shape[:2] == (1, 1) else x.stride(1)
                found += (token, x.stride(2), self.shape[2] // x.shape[2])
        return tuple(found)


class Made(NamedTuple):
    """What is made ready of a call: of a decay over the key sums of logs within halves of chunks, up to each token and
    (for precise operands) behind it, [B, T, G, K]; the same over the value; q and b scaled; A [B, T, G, BT]; the logs
    of whole chunks [chunks, G, K], or the sums of those of a number a token, [chunks, G, 2, BT]."""

    up: Tensor | None = None
    down: Tensor | None = None
    vup: Tensor | None = None
    vdown: Tensor | None = None
    q: Tensor | None = None
    b: Tensor | None = None
    pairs: Tensor | None = None
    total: Tensor | None = None


class Kept(NamedTuple):
    """What a backward needs of its forward: what the kernels read of the readout, sums [B, T, G, width] that they
    handed on, and the states before each chunk and what was made ready, if they were kept."""

    seen: Tensor | None
    sums: Tensor | None
    states: Tensor | None
    zstates: Tensor | None
    made: Made | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (*self[:4], *(self.made or Made()))

    @staticmethod
    def of(tensors: Any) -> Kept:
        """What `tensors` gave."""
        made = Made(*tensors[4:])
        seen, sums, states, zstates = tensors[:4]
        return Kept(seen, sums, states, zstates, made if any(x is not None for x in made) else None)


def _is_readable(at: int, x: Tensor) -> bool:
    """Whether the kernels read the tensor at this place as it lies: a start in fp32 and contiguous; of others rows
    (b, t) evenly spaced, vectors contiguous, and nothing of a chunk of tokens further than 32 bits reach (where an axis
    of lanes lies outside of time, it may be)."""
    if at < 2:
        return x.dtype == torch.float32 and x.is_contiguous()
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    solid = x.dim() == 3 or x.stride(-1) == 1 or x.shape[-1] == 1
    return even and solid and _near((64, *x.shape[2:]), x.stride()[1:])


def _readable(at: int, x: Tensor | None) -> Tensor | None:
    """The tensor, or a copy that the kernels read as it lies."""
    if x is None or _is_readable(at, x):
        return x
    return (x.float() if at < 2 else x).contiguous()


def _near(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether 32 bits hold every offset. Kernels compute those of rows in 64 bits, and within a row in 32."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) < 2**31


def _folded(x: Tensor, like: Tensor) -> Tensor:
    """Gradients of all G lanes [B, T, G, ...] as those of the lanes that `like` has, in its dtype."""
    if x.shape[2] != like.shape[2]:
        x = x.unflatten(2, (like.shape[2], -1)).sum(3)
    return x.to(like.dtype)


def _block(n: int) -> int:
    """The least power of two that is not below n, and 16 at least."""
    return max(16, 1 << (n - 1).bit_length())
