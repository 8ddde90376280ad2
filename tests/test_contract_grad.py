"""Every example against the oracle: outputs, the final state and every gradient, under every option of a call."""

from __future__ import annotations

import pytest
import torch
from contract.cases import FULL, GRID, OPTIONS, chosen, fitting
from contract.compare import Result, compiled, errors, oracle
from contract.data import Case, make
from contract.examples import NAMES, declared, domain, example

EXACT = 1e-10  # fp64 against fp64: reassociation only
# Largest error over the largest magnitude of a tensor. State and sums are fp32 either way, so bf16 costs one rounding
# of an output or a gradient, half a unit in the last place: 2^-8.
TOLERANCES = {
    torch.float32: {"output": 1e-5, "state": 1e-5, "grad": 5e-5},
    torch.bfloat16: {"output": 4.5e-3, "state": 1e-5, "grad": 5e-3},
}
torch.set_num_threads(1)


def both(name: str, case: Case, dtype: torch.dtype = torch.float64) -> tuple[Result, Result]:
    agg = example(name)
    batch = make(declared(agg), fitting(case, agg), dtype, live=agg.spec.live, intervals=domain(name), extern=agg.rule)
    wanted = oracle(agg, batch, dtype, agg.rule)
    if dtype != torch.float64:
        batch = batch.lower(dtype)
    return compiled(agg, batch, dtype, agg.rule), wanted


@pytest.mark.parametrize(("name", "case"), [(n, c) for i, n in enumerate(NAMES) for c in chosen(i)], ids=str)
def test_example_is_the_oracle(name: str, case: Case):
    found = errors(*both(name, case))
    assert max(found.values()) < EXACT, {k: v for k, v in found.items() if v >= EXACT}


def test_the_grid_is_covered():
    """Over all examples the default run meets every length, every option and every kind of lanes."""
    met = {c for i, _ in enumerate(NAMES) for c in chosen(i)}
    assert {c.length for c in met} == {c.length for c in GRID}
    assert {c.lanes for c in met} == {c.lanes for c in GRID}
    for options in OPTIONS:
        assert any(all(getattr(c, k) for k in options) for c in met), options
    assert not FULL or met == set(GRID)


@pytest.mark.parametrize("name", ["gla", "softmax_average", "affine2x2"])
def test_a_thousand_tokens(name: str):
    found = errors(*both(name, Case(1000, lanes=(2,), mask=name == "affine2x2", reset=name == "gla", initial=True)))
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", NAMES if FULL else NAMES[::3])
def test_short_floats(name: str, dtype: torch.dtype):
    ours, theirs = both(name, Case(67, lanes=(2,), initial=True, mask=True, seed=3), dtype)
    for slot in example(name).spec.outputs:
        assert slot.kind == "int" or ours.outputs[slot.name].dtype in (dtype, torch.complex64)
    assert all(
        x.dtype in (torch.float32, torch.complex64, torch.int64) for k, x in ours.state.items() if "_tail" not in k
    )
    found = errors(ours, theirs)
    bad = {k: v for k, v in found.items() if v > TOLERANCES[dtype][k.split()[0]]}
    assert not bad, bad


@pytest.mark.parametrize("name", ["gla", "mlstm_recurrence", "rwkv6", "welford", "viterbi_recurrence", "elman"])
@pytest.mark.parametrize("options", [{}, {"mask": True, "reset": True}, {"packed": True}], ids=str)
def test_segments_and_recomputation(name: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch):
    """Long calls are cut into segments whose elements are recomputed in backward; small limits make 199 tokens long."""
    module = example(name).module
    monkeypatch.setattr(module, "SEGMENT_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(module, "RECOMPUTE_BYTES", {"cpu": 1, "cuda": 1})
    found = errors(*both(name, Case(199, lanes=(2,), initial=True, **options)))
    assert max(found.values()) < EXACT, found


def test_a_wrong_gradient_is_seen():
    """The comparison itself: what an aggregator with one wrong rule gives must not pass."""
    agg = example("gla")
    batch = make(declared(agg), Case(65, lanes=(2,)), live=agg.spec.live)
    wanted = oracle(agg, batch)
    assert all(bool(g.abs().max() > 1e-3) for g in wanted.grads.values())
    for k in wanted.grads:
        wrong = compiled(agg, batch)
        wrong.grads[k] = wrong.grads[k] * 1.001
        assert errors(wrong, wanted)[f"grad {k}"] > EXACT
    wrong = compiled(agg, batch)
    wrong.outputs["o"] = torch.full_like(wrong.outputs["o"], float("nan"))
    assert errors(wrong, wanted)["output o"] == float("inf")
