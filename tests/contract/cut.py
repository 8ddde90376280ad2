"""Calls in parts: tokens of a batch, one token after the other, states handed on."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from contract.compare import Result, call, carried, detached, gradients, named
from contract.data import Batch, Tensors


def part(batch: Batch, lo: int, hi: int) -> Batch:
    """Tokens lo to hi of a batch that is not packed; the initial state stays."""
    flags = {k: v[:, lo:hi] if isinstance(v, Tensor) else v for k, v in batch.flags.items()}
    return replace(batch, inputs={k: x[:, lo:hi] for k, x in batch.inputs.items()}, flags=flags)


def state_after(agg: Any, batch: Batch, state: Any) -> tuple[Tensors, Any]:
    """Outputs by name and the whole final state of a call that goes on from `state`."""
    found, after = agg(**batch.inputs, **batch.params, initial_state=state, return_state=True, **batch.flags)
    return named(agg, found), after


def in_parts(agg: Any, batch: Batch, places: tuple[int, ...], module: Module | None = None) -> Result:
    """The call cut before the tokens `places`, the state carried; in reverse the last part goes first."""
    leaves = batch.require_grad()
    bounds = sorted({0, *places, batch.case.length})
    pieces = [part(leaves, lo, hi) for lo, hi in pairwise(bounds)] or [leaves]
    reverse = bool(batch.flags.get("reverse"))
    state: Any = leaves.initial
    outputs: list[Tensors] = []
    for piece in reversed(pieces) if reverse else pieces:
        found, state = state_after(agg, piece, state)
        outputs.append(found)
    joined = {k: torch.cat([o[k] for o in (outputs[::-1] if reverse else outputs)], 1) for k in outputs[0]}
    return _result(agg, leaves, joined, state, module)


def in_steps(agg: Any, batch: Batch, module: Module | None = None) -> Result:
    """One token after the other through `step`."""
    leaves = batch.require_grad()
    state: Any = leaves.initial
    outputs: list[Tensors] = []
    for t in range(batch.case.length):
        found, state = agg.step(state, **{k: x[:, t] for k, x in leaves.inputs.items()}, **leaves.params)
        outputs.append(named(agg, found))
    joined = {k: torch.stack([o[k] for o in outputs], 1) for k in outputs[0]}
    return _result(agg, leaves, joined, state, module)


def whole(agg: Any, batch: Batch, module: Module | None = None) -> Result:
    """The same in one call."""
    leaves = batch.require_grad()
    outputs, state = call(agg, leaves)
    return _result(agg, leaves, outputs, state, module)


def _result(agg: Any, leaves: Batch, outputs: Tensors, state: Any, module: Module | None) -> Result:
    state = {k: x for k, x in state.items() if k in carried(agg)}
    return Result(detached(outputs), detached(state), gradients(leaves, outputs, state, torch.float64, module))
