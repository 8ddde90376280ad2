"""The shipped specs, compiled once a process, with what their data needs."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import psmc
from psmc.ir import Interval

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = tuple(sorted(p.stem for p in (ROOT / "examples").glob("*.psm")))
POSITIVE = Interval(lo=Fraction(1, 10), hi=Fraction(1), lo_open=False, hi_open=False)
# Domains that a paper means and a spec cannot say: random features are positive.
INTERVALS = {"gated_rfa": {"q": POSITIVE, "k": POSITIVE}}


def scratch_cache() -> None:
    """Generated modules of tests go to a directory that goes with the process."""
    if "PSMC_CACHE_DIR" not in os.environ:
        os.environ["PSMC_CACHE_DIR"] = tempfile.mkdtemp(prefix="psmc-tests-")
        atexit.register(shutil.rmtree, os.environ["PSMC_CACHE_DIR"], ignore_errors=True)


class Mix(torch.nn.Module):
    """A rule that is not associative, with weights: s = tanh(mean of l over chunks, W r + l) in miniature."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        weights = torch.randn(2, width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.left, self.right = (torch.nn.Parameter(w) for w in weights)

    def forward(self, l: dict[str, Tensor], r: dict[str, Tensor]) -> dict[str, Tensor]:
        left, right = (w.to(l["s"].dtype) for w in (self.left, self.right))
        return {"s": torch.tanh(l["s"] @ left + r["s"] @ right + l["s"].mean(-2, keepdim=True))}


@cache
def example(name: str) -> Any:
    """The compiled aggregator; `rule` is the module behind `combine extern`, else None."""
    scratch_cache()
    rule = Mix() if name == "transformer_psm" else None
    agg = psmc.load(ROOT / "examples" / f"{name}.psm", extern=rule)
    agg.rule = rule
    return agg


def declared(agg: Any) -> Any:
    """The spec as written, as IR."""
    return agg.reference.args[0]


def domain(name: str) -> dict[str, Interval]:
    return INTERVALS.get(name.removesuffix("_recurrence"), {})
