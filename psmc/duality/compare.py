"""How far two results are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from psmc.duality.draw import Tensors


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) and torch.equal(torch.isnan(x), torch.isnan(y))


def distances(found: Tensors, wanted: Tensors, scale: Tensors, time: bool) -> dict[str, float]:
    """The largest |found - wanted| of each tensor, relative to the largest finite |scale| of that tensor.

    `time`: [B, T, ...] are compared token by token, relative to the largest value so far, so that a state that grows
    does not hide its beginnings. A tensor that is nearly zero beside the others is compared on their scale.
    """
    smooth = [k for k, v in wanted.items() if v.is_floating_point() or v.is_complex()]
    sizes = {k: _size(scale[k], time) for k in smooth}
    floor: Tensor | float = 0.0
    for size in sizes.values():
        floor = torch.maximum(size, torch.as_tensor(floor, dtype=size.dtype, device=size.device))
    out = {}
    for name, right in wanted.items():
        left = found[name]
        if name not in sizes:
            out[name] = 0.0 if torch.equal(left.to(right.dtype), right) else float("inf")
            continue
        wide = torch.complex128 if right.is_complex() else torch.float64
        left, right = left.to(wide), right.to(wide)
        finite = torch.isfinite(right)
        if left.shape != right.shape or not _same_limits(left, right, finite):
            out[name] = float("inf")
            continue
        gap = torch.where(finite, left - right, 0).abs()
        ratio = _largest(gap, time) / torch.clamp(sizes[name], min=1e-3 * floor + 1e-30)
        out[name] = float(ratio.max()) if ratio.numel() else 0.0
    return out


def _size(x: Tensor, time: bool) -> Tensor:
    """The largest finite |x|; with `time` [B, T], the largest up to each token."""
    wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
    largest = _largest(torch.where(torch.isfinite(wide), wide, 0).abs(), time)
    return largest.cummax(1).values if time and largest.numel() else largest


def _largest(x: Tensor, time: bool) -> Tensor:
    if time:
        return x.flatten(2).amax(-1) if x.dim() > 2 else x
    return x.max() if x.numel() else x.sum()


def _same_limits(left: Tensor, right: Tensor, finite: Tensor) -> bool:
    """Infinities where infinities are wanted. NaN is compared with nothing: the spec has no value there."""
    if bool((~torch.isfinite(left) & finite).any()):
        return False
    if left.is_complex():
        return True
    limits = torch.isinf(right)
    return torch.equal(left[limits], right[limits])
