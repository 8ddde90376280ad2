"""Usual mistakes in the examples: each is refuted, repaired, and the printed text, pasted into the source, proves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from psmc.algebra.equality import decide
from psmc.algebra.facts import Facts
from psmc.algebra.laws import combined, flat_combine, operand, sides
from psmc.algebra.prover import prove
from psmc.algebra.repair import Repair, repair
from psmc.algebra.ring import Ring
from psmc.algebra.verdict import Proved, Refuted
from psmc.frontend.psm import parse
from psmc.frontend.resolve import resolve
from psmc.ir import Aggregator
from psmc.source import SourceFile, Span

EXAMPLES = Path(__file__).parent.parent / "examples"
LONG = 120.0  # seconds: never reached on an idle machine


@dataclass(frozen=True)
class Broken:
    """An example, a statement of it, what was written instead, and a word of what the repair says."""

    example: str
    right: str
    wrong: str
    says: str
    restored: bool = True  # to the very rule; else to another monoid


BROKEN = {
    "operands of a product swapped": Broken(
        "deltanet", "A[i, m] = sum[p] r.A[i, p] * l.A[p, m]", "A[i, m] = sum[p] l.A[i, p] * r.A[p, m]", "wrong order"
    ),
    "operands of what is acted on swapped": Broken(
        "deltanet", "S[i, j] = sum[p] r.A[i, p] * l.S[p, j] + r.S[i, j]",
        "S[i, j] = sum[p] l.A[i, p] * r.S[p, j] + l.S[i, j]", "wrong order", restored=False,  # or the order of A was
    ),
    "decay not carried": Broken("gla", "a[i] = l.a[i] * r.a[i]", "a[i] = r.a[i]", "never carried on"),
    "scalar decay not carried": Broken("retnet", "a = l.a * r.a", "a = r.a", "never carried on"),
    "log decay not carried": Broken("mlstm", "f = l.f + r.f", "f = r.f", "never carried on"),
    "transition not carried": Broken(
        "deltanet", "A[i, m] = sum[p] r.A[i, p] * l.A[p, m]", "A[i, m] = r.A[i, m]", "never carried on"
    ),
    "wrong decay read": Broken(
        "mamba2", "h[n, p] = r.a * l.h[n, p] + r.h[n, p]", "h[n, p] = l.a * l.h[n, p] + r.h[n, p]", "wrong operand"
    ),
    "injection dropped": Broken(
        "hgrn", "h = r.a * l.h + r.h", "h = r.a * l.h", "never taken in"
    ),
    "sign turned": Broken("minlstm", "+ r.h", "- r.h", "wrong sign"),
    "rescale of a running sum forgotten": Broken(
        "softmax_average", "w = l.w * exp(l.m - m) + r.w * exp(r.m - m)", "w = l.w + r.w * exp(r.m - m)", "old scale"
    ),
    "rescale of the left sum forgotten": Broken(
        "logsumexp", "s = l.s * exp(l.m - m) + r.s * exp(r.m - m)", "s = l.s + r.s * exp(r.m - m)", "old scale"
    ),
    "rescale of the right sum forgotten": Broken(
        "mlstm", "n[i] = past * l.n[i] + new * r.n[i]", "n[i] = past * l.n[i] + r.n[i]", "old scale"
    ),
    "one of the identities 0 for 1": Broken("gla", "a[K] = 1", "a[K] = 0", "identity of 'a'"),
    "a zero for the neutral of max": Broken("softmax_average", "m = -inf", "m = 0", "identity of 'm'"),
    "a zero matrix for eye": Broken("deltanet", "A[K, K] = eye", "A[K, K] = 0", "identity of 'A'"),
    "an interval stays with its identity": Broken("welford", "n in (0, inf) = 0", "n in (0, inf) = 1", "identity of 'n'"),
}  # fmt: skip

# Components that were left out, with the decay or the count written as a constant.
MISSING = {
    "decay": "param g in (0, 1) input x state s = 0 lift { s = x } combine (l, r) { s = g * l.s + r.s }",
    "vector decay": "dim K param g[K] input x[K] state s[K] = 0 lift { s[i] = x[i] } "
    "combine (l, r) { s[i] = r.s[i] + l.s[i] * exp(g[i]) }",
    "count": "input x state s = 0 lift { s = x } combine (l, r) { s = (l.s + r.s) / 2 }",
    "count, as a factor": "input x state s = 0 lift { s = x } combine (l, r) { s = 0.5 * (r.s + l.s) }",
}


def aggregator(text: str) -> Aggregator:
    (found,) = resolve(parse(SourceFile("broken.psm", text)))
    return found


def broken(case: Broken) -> tuple[str, str]:
    """(source of the example, the same with the mistake)."""
    source = (EXAMPLES / f"{case.example}.psm").read_text(encoding="utf-8")
    assert source.count(case.right) == 1, f"{case.example} no longer says '{case.right}'"
    return source, source.replace(case.right, case.wrong)


def repaired(agg: Aggregator) -> Repair:
    proof = prove(agg, LONG)
    assert isinstance(proof.associativity, Refuted) or isinstance(proof.identity, Refuted)
    found = repair(agg, proof, LONG)
    assert found is not None
    return found


def pasted(text: str, agg: Aggregator, fix: str) -> str:
    """The source with the statement (or the declaration) of that name written as the repair says."""
    changes: list[tuple[Span, str]] = []
    for statement in fix.split("; "):
        name = re.split(r"[^\w]", statement)[0]
        span = agg.where(f"combine {name}") if re.search(r"\b[lr]\.", statement) else agg.where(f"state {name}")
        assert span is not None
        changes.append((span, statement))
    for span, statement in sorted(changes, key=lambda c: -c[0].start):
        text = text[: span.start] + statement + text[span.end :]
    return text


def same(one: Aggregator, two: Aggregator) -> bool:
    x, y = (combined(flat_combine(agg), operand(agg, "a"), operand(agg, "b")) for agg in (one, two))
    return all(decide(left, right, Ring(Facts(), float("inf"))).equal for left, right in sides(x, y).values())


def proves(agg: Aggregator) -> bool:
    proof = prove(agg, LONG)
    return isinstance(proof.associativity, Proved) and isinstance(proof.identity, Proved)


@pytest.mark.parametrize("name", BROKEN)
def test_repair_of_an_example(name: str) -> None:
    case = BROKEN[name]
    source, text = broken(case)
    agg = aggregator(text)
    found = repaired(agg)
    assert case.says in found.why, found
    again = aggregator(pasted(text, agg, found.text))
    assert proves(again)
    assert same(again, found.agg)
    assert same(again, aggregator(source)) == case.restored, found.text


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_component(name: str) -> None:
    body = MISSING[name]
    found = repaired(aggregator(f"aggregator rule {{ {body} associative: yes }}"))
    state, lift, combine = re.fullmatch(r"(state .*)  lift \{ (.*) \}  combine \(l, r\) (\{ .* \})", found.text).groups()  # type: ignore[union-attr]
    body = body.replace("state", f"{state}, ", 1).replace(", ", ", ", 1)
    body = re.sub(r"^(.*?)(state .*?),\s+(.*)$", r"\1\2, \3", body)
    body = body.replace("lift { ", f"lift {{ {lift}; ")
    again = aggregator(f"aggregator rule {{ {body[: body.index('combine')]} combine (l, r) {combine} associative: yes }}")
    assert proves(again)
    assert same(again, found.agg)


def test_no_repair_is_invented() -> None:
    agg = aggregator("aggregator rule { state s = 0 combine (l, r) { s = tanh(l.s + r.s) } associative: yes }")
    assert repair(agg, prove(agg, LONG), LONG) is None


SEMIRINGS = {
    "max": ("max[m] (l.M[i, m] + r.M[m, j])", "where(eye == 1, 0, -inf)"),
    "min": ("-max[m] -(l.M[i, m] + r.M[m, j])", "where(eye == 1, 0, inf)"),
    "bottleneck": ("max[m] min(l.M[i, m], r.M[m, j])", "where(eye == 1, inf, -inf)"),
    "product": ("sum[m] l.M[i, m] * r.M[m, j]", "eye"),
}


@pytest.mark.parametrize("name", SEMIRINGS)
def test_the_identity_of_a_matrix_product(name: str) -> None:
    rule, identity = SEMIRINGS[name]
    text = f"aggregator rule {{ dim N state M[N, N] = 0 combine (l, r) {{ M[i, j] = {rule} }} associative: yes }}"
    agg = aggregator(text)
    found = repaired(agg)
    assert found.text == f"M[N, N] = {identity}"
    assert proves(aggregator(pasted(text, agg, found.text)))
