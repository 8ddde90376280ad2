"""Limits: what would grow without end ends in Unknown, in time and in little memory; progress is told on the way."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from prover_specs import ASSOCIATIVE, spec

from psmc.algebra.linear import Constraint, feasible
from psmc.algebra.prover import Progress, prove
from psmc.algebra.verdict import Proved, Refuted, Unknown

NAMES = [f"x{k}" for k in range(6)]
ADDED = "; ".join(f"{n} = l.{n} + r.{n}" for n in NAMES)
STATE = "state " + ", ".join(f"{n} = 0" for n in NAMES)
POWER = "(" + " + ".join(NAMES) + " + 1)^14"


def coboundary(f: str, at_zero: str) -> str:
    """y∘y' = y + y' + f(x + x') - f(x) - f(x'): associative for every f, and past any limit if f is written out."""

    def at(form: str) -> str:
        out = f
        for name in NAMES:
            out = out.replace(name, "(" + form.format(name) + ")")
        return out

    y = f"y = l.y + r.y + {at('l.{0} + r.{0}')} - {at('l.{0}')} - {at('r.{0}')}"
    return f"{STATE}, y = {at_zero} combine (l, r) {{ {ADDED}; {y} }}"


EXPLODING = {
    "polynomial": coboundary(POWER, "1"),
    "quotient": coboundary(f"1 / (1 + {POWER})", "1 / 2"),
    "exponential": coboundary(f"exp({' * '.join(NAMES)}) * {POWER}", "1"),
    "maxima": coboundary("max(" + ", max(".join(f"{m} * {n}" for m in NAMES for n in NAMES) + ", 0" + ")" * 36, "0"),
}


@pytest.mark.parametrize("name", EXPLODING)
def test_what_explodes_ends(name: str) -> None:
    agg = spec(EXPLODING[name])
    begun = time.process_time()
    tracemalloc.start()
    try:
        proof = prove(agg, 2.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300e6
    assert time.process_time() - begun < 30
    assert not isinstance(proof.associativity, Refuted)
    if isinstance(proof.associativity, Unknown):
        assert proof.associativity.reason.startswith("associativity of 'y': ")


def test_an_address_space_that_is_enough() -> None:
    """The whole process stays below 1 GiB, whatever the allocator does."""
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import resource, sys; sys.path[:0] = ['tests', '.']\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from test_prover_budget import EXPLODING, prove, spec\n"
        "print([type(prove(spec(t), 1.0).associativity).__name__ for t in EXPLODING.values()])\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Refuted" not in done.stdout


@pytest.mark.parametrize(
    "body",
    [
        "state s = 0 combine (l, r) { s = ((((l.s + r.s + 2)^50 + 1)^50 + 1)^50 + 1)^50 }",
        "state s = 0 combine (l, r) { s = exp(exp(exp(exp(l.s) + r.s) + r.s) + r.s) }",
        "state s = 0 combine (l, r) { s = (l.s + r.s + l.s * r.s + 1)^60 - 1 }",
    ],
)
def test_numbers_that_explode(body: str) -> None:
    """Evaluation gives up on numbers that are too long; a long counterexample is printed rounded."""
    begun = time.process_time()
    proof = prove(spec(body), 2.0)
    assert time.process_time() - begun < 30
    if isinstance(proof.associativity, Refuted):
        assert len(proof.associativity.counterexample.text) < 400


def test_the_simplex_stops_at_its_deadline() -> None:
    """Cut short it says 'feasible', which prunes nothing."""
    from fractions import Fraction

    impossible = [Constraint({"x": Fraction(1)}, Fraction(-1), True), Constraint({"x": Fraction(-1)}, Fraction(0), True)]
    assert not feasible(impossible)
    assert feasible(impossible, time.monotonic() - 1)


def test_progress() -> None:
    told: list[Progress] = []
    proof = prove(spec(ASSOCIATIVE["welford"]), 60, progress=told.append)
    assert isinstance(proof.associativity, Proved)
    assert {p.component for p in told} == {"n", "mean", "M"}
    assert {p.law for p in told} == {"associativity", "left identity", "right identity", "e∘e"}
    told.clear()
    prove(spec(ASSOCIATIVE["signed"]), 60, progress=told.append)
    assert max(p.cases for p in told) >= 16
