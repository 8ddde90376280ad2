"""Dims of fixed size that are too large to be filled: proofs as ever, counterexamples in a corner, never a hang."""

from __future__ import annotations

import time

import pytest
from prover_specs import ASSOCIATIVE, NOT_ASSOCIATIVE, spec

from psmc.algebra.padded import MAX_ENTRIES, shrunk
from psmc.algebra.prover import prove
from psmc.algebra.verdict import Proved, Refuted, Unknown
from psmc.confirm import confirm
from psmc.ir import Aggregator


def sized(body: str, size: int) -> Aggregator:
    return spec(body.replace("dim K, V", f"dim K = {size}, V = {size}"))


DELTANET, SWAPPED = ASSOCIATIVE["deltanet"], NOT_ASSOCIATIVE["swapped_delta"][0]


def test_what_is_large() -> None:
    assert shrunk(sized(DELTANET, 2)) == frozenset()
    assert shrunk(sized(DELTANET, 16)) == {"K", "V"}
    assert shrunk(spec(ASSOCIATIVE["deltanet"])) == frozenset()


@pytest.mark.parametrize("size", [16, 64, 300])
def test_proofs(size: int) -> None:
    proof = prove(sized(DELTANET, size), 60)
    assert isinstance(proof.associativity, Proved) and isinstance(proof.identity, Proved), proof


@pytest.mark.parametrize("size", [16, 64])
def test_a_counterexample_is_one_of_the_declared_sizes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    agg = sized(SWAPPED, size)
    verdict = prove(agg, 60).associativity
    assert isinstance(verdict, Refuted), verdict
    found = verdict.counterexample
    assert dict(found.dims) == {"K": size, "V": size} and len(found.text) < 500
    assert f"K={size}, V={size} (entries that are not shown are 0)" in found.text
    (_, parts), *_ = found.elements
    assert {n: (len(v), len(v[0])) for n, v in parts} == {"A": (size, size), "S": (size, size)}  # type: ignore[arg-type, index]
    assert confirm(agg, found).word == "shown"
    monkeypatch.setattr("psmc.confirm._oracle", lambda agg, sizes: None)
    begun = time.process_time()
    assert confirm(agg, found).word == "shown" and time.process_time() - begun < 20


def test_entries_that_cannot_be_0() -> None:
    agg = spec(
        """dim K = 40, V = 40 state a[K, V] in (0, inf) = 1, s[K, V] = 0
        combine (l, r) { a[i, j] = l.a[i, j] * r.a[i, j]; s[i, j] = sum[m] l.s[i, j] / r.a[m, j] + r.s[i, j] }"""
    )
    verdict = prove(agg, 60).associativity
    assert isinstance(verdict, Refuted), verdict
    assert "entries that are not shown are 0, 1 of 'a'" in verdict.counterexample.text
    assert confirm(agg, verdict.counterexample).word == "shown"


def test_a_law_that_fails_at_other_sizes_only_is_not_refuted() -> None:
    rule = "s[i, j] = l.s[i, j] + r.s[i, j] + (K - 64) * l.s[i, j]"
    proof = prove(spec(f"dim K = 64, V = 64 state s[K, V] = 0 combine (l, r) {{ {rule} }}"), 20)
    assert not isinstance(proof.associativity, Refuted) and not isinstance(proof.identity, Refuted)
    other = prove(spec(f"dim K = 65, V = 64 state s[K, V] = 0 combine (l, r) {{ {rule} }}"), 60)
    assert isinstance(other.identity, Refuted) or isinstance(other.associativity, Refuted)


def test_a_literal_position_outside_of_the_corner() -> None:
    agg = spec("dim K = 64, V = 64 state s[K, V] = 0 combine (l, r) { s[i, j] = 2 * l.s[63, 63] + r.s[i, j] }")
    assert not isinstance(prove(agg, 5).associativity, Proved)


@pytest.mark.parametrize(
    "body",
    [
        "dim N = 1000000 state s[N] = 0 combine (l, r) { s[i] = l.s[i] - r.s[i] }",
        "dim N = 3000 state A[N, N] = eye combine (l, r) { A[i, j] = sum[m] l.A[i, m] * r.A[j, m] }",
        "dim N = 500 state p[N] : int = iota combine (l, r) { p[i] = sum[m, n] r.p[l.p[i]] * (l.p[m] - r.p[n]) }",
    ],
)
def test_the_budget_holds_whatever_the_size(body: str) -> None:
    begun = time.process_time()
    proof = prove(spec(body), 3)
    assert time.process_time() - begun < 30
    assert isinstance(proof.associativity, Refuted | Unknown) and isinstance(proof.identity, Proved | Refuted | Unknown)


def test_what_is_too_large_to_be_written_out_is_unknown() -> None:
    assert MAX_ENTRIES < 3000**2
    body = "dim N = 3000 state A[N, N] = eye combine (l, r) { A[i, j] = sum[m] l.A[i, m] * r.A[j, m] }"
    assert isinstance(prove(spec(body), 2).associativity, Unknown)
