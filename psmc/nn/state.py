"""Decoding states: flat dicts of plain tensors, batch first, so that `torch.save` keeps them and rows can be moved.

Positions ([B] int64) stay on the CPU: they steer the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def scoped(state: Mapping[str, Tensor], scope: str) -> State:
    """The entries below `scope.`, without it."""
    return {k[len(scope) + 1 :]: x for k, x in state.items() if k.startswith(f"{scope}.")}


def within(state: Mapping[str, Tensor], scope: str) -> State:
    """The same entries, each below `scope.`."""
    return {f"{scope}.{k}": x for k, x in state.items()}


def state_bytes(state: Mapping[str, Tensor]) -> int:
    """What a state holds, in bytes; tensors that are the same memory count once."""
    held = {(x.data_ptr(), x.numel() * x.element_size()) for x in state.values() if x.numel()}
    return sum(size for _, size in held)


def select(state: Mapping[str, Tensor], rows: Sequence[int]) -> State:
    """Some streams of a state, in the order named."""
    return {k: x[torch.tensor(rows, dtype=torch.int64, device=x.device)] for k, x in state.items()}


def join(states: Sequence[Mapping[str, Tensor]]) -> State:
    """One batch of the streams of several states, wherever each is in its own sequence.

    An entry that some lack, or hold with less room (a key cache), is filled up with zeros, which nothing reads.
    """
    out: State = {}
    for key in sorted({k for s in states for k in s}):
        known = [s[key] for s in states if key in s]
        shape = [max(sizes) for sizes in zip(*(x.shape[1:] for x in known), strict=True)]
        parts = []
        for s in states:
            rows = next(iter(s.values())).shape[0]
            x = s[key] if key in s else known[0].new_zeros(rows, *shape)
            lacking = [want - have for have, want in zip(x.shape[1:], shape, strict=True)]
            room = [w for lack in reversed(lacking) for w in (0, lack)]
            parts.append(F.pad(x, room) if any(room) else x)
        out[key] = torch.cat(parts)
    return out


def put_rows(x: Tensor, rows: Sequence[int], values: Tensor, in_place: bool = False) -> Tensor:
    """`x` [B, ...] with some rows replaced; `values` itself if they are all."""
    if len(rows) == x.shape[0]:
        return x.copy_(values) if in_place else values
    index = torch.tensor(rows, dtype=torch.int64, device=x.device)
    return x.index_copy_(0, index, values) if in_place else x.index_copy(0, index, values)


def write_token(x: Tensor, at: Sequence[int], value: Tensor) -> None:
    """x [B, S, ...] with value [B, ...] at a place of each row's own, in place."""
    if len(set(at)) == 1:
        x[:, at[0]] = value
    else:
        places = torch.tensor(at, dtype=torch.int64, device=x.device)
        x[torch.arange(len(at), device=x.device), places] = value
