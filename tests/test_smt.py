"""The second opinion: z3 agrees with every verdict on the examples, and contradicts proofs of what is false."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import pytest
from mutants import mutants
from prover_specs import ASSOCIATIVE, NOT_ASSOCIATIVE, spec

from psmc.algebra import exact, smt
from psmc.algebra.prover import prove
from psmc.algebra.verdict import Counterexample, Proof, Proved, Refuted, Unknown
from psmc.cli import app
from psmc.ir import OPS
from psmc.pipeline import read, read_text

smt_eval = pytest.importorskip("psmc.algebra.smt_eval", reason="z3 is optional")

ROOT = Path(__file__).parent.parent
# Products of maxima of products, nonlinear in all of their cases: z3 needs too long at size 2.
HARD = {"reachability", "reachability_recurrence"}
PROVED = Proof(Proved("says so"), Proved("says so"))


def test_every_operator_has_a_row() -> None:
    assert smt_eval.TABLE.keys() == OPS.keys() == exact.TABLE.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.psm")), ids=lambda p: p.stem)
def test_agrees_on_every_example(path: Path) -> None:
    for found in read(path):
        opinion = smt.opinion(found.agg, found.proof, 1 if path.stem in HARD else 30)
        if found.declared.claim == "no":
            assert opinion is None
        elif path.stem in HARD:
            assert opinion is not None and opinion.word != "contradicts", opinion
        else:
            assert opinion is not None and opinion.word == "agrees", opinion


@pytest.mark.parametrize("name", sorted(NOT_ASSOCIATIVE))
def test_finds_what_is_wrong(name: str) -> None:
    """Both ways: it has a model where a claim is refuted, and it contradicts whoever calls that proved."""
    agg = spec(NOT_ASSOCIATIVE[name][0])
    proof = prove(agg)
    assert isinstance(proof.associativity, Refuted)
    opinion = smt.opinion(agg, Proof(proof.associativity, None), 10)
    assert opinion is not None and opinion.word != "contradicts"
    if opinion.word == "agrees":
        assert opinion.counterexample is not None
    against = smt.opinion(agg, Proof(Proved("says so"), None), 10)
    if name == "wrong_gather":  # true of all maps of two elements, and larger sizes are not asked
        assert against == smt.Opinion("agrees") and dict(proof.associativity.counterexample.dims)["N"] == 3
    else:
        assert against is not None and against.word == ("contradicts" if opinion.word == "agrees" else "undecided")


def test_decides_most_of_what_is_wrong() -> None:
    words = [smt.opinion(spec(body), PROVED, 10) for body, _ in NOT_ASSOCIATIVE.values()]
    assert sum(o is not None and o.word == "contradicts" for o in words) >= len(words) - 1


def test_contradicts_a_refutation_of_what_is_true() -> None:
    agg = spec("state s = 0 combine (l, r) { s = l.s + r.s }")
    nothing = Counterexample("associativity", (), (), "s", (), 0, 1, "")
    opinion = smt.opinion(agg, Proof(Refuted(nothing), None))
    assert opinion is not None and opinion.word == "contradicts"


@pytest.mark.parametrize("name", ["mlstm", "welford", "segmented_sum", "viterbi", "deltanet", "moebius", "extrema"])
def test_never_against_the_prover(name: str) -> None:
    """Mutants: no verdict is contradicted, and every proof is confirmed."""
    decided = asked = 0
    for _, agg in islice(mutants(spec(ASSOCIATIVE[name])), 3, None, 17):
        proof = prove(agg, 3)
        opinion = smt.opinion(agg, proof, 5)
        assert opinion is not None and opinion.word != "contradicts", opinion
        asked += 1
        decided += opinion.word == "agrees"
    assert asked and decided >= asked / 2


def test_intervals_count_only_where_they_are_closed() -> None:
    body = "state s in [0, {}] = 0 combine (l, r) {{ s = where(l.s + r.s > 6, 0, l.s + r.s) }}"
    open_ = smt.opinion(spec(body.format(1)), PROVED)
    assert open_ is not None and open_.word == "contradicts"
    closed = spec("state s in [0, inf) = 0 combine (l, r) { s = abs(l.s) + abs(r.s) }")
    agrees = smt.opinion(closed, PROVED)
    assert agrees is not None and agrees.word == "agrees"
    anywhere = smt.opinion(spec("state s = 0 combine (l, r) { s = abs(l.s) + abs(r.s) }"), PROVED)
    assert anywhere is not None and anywhere.word == "contradicts"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("state s = 0 combine (l, r) { s = erf(l.s + r.s) }", "erf is outside"),
        ("state s in [0, inf) = 1 combine (l, r) { s = exp(log(l.s) + log(r.s)) }", "may be -inf"),
        ("dim K = 30 state A[K, K] = eye combine (l, r) { A[i, j] = sum[m] l.A[i, m] * r.A[m, j] }", "variables"),
    ],
)
def test_says_what_it_does_not_decide(body: str, why: str) -> None:
    opinion = smt.opinion(spec(body), PROVED)
    assert opinion is not None and opinion.word == "undecided" and why in opinion.reason


def test_is_bounded_in_time() -> None:
    """Two random quartics: nobody multiplies that out in a hundredth of a second."""
    rule = "(l.s^4 + r.s^3 * l.t + max(l.t, r.s^5))"
    agg = spec(f"state s = 0, t = 0 combine (l, r) {{ s = {rule}; t = max({rule}, {rule} * r.t) }}")
    opinion = smt.opinion(agg, PROVED, 0.01)
    assert opinion is not None and opinion.word == "undecided"


def test_an_unknown_proof_stays_unknown() -> None:
    agg = spec("state s = 0 combine (l, r) { s = l.s - r.s }")
    opinion = smt.opinion(agg, Proof(Unknown("", "gave up"), None))
    assert opinion is not None and opinion.word == "undecided" and "counterexample" in opinion.reason


def test_a_law_without_a_value_is_not_judged() -> None:
    agg = spec("state s = -inf combine (l, r) { s = max(l.s, r.s) + l.s - l.s }")
    proof = prove(agg)
    assert isinstance(proof.identity, Refuted) and proof.identity.counterexample.left is None
    opinion = smt.opinion(agg, proof)
    assert opinion is not None and opinion.word == "undecided" and "no value" in opinion.reason


# --- the command --------------------------------------------------------------------------------


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(ROOT / "examples" / f"{n}.psm") for n in ("mlstm", "elman")]
    assert app.run(["check", "--second-opinion", "--json", *files]) == 0
    first, second = json.loads(capsys.readouterr().out)["results"]
    assert first["second_opinion"] == {"verdict": "agrees", "reason": None} and second["second_opinion"] is None
    assert app.run(["check", "--second-opinion", *files]) == 0
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert head.endswith("second opinion") and row.endswith("agrees")


def test_a_contradiction_is_a_bug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psmc.pipeline.prove", lambda agg, budget, **_: PROVED)
    file = str(ROOT / "examples" / "wrong" / "leaky.psm")
    assert app.run(["check", file]) == 1 and "the checker finds that" in capsys.readouterr().err
    monkeypatch.setattr("psmc.confirm.contradictions", lambda agg, proof: {})
    assert app.run(["check", file]) == 0, "a prover that errs, asked alone"
    capsys.readouterr()
    assert app.run(["check", "--second-opinion", "--json", file]) == 1
    seen = capsys.readouterr()
    (row,) = json.loads(seen.out)["results"]
    assert (row["associativity"], row["identity"]) == ("unknown", "unknown")
    assert row["second_opinion"]["verdict"] == "contradicts" and "gives s=" in row["residual"]
    assert "error[PSM901]" in seen.err and "a bug of psmc" in seen.err


def test_without_z3(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "z3", None)
    assert app.run(["check", "--second-opinion", str(ROOT / "examples" / "gla.psm")]) == 2
    assert "pip install 'psmc[proofs]'" in capsys.readouterr().err


def test_text_of_a_model_is_checked_exactly() -> None:
    (found,) = read_text(
        "aggregator a { input x state s = 0 lift { s = x } combine (l, r) { s = l.s * r.s + 1/3 } associative: yes }"
    )
    opinion = smt.opinion(found.agg, PROVED)
    assert opinion is not None and opinion.counterexample is not None
    assert opinion.counterexample.left != opinion.counterexample.right and "gives s=" in opinion.counterexample.text
