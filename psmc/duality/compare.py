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
    sizes = {k: _magnitude(scale[k]) for k in wanted}
    whole = max((float(s.max()) if s.numel() else 0.0 for s in sizes.values()), default=0.0)
    out = {}
    for name, right in wanted.items():
        left = found[name]
        if not (right.is_floating_point() or right.is_complex()):
            out[name] = 0.0 if torch.equal(left.to(right.dtype), right) else float("inf")
            continue
        wide = torch.complex128 if right.is_complex() else torch.float64
        left, right = left.to(wide), right.to(wide)
        finite = torch.isfinite(right)
        if left.shape != right.shape or not _same_limits(left, right, finite):
            out[name] = float("inf")
            continue
        gap = torch.where(finite, left - right, 0).abs()
        size = sizes[name]
        if time and size.dim() > 1 and size.numel():
            size = size.flatten(2).amax(-1) if size.dim() > 2 else size
            size, gap = size.cummax(1).values, gap.flatten(2).amax(-1) if gap.dim() > 2 else gap
        else:
            size = size.max() if size.numel() else size.sum()
        ratio = gap / torch.clamp(size, min=1e-3 * whole + 1e-30)
        out[name] = float(ratio.max()) if ratio.numel() else 0.0
    return out


def _magnitude(x: Tensor) -> Tensor:
    wide = x.to(torch.complex128 if x.is_complex() else torch.float64)
    return torch.where(torch.isfinite(wide), wide, 0).abs()


def _same_limits(left: Tensor, right: Tensor, finite: Tensor) -> bool:
    """Infinities where infinities are wanted. NaN is compared with nothing: the spec has no value there."""
    if bool((~torch.isfinite(left) & finite).any()):
        return False
    if left.is_complex():
        return True
    limits = torch.isinf(right)
    return torch.equal(left[limits], right[limits])
