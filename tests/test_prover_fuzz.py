"""Soundness at scale: mutants of good rules, rules that are associative by construction, and rules at random.

Proved is held against exact evaluation at points the prover did not look at; rules built to be associative are never
refuted.
"""

from __future__ import annotations

import random
import time
from itertools import islice

import pytest
from generated_rules import random_rule
from mutants import mutants
from prover_specs import ASSOCIATIVE, spec

from psmc.algebra.intervals import closure
from psmc.algebra.prover import deep_recursion, prove
from psmc.algebra.refute import Refuter
from psmc.algebra.samples import Sampler
from psmc.algebra.verdict import Proof, Proved, Unknown
from psmc.ir import Aggregator

UNSEEN = range(50_000, 50_040)


def contradicted(agg: Aggregator) -> str:
    """A counterexample to associativity at points the prover did not look at."""
    with deep_recursion():
        refuter = Refuter(agg, Sampler.of(agg, closure(agg).closed))
        found = refuter.search("associativity", UNSEEN, time.monotonic() + 2)
    return "" if found is None else found.text


def check(agg: Aggregator, proof: Proof) -> None:
    if isinstance(proof.associativity, Proved):
        assert not contradicted(agg)
    for verdict in (proof.associativity, proof.identity):
        assert not isinstance(verdict, Unknown) or (verdict.reason and "contradict" not in verdict.reason)


@pytest.mark.parametrize("name", ["mlstm", "deltanet", "welford", "segmented_sum", "viterbi", "extrema"])
def test_mutants(name: str) -> None:
    kinds = set()
    for kind, agg in islice(mutants(spec(ASSOCIATIVE[name])), 0, None, 12):
        kinds.add(kind)
        check(agg, prove(agg, 30))
    assert kinds


@pytest.mark.parametrize("seed", range(16))
def test_generated_monoids(seed: int) -> None:
    how, rule = random_rule(seed)
    agg = spec(rule.text())
    proof = prove(agg, 60)
    assert isinstance(proof.associativity, Proved), (how, proof.associativity)
    if rule.identity_kept:
        assert isinstance(proof.identity, Proved), (how, proof.identity)
    check(agg, proof)


FORMS = ["{a} + {b}", "{a} * {b}", "{a} - {b}", "max({a}, {b})", "min({a}, {b})", "abs({a})"]
FORMS += ["where({a} > {b}, {a}, {b})", "exp({a} - max({a}, {b}))"]


def random_term(rng: random.Random, names: list[str], depth: int) -> str:
    if depth == 0:
        return rng.choice([f"{side}.{n}" for side in "lr" for n in names] + ["2"])
    a, b = (random_term(rng, names, depth - 1) for _ in "ab")
    return "(" + rng.choice(FORMS).format(a=a, b=b) + ")"


@pytest.mark.parametrize("seed", range(24))
def test_rules_at_random(seed: int) -> None:
    """Nearly all of them are wrong; whatever the verdict, evaluation must not contradict it."""
    rng = random.Random(seed)
    names = ["s", "d"][: rng.randint(1, 2)]
    rule = "; ".join(f"{n} = {random_term(rng, names, rng.randint(1, 3))}" for n in names)
    agg = spec(f"state {', '.join(f'{n} = 0' for n in names)} combine (l, r) {{ {rule} }}")
    proof = prove(agg, 60)
    check(agg, proof)
    assert not isinstance(proof.associativity, Unknown), proof.associativity
