"""Soundness at scale: mutants of the examples, rules that are associative by construction, wrong ones, and any at all.

Proved is held against exact evaluation at points the prover did not look at, and against the fp64 oracle; rules built to
be associative are never refuted. benchmarks/proofs.py does the same with thousands.
"""

from __future__ import annotations

import time
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import pytest
from generated_rules import random_rule
from hypothesis import HealthCheck, given, settings
from mutants import mutants
from prover_specs import spec
from wrong_rules import wrong_at, wrong_rule

from psmc.algebra.intervals import closure
from psmc.algebra.prover import deep_recursion, prove
from psmc.algebra.refute import Refuter
from psmc.algebra.samples import Sampler
from psmc.algebra.verdict import Proof, Proved, Refuted, Unknown
from psmc.ir import OPS, Aggregator, Assign, Block, Const, DimValue, Expr, Eye, Index, IndexValue, Op, Reduce, Ref
from psmc.pipeline import read

EXAMPLES = Path(__file__).parent.parent / "examples"
UNSEEN = range(50_000, 50_040)
LONG = 60.0  # seconds: never reached on an idle machine


def contradicted(agg: Aggregator, law: str) -> str:
    """A counterexample at points the prover did not look at."""
    with deep_recursion():
        refuter = Refuter(agg, Sampler.of(agg, closure(agg).closed))
        found = refuter.search(law, UNSEEN, time.monotonic() + 2)  # type: ignore[arg-type]
    return "" if found is None else found.text


def check(agg: Aggregator, proof: Proof) -> None:
    if isinstance(proof.associativity, Proved):
        assert not contradicted(agg, "associativity")
        assert not wrong_at(agg, 1)
    if isinstance(proof.identity, Proved):
        assert not contradicted(agg, "left identity") and not contradicted(agg, "right identity")
    for verdict in (proof.associativity, proof.identity):
        assert not isinstance(verdict, Unknown) or (verdict.reason and "contradict" not in verdict.reason)


@cache
def example(name: str) -> Aggregator:
    (found,) = read(EXAMPLES / f"{name}.psm")
    return found.agg


@pytest.mark.parametrize("name", ["mlstm", "deltanet", "welford", "segmented_sum", "viterbi", "lru"])
def test_mutants(name: str) -> None:
    """Each is refuted, or a monoid still: none is open."""
    found = list(mutants(example(name)))
    for kind, agg in found[:: max(1, len(found) // 3)]:
        proof = prove(agg, LONG)
        check(agg, proof)
        assert not isinstance(proof.associativity, Unknown), (kind, proof.associativity)
        assert not isinstance(proof.identity, Unknown), (kind, proof.identity)


@pytest.mark.parametrize("seed", [*range(10), 82, 138, 154, 203])
def test_generated_monoids(seed: int) -> None:
    how, rule = random_rule(seed)
    agg = spec(rule.text())
    proof = prove(agg, LONG)
    assert isinstance(proof.associativity, Proved), (how, proof.associativity)
    if rule.identity_kept:
        assert isinstance(proof.identity, Proved), (how, proof.identity)
    check(agg, proof)


@pytest.mark.parametrize("seed", range(12))
def test_wrong_rules(seed: int) -> None:
    how, agg = wrong_rule(seed)
    assert isinstance(prove(agg, LONG).associativity, Refuted), how


# --- anything -----------------------------------------------------------------------------------

STATE = "dim K state s = 0, v[K] = 0, A[K, K] = eye, n : int = 0, p[K] : int = iota, z : complex = 1"
ROW, COL = Index("i", "K"), Index("j", "K")
SHAPES: dict[str, tuple[tuple[Index, ...], str]] = {
    "s": ((), "real"), "v": ((ROW,), "real"), "A": ((ROW, COL), "real"),
    "n": ((), "int"), "p": ((ROW,), "int"), "z": ((), "complex"),
}  # fmt: skip


@st.composite
def leaves(draw: st.DrawFn, free: tuple[Index, ...]) -> Expr:
    side = draw(st.sampled_from(("left", "right")))
    some = [Ref(side, "s", ()), Ref(side, "n", (), "int"), Ref(side, "z", (), "complex"), DimValue("K")]
    some += [Const(Fraction(k, 2)) for k in (0, 1, 2, 4, -2)]
    for index in free:
        gathered = Ref(side, "p", (index,), "int")
        some += [Ref(side, "v", (index,)), gathered, IndexValue(index), Ref(side, "v", (gathered,))]
        some += [leaf for other in free for leaf in (Ref(side, "A", (index, other)), Eye(index, other))]
    return draw(st.sampled_from(some))


@st.composite
def expressions(draw: st.DrawFn, free: tuple[Index, ...], depth: int) -> Expr:
    """Any operators over both operands; where the kinds do not fit, a leaf."""
    if depth == 0 or draw(st.integers(0, 5)) == 0:
        return draw(leaves(free))
    if draw(st.integers(0, 3)) == 0:
        index = Index(f"m{depth}", "K")
        body = draw(expressions((*free, index), depth - 1))
        op = draw(st.sampled_from(("sum", "max", "prod")))
        try:
            return Reduce(op, index, body)
        except TypeError:
            return draw(leaves(free))
    name = draw(st.sampled_from(sorted(OPS)))
    try:
        return Op(name, tuple(draw(expressions(free, depth - 1)) for _ in range(OPS[name].arity)))
    except TypeError:
        return draw(leaves(free))


@st.composite
def rules(draw: st.DrawFn) -> Aggregator:
    """Some components combine at random, the others as they should."""
    right = {
        "s": Op("add", (Ref("left", "s", ()), Ref("right", "s", ()))),
        "v": Op("max", (Ref("left", "v", (ROW,)), Ref("right", "v", (ROW,)))),
        "A": Reduce("sum", Index("m", "K"), Op("mul", (
            Ref("left", "A", (ROW, Index("m", "K"))), Ref("right", "A", (Index("m", "K"), COL))))),
        "n": Op("add", (Ref("left", "n", (), "int"), Ref("right", "n", (), "int"))),
        "p": Ref("right", "p", (Ref("left", "p", (ROW,), "int"),), "int"),
        "z": Op("mul", (Ref("left", "z", (), "complex"), Ref("right", "z", (), "complex"))),
    }  # fmt: skip
    changed = draw(st.sampled_from(("s", "s", "v", "A", "z", "n")))
    indices, kind = SHAPES[changed]
    value = draw(expressions(indices, draw(st.integers(1, 3))))
    if value.kind in (kind, "int") or (kind == "complex" and value.kind == "real"):
        right[changed] = value
    results = tuple(Assign(name, SHAPES[name][0], value) for name, value in right.items())
    return replace(spec(f"{STATE} combine (l, r) {{ s = l.s + r.s; v[i] = l.v[i]; A[i, j] = l.A[i, j]; n = l.n + r.n; "
                        "p[i] = l.p[i]; z = l.z }"), combine=Block(results=results))  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(rules())
def test_any_rule(agg: Aggregator) -> None:
    """No crash, no hang, no wrong verdict, whatever the operators and the kinds."""
    begun = time.process_time()
    proof = prove(agg, 1.5)
    assert time.process_time() - begun < 20
    check(agg, proof)
