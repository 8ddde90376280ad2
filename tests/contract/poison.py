"""Buffers that torch leaves unset, filled with what would show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

FUNCTIONS = ("empty", "empty_like", "empty_strided")


def filled(x: Tensor) -> Tensor:
    """NaN, or the largest integer, everywhere."""
    if x.is_floating_point() or x.is_complex():
        return x.fill_(float("nan"))
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its like give poisoned tensors in here."""
    plain = {name: getattr(torch, name) for name in FUNCTIONS}
    new_empty = torch.Tensor.new_empty
    try:
        for name, function in plain.items():
            setattr(torch, name, lambda *a, function=function, **k: filled(function(*a, **k)))

        def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return filled(new_empty(self, *args, **kwargs))

        torch.Tensor.new_empty = poisoned  # type: ignore[method-assign, assignment]
        yield
    finally:
        for name, function in plain.items():
            setattr(torch, name, function)
        torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]
