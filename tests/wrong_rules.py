"""Random rules that are not associative, with the proof: a point in fp64 at which the oracle tells both sides apart.

Nothing here is shared with the prover but the IR: values are drawn by torch, both sides run in psmc.reference.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from generated_rules import random_rule
from mutants import mutants
from prover_specs import spec
from torch import Tensor

from psmc.ir import Aggregator, Block, Interval, Ref
from psmc.ir.rewrite import refs
from psmc.reference.evaluate import Env, run

POINTS = 64
_CLEAR, _LARGE = 1e-3, 1e5  # of the relative difference, and of all values on the way
FORMS = ["{a} + {b}", "{a} * {b}", "{a} - {b}", "max({a}, {b})", "min({a}, {b})", "abs({a})", "tanh({a}) + {b}"]
FORMS += ["where({a} > {b}, {a}, {b})", "exp({a} - max({a}, {b}))", "sigmoid({a}) * {b}", "{a} / (1 + {b}^2)"]
FORMS += ["clamp({a}, -1, {b})", "sqrt(1 + {a}^2) * {b}", "0.5 * {a}", "relu({a}) - {b}", "logaddexp({a}, {b})"]
SHAPES = (("", "", ""), ("", "", ""), ("dim K", "[K]", "[i]"), ("dim K, V", "[K, V]", "[i, j]"))
# added to one component: small, and hard to see
EXTRAS = ["0.01 * l.{0} * r.{0}", "0.1 * l.{0}", "where(l.{0} > 2, 0.5, 0)", "max(l.{0} - r.{0}, 0)", "sin(r.{0}) * l.{0}"]


def random_term(rng: random.Random, names: list[str], at: str, depth: int) -> str:
    if depth == 0:
        return rng.choice([f"{side}.{n}{at}" for side in "lr" for n in names] + ["2"])
    a, b = (random_term(rng, names, at, depth - 1) for _ in "ab")
    return "(" + rng.choice(FORMS).format(a=a, b=b) + ")"


def written(rng: random.Random) -> Aggregator:
    """Terms at random."""
    dims, shape, at = rng.choice(SHAPES)
    names = ["s", "d"][: rng.randint(1, 2)]
    rule = "; ".join(f"{n}{at} = {random_term(rng, names, at, rng.randint(1, 3))}" for n in names)
    state = ", ".join(f"{n}{shape} = 0" for n in names)
    return spec(f"{dims} state {state} combine (l, r) {{ {rule} }}")


def perturbed(rng: random.Random) -> Aggregator:
    """A monoid, and something added to one of its scalars."""
    while True:
        rule = random_rule(rng.randrange(10**6))[1]
        able = [n for n, (shape, _) in rule.state.items() if not shape]
        if able:
            name = rng.choice(able)
            indices, value = rule.results[name]
            rule.results[name] = (indices, f"({value}) + {rng.choice(EXTRAS).format(name)}")
            return spec(rule.text())


def mutated(rng: random.Random) -> Aggregator:
    """A monoid with a mechanical mistake in its rule."""
    found = [m for kind, m in mutants(spec(random_rule(rng.randrange(10**6))[1].text())) if kind != "identity"]
    return rng.choice(found)


MAKERS = {"terms at random": written, "perturbed monoid": perturbed, "mutated monoid": mutated}


def wrong_rule(seed: int) -> tuple[str, Aggregator]:
    """(how it was made, a rule that the oracle finds wrong)."""
    how = sorted(MAKERS)[seed % len(MAKERS)]
    rng = random.Random(f"wrong {seed}")
    while True:
        agg = MAKERS[how](rng)
        if wrong_at(agg, seed):
            return how, agg


# --- the oracle ---------------------------------------------------------------------------------


def wrong_at(agg: Aggregator, seed: int) -> bool:
    """Whether (a∘b)∘c and a∘(b∘c) clearly differ at one of some random points."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {d.name: d.size or 1 + (seed + k) % 3 for k, d in enumerate(agg.dims)}
    params = {p.name: drawn(p.dims, p.kind, p.interval, sizes, generator) for p in agg.params}
    gathers = gathered(agg)

    def element() -> dict[str, Tensor]:
        return {
            c.name: torch.randint(sizes[gathers[c.name]], (POINTS, *(sizes[d] for d in c.dims)), generator=generator)
            if c.name in gathers else drawn(c.dims, c.kind, c.interval, sizes, generator)
            for c in agg.state
        }  # fmt: skip

    a, b, c = element(), element(), element()
    try:
        ab, bc = combined(agg, a, b, params, sizes), combined(agg, b, c, params, sizes)
        left, right = combined(agg, ab, c, params, sizes), combined(agg, a, bc, params, sizes)
    except (IndexError, RuntimeError):  # a mutant that reads out of range
        return False
    clear = torch.zeros(POINTS, dtype=torch.bool)
    calm = torch.ones(POINTS, dtype=torch.bool)
    for component in agg.state:
        name, rank = component.name, len(component.dims)
        x, y = (flat(side[name], rank) for side in (left, right))
        clear |= ((x - y).abs() > _CLEAR * (1 + x.abs() + y.abs())).any(1)
        for side in (ab, bc, left, right):
            calm &= (flat(side[name], rank).abs() < _LARGE).all(1)  # NaN is not
    return bool((clear & calm).any())


def flat(x: Tensor, rank: int) -> Tensor:
    """`[POINTS, entries]`; what does not depend on the operands has no leading axis."""
    return x.expand(POINTS, *x.shape[x.dim() - rank :]).reshape(POINTS, -1).to(torch.complex128 if x.is_complex() else torch.float64)


def combined(
    agg: Aggregator, left: Mapping[str, Tensor], right: Mapping[str, Tensor],
    params: Mapping[str, Tensor], sizes: Mapping[str, int],
) -> dict[str, Tensor]:  # fmt: skip
    assert isinstance(agg.combine, Block)
    values = {("left", n, 0): x for n, x in left.items()} | {("right", n, 0): x for n, x in right.items()}
    values |= {("param", n, 0): x for n, x in params.items()}
    return run(agg.combine, Env(values, sizes))


def drawn(
    dims: tuple[str, ...], kind: str, interval: Interval | None, sizes: Mapping[str, int], generator: torch.Generator
) -> Tensor:
    """`[POINTS, *dims]`, of the kind, in the declared interval."""
    shape = (POINTS, *(sizes[d] for d in dims))
    if kind == "complex":
        return torch.randn(shape, dtype=torch.complex128, generator=generator)
    lo, hi = (None, None) if interval is None else (interval.lo, interval.hi)
    if kind == "int":
        first, last = int(lo) if lo is not None else -3, int(hi) if hi is not None else 3
        return torch.randint(first, max(first, last) + 1, shape, generator=generator)
    unit = 0.05 + 0.9 * torch.rand(shape, dtype=torch.float64, generator=generator)
    if lo is not None and hi is not None:
        return float(lo) + (float(hi) - float(lo)) * unit
    if lo is not None or hi is not None:
        return float(lo) + 3 * unit if lo is not None else float(hi) - 3 * unit  # type: ignore[arg-type]
    return 2 * torch.randn(shape, dtype=torch.float64, generator=generator)


def gathered(agg: Aggregator) -> dict[str, str]:
    """Components that are read as subscripts -> the dim they run over."""
    assert isinstance(agg.combine, Block)
    dims = {c.name: c.dims for c in agg.state}
    out = {}
    for ref in refs(*(r.value for r in agg.combine.results)):
        for axis, sub in enumerate(ref.subs):
            if isinstance(sub, Ref) and ref.name in dims:
                out[sub.name] = dims[ref.name][axis]
    return out
