"""Numeric evidence for a rule that nothing can be proved of: `combine extern`, or a claim that is vouched for.

Elements that the spec can produce are combined both ways at random. That many numbers agree proves nothing; that they
disagree refutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from psmc.duality.batch import DTYPES
from psmc.duality.compare import distances
from psmc.duality.draw import Draw, Tensors, complex_of
from psmc.ir import Extern
from psmc.ir.query import taps

# Relative to the largest value of either side: what another order may cost, and what no rounding explains.
_LIMIT = {"fp64": 1e-9, "fp32": 1e-3}


@dataclass(frozen=True)
class Evidence:
    """Worst relative difference of (a∘b)∘c and a∘(b∘c), and of e∘x, x∘e and x, over `trials` random elements each."""

    trials: int
    dtype: str
    associativity: float
    left_identity: float
    right_identity: float
    component: str  # where associativity fared worst

    @property
    def associative(self) -> bool:
        """Whether the numbers speak for it: evidence, no proof."""
        return self.associativity <= _LIMIT[self.dtype]

    @property
    def identity(self) -> bool:
        """The same of the identity element."""
        return max(self.left_identity, self.right_identity) <= _LIMIT[self.dtype]

    def __str__(self) -> str:
        verdict = "agree" if self.associative else "DIFFER"
        e = "agree" if self.identity else "DIFFER"
        return (
            f"numeric evidence only, {self.trials} random triples in {self.dtype}: (a∘b)∘c and a∘(b∘c) {verdict} "
            f"({self.associativity:.1e}, worst in '{self.component}'); e∘x, x∘e and x {e} "
            f"({max(self.left_identity, self.right_identity):.1e})"
        )


def evidence(
    agg: Any, *, trials: int = 64, dtype: str | None = None, sizes: dict[str, int] | None = None, seed: int = 0
) -> Evidence:
    """Try the laws of a compiled aggregator (`psmc.load`) on random elements.

    trials  how many triples, one batch of them: the rule is called on components [trials, *dims]
    dtype   "fp64" or "fp32"; None: fp64, and fp32 for a rule from Python, which may hold fp32 weights
    sizes   of the dims that the spec leaves open

    Half of the elements are lifted tokens, half are products of two of them. Raises what the rule raises.
    """
    draw = Draw(agg.declared, sizes or {}, (), seed, "mild")
    dtype = dtype or ("fp32" if isinstance(agg.declared.combine, Extern) else "fp64")
    compute = DTYPES[dtype]
    n = SimpleNamespace(**draw.sizes)
    lags = taps(agg.declared)

    def cast(x: torch.Tensor) -> torch.Tensor:
        return x.to(complex_of(compute) if x.is_complex() else compute if x.is_floating_point() else x.dtype)

    params = SimpleNamespace(**{k: cast(v) for k, v in draw.params().items()})

    def lifted() -> Tensors:
        x = {k: cast(v)[:, 0] for k, v in draw.inputs(trials, 1).items()}
        for name, longest in lags.items():
            x |= {f"{name}_lag{k}": x[name].flip(0) for k in range(1, longest + 1)}
        return _full(agg, agg.rules.lift(SimpleNamespace(**x), params, n), draw.sizes, trials)

    def join(l: Tensors, r: Tensors) -> Tensors:  # noqa: E741
        found = agg.rules.combine(SimpleNamespace(**l), SimpleNamespace(**r), params, n)
        return _full(agg, found, draw.sizes, trials)

    def element() -> Tensors:
        one, two = lifted(), join(lifted(), lifted())
        half = torch.arange(trials) % 2 == 0
        return {k: torch.where(half.reshape(-1, *[1] * (v.dim() - 1)), v, two[k]) for k, v in one.items()}

    with torch.no_grad():
        a, b, c = element(), element(), element()
        left, right = join(join(a, b), c), join(a, join(b, c))
        e = _full(agg, agg.rules.identity(n, torch.empty((), dtype=compute)), draw.sizes, trials)
        apart = _apart(left, right)
        sides = [max(_apart(x, a).values(), default=0.0) for x in (join(e, a), join(a, e))]
    worst = max(apart, key=lambda k: apart[k])
    return Evidence(trials, dtype, apart[worst], sides[0], sides[1], worst)


def _apart(one: Tensors, two: Tensors) -> dict[str, float]:
    """By component; relative to the larger of the two."""
    size = {k: one[k] if bool(one[k].abs().max() > two[k].abs().max()) else two[k] for k in one}
    return distances(one, two, size, False)


def _full(agg: Any, values: Any, sizes: dict[str, int], trials: int) -> Tensors:
    """Rules return what they read of the leading axis."""
    found = vars(values) if isinstance(values, SimpleNamespace) else values
    return {s.name: found[s.name].expand(trials, *(sizes[d] for d in s.dims)) for s in agg.spec.components}
