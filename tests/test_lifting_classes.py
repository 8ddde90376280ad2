"""Every class of recurrences that is lifted: proved, and equal to the recurrence run token by token, gradients too."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from contract.cases import FULL
from contract.compare import compiled, errors, oracle
from contract.cut import in_parts, in_steps
from contract.data import Case, make
from contract.examples import declared, scratch_cache
from hypothesis import HealthCheck, given, settings
from interpreted import INTERPRETED, run_interpreted
from lifting_random import matrices, recurrences
from lifting_specs import CLASSES
from run_ir import draw, folded, spec, stepped
from test_lifting import _check

from psmc.algebra.prover import prove
from psmc.algebra.verdict import Proved
from psmc.api import realise
from psmc.derive.lifting import lifted
from psmc.ir import Aggregator
from psmc.pipeline import pick, read_text

torch.set_num_threads(1)
# Some of them for kernels in the interpreter, and compiled; all under PSMC_FULL=1.
KERNELS = ("from one on", "clamp, restarted", "leaky peak, two resets")
COMPILED = (
    "from one on", "fractions, restarted", "fallen twice, with choices", "growing queue with a ceiling",
    "clamp, restarted by a factor", "leaky peak of sizes", "minimax path", "segmented mlstm",
    "permutations, from elsewhere", "one of each",
)  # fmt: skip
if FULL:
    KERNELS, COMPILED = (*KERNELS, "Kalman variance", "bottleneck", "segmented log-sum-exp"), tuple(CLASSES)
# Long calls in fp32: products of many elements neither overflow nor lose the state.
LONG = ("continued fraction, inside out", "clamped leaky integrator", "leaky peak, restarted")


def text_of(body: str) -> str:
    return "aggregator s { " + body + "\n associative: yes }"


def known(name: str) -> Aggregator:
    return spec(text_of(CLASSES[name][0]))


@cache
def loaded(name: str) -> Any:
    scratch_cache()
    return realise(pick(read_text(text_of(CLASSES[name][0])), "s", "test"), None)


def close(found: Any, wanted: Any, within: float = 1e-9) -> None:
    worst = {k: v for k, v in errors(found, wanted).items() if v >= within}
    assert not worst, worst


def proved(agg: Aggregator) -> None:
    proof = prove(agg, 60.0)
    assert isinstance(proof.associativity, Proved), proof.associativity
    assert isinstance(proof.identity, Proved), proof.identity


if not INTERPRETED:

    @pytest.mark.parametrize("name", CLASSES)
    def test_lifted_as_expected_and_proved(name: str) -> None:
        agg = known(name)
        once = _check(agg, seed=1)
        own = {c.name for c in agg.state}
        carried = [f"{c.name}{list(c.dims) or ''}".replace("'", "") for c in once.state if c.name not in own]
        assert " ".join(carried) == CLASSES[name][1]
        proved(once)

    @pytest.mark.parametrize("name", COMPILED)
    def test_compiled_is_the_recurrence(name: str) -> None:
        """Outputs, final state and all gradients of the module on a CPU against the declared recurrence."""
        agg = loaded(name)
        case = Case(21, initial=True, mask=True, reset=True, seed=1)
        batch = make(declared(agg), case, torch.float64, live=agg.spec.live)
        wanted = oracle(agg, batch)
        close(compiled(agg, batch), wanted)
        close(in_parts(agg, batch, (4, 5)), wanted)
        batch = make(declared(agg), Case(5, batch=1, seed=2), torch.float64, live=agg.spec.live)
        close(in_steps(agg, batch), oracle(agg, batch))

    @pytest.mark.parametrize("name", LONG)
    def test_long_calls(name: str) -> None:
        agg = loaded(name)
        batch = make(declared(agg), Case(700, batch=1, seed=5), torch.float64, live=agg.spec.live)
        single = batch.map(lambda x: x.float() if x.is_floating_point() else x)
        close(compiled(agg, single, torch.float64), oracle(agg, batch), 1e-4)

    @settings(deadline=None, max_examples=100 if FULL else 10, suppress_health_check=list(HealthCheck))
    @given(recurrences())
    def test_random_recurrences(found: tuple[str, str]) -> None:
        agg = spec(text_of(found[1]))
        proved(_check(agg, steps=4))
        gradients_agree(agg)

    @settings(deadline=None, max_examples=40 if FULL else 3, suppress_health_check=list(HealthCheck))
    @given(matrices())
    def test_random_matrices(found: tuple[str, str]) -> None:
        agg = spec(text_of(found[1]))
        proved(_check(agg, steps=4))
        gradients_agree(agg)

    def gradients_agree(agg: Aggregator, steps: int = 5) -> None:
        """Of the state after some tokens, between the recurrence and a fold of what it is lifted to in some order."""
        inputs, params = draw(agg, steps)
        leaves = [v.requires_grad_() for t in (*inputs, params) for v in t.values() if v.is_floating_point()]
        states = [stepped(agg, inputs, params)[-1]["h"], folded(lifted(agg), inputs, params)["h"]]
        weights = torch.arange(1.0, states[0].numel() + 1, dtype=torch.float64)
        grads = [torch.autograd.grad((s.flatten() * weights).sum() + 0 * sum(x.sum() for x in leaves), leaves) for s in states]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-8, atol=1e-9)

    def test_kernels_in_the_interpreter() -> None:
        pytest.importorskip("triton")
        run_interpreted(__file__)

else:
    import pointwise_cases

    pointwise_cases.scan_rows()

    @pytest.mark.parametrize("name", KERNELS)
    def test_kernels(name: str) -> None:
        agg = lifted(known(name))
        pointwise_cases.Case(agg, 1, 19, lanes=(1,), initial=True, masked=True, resets=True).check()
