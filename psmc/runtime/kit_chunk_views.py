"""How a chunk kernel sees its tensors: rows and strides, and what a call's kernels share."""

from __future__ import annotations

from typing import NamedTuple

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


def _laid(x: Tensor) -> Tensor:
    """A factor [B, T, G, ...] as the kernels read it: rows (b, t) evenly spaced, vectors contiguous."""
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if even and (x.dim() == 3 or x.stride(-1) == 1 or x.shape[-1] == 1) else x.contiguous()


def _places(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(1), x.stride(2))


def _strides(*factors: Tensor | None) -> list[int]:
    return [s for x in factors for s in _places(x)]


def _rows_of(*factors: Tensor | None) -> list[int]:
    """Strides of the batch and the lanes."""
    return [s for x in factors for s in ((0, 0) if x is None else (x.stride(0), x.stride(2)))]


def _matrices(n: Lanes, count: int, like: Tensor) -> Tensor:
    return torch.empty(count, n.lanes, n.key, n.value, dtype=torch.float32, device=like.device)


def _block(n: int) -> int:
    """The least power of two that is not below n, and 16 at least."""
    return max(16, 1 << (n - 1).bit_length())


_MULTIPROCESSORS: dict[torch.device, int] = {}


def _multiprocessors(device: torch.device) -> int:
    if device not in _MULTIPROCESSORS:
        _MULTIPROCESSORS[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _MULTIPROCESSORS[device]
