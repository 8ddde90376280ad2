"""Every class of recurrences that is lifted: proved, and equal to the recurrence run token by token, gradients too."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from contract.compare import compiled, errors, oracle
from contract.cut import in_parts, in_steps
from contract.data import Case, make
from contract.examples import declared, scratch_cache
from lifting_specs import CLASSES
from run_ir import spec
from test_lifting import _check

from psmc.algebra.prover import prove
from psmc.algebra.verdict import Proved
from psmc.api import realise
from psmc.derive.lifting import lifted
from psmc.pipeline import pick, read_text

torch.set_num_threads(1)


def text_of(name: str) -> str:
    body = CLASSES[name][0]
    return "aggregator s { " + body + "\n associative: yes }"


@cache
def loaded(name: str) -> Any:
    scratch_cache()
    return realise(pick(read_text(text_of(name)), "s", "test"), None)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_carried(name: str) -> None:
    agg = spec(text_of(name))
    known = {c.name for c in agg.state}
    found = [f"{c.name}{list(c.dims)}".replace("[]", "").replace("'", "") for c in lifted(agg).state if c.name not in known]
    assert " ".join(found) == CLASSES[name][1]


@pytest.mark.parametrize("name", CLASSES)
def test_proved(name: str) -> None:
    proof = prove(lifted(spec(text_of(name))), 5.0)
    assert isinstance(proof.associativity, Proved), proof.associativity
    assert isinstance(proof.identity, Proved), proof.identity


@pytest.mark.parametrize("name", CLASSES)
def test_folds_in_any_order(name: str) -> None:
    _check(spec(text_of(name)), seed=1, steps=7)


@pytest.mark.parametrize("name", CLASSES)
def test_calls_are_the_recurrence(name: str) -> None:
    """Outputs, final state and all gradients of the compiled module on a CPU against the declared recurrence."""
    agg = loaded(name)
    for case in (Case(67, lanes=(2,)), Case(33, initial=True, mask=True, reset=True, seed=1)):
        batch = make(declared(agg), case, torch.float64, live=agg.spec.live)
        worst = {k: v for k, v in errors(compiled(agg, batch), oracle(agg, batch)).items() if v >= 1e-9}
        assert not worst, (case, worst)


@pytest.mark.parametrize("name", CLASSES)
def test_steps_and_parts_are_the_recurrence(name: str) -> None:
    agg = loaded(name)
    batch = make(declared(agg), Case(9, initial=True, seed=2), torch.float64, live=agg.spec.live)
    wanted = oracle(agg, batch)
    for found in (in_steps(agg, batch), in_parts(agg, batch, (4, 5))):
        worst = {k: v for k, v in errors(found, wanted).items() if v >= 1e-9}
        assert not worst, worst
