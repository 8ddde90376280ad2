"""Which way the decays of a chunk take, and that no way shows: ratios where they are mild, products of steps elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.compare import Result, compiled, errors, oracle
from contract.data import Batch, Case, make
from contract.examples import declared, example, scratch_cache

from psmc.api import realise
from psmc.codegen.chunk_erase import erasers
from psmc.pipeline import pick, read_text
from psmc.structure.report import Affine

torch.set_num_threads(1)
SIZES = {"K": 16, "V": 8}
GATED = ("gla", "value_gate", "grid_gate", "kda", "gated_deltanet")


def drawn(name: str, strength: float, seed: int = 0, length: int = 150) -> tuple[Any, Batch]:
    """A batch whose log decays lie between 0 and -strength, evenly in their logs."""
    agg = example(name)
    batch = make(declared(agg), Case(length, lanes=(2,), seed=seed), torch.float32, live=agg.spec.live, sizes=SIZES)
    generator = torch.Generator().manual_seed(seed)
    for gate in {"g", "h"} & batch.inputs.keys():
        x = batch.inputs[gate]
        size = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        batch.inputs[gate] = (-strength * 10 ** (-3 * size)).float().double()
    if "k" in batch.inputs:
        k = batch.inputs["k"]
        batch.inputs["k"] = (k / k.norm(dim=-1, keepdim=True)).float().double()
    return agg, batch


def found(agg: Any, batch: Batch) -> Result:
    return compiled(agg, batch.lower(torch.float32), torch.float32)


@pytest.mark.parametrize("strength", [0.01, 0.5, 2.0, 30.0])
@pytest.mark.parametrize("name", GATED)
def test_either_way(name: str, strength: float, monkeypatch: pytest.MonkeyPatch):
    """fp32 of every strength is as near to the oracle as with products of steps alone, but for a few roundings."""
    agg, batch = drawn(name, strength)
    wanted = oracle(agg, batch, torch.float32)
    ours = errors(found(agg, batch), wanted)
    monkeypatch.setattr(agg.module, "MILD", 2.0)  # no product is as large
    exact = errors(found(agg, batch), wanted)
    assert max(exact.values()) < 1e-6, exact
    assert max(ours.values()) < 2e-6, ours


@pytest.mark.parametrize("name", GATED)
def test_rows_beyond_the_bound_are_products(name: str, monkeypatch: pytest.MonkeyPatch):
    """A token whose decays are not mild gives the bits that it gives where none is; the others do not all."""
    agg, batch = drawn(name, 8.0 if name == "gated_deltanet" else 2.0, length=32)
    inputs = batch.lower(torch.float32).inputs
    given = {**inputs, **batch.lower(torch.float32).params}
    seen: list[torch.Tensor] = []
    join = agg.module._Far.join

    def watched(self: Any, near: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        seen.append(self.mild)
        return join(self, near, exact)

    monkeypatch.setattr(agg.module._Far, "join", watched)
    mixed = agg(**given)
    (mild,) = {tuple(m.flatten().tolist()) for m in seen[:1]}
    rows = torch.tensor(mild).view(seen[0].shape)[:, 0].transpose(1, 2)  # [B, L, lanes]
    assert rows.any() and not rows.all()
    assert bool((rows[:, :-1] >= rows[:, 1:]).all())  # once beyond, beyond until the chunk's end
    monkeypatch.setattr(agg.module, "MILD", 2.0)
    exact = agg(**given)
    if name == "grid_gate":  # two decays, of which either may be beyond
        assert torch.allclose(mixed, exact, rtol=1e-5, atol=1e-5)
        return
    if "beta" not in given:  # what is written depends on earlier tokens
        assert torch.equal(mixed[~rows], exact[~rows])
    assert not torch.equal(mixed[rows], exact[rows])


def test_growth_is_not_mild():
    """Without a bound on a log decay it may be above 0; ratios of large products are left alone as well."""
    scratch_cache()
    text = """aggregator growing {
      dim K, V
      input q[K], k[K], v[V], g[K]
      state S[K, V] = 0
      recurrence { S[i, j] = exp(g[i]) * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]
      associative: yes
    }"""
    agg = realise(pick(read_text(text), None, "test"), None)
    batch = make(declared(agg), Case(40, lanes=(2,), seed=3), torch.float32, live=agg.spec.live)
    generator = torch.Generator().manual_seed(3)
    batch.inputs["g"] = 3 * torch.randn(batch.inputs["g"].shape, generator=generator).double()
    assert max(errors(found(agg, batch), oracle(agg, batch, torch.float32)).values()) < 1e-5


def affine(text: str) -> Affine:
    structure = pick(read_text(text), None, "test").structure
    assert structure is not None
    (layer,) = structure.layers
    assert layer.affine is not None
    return layer.affine


STEPS = {  # step: whether it erases by what it writes with
    "S[i, j] + k[i] * (v[j] - sum[m] w[m] * S[m, j])": True,
    "a * S[i, j] - a * b * k[i] * sum[m] w[m] * S[m, j] + b * k[i] * v[j]": True,
    "S[i, j] + k[i] * (v[j] + sum[m] w[m] * S[m, j])": True,
    "S[i, j] - a * k[i] * (sum[m] w[m] * S[m, j]) + b * k[i] * v[j]": False,  # a / b, and b may be 0
    "S[i, j] - w[i] * (sum[m] w[m] * S[m, j]) + k[i] * v[j]": False,
    "S[i, j] - k[i] * w[i] * (sum[m] w[m] * S[m, j]) + k[i] * v[j]": False,  # w[i] is no number a token
    "S[i, j] - k[i] * (sum[m] w[m] * S[m, j]) + k[i] * v[j] + w[i] * q[j]": False,
}


@pytest.mark.parametrize("step", STEPS)
def test_erasers(step: str):
    """And whatever is found, the whole is what the spec says."""
    text = f"""aggregator some_step {{
      dim K, V
      input q[V], k[K], w[K], v[V], a, b
      state S[K, V] = 0
      recurrence {{ S[i, j] = {step} }}
      output o[j] = sum[i] w[i] * S[i, j]
      associative: yes
    }}"""
    assert (erasers(affine(text)) is not None) == STEPS[step]
    scratch_cache()
    agg = realise(pick(read_text(text), None, "test"), None)
    batch = make(declared(agg), Case(21, lanes=(2,), seed=1, initial=True), live=agg.spec.live)
    for name in ("k", "w"):
        batch.inputs[name] = batch.inputs[name] / batch.inputs[name].norm(dim=-1, keepdim=True).clamp(min=1.0) / 2
    assert max(errors(compiled(agg, batch), oracle(agg, batch)).values()) < 1e-10
