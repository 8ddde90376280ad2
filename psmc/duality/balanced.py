"""A rule evaluated in balanced halves, with nothing of the runtime that the other paths share."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from psmc.duality.draw import Tensors, complex_of
from psmc.ir import Extern
from psmc.ir.query import taps


def balanced(
    agg: Any, inputs: Tensors, params: Tensors, initial: Tensors, sizes: Mapping[str, int], lanes: tuple[int, ...],
    compute: torch.dtype,
) -> tuple[Tensors, Tensors]:  # fmt: skip
    """(outputs, final state) of an associative aggregator, with elements combined in balanced halves, then with the
    initial state: the module's lift, combine, advance and output, and nothing else of its runtime.

    inputs [B, T, *lanes, *dims], params [*lanes, *dims], initial [B, *lanes, *dims] live components and tails, or {}.
    """
    spec, rules, n = agg.spec, agg.rules, SimpleNamespace(**sizes)
    slots = {s.name: s for s in spec.components}
    dtypes = {"real": compute, "complex": complex_of(compute), "int": torch.int64, "bool": torch.bool}
    x = _wide(_with_lags(inputs, initial, taps(agg.declared)), compute)
    p = SimpleNamespace(**_wide(params, compute))
    batch, length = next(iter(inputs.values())).shape[:2]

    def full(values: Mapping[str, Tensor], lead: tuple[int, ...]) -> Tensors:
        """Rules return what they read of the leading axes."""
        shapes = {k: (*lead, *lanes, *(sizes[d] for d in slots[k].dims)) for k in values}
        return {k: v.to(dtypes[slots[k].kind]).expand(shapes[k]) for k, v in values.items()}

    def join(l: Tensors, r: Tensors, rule: Any) -> Tensors:  # noqa: E741
        lead = next(iter(r.values())).shape[:2]
        if isinstance(agg.declared.combine, Extern):  # a rule from Python need not broadcast
            l = {k: v.expand(*lead, *v.shape[2:]) for k, v in l.items()}  # noqa: E741
        return full(rule(SimpleNamespace(**l), SimpleNamespace(**r), p, n), lead)

    def halves(e: Tensors) -> Tensors:
        """All prefixes of the elements."""
        width = next(iter(e.values())).shape[1]
        if width < 2:
            return e
        left, right = (halves({k: v[:, part] for k, v in e.items()}) for part in _split(width))
        last = {k: v[:, -1:] for k, v in left.items()}
        rest = join(last, right, rules.combine)
        return {k: torch.cat([left[k], rest[k]], 1) for k in e}

    elements = full(rules.lift(SimpleNamespace(**x), p, n), (batch, length))
    prefix = halves(elements)
    like = torch.empty((), dtype=compute, device=next(iter(inputs.values())).device)
    begin = getattr(rules, "start", rules.identity)(n, like)
    first = full({k: begin[k] for k in spec.live}, (batch, 1))
    if initial:
        first = {k: initial[k].unsqueeze(1) for k in spec.live}
    if initial or hasattr(rules, "start"):
        prefix = join(first, prefix, rules.advance)
    prefix = {k: prefix[k] for k in spec.live}
    before = {k: torch.cat([first[k].to(v.dtype), v[:, :-1]], 1) for k, v in prefix.items()}
    found = rules.output(
        SimpleNamespace(**prefix), SimpleNamespace(**before) if spec.previous else None, SimpleNamespace(**x), p, n
    )
    real = next((v.dtype for v in inputs.values() if v.is_floating_point()), compute)
    outputs = {}
    for slot in spec.outputs:
        value = found[slot.name].expand(batch, length, *lanes, *(sizes[d] for d in slot.dims))
        outputs[slot.name] = value.to(real) if value.is_floating_point() else value
    return outputs, {k: v[:, -1] for k, v in prefix.items()}


def _split(width: int) -> tuple[slice, slice]:
    half = 1 << ((width - 1).bit_length() - 1)
    return slice(None, half), slice(half, None)


def _wide(tensors: Tensors, compute: torch.dtype) -> Tensors:
    return {
        k: v.to(compute) if v.is_floating_point() else v.to(complex_of(compute)) if v.is_complex() else v
        for k, v in tensors.items()
    }


def _with_lags(inputs: Tensors, initial: Tensors, lags: Mapping[str, int]) -> Tensors:
    """The inputs, and each tapped one some tokens earlier as `name_lagK`."""
    out = dict(inputs)
    for name, longest in lags.items():
        x = inputs[name]
        past = initial.get(f"{name}_tail", x.new_zeros(x.shape[0], longest, *x.shape[2:]))
        whole = torch.cat([past.to(x.dtype), x], 1)
        for lag in range(1, longest + 1):
            out[f"{name}_lag{lag}"] = whole[:, longest - lag : longest - lag + x.shape[1]]
    return out
