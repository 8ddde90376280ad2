"""Random .psm texts, and what must hold of every one of them.

    derived    a random derivation of grammar/psm.lark: parses, and rarely means anything
    typed      a spec whose names, dims and kinds fit, but for a slip here and there
    rule       an associative rule by construction, as it is or with one token changed
    mutated    a shipped spec with some tokens dropped, doubled, swapped, or taken from another
    noise      characters, mostly those of the language

`draw(seed)` always gives the same text. `examine` takes a text through parse, fmt, resolve, lift, verify, and a sample
through the prover: whatever is wrong with a text, only PsmcError says so.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from fuzz_typed import typed
from generated_rules import random_rule
from lark.grammar import Rule

from psmc.algebra.intervals import closure
from psmc.algebra.prover import deep_recursion, prove
from psmc.algebra.refute import Refuter
from psmc.algebra.report import diagnostic_for
from psmc.algebra.samples import Sampler
from psmc.algebra.verdict import Proved, Unknown
from psmc.derive.lifting import lifted
from psmc.diagnostics import PsmcError
from psmc.diagnostics.catalogue import CATALOGUE
from psmc.frontend import psm
from psmc.frontend.names import KEYWORDS
from psmc.frontend.pretty import format_source
from psmc.frontend.resolve import resolve
from psmc.ir import Aggregator, Block
from psmc.ir.text import show
from psmc.ir.verify import verify
from psmc.source import SourceFile, Span

ROOT = Path(__file__).parent.parent
NAMES = ("x", "s", "m", "a", "l", "r", "prev", "K", "N", "i", "j", "q", "exp", "where", "eye", "yes", "no", "tree")
WORDS = {
    "NAME": NAMES,
    "NUMBER": ("0", "1", "2", "0.5", "1e-6", "3", "64", "1e400", ".5", "7"),
    "STRING": ('"lib.psm"', '""', '"../x.psm"'),
    "DOC": ('"""A doc."""', '"""two\nlines"""'),
    "REDUCE": ("sum", "max", "prod"),
    "COMPARE": ("<", "<=", "==", "!=", ">", ">="),
}
SIGNS = ("aggregator", "combine", "lift", "state", "sum[i]", "l.s", "inf", "in", "0", "1", "==", *"()[]{}=+-*/^<,;:.#")
UNSEEN = range(70_000, 70_020)


# --- texts ----------------------------------------------------------------------------------------


def draw(seed: int) -> tuple[str, str]:
    """(kind, text)."""
    rng = random.Random(seed)
    kind = rng.choices(tuple(KINDS), (3, 6, 2, 6, 1))[0]
    return kind, KINDS[kind](rng)


@cache
def _rules() -> tuple[dict[str, list[Rule]], dict[str, int]]:
    """The grammar's rules by name, and how deep the shallowest derivation of each is."""
    rules: dict[str, list[Rule]] = {}
    for rule in psm.grammar().rules:
        rules.setdefault(rule.origin.name, []).append(rule)
    depth: dict[str, int] = {}
    while len(depth) < len(rules):
        for name, options in rules.items():
            known = [_depth(rule, depth) for rule in options if _depth(rule, depth) < 1000]
            if known and name not in depth:
                depth[name] = 1 + min(known)
    return rules, depth


def _depth(rule: Rule, depth: dict[str, int]) -> int:
    return max((0 if s.is_term else depth.get(s.name, 1000) for s in rule.expansion), default=0)


@cache
def _literals() -> dict[str, str]:
    return {t.name: t.pattern.value for t in psm.grammar().terminals if t.pattern.type == "str"}


def derived(rng: random.Random) -> str:
    rules, depths = _rules()
    budget = rng.choice((60, 150, 400))
    out: list[str] = []
    stack: list[Any] = [next(r for r in rules["file"] if r.expansion).expansion[0]]
    while stack:
        symbol = stack.pop()
        if symbol.is_term:
            out.append(rng.choice(WORDS[symbol.name]) if symbol.name in WORDS else _literals()[symbol.name])
            continue
        options = rules[symbol.name]
        if len(out) + len(stack) > budget:  # the shallowest way out
            least = min(_depth(r, depths) for r in options)
            options = [r for r in options if _depth(r, depths) == least]
        stack += reversed(rng.choice(options).expansion)
    return " ".join(out)


@cache
def _corpus() -> tuple[tuple[str, ...], ...]:
    """The tokens of every shipped spec that has any, examples thrice."""
    files = 3 * sorted((ROOT / "examples").rglob("*.psm")) + sorted((ROOT / "tests" / "bad").glob("*.psm"))
    out = []
    for file in files:
        try:
            source = psm.read(file)
            out.append(tuple(str(t) for t in psm.tokens(source).code))
        except PsmcError:
            continue
    return tuple(out)


def mutated(rng: random.Random) -> str:
    tokens = list(rng.choice(_corpus()))
    for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
        _mutate(tokens, rng)
    return " ".join(tokens)


def _mutate(tokens: list[str], rng: random.Random) -> None:
    if not tokens:
        return
    at, other = rng.randrange(len(tokens)), rng.randrange(len(tokens))
    if rng.random() < 0.75:  # one that the grammar takes
        movable = [n for n, t in enumerate(tokens) if _sort(t) in ("name", "number", "operator")]
        at = rng.choice(movable) if movable else at
        alike = [t for t in tokens if _sort(t) == _sort(tokens[at]) and t != tokens[at]]
        tokens[at] = rng.choice(alike) if alike else tokens[at]
        return
    match rng.randrange(7):
        case 0:
            del tokens[at]
        case 1:
            tokens.insert(at, tokens[other])
        case 2:
            tokens[at], tokens[other] = tokens[other], tokens[at]
        case 3:
            tokens[at] = rng.choice(rng.choice(_corpus()))
        case 4:
            donor = rng.choice(_corpus())
            start = rng.randrange(len(donor))
            tokens[at:at] = donor[start : start + rng.randrange(1, 12)]
        case 5:
            del tokens[min(at, other) : max(at, other)]
        case _:
            tokens[at] = rng.choice(WORDS[rng.choice(tuple(WORDS))])


def _sort(token: str) -> str:
    """Tokens of one sort may stand for each other without a syntax error."""
    if token.isidentifier():
        return token if token in KEYWORDS else "name"
    return "number" if token[0].isdigit() else "operator" if token in "+-*/^" else token


def rule(rng: random.Random) -> str:
    _, made = random_rule(rng.randrange(10**6))
    text = f"aggregator rule {{ {made.text()} associative: yes }}"
    if rng.random() < 0.5:
        tokens = [str(t) for t in psm.tokens(SourceFile("rule", text)).code]
        _mutate(tokens, rng)
        text = " ".join(tokens)
    return text


def noise(rng: random.Random) -> str:
    pieces: list[str] = [rng.choice(SIGNS) for _ in range(rng.randrange(1, 60))]
    for _ in range(rng.randrange(4)):
        pieces.insert(rng.randrange(len(pieces)), chr(rng.choice((0, 9, 10, 13, 34, 39, 92, 0xE9, 0x3B2, 0x2028, 0x1F600))))
    return rng.choice((" ", "", "\n")).join(pieces)


KINDS: dict[str, Callable[[random.Random], str]] = {
    "derived": derived,
    "typed": typed,
    "rule": rule,
    "mutated": mutated,
    "noise": noise,
}


# --- what must hold -------------------------------------------------------------------------------


def examine(text: str, budget: float | None = None) -> str:
    """What became of a text: a diagnostic's code, 'resolved', or a verdict if `budget` seconds are given to prove it.

    Raises AssertionError, or whatever escaped, where psmc is wrong.
    """
    source = SourceFile("fuzz.psm", text)
    try:
        file = psm.parse(source)
    except PsmcError as error:
        return _said(error, source)
    _laid_out(source, bare(file))
    try:
        found = resolve(file)
    except PsmcError as error:
        return _said(error, source)
    outcome = "resolved"
    for agg in found:
        verify(agg)
        (again,) = resolve(psm.parse(SourceFile("shown.psm", show(agg))))
        assert again == agg, "the printed aggregator is another one"
        try:
            monoid = lifted(agg)
        except PsmcError as error:
            outcome = _said(error, source)
            continue
        verify(monoid)
        if budget is not None and isinstance(monoid.combine, Block):
            outcome = _proved(monoid, budget)
    return outcome


def _said(error: PsmcError, source: SourceFile) -> str:
    """The code of the first diagnostic, after all of them were rendered."""
    assert str(error).strip()
    for each in error.diagnostics:
        assert each.code in CATALOGUE and not each.code.startswith("PSM9"), each
        assert each.span is None or each.span.source is not source or 0 <= each.span.start <= each.span.end
        assert each.span is None or each.span.end <= len(each.span.source.text)
    return error.diagnostics[0].code


def _laid_out(source: SourceFile, tree: Any) -> None:
    once = format_source(source)
    again = SourceFile("fmt.psm", once)
    assert bare(psm.parse(again)) == tree, "fmt changed the meaning"
    assert format_source(again) == once, "fmt is not idempotent"
    before, after = (sorted(c.text.rstrip() for c in psm.tokens(s).comments) for s in (source, again))
    assert before == after, "fmt lost a comment"


def _proved(agg: Aggregator, budget: float) -> str:
    begun = time.monotonic()
    proof = prove(agg, budget, associativity=True)
    assert time.monotonic() - begun < 10 * budget + 20, "the prover ignores its budget"
    said = diagnostic_for(agg, proof, lambda agg, proof: None)
    if said is not None:
        assert str(PsmcError(said)) and said.code != "PSM901", said
    for verdict in (proof.associativity, proof.identity):
        assert not isinstance(verdict, Unknown) or (verdict.reason and "PSM901" not in verdict.residual), verdict
    if isinstance(proof.associativity, Proved):
        with deep_recursion():
            refuter = Refuter(agg, Sampler.of(agg, closure(agg).closed))
            wrong = refuter.search("associativity", UNSEEN, time.monotonic() + 2)
        assert wrong is None, f"proved, but {wrong}"
    return type(proof.associativity).__name__.lower()


def bare(node: Any) -> Any:
    """An AST without its positions."""
    if isinstance(node, Span | SourceFile):
        return None
    if dataclasses.is_dataclass(node):
        return (type(node).__name__, *(bare(getattr(node, f.name)) for f in dataclasses.fields(node)))
    return tuple(bare(n) for n in node) if isinstance(node, tuple) else node
