"""Counterexamples are held against fp64 before they are printed, with torch and without it."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prover_specs import NOT_ASSOCIATIVE, spec

from psmc import confirm as module
from psmc.algebra import floats, intervals
from psmc.algebra import interval_math as im
from psmc.algebra.prover import prove
from psmc.algebra.verdict import Counterexample, Proof, Proved, Refuted, Unknown
from psmc.confirm import confirm, confirmed
from psmc.ir import OPS, Aggregator, Assign, Block, Op, Ref
from psmc.pipeline import read_text
from psmc.reference.evaluate import POINTWISE

TEXT = "aggregator a {{ input x {} lift {{ s = x }} combine (l, r) {{ {} }} associative: yes }}"


def refutation(agg: Aggregator) -> Counterexample:
    verdict = prove(agg).associativity
    assert isinstance(verdict, Refuted), verdict
    return verdict.counterexample


# --- plain floats are the oracle's ----------------------------------------------------------------

SPECIAL = [0.0, 1.0, -1.0, 0.5, -2.5, 3.0, 40.0, -40.0, 710.0, -745.0, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("op", [o for o in OPS if o not in ("and", "or", "not", "where", "complex")])
def test_rows_are_the_oracles(op: str) -> None:
    rng = random.Random(op)
    cases = [(v,) * OPS[op].arity for v in SPECIAL]
    cases += [tuple(rng.choice(SPECIAL) for _ in range(OPS[op].arity)) for _ in range(80)]
    for case in cases:
        wanted = POINTWISE[op](*(torch.tensor(v, dtype=torch.float64) for v in case)).item()
        assert floats.TABLE[op](*case) == pytest.approx(wanted, rel=1e-12, abs=1e-300, nan_ok=True), case


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "neg", "abs", "exp", "log", "real", "imag", "conj", "eq"])
def test_complex_rows_are_the_oracles(op: str) -> None:
    for a, b in [(1 + 2j, 0.5 - 1j), (-1j, 2 + 0j), (0.25 + 0j, -3 + 1j)]:
        case = (a, b)[: OPS[op].arity]
        wanted = POINTWISE[op](*(torch.tensor(v, dtype=torch.complex128) for v in case)).item()
        assert complex(floats.TABLE[op](*case)) == pytest.approx(complex(wanted), rel=1e-12)


def test_a_row_for_each_operator() -> None:
    assert floats.TABLE.keys() == OPS.keys()


def test_whole_numbers_wrap_as_int64_does() -> None:
    x = Ref("left", "x", (), "int")
    block = Block(results=(Assign("x", (), Op("mul", (x, x))),))
    value = 2**40 + 3
    wanted = torch.tensor(value) * torch.tensor(value)
    assert floats.run(block, {}, {("left", "x"): {(): value}})["x"][()] == wanted.item()


@pytest.mark.parametrize("name", sorted(NOT_ASSOCIATIVE))
def test_both_evaluations_show_the_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agg = spec(NOT_ASSOCIATIVE[name][0])
    found = refutation(agg)
    by_oracle = confirm(agg, found)
    monkeypatch.setattr(module, "_oracle", lambda agg, sizes: None)
    plain = confirm(agg, found)
    assert by_oracle.word == plain.word == "shown"
    assert (by_oracle.left, by_oracle.right) == pytest.approx((plain.left, plain.right), rel=1e-12)


# --- what floats do not see -----------------------------------------------------------------------

UNSEEN = {
    "rounding": ("state s = 0", "s = l.s + (r.s + 1e-30 * l.s * l.s)"),
    "absorbed": ("state s = 0", "s = (l.s + 1e30 + r.s * l.s * l.s) - 1e30"),
    "overflow": ("state s = 0", "s = (l.s - r.s) * 1e300 * 1e300"),
    "underflow": ("state s = 0", "s = (l.s - r.s) * 1e-300 * 1e-300"),
    "not a number": ("state s = 0", "s = l.s - r.s + ((l.s + 1) * 1e300 * 1e300 - (l.s + 1) * 1e300 * 1e300)"),
}


@pytest.mark.parametrize("plain", [False, True], ids=["oracle", "plain"])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_floats_do_not_see_is_said(name: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(module, "_oracle", lambda agg, sizes: None)
    (found,) = read_text(TEXT.format(*UNSEEN[name]))
    assert isinstance(found.proof.associativity, Refuted)
    assert found.diagnostic is not None and found.diagnostic.code == "PSM301"
    assert any("fp64 does not show this difference" in note for note in found.diagnostic.notes), found.diagnostic.notes


def test_nothing_is_said_where_floats_agree() -> None:
    (found,) = read_text(TEXT.format("state s = 0", "s = l.s - r.s"))
    assert found.diagnostic is not None and len(found.diagnostic.notes) == 1


# --- our bugs -------------------------------------------------------------------------------------


def claimed(left: int, right: int) -> Counterexample:
    one = (("s", Fraction(1)),)
    elements = tuple((name, one) for name in "abc")
    return Counterexample("associativity", (), elements, "s", (), Fraction(left), Fraction(right), "with a=1 …")


@pytest.mark.parametrize("plain", [False, True], ids=["oracle", "plain"])
def test_a_wrong_counterexample_is_not_believed(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(module, "_oracle", lambda agg, sizes: None)
    agg = spec("state s = 0 combine (l, r) { s = l.s + r.s }")
    proof, notes = confirmed(agg, Proof(Refuted(claimed(3, 4)), None))
    assert isinstance(proof.associativity, Unknown) and "PSM901" in proof.associativity.residual and not notes


def test_it_is_reported_as_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psmc.pipeline.prove", lambda agg, budget, **_: Proof(Refuted(claimed(3, 4)), None))
    (found,) = read_text(TEXT.format("state s = 0", "s = l.s + r.s"))
    assert found.diagnostic is not None and found.diagnostic.code == "PSM901"
    assert "bug of psmc" in found.diagnostic.message and found.diagnostic.span is not None
    (vouched,) = read_text(TEXT.format("state s = 0", "s = l.s + r.s").replace("yes", "assume"))
    assert vouched.diagnostic is not None and vouched.diagnostic.code == "PSM901"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(-3, 3), st.integers(-3, 3), st.sampled_from(["+", "-", "*"]), st.sampled_from("+-*"))
def test_true_counterexamples_are_never_contradicted(a: int, b: int, one: str, two: str) -> None:
    agg = spec(f"state s = 0, t = 1 combine (l, r) {{ s = {a} * l.s {one} r.s / 3; t = exp(l.t) {two} {b} * r.t }}")
    proof = prove(agg, 2)
    kept, _ = confirmed(agg, proof)
    assert kept == proof


def test_identity_laws_params_ints_and_complex_elements() -> None:
    for body in (
        "state z : complex = 1 combine (l, r) { z = l.z + r.z }",
        "dim N state p[N] : int = 0 combine (l, r) { p[i] = r.p[l.p[i]] }",
        "dim N = 3 state p[N] : int in [0, 2] = 0 combine (l, r) { p[i] = r.p[l.p[i]] }",
        "param w state s = 0 combine (l, r) { s = w + l.s + r.s }",
        "dim K state A[K, K] = 0 combine (l, r) { A[i, j] = sum[m] l.A[i, m] * r.A[m, j] }",
    ):
        agg = spec(body)
        proof = prove(agg)
        assert isinstance(proof.identity, Refuted), body
        assert confirm(agg, proof.identity.counterexample).word == "shown", body
        assert confirmed(agg, proof) == (proof, {})


def test_an_identity_without_a_value() -> None:
    agg = spec("state s = -inf combine (l, r) { s = max(l.s, r.s) + l.s - l.s }")
    proof = prove(agg)
    assert isinstance(proof.identity, Refuted) and proof.identity.counterexample.left is None
    assert confirmed(agg, proof) == (proof, {})


def test_a_law_without_values_there() -> None:
    agg = spec("state s = 0 combine (l, r) { s = l.s + r.s }")
    nothing = replace(claimed(3, 4), elements=tuple((n, (("s", None),)) for n in "abc"))
    assert confirm(agg, nothing).word == "unseen"


# --- proofs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "laws"), [
    ("state s = 0 combine (l, r) { s = l.s + r.s + l.s * l.s * r.s }", {"associativity"}),
    ("state s = 1 combine (l, r) { s = l.s + r.s }", {"identity"}),
    ("state s in [0, inf) = 0 combine (l, r) { s = abs(l.s - r.s) }", {"associativity", "identity"}),
    ("state s = 0 combine (l, r) { s = l.s + r.s }", set()),
    ("dim N = 1000 state s[N] = 0 combine (l, r) { s[i] = l.s[i] * max[j] r.s[j] }", set()),  # too large to look at
    ("state s = 0, t = 1 combine (l, r) { s = sqrt(-1 - l.s^2); t = l.t * r.t }", set()),  # without values
])  # fmt: skip
def test_the_checker_is_asked_about_proofs(body: str, laws: set[str]) -> None:
    said = confirmed(spec(body), Proof(Proved("by mistake"), Proved("by mistake")))[0]
    for law in ("associativity", "identity"):
        verdict = getattr(said, law)
        assert isinstance(verdict, Unknown if law in laws else Proved), verdict
        assert law not in laws or ("PSM901" in verdict.residual and "the checker finds that" in verdict.residual)


def test_a_wrong_interval_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if interval arithmetic had the powers wrong: the checker draws values of its own."""
    monkeypatch.setitem(intervals.TABLE, "pow", lambda *_: im.NON_NEGATIVE)
    (found,) = read_text("aggregator a { input x state s in [0, inf) = 0 lift { s = x^3 } "
                         "combine (l, r) { s = abs(l.s + r.s) } associative: yes }")  # fmt: skip
    assert isinstance(prove(found.agg).associativity, Proved)
    assert found.diagnostic is not None and found.diagnostic.code == "PSM901"
    assert "the interval of 's' is not closed: lift misses [0, inf)" in found.diagnostic.notes[1]


def test_entries_read_outside_of_a_dim() -> None:
    """The oracle computes all entries, of which some have no value: the one that is looked at has."""
    (found,) = read_text("""aggregator shifted {
      dim N
      input x[N]
      state p[N] = 0
      lift { p[i] = x[i] }
      combine (l, r) { p[i] = l.p[i + 1] + r.p[i] }
      associative: yes
    }""")
    assert isinstance(found.proof.associativity, Refuted) and found.diagnostic is not None
