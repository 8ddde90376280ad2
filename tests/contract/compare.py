"""A compiled aggregator against the oracle: outputs, the final state, and the gradient of everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from contract.data import Batch, Tensors, quantised


@dataclass
class Result:
    """What a call gave, by name: outputs, the final state, gradients under fixed cotangents of both."""

    outputs: Tensors
    state: Tensors
    grads: Tensors

    def parts(self) -> dict[str, Tensor]:
        named = (("output", self.outputs), ("state", self.state), ("grad", self.grads))
        return {f"{kind} {k}": x for kind, part in named for k, x in part.items()}


def oracle(agg: Any, batch: Batch, dtype: torch.dtype = torch.float64, module: Module | None = None) -> Result:
    """The sequential fold in fp64 on the CPU, its state restricted to what the aggregator carries.
    dtype: of the inputs under test, whose cotangents are rounded to it."""
    leaves = batch.require_grad()
    flags = {k: v for k, v in leaves.flags.items() if k != "cu_seqlens"}
    outputs, state = agg.reference(
        leaves.inputs, leaves.params, initial_state=leaves.initial, cu_seqlens=leaves.offsets, **flags
    )
    kept = carried(agg)
    state = {k: x for k, x in state.items() if k in kept}
    return Result(detached(outputs), detached(state), gradients(leaves, outputs, state, dtype, module))


def compiled(agg: Any, batch: Batch, dtype: torch.dtype = torch.float64, module: Module | None = None) -> Result:
    """The parallel call, on the tensors as they are (dtype and device of `batch`)."""
    leaves = batch.require_grad()
    outputs, state = call(agg, leaves)
    return Result(detached(outputs), detached(state), gradients(leaves, outputs, state, dtype, module))


def call(agg: Any, batch: Batch, **more: Any) -> tuple[Tensors, Tensors]:
    """Outputs by name, and the final state (that of a tree, a counter, is left out)."""
    found, state = agg(
        **batch.inputs, **batch.params, initial_state=batch.initial, return_state=True, **batch.flags, **more
    )
    kept = carried(agg)
    return named(agg, found), {k: x for k, x in state.items() if k in kept}


def named(agg: Any, found: Any) -> Tensors:
    values = found if isinstance(found, tuple) else (found,)
    return {slot.name: x for slot, x in zip(agg.spec.outputs, values, strict=True)}


def carried(agg: Any) -> set[str]:
    """Names in a final state that the oracle has too."""
    tails = {f"{name}_tail" for name in agg.spec.taps}
    return tails if agg.fold_order == "tree" else {*agg.spec.live, *tails}


def gradients(
    batch: Batch, outputs: Tensors, state: Tensors, dtype: torch.dtype, module: Module | None = None
) -> Tensors:
    """Of every leaf (and the rule's own parameters), under cotangents that depend on names and shapes alone."""
    wanted = batch.leaves() | ({} if module is None else dict(module.named_parameters()))
    results, cotangents = [], []
    for kind, part in (("output", outputs), ("state", state)):
        for name, x in sorted(part.items()):
            if x.requires_grad:
                results.append(x)
                cotangents.append(cotangent(f"{kind} {name}", x, dtype if kind == "output" else torch.float32))
    leaves = {k: x for k, x in wanted.items() if x.requires_grad}
    found: Any = [None] * len(leaves)
    if results:
        found = torch.autograd.grad(results, list(leaves.values()), cotangents, allow_unused=True)
    grads = dict(zip(leaves, found, strict=True))
    return {k: torch.zeros_like(x) if grads.get(k) is None else grads[k] for k, x in wanted.items()}


def cotangent(name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for the oracle and for what is compared with it: drawn on the CPU, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(sum((i + 1) * ord(c) for i, c in enumerate(name)))
    value = torch.randn(like.shape, generator=generator, dtype=torch.complex128 if like.is_complex() else torch.float64)
    return quantised(value, dtype).to(like.device, like.dtype)


def detached(tensors: Tensors) -> Tensors:
    return {k: x.detach() for k, x in tensors.items()}


def errors(found: Result, wanted: Result) -> dict[str, float]:
    """The largest difference of each tensor over the largest magnitude of the oracle's; inf where one is NaN or the
    other infinite. Raises AssertionError if names or shapes differ."""
    ours, theirs = found.parts(), wanted.parts()
    assert ours.keys() == theirs.keys(), f"{sorted(ours)} are not {sorted(theirs)}"
    return {k: error(x, theirs[k], k) for k, x in ours.items()}


def error(found: Tensor, wanted: Tensor, name: str = "") -> float:
    assert found.shape == wanted.shape, f"{name}: {list(found.shape)} is not {list(wanted.shape)}"
    if not found.numel():
        return 0.0
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    found, wanted = found.detach().cpu().to(wide), wanted.detach().cpu().to(wide)
    same = found == wanted  # infinities of the same sign
    if bool(same.all()):
        return 0.0
    gap = torch.where(same, 0.0, (found - wanted).abs())
    finite = torch.where(wanted.isfinite(), wanted.abs(), 0.0)
    worst = gap.max().item() / max(finite.max().item(), 1e-3)
    return worst if worst == worst else float("inf")
