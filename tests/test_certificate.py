"""Certificates, and the small checker that accepts or rejects them."""

from __future__ import annotations

import ast
import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import localcontext
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import mutants
from prover_specs import NOT_ASSOCIATIVE
from prover_specs import spec as rule_of

from psmc import checker, pipeline
from psmc.algebra import certificate, certificate_rule
from psmc.algebra.exact import TABLE
from psmc.algebra.intervals import closure
from psmc.algebra.numbers import Complex, differ, parts
from psmc.algebra.prover import prove
from psmc.algebra.ring import UndefinedError
from psmc.algebra.verdict import Proof, Proved, Refuted
from psmc.cli import app
from psmc.diagnostics import PsmcError
from psmc.ir import OPS, Aggregator, Op, Ref

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.psm")) + sorted((ROOT / "examples" / "wrong").glob("*.psm"))
RECURRENCES = [p for p in EXAMPLES if p.stem.endswith("_recurrence")]
CHECKER = ROOT / "psmc" / "checker.py"


@cache
def proved(path: Path) -> tuple[Aggregator, Proof, Aggregator] | None:
    """None: it cannot be lifted."""
    (found,) = pipeline.read(path)
    try:
        return found.agg, found.proof, found.declared
    except PsmcError:
        return None


def entry(name: str, witnesses: int = 0) -> dict[str, Any]:
    agg, proof, declared = proved(next(p for p in EXAMPLES if p.stem == name))
    return certificate.entry(agg, proof, file=f"{name}.psm", declared=declared, witnesses=witnesses)


def spec(text: str, name: str = "a") -> Aggregator:
    (found,) = pipeline.read_text(f"aggregator {name} {{ {text} associative: yes }}")
    return found.agg


def verdicts(*entries: dict[str, Any], points: int = 8) -> list[bool | None]:
    return [row["accepted"] for row in checker.check(certificate.document(entries), points)]


def written(entries: list[dict[str, Any]]) -> Any:
    """As it is read back from its text."""
    return json.loads(certificate.text(certificate.document(entries)))


@pytest.fixture
def psmc(capsys: pytest.CaptureFixture[str]):
    def run(*argv: object) -> SimpleNamespace:
        code = app.run([str(a) for a in argv])
        seen = capsys.readouterr()
        return SimpleNamespace(code=code, out=seen.out, err=seen.err)

    return run


# --- what is accepted -----------------------------------------------------------------------------


def rows_of(paths: list[Path], points: int, witnesses: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every row of the certificates of examples; benchmarks run it on all of them with more points."""
    for path in paths:
        found = proved(path)
        if found is not None:
            agg, proof, declared = found
            made = certificate.entry(agg, proof, file=path.name, declared=declared, witnesses=witnesses)
            for row in checker.check(written([made]), points):
                yield path, row


def test_examples_are_accepted() -> None:
    """The declared forms; of the recurrences, every eighth."""
    chosen = [p for p in EXAMPLES if p not in RECURRENCES or p in RECURRENCES[::8]]
    counts = {True: 0, None: 0}
    for path, row in rows_of(chosen, 5, 6):
        assert row["accepted"] is not False, (path.name, row)
        counts[row["accepted"]] += 1
        if row["verdict"] == "proved":
            assert row["cells"] and row["error"] < -40, (path.name, row)  # none at points alone
    assert counts[True] > 70 and counts[None] <= 12


MORE = {  # rule -> whether it holds as an expression
    "state v in (-1, 1) = 0 combine (l, r) { v = (l.v + r.v) / (1 + l.v * r.v) }": True,
    "state s = -inf combine (l, r) { s = logaddexp(l.s, r.s) }": True,
    "state v in (0, inf) = 1 combine (l, r) { v = exp(log(l.v) + log(r.v)) }": True,
    "state v in [0, inf) = 0 combine (l, r) { v = (l.v^3 + r.v^3)^(1/3) } ": True,
    "param k state t = 0, s = 0 combine (l, r) { t = l.t + r.t s = exp(-k * r.t) * l.s + r.s }": True,
    "state a : complex = 1, h : complex = 0 combine (l, r) { a = l.a * r.a h = r.a * l.h + r.h }": True,
    "state t = 0, x = 0, y = 0 combine (l, r) { t = l.t + r.t x = cos(r.t) * l.x - sin(r.t) * l.y + r.x"
    " y = sin(r.t) * l.x + cos(r.t) * l.y + r.y }": False,
    "state v = 0 combine (l, r) { v = where(l.v == 0, r.v, l.v) }": True,
    "state v in [0, inf) = 0 combine (l, r) { v = sqrt(l.v^2 + r.v^2) }": True,
}


@pytest.mark.parametrize("text", MORE)
def test_other_rules_are_accepted(text: str) -> None:
    agg = spec(text)
    proof = prove(agg)
    assert isinstance(proof.associativity, Proved), proof.associativity
    first, second = checker.check(certificate.certificate_of(agg, proof, witnesses=20), 12)
    assert first["accepted"] and second["accepted"] is not False
    assert bool(first["cells"]) or not MORE[text]


def test_exp_of_a_sum_is_0_where_a_term_is_minus_infinity() -> None:
    """As the language says: e∘e has a value then, and -inf is an identity even where the maximum is forgotten."""
    (row,) = [r for r in checker.check(certificate.document([entry("softmax_average")]), 6) if r["law"] == "identity"]
    assert row["accepted"] and row["undefined"] == 0
    agg = spec("state m = -inf, s = 0 combine (l, r) { m = max(l.m, r.m) s = l.s * exp(l.m - l.m) + r.s * exp(r.m - m) }")
    assert verdicts(certificate.entry(agg, Proof(Proved("claimed"), Proved("claimed")))) == [False, True]


def test_a_root_is_the_positive_one() -> None:
    """sqrt(x²) is x on [0, inf), and a rule that needs this elsewhere is rejected."""
    good = "state v in [0, inf) = 0 combine (l, r) { v = sqrt((l.v + r.v)^2) }"
    agg = spec(good)
    made = certificate.entry(agg, Proof(Proved("claimed", ("uses the interval of 'v'",)), None))
    assert verdicts(made)[0] is True
    made = certificate.entry(spec(good.replace(" in [0, inf)", "")), Proof(Proved("claimed"), None))
    assert verdicts(made)[0] is False


# --- what is rejected -----------------------------------------------------------------------------


def swapped(tree: Any) -> Any:
    if isinstance(tree, list):
        return [{"l": "r", "r": "l"}.get(x, x) if n == 0 and isinstance(x, str) else swapped(x) for n, x in enumerate(tree)]
    return tree


def swap_operands(e: Any) -> None:
    e["combine"]["results"][-1][2] = swapped(e["combine"]["results"][-1][2])


def swap_a_factor(e: Any) -> None:
    """r.a * l.h + r.h becomes l.a * l.h + r.h."""
    tree = e["combine"]["results"][-1][2]
    tree[1][1] = swapped(tree[1][1])


def change_a_constant(e: Any) -> None:
    tree = e["combine"]["results"][-1][2]
    e["combine"]["results"][-1][2] = ["mul", "1000001/1000000", tree]


def change_the_identity(e: Any) -> None:
    name = next(iter(e["state"]))
    e["state"][name]["identity"][1] = "7"


def drop_the_counterexample(e: Any) -> None:
    e["associativity"] = {"verdict": "refuted", "counterexample": {}}


def invent_a_counterexample(e: Any) -> None:
    point = {name: "1" for name in e["state"]}
    case = {"case": "(a∘b)∘c = a∘(b∘c)", "sizes": {}, "params": {}, "x": [point] * 3, "component": next(iter(point))}
    e["associativity"] = {"verdict": "refuted", "counterexample": case | {"position": [], "left": "1", "right": "2"}}


def claim_a_proof(e: Any) -> None:
    e["associativity"] = {"verdict": "proved", "method": "normal form", "cases": 1, "lines": []}


def move_the_counterexample(e: Any) -> None:
    case = e["associativity"]["counterexample"]
    for x in case["x"]:
        x.update((n, "0") for n in x)


def change_a_side(e: Any) -> None:
    e["associativity"]["counterexample"]["left"] = "12345"


def add_an_interval(e: Any) -> None:
    name = next(iter(e["state"]))
    e["state"][name] |= {"interval": "[0, 1]", "closed": True, "used": True}
    e["lift"] = {"lets": [], "results": [[n, [], "0"] for n in e["state"]]}


def use_an_open_interval(e: Any) -> None:
    add_an_interval(e)
    e["state"][next(iter(e["state"]))]["closed"] = False


def miss_by_a_branch(e: Any) -> None:
    """Right but for one cell."""
    name, indices, tree = e["combine"]["results"][-1]
    far = ["lt", "2", ["l", name, *(i for i, _ in indices)]]
    e["combine"]["results"][-1][2] = ["where", far, ["add", tree, "1/1000000000000"], tree]


TAMPERED = [
    ("linear_recurrence", swap_a_factor, 0), ("gla", swap_a_factor, 0), ("lru", swap_a_factor, 0),
    ("deltanet", swap_operands, 0), ("mlstm", swap_operands, 0), ("affine2x2", swap_operands, 0),
    ("linear_recurrence", change_a_constant, 0), ("welford", change_a_constant, 0), ("softmax_average", change_a_constant, 0),
    ("linear_recurrence", change_the_identity, 1), ("cumsum", change_the_identity, 1), ("welford", change_the_identity, 1),
    ("cumsum", drop_the_counterexample, 0), ("cumsum", invent_a_counterexample, 0), ("lru", drop_the_counterexample, 0),
    ("leaky", claim_a_proof, 0), ("mean_of_means", claim_a_proof, 0), ("swapped_delta", claim_a_proof, 0),
    ("saturating", claim_a_proof, 0), ("softmax_unscaled", claim_a_proof, 0), ("vouched", claim_a_proof, 0),
    ("leaky", move_the_counterexample, 0), ("vouched", move_the_counterexample, 0), ("leaky", change_a_side, 0),
    ("cumsum", add_an_interval, 0), ("linear_recurrence", use_an_open_interval, 0),
    ("linear_recurrence", miss_by_a_branch, 0), ("cumsum", miss_by_a_branch, 0), ("affine2x2", miss_by_a_branch, 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "law"), TAMPERED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_tampered_certificates_are_rejected(name: str, change: Callable[[Any], None], law: int) -> None:
    made = entry(name)
    assert False not in verdicts(made, points=24)
    changed = copy.deepcopy(made)
    change(changed)
    rows = checker.check(certificate.document([changed]), 24)
    assert rows[law]["accepted"] is False and rows[law]["why"], rows


@pytest.mark.parametrize("name", ["gla", "linear_recurrence", "softmax_average", "segmented_sum", "viterbi"])
def test_mutants_are_rejected_as_the_prover_refutes_them(name: str) -> None:
    """Every mutant is called proved; the checker must say no to those that are refuted, and yes to no others."""
    agg, _, _ = proved(next(p for p in EXAMPLES if p.stem == name))
    seen = {True: 0, False: 0}
    for kind, mutant in list(mutants(agg))[::5]:
        verdict = prove(mutant, 1.0).associativity
        if not isinstance(verdict, Proved | Refuted):
            continue
        claim = Proved("claimed", verdict.certificate if isinstance(verdict, Proved) else ())
        (row, _) = checker.check(certificate.certificate_of(mutant, Proof(claim, None)), 16)
        assert row["accepted"] is isinstance(verdict, Proved), (kind, row, verdict)
        seen[row["accepted"]] += 1
    assert seen[False] >= 1


@pytest.mark.parametrize("name", NOT_ASSOCIATIVE)
def test_what_is_not_associative_is_rejected(name: str) -> None:
    claim = Proof(Proved("claimed"), None)
    (row, _) = checker.check(certificate.certificate_of(rule_of(NOT_ASSOCIATIVE[name][0]), claim), 24)
    assert row["accepted"] is False and "fails for" in row["why"]


def test_no_point_is_no_proof() -> None:
    """A rule without a value anywhere."""
    made = entry("cumsum")
    made["combine"]["results"][0][2] = ["pow", ["add", ["l", "s"], ["mul", "-1", ["l", "s"]]], "-1"]
    assert verdicts(made)[0] is False


def test_agreeing_at_a_point_is_not_enough() -> None:
    """Equal where it is looked at, and different as an expression."""
    made = entry("cumsum")
    point = {"s": "1"}
    made["associativity"]["witnesses"] = [{"sizes": {}, "params": {}, "x": [point] * 3}]
    made["combine"]["results"][0][2] = ["mul", ["l", "s"], ["mul", ["l", "s"], ["r", "s"]]]
    (row, _) = checker.check(certificate.document([made]), 0)
    assert row["accepted"] is False and "not around it" in row["why"]


# --- hostile text ---------------------------------------------------------------------------------

DEEP: Any = "1"
for _ in range(30_000):
    DEEP = ["add", DEEP, "1"]
HUGE = ["pow", ["pow", ["pow", ["l", "s"], "999999999999"], "99999999999999"], "9999999999999999"]
WIDE = ["sum", "i", "K", ["sum", "j", "K", ["sum", "m", "K", ["l", "s"]]]]
SLOW = ["erf", ["l", "s"]]
for _ in range(9):
    SLOW = ["add", SLOW, SLOW]


def with_rule(tree: Any, **more: Any) -> Any:
    made = entry("cumsum") | more
    made["combine"] = {"lets": [], "results": [["s", [], tree]]}
    return certificate.document([made])


HOSTILE: dict[str, Any] = {
    "null": None, "a number": 3, "a list": [1], "nothing": {}, "no aggregators": {"aggregators": 7},
    "text": {"aggregators": ["x", None, {}]}, "deep": with_rule(DEEP), "huge powers": with_rule(HUGE),
    "an unknown operator": with_rule(["system", "rm"]), "no operands": with_rule(["add"]), "an empty list": with_rule([]),
    "a bool": with_rule(["lt", ["l", "s"], "0"]), "a dict": with_rule({"s": 1}), "a long number": with_rule("9" * 5000),
    "a float": with_rule(0.5), "an exponent": with_rule("1e999999999"), "nan": with_rule("nan"), "an unknown name": with_rule(["l", "x"]),
    "large dims": with_rule(WIDE, dims={"K": 10**9}), "a wide state": with_rule("0", dims={"K": 10**9}, state={
        "s": entry("cumsum")["state"]["s"] | {"dims": ["K"], "identity": [[["i", "K"]], "0"]}}),
    "negative dims": with_rule(WIDE, dims={"K": -3}), "dims of text": with_rule(WIDE, dims={"K": "5"}),
    "a cycle of lets": certificate.document([entry("cumsum") | {
        "combine": {"lets": [["x", [], ["let", "x"]]], "results": [["s", [], ["let", "x"]]]}}]),
    "a slow rule": with_rule(SLOW), "no verdict": with_rule("0", associativity={"verdict": "PROVED"}),
    "witnesses of text": with_rule("0", associativity={"verdict": "proved", "witnesses": "abc"}),
    "an interval of text": with_rule("0", state={"s": {"interval": "(0; 1)", "closed": True, "used": True}}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_documents_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "WORK", 100_000)
    rows = checker.check(HOSTILE[name], 24 if name == "huge powers" else 4)
    assert rows and rows[0]["accepted"] is False and rows[0]["why"], rows
    assert len(rows[0]["why"]) < 2000 and "Traceback" not in rows[0]["why"]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**9), st.sampled_from(["cumsum", "segmented_sum", "welford", "leaky"]))
def test_any_change_gives_a_verdict(seed: int, name: str) -> None:
    """A node of the document is replaced by something else: the checker raises nothing, whatever it is."""
    rng = random.Random(seed)
    document = written([entry(name)])
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            visit(value)

    visit(document)
    node, key = rng.choice(places)
    node[key] = rng.choice([None, True, -1, 10**30, 0.1, "x", "inf", "1/0", [], {}, ["add", "1", "2"], [[[]]], "l", "K"])
    for row in checker.check(document, 2):
        assert row["accepted"] in (True, False, None) and (row["accepted"] is not False or row["why"])


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"aggregators": [' + "9" * 10_000 + "]}", "\x00", '"\\ud800"'])
def test_text_that_is_no_certificate(psmc, tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text, encoding="utf-8")
    ran = psmc("verify", path)
    assert ran.code == 1 and ran.err.strip() and "Traceback" not in ran.err + ran.out


# Once rejected: equal numbers that are not rational, and what is -inf at one point alone.
EDGES = {
    "a maximum of equal roots": "dim D state s = 0, t[D] = 0 combine (l, r) { s = max(l.s / sqrt(D), l.s / sqrt(D)) + r.s; "
    "t[i] = l.t[i] + r.t[i] }",
    "log 0": "state s in [0, inf) = 1 combine (l, r) { s = exp(log(l.s) + log(r.s)) }",
    "a condition on log 0": "state s in [0, inf) = 1 combine (l, r) { s = where(log(l.s) > -inf, l.s * r.s, 0) }",
}


@pytest.mark.parametrize("text", EDGES.values(), ids=EDGES)
def test_edges(text: str) -> None:
    agg = spec(text)
    rows = checker.check(certificate.certificate_of(agg, prove(agg)), 60)
    assert [row["accepted"] for row in rows] == [True, True], rows


def test_taps_are_drawn_as_zero_too() -> None:
    agg = spec("input x in (2, 3] state s in [2, 3] = 2 lift { s = x{-1} } combine (l, r) { s = max(l.s, r.s) }")
    assert closure(agg).open == {"s": "lift"}
    made = certificate.entry(agg, prove(agg))
    assert made["lift"] is None, "an interval that is not closed is of no use"
    agg = spec("input x in (2, 3] state s in [0, 3] = 0 lift { s = x{-1} } combine (l, r) { s = max(l.s, r.s) }")
    assert certificate.entry(agg, prove(agg))["inputs"]["x{-1}"]["interval"] == "[0, 3]"


# --- the checker itself ---------------------------------------------------------------------------


def test_the_checker_is_small_and_alone() -> None:
    text = CHECKER.read_text(encoding="utf-8")
    tree = ast.parse(text)
    strings = {
        line
        for n in ast.walk(tree)
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
        for line in range(n.lineno, (n.end_lineno or 0) + 1)
    }
    lines = {n for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    assert len(lines - strings) < 300
    modules = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    modules += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert {m.split(".")[0] for m in modules} <= set(sys.stdlib_module_names)


def test_the_primes_are_a_chain() -> None:
    for p, q in zip(checker.Q, checker.Q[1:], strict=False):
        assert q == 2 * p + 1 and pow(4, p, q) == 1
    for q in checker.Q:
        assert q % 4 == 3 and all(pow(b, q - 1, q) == 1 for b in (2, 3, 5, 7, 11, 13))


def test_residues_follow_the_laws_of_exp_and_log() -> None:
    rng = random.Random(1)

    def leaf(x: int) -> checker.V:
        return checker.V(Fraction(x), tuple(pow(rng.randrange(q), 4, q) for q in checker.Q), None, 4)

    x, y, half = leaf(2), leaf(3), checker.const("1/2")
    with localcontext(checker.DIGITS):
        assert checker.same(checker.exp(checker.add(x, y)), checker.mul(checker.exp(x), checker.exp(y)))
        assert checker.same(checker.exp(checker.log(x)), x)
        assert checker.same(checker.log(checker.mul(x, y)), checker.add(checker.log(x), checker.log(y)))
        assert checker.same(checker.power(checker.mul(x, x), half), x)
        root = checker.exp(checker.mul(checker.log(x), half))
        assert checker.same(checker.mul(root, root), x)
        for wrong in (checker.add(x, y), checker.mul(x, x), checker.exp(x), checker.log(x)):
            assert not checker.same(wrong, x)


def test_every_operator_can_be_written() -> None:
    assert set(certificate_rule._REAL) == set(OPS) and set(certificate_rule._COMPLEX) <= set(OPS)


# Where the exact evaluator of the prover has values. They share no code.
VALUES = [Fraction(v) for v in ("0", "1", "-1", "2", "1/2", "-3/2", "5/3")]


# Of complex numbers the certificate has no log, and no power but of a small whole number written there.
UNWRITTEN = {("log", "complex"), ("pow", "complex")}


def typed(op: str, kind: Any) -> Op | None:
    """The operator on numbers of that kind; None where the IR has no such thing."""
    try:
        return Op(op, tuple(Ref("left", n, (), kind) for n in "abc"[: OPS[op].arity]))
    except TypeError:
        return None


CASES = [
    (op, kind) for kind in ("real", "complex") for op in OPS
    if op not in ("and", "or", "not", "where", "complex") and typed(op, kind) is not None
]  # fmt: skip


@pytest.mark.parametrize(("op", "kind"), sorted(UNWRITTEN))
def test_what_is_not_written_says_so(op: str, kind: Any) -> None:
    expr = typed(op, kind)
    assert expr is not None
    with pytest.raises(certificate_rule.UnwritableError):
        certificate_rule._Writer({}).pair(expr)


@pytest.mark.parametrize(("op", "kind"), [case for case in CASES if case not in UNWRITTEN])
def test_operators_mean_what_they_mean_to_the_prover(op: str, kind: Any) -> None:
    expr, arity = typed(op, kind), OPS[op].arity
    assert expr is not None
    leaves = list(expr.args)
    write = certificate_rule._Writer({})
    trees = write.pair(expr) if expr.kind == "complex" else (write.real(expr),)
    rng = random.Random(op)
    seen = 0
    with localcontext(checker.DIGITS):
        for _ in range(40):
            numbers = [rng.choice(VALUES) for _ in range(arity * 2)]
            args = [Complex(*numbers[2 * n : 2 * n + 2]) if kind == "complex" else numbers[n] for n in range(arity)]
            env: dict[Any, Any] = {}
            for leaf, arg in zip(leaves, args, strict=True):
                for name, x in zip(certificate_rule.parts(leaf.name, kind), parts(arg), strict=False):
                    env["l", name] = {(): checker.const(str(x))}
            rule = checker.Rule({"dims": {}}, "", None, [10**6], limit=2000)
            try:
                expected = TABLE[op](*args)
                found = [rule.value(t, {}, env) for t in trees]
            except (UndefinedError, checker.Undefined):
                continue
            seen += 1
            if isinstance(expected, bool):
                assert found == [expected]
            else:
                assert not any(differ(e, f.x) for e, f in zip(parts(expected), found, strict=False)), (args, expected, found)
    assert seen > 3


# --- the command line -----------------------------------------------------------------------------


def test_commands(psmc, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "c.json"
    out.parent.mkdir()
    gla, leaky = ROOT / "examples" / "gla.psm", ROOT / "examples" / "wrong" / "leaky.psm"
    assert psmc("check", gla, leaky, "--certificate", out).code == 1  # leaky is refuted, and that is written too
    ran = psmc("verify", out, "--points", "4")
    assert ran.code == 0 and "as expressions in" in ran.out and "counterexample" in ran.out and "digest" in ran.out
    assert psmc("verify", out, "--spec", gla, "--spec", leaky, "--points", "2").code == 0
    rows = json.loads(psmc("verify", out, "--points", "2", "--json").out)
    assert [r["accepted"] for r in rows] == [True] * 4
    changed = json.loads(out.read_text(encoding="utf-8"))
    swap_a_factor(changed["aggregators"][0])
    out.write_text(json.dumps(changed), encoding="utf-8")
    ran = psmc("verify", out, "--points", "4")
    assert ran.code == 1 and "REJECTED" in ran.out and "(a∘b)∘c = a∘(b∘c) fails for S" in ran.err
    assert psmc("verify", tmp_path / "none.json").code == 1


def test_a_certificate_of_another_spec(psmc, tmp_path: Path) -> None:
    out, other = tmp_path / "c.json", tmp_path / "ema.psm"
    text = (ROOT / "examples" / "ema.psm").read_text(encoding="utf-8")
    other.write_text(text.replace("0.9", "0.8"), encoding="utf-8")
    assert psmc("check", ROOT / "examples" / "ema.psm", "--certificate", out).code == 0
    ran = psmc("verify", out, "--spec", other)
    assert ran.code == 1 and "says something else" in ran.err
    changed = json.loads(out.read_text(encoding="utf-8"))
    changed["aggregators"][0]["combine"]["results"][1][2] = "0"  # still associative, and not the spec's
    changed["aggregators"][0]["identity"] = {"verdict": None}
    out.write_text(json.dumps(changed), encoding="utf-8")
    assert psmc("verify", out).code == 0
    ran = psmc("verify", out, "--spec", ROOT / "examples" / "ema.psm")
    assert ran.code == 1 and "the combine" in ran.err


def test_names_from_a_certificate_do_not_reach_the_terminal_raw(psmc, tmp_path: Path) -> None:
    out = tmp_path / "c.json"
    made = entry("cumsum") | {"aggregator": "\x1b[31mred", "associativity": {"verdict": "\x1b[2J"}}
    out.write_text(json.dumps(certificate.document([made])), encoding="utf-8")
    ran = psmc("verify", out)
    assert ran.code == 1 and "\x1b" not in ran.out + ran.err


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    found = set()
    for seed in ("1", "2"):
        out = tmp_path / f"{seed}.json"
        files = [str(ROOT / "examples" / f"{n}.psm") for n in ("mlstm", "welford", "segmented_sum", "s4d")]
        code = f"from psmc.cli import main; main(['check', *{files!r}, '--certificate', {str(out)!r}])"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
        found.add(out.read_bytes())
    assert len(found) == 1


def test_it_runs_alone(tmp_path: Path) -> None:
    """The bare file, without site-packages and without psmc on the path."""
    alone = tmp_path / "alone.py"
    alone.write_text(CHECKER.read_text(encoding="utf-8"), encoding="utf-8")
    out = tmp_path / "c.json"
    out.write_text(certificate.text(certificate.document([entry("mlstm"), entry("leaky")])), encoding="utf-8")
    blocked = "import sys; sys.modules.update(dict.fromkeys(('psmc', 'torch', 'triton', 'sympy', 'numpy'), None))\n"
    run = f"{blocked}import runpy; sys.argv = ['alone.py', {str(out)!r}, '4']; runpy.run_path({str(alone)!r}, None, '__main__')"
    for argv in (["-I", "-S", str(alone), str(out), "4"], ["-I", "-S", "-c", run]):
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert [json.loads(line)["accepted"] for line in done.stdout.splitlines()] == [True] * 4
    out.write_text(json.dumps(certificate.document([entry("gla") | {"combine": 1}])), encoding="utf-8")
    done = subprocess.run([sys.executable, str(alone), str(out)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "malformed" in done.stdout and not done.stderr


def test_intervals_taps_and_conditions_are_written() -> None:
    made = entry("welford")
    assert made["state"]["n"]["interval"] == "(0, inf)" and made["state"]["n"]["closed"] and made["state"]["n"]["used"]
    assert [c["must be"] for c in made["conditions"]] == ["not 0", "not 0"]
    assert all("intervals" in c["because"] for c in made["conditions"]), made["conditions"]
    assert entry("linear_recurrence")["lift"] is None
    agg = spec("input x in [0, 1] state s in [0, inf) = 0 lift { s = x{-1} + x } combine (l, r) { s = l.s + r.s }")
    proof = prove(agg)
    made = certificate.entry(agg, proof)
    assert sorted(made["inputs"]) == ["x", "x{-1}"] and verdicts(made) == [True, True]
    made["lift"]["results"][0][2] = "-1"
    assert verdicts(made) == [False, False]


def test_every_cell_has_a_witness() -> None:
    made = entry("segmented_sum", witnesses=80)
    witnesses = made["associativity"]["witnesses"]
    flags = {tuple(x["f"] for x in w["x"]) for w in witnesses}
    assert len(flags) == 8  # every choice of three flags
    (row, _) = checker.check(certificate.document([made]), 0)
    assert row["accepted"] and row["cells"] == len(witnesses)
