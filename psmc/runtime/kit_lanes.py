"""How the lanes of a call's tensors lie in memory, for kernels whose lanes do the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class LaneShape:
    """How the lanes of a call's tensors lie: `full` sizes, `count` of them, and a map (Q, D) for each tensor: lane c is
    its (c // Q) * D + c % D; None: no such map, the tensor is expanded."""

    def __init__(self, table: Any, inputs: tuple[Any, ...], params: tuple[Any, ...]) -> None:
        slots = [*zip(table.inputs, inputs, strict=True), *zip(table.params, params, strict=True)]
        dims: Sequence[str] = table.dims
        sizes: dict[str, int] = {}
        lanes: list[int] = [1] * max((len(shape) - len(own) for (_, own, _), shape in slots), default=0)
        for (_, own, _), shape in slots:
            front = len(shape) - len(own)
            sizes.update(zip(own, shape[front:], strict=True))
            for axis in range(-front, 0):
                both = lanes[axis], shape[front + axis]
                lanes[axis] = 0 if 0 in both else max(both)
        self.lanes = tuple(lanes)
        self.dims = tuple(dims)
        self.full = (*self.lanes, *(sizes[d] for d in dims))
        self.count = math.prod(self.full)
        self.axes = [self._axes(own, shape) for (_, own, _), shape in slots]
        self.maps = [_lane_map(a) for a in self.axes]
        self.inputs = len(inputs)
        self.kinds = [kind for (_, _, kind), _ in slots]

    def _axes(self, own: Sequence[str], shape: Sequence[int]) -> list[tuple[int, int]]:
        """(full, own) sizes, axis by axis; a grouped axis is two."""
        front = len(shape) - len(own)
        lanes = [1] * (len(self.lanes) - front) + list(shape[:front])
        axes: list[tuple[int, int]] = []
        for full, here in zip(self.lanes, lanes, strict=True):
            axes += [(full, here)] if here in (1, full) else [(here, here), (full // here, 1)]
        held = dict(zip(own, shape[front:], strict=True))
        sizes = self.full[len(self.lanes) :]
        return [*axes, *((size, held.get(d, 1)) for d, size in zip(self.dims, sizes, strict=True))]

    def tensors(
        self, places: tuple[tuple[int, ...], ...], inputs: Sequence[Tensor], params: Sequence[Tensor]
    ) -> list[Any]:
        """The tensors at these places as kernels take them."""
        found: list[Any] = [self.tensor(at, inputs[at], 2) for at in places[0]]
        return found + [self.tensor(self.inputs + at, params[at], 0) for at in places[1]]

    def tensor(self, at: int, x: Tensor, lead: int) -> Tensor:
        """Contiguous, complex if it is said to be, and expanded if its lanes have no map; `lead` axes before them."""
        if self.kinds[at] == "complex" and not x.is_complex():
            x = x.to(torch.complex64)
        if self.maps[at] is None:
            axes = self.axes[at]
            x = x.reshape(*x.shape[:lead], *(n for _, n in axes)).expand(*x.shape[:lead], *(n for n, _ in axes))
        return _plain(x)

    def flat_maps(self, places: tuple[tuple[int, ...], ...]) -> list[int]:
        """Q and D of each of the tensors at these places."""
        found = [self.maps[at] or (1, 1) for at in (*places[0], *(self.inputs + at for at in places[1]))]
        return [number for pair in found for number in pair]

    def reduced(self, grad: Tensor, like: Tensor, own: Sequence[str], lead: int) -> Tensor:
        """A gradient in all lanes summed to the shape and dtype of its tensor."""
        axes = self._axes(own, like.shape[lead:])
        if any(full != here for full, here in axes):
            grad = grad.reshape(*grad.shape[:lead], *(full for full, _ in axes))
            grad = grad.sum([lead + n for n, (full, here) in enumerate(axes) if full != here])
        grad = grad.reshape(like.shape)
        if grad.is_complex() and not like.is_complex():
            grad = grad.real
        return grad.to(like.dtype)


def _lane_map(axes: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Runs of axes that a tensor has or lacks: with one lacking run between, lane c is its (c // Q) * D + c % D."""
    runs: list[list[int]] = []  # [has it, size]
    for full, here in axes:
        if full == 1:
            continue
        has = int(here == full)
        if runs and runs[-1][0] == has:
            runs[-1][1] *= full
        else:
            runs.append([has, full])
    lacking = [n for n, (has, _) in enumerate(runs) if not has]
    if not lacking:
        return 1, 1
    if len(lacking) > 1:
        return None
    inner = math.prod(size for _, size in runs[lacking[0] + 1 :])
    return runs[lacking[0]][1] * inner, inner


def real_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The real dtype of outputs: what the float tensors promote to."""
    found: torch.dtype | None = None
    for x in tensors:
        dtype = x.dtype
        if dtype.is_complex:
            dtype = torch.float32
        if dtype.is_floating_point and dtype != found:
            found = dtype if found is None else torch.promote_types(found, dtype)
    return found or torch.get_default_dtype()


def _empty(shape: tuple[int, ...], kind: str, real: torch.dtype, device: torch.device) -> Tensor:
    dtype = {"real": real, "complex": torch.complex64, "int": torch.int64, "bool": torch.bool}[kind]
    return torch.empty(shape, dtype=dtype, device=device)


def _plain(x: Tensor) -> Tensor:
    """Contiguous, and nothing left to be done when it is read (a conjugate, a sign)."""
    if x.is_contiguous() and not x.is_neg() and not x.is_conj():
        return x
    return x.resolve_conj().resolve_neg().contiguous()


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()
