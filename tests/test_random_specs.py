"""Random pointwise specs: proved, compiled, and the oracle's in everything that it returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract.cases import FULL, GRID, fitting
from contract.compare import compiled, errors, oracle
from contract.cut import in_parts, in_steps
from contract.data import Case, make
from contract.examples import declared
from contract.specs import FAMILIES, pointwise_specs, specs
from contract.texts import from_text
from hypothesis import HealthCheck, given, settings

from psmc.algebra.verdict import Proved
from psmc.pipeline import read_text

EXACT = 1e-9
COUNT = 100 if FULL else 10
torch.set_num_threads(1)


def hold(text: str, cases: tuple[Case, ...]) -> None:
    """Both laws proved; outputs, final state and gradients of each case as the oracle's."""
    (compilation,) = read_text(text)
    for law in (compilation.proof.associativity, compilation.proof.identity):
        assert isinstance(law, Proved), law
    agg = from_text(text)
    for case in cases:
        batch = make(declared(agg), fitting(case, agg), live=agg.spec.live)
        gaps = errors(compiled(agg, batch), oracle(agg, batch))
        assert max(gaps.values()) < EXACT, (case, gaps)


@pytest.mark.parametrize("number", range(COUNT))
def test_seeded(number: int):
    hold(specs(number + 1, seed=1)[number], tuple(GRID[(3 * number + k) * 19 % len(GRID)] for k in range(3)))


@settings(max_examples=100 if FULL else 10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(pointwise_specs())
def test_drawn(text: str):
    packed = Case(33, packed=True, initial=True, mask=True, reset=True, reverse=True, lanes=(2,))
    hold(text, (Case(2, lanes=(3,)), packed))


@pytest.mark.parametrize("text", specs(4, seed=2))
def test_steps_and_parts(text: str):
    agg = from_text(text)
    batch = make(declared(agg), Case(9, lanes=(2,), initial=True), live=agg.spec.live)
    wanted = oracle(agg, batch)
    for found in (in_steps(agg, batch), in_parts(agg, batch, (1, 5))):
        assert max(errors(found, wanted).values()) < EXACT


def test_seeds_are_specs():
    """The same text in any process, no two alike, and every family is met."""
    code = "from contract.specs import specs; import sys; sys.stdout.write(''.join(specs(20)))"
    folder = str(Path(__file__).parent)
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env={"PYTHONHASHSEED": seed}, capture_output=True
        )
        assert done.stdout.decode() == "".join(specs(20)), done.stderr.decode()
    every = specs(100)
    assert len(set(every)) == 100 and specs(20, seed=5)[:3] == specs(3, seed=5)
    combines = "".join(every).replace("b_", "a_").replace("c_", "a_")
    for name, family in FAMILIES.items():
        assert any(family.rule.split(";")[0].replace("@", "a_").replace("[]", i) in combines for i in ("", "[d]")), name
