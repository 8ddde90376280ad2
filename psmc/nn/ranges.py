"""From a projection's unbounded numbers into the interval that a spec declares, and where they start.

One rule for all specs. An interval with one finite end is a distance from it, softplus; those distances start
log-uniform in [0.001, 0.1]: as log decays they remember 10 to 1000 tokens, as step sizes they are Mamba's (Gu & Dao
2023, §3.6). An interval with two ends is a sigmoid, which starts in the middle. Params start 1 to 16 away from one end
(Dao & Gu 2024), or evenly spread between two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Range(NamedTuple):
    """A real interval; None is unbounded on that side."""

    low: float | None = None
    high: float | None = None

    def place(self, x: Tensor) -> Tensor:
        """Any real numbers -> numbers inside."""
        if self.low is None:
            return x if self.high is None else self.high - F.softplus(x)
        if self.high is None:
            return F.softplus(x) + self.low
        return self.low + (self.high - self.low) * torch.sigmoid(x)

    def input_bias(self, count: int, generator: torch.Generator) -> Tensor:
        """[count]: what to add to the projection of an input of so many numbers a token."""
        if (self.low is None) == (self.high is None):
            return torch.zeros(count)
        return _distances(count, 0.001, 0.1, generator)

    def param(self, count: int, generator: torch.Generator) -> Tensor:
        """[count]: a param's start, before `place`."""
        if self.low is None and self.high is None:
            return torch.ones(count)
        if self.low is None or self.high is None:
            return _distances(count, 1.0, 16.0, generator)
        inner = (torch.arange(count) + 0.5) / count
        return torch.log(inner / (1 - inner))


def _distances(count: int, least: float, most: float, generator: torch.Generator) -> Tensor:
    """[count] numbers whose softplus is log-uniform between the two, in random order."""
    spread = (torch.arange(count) + 0.5) / count
    distance = torch.exp(math.log(least) + spread * math.log(most / least))
    return (distance + torch.log(-torch.expm1(-distance)))[torch.randperm(count, generator=generator)]
