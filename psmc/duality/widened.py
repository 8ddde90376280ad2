"""Rules from Python under the fp64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Widened:
    """The rule, also for fp64 where it holds fp32 weights: the oracle is fp64, such a rule is as good as fp32."""

    def __init__(self, rule: Callable[..., Any]) -> None:
        self.rule, self.narrow = rule, False

    def __call__(self, l: dict[str, Any], r: dict[str, Any]) -> dict[str, Any]:  # noqa: E741
        wide = any(v.dtype == torch.float64 for v in (*l.values(), *r.values()))
        if not wide:
            return self._called(l, r)
        if not self.narrow:
            try:
                return self._called(l, r)
            except RuntimeError:  # of mixed dtypes, if it is none in fp32
                self.narrow = True
        found = self._called(_cast(l, torch.float32), _cast(r, torch.float32))
        return _cast(found, torch.float64)

    def _called(self, l: dict[str, Any], r: dict[str, Any]) -> dict[str, Any]:  # noqa: E741
        found: dict[str, Any] = self.rule(l, r)
        return found


def _cast(tensors: dict[str, Any], dtype: Any) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
