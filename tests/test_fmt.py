"""`psmc fmt`: same AST, idempotent, no comment lost, however the text is laid out."""

from __future__ import annotations

import dataclasses
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psmc.frontend import psm
from psmc.frontend.pretty import format_source
from psmc.source import SourceFile, Span

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").rglob("*.psm"))


def source(text: str) -> SourceFile:
    return SourceFile("t.psm", text)


def bare(node: Any) -> Any:
    """An AST without its positions."""
    if isinstance(node, Span | SourceFile):
        return None
    if dataclasses.is_dataclass(node):
        return (type(node).__name__, *(bare(getattr(node, f.name)) for f in dataclasses.fields(node)))
    return tuple(bare(n) for n in node) if isinstance(node, tuple) else node


def comments(text: str) -> list[str]:
    return sorted(c.text.rstrip() for c in psm.tokens(source(text)).comments)


def check(text: str) -> str:
    once = format_source(source(text))
    assert bare(psm.parse(source(once))) == bare(psm.parse(source(text)))
    assert format_source(source(once)) == once
    assert comments(once) == comments(text)
    assert all(line == line.rstrip() for line in once.splitlines())
    return once


def expression(text: str) -> str:
    """The formatted right-hand side `text`."""
    return format_source(source(f"const c = {text}")).removeprefix("const c = ").rstrip("\n")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_keep_their_meaning(path: Path) -> None:
    check(psm.read(path).text)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("((a+b))", "a + b"),
        ("(a*b)+c", "a * b + c"),
        ("a-(b-c)", "a - (b - c)"),
        ("(a-b)-c", "a - b - c"),
        ("a*(b*c)", "a * (b * c)"),
        ("-(a*b)", "-(a * b)"),
        ("(-a)*b", "-a * b"),
        ("-(a^b)", "-a^b"),
        ("(-a)^b", "(-a)^b"),
        ("a^(-b)", "a^-b"),
        ("a^(b^c)", "a^b^c"),
        ("(a^b)^c", "(a^b)^c"),
        ("-(-a)", "--a"),
        ("sum[i](x[i]*y[i])", "sum[i] x[i] * y[i]"),
        ("(sum[i] x[i])*y", "(sum[i] x[i]) * y"),
        ("a*(sum[i] x[i])", "a * sum[i] x[i]"),
        ("a/(sum[i] x[i])", "a / (sum[i] x[i])"),
        ("a*(-(sum[i] x[i]))", "a * -sum[i] x[i]"),
        ("(a*(sum[i] x[i]))*b", "(a * sum[i] x[i]) * b"),
        ("(sum[i] x[i])+y", "sum[i] x[i] + y"),
        ("sum[i] (x[i]+y)", "sum[i] (x[i] + y)"),
        ("-(sum[i] x[i])", "-sum[i] x[i]"),
        ("(sum[i] x[i])^2", "(sum[i] x[i])^2"),
        ("sum[i](sum[j] A[i,j])", "sum[i] sum[j] A[i, j]"),
        ("max( a , (b) )", "max(a, b)"),
        ("max[i,j](A[i,j])", "max[i, j] A[i, j]"),
        ("not (a<b) and (c or d)", "not a < b and (c or d)"),
        ("(not a) == b", "(not a) == b"),
        ("where((a<b)or c, 1e-3, .5)", "where(a < b or c, 1e-3, .5)"),
        ("x{ - 1 }[ p ]", "x{-1}[p]"),
        ("f (x) [ i ]", "f(x)[i]"),
        ("l . S [i , p[ j ] ]", "l.S[i, p[j]]"),
        ("- inf", "-inf"),
    ],
)
def test_parentheses_are_minimal(written: str, canonical: str) -> None:
    assert expression(written) == canonical
    check(f"const c = {written}")


def test_layout() -> None:
    text = (
        '# head\n\n\n\nuse "lib"\n'
        "const eps=1e-6 fn f(x[K],y)[i]=x[i]*y # note\n"
        'aggregator a{# open\n"""one\n   two\n"""dim K,R=2;input x[K]:complex,# first\n y in(-1/2,inf)\n\n\n'
        "state s[K]in[0,1)=0 lift{s[i]=x[i]}combine(l,r){let t=l.s[0];for r in R{s[i]=t}}\n"
        "output o=s[0],n=s[1] associative:yes # end\n# last\n}# after\n# tail"
    )
    assert check(text) == (
        "# head\n"
        "\n"
        'use "lib"\n'
        "const eps = 1e-6\n"
        "fn f(x[K], y)[i] = x[i] * y  # note\n"
        "\n"
        "aggregator a {  # open\n"
        '  """one\n'
        '  two"""\n'
        "  dim K, R = 2\n"
        "  input x[K] : complex  # first\n"
        "  input y in (-1/2, inf)\n"
        "\n"
        "  state s[K] in [0, 1) = 0\n"
        "  lift { s[i] = x[i] }\n"
        "  combine (l, r) {\n"
        "    let t = l.s[0]\n"
        "    for r in R { s[i] = t }\n"
        "  }\n"
        "  output o = s[0], n = s[1]\n"
        "  associative: yes  # end\n"
        "  # last\n"
        "}  # after\n"
        "# tail\n"
    )


def test_long_lines_break_before_operators() -> None:
    terms = " + ".join(f"alpha{n} * beta{n}" for n in range(12))
    printed = check(f"aggregator a {{ lift {{ S[i] = {terms} }} }}")
    assert max(map(len, printed.splitlines())) <= 100
    assert "\n        + alpha" in printed
    names = ", ".join(f"input_number_{n}[K]" for n in range(12))
    assert max(map(len, check(f"aggregator a {{ input {names} }}").splitlines())) <= 100


def test_carriage_returns_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "crlf.psm"
    path.write_bytes(b'\xef\xbb\xbfaggregator a {\r\n  """d\r\n  e"""\r\n  # c\r\n  associative: yes\r\n}\r\n')
    assert format_source(psm.read(path)) == 'aggregator a {\n  """d\n  e"""\n  # c\n  associative: yes\n}\n'


# --- random files ---------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b1", "x_y", "S", "q", "eye", "prev", "tree", "yes", "left", "complex"])
INDICES = st.lists(st.sampled_from(["i", "j", "m"]), min_size=1, max_size=3, unique=True)
Words = st.SearchStrategy[list[str]]


def listed(items: list[list[str]]) -> list[str]:
    return [word for n, item in enumerate(items) for word in ([","] if n else []) + item]


def bracketed(names: list[str]) -> list[str]:
    return ["[", *listed([[n] for n in names]), "]"]


def compound(inner: Words) -> Words:
    infix = st.sampled_from(["+", "-", "*", "/", "^", "<", "==", ">=", "and", "or"])

    def group(words: list[str]) -> list[str]:
        return ["(", *words, ")"]

    return st.one_of(
        st.tuples(inner, infix, inner).map(lambda t: [*group(t[0]), t[1], *group(t[2])]),
        st.tuples(inner, st.sampled_from(["+", "-"]), inner).map(lambda t: [*group(t[0]), t[1], *group(t[2])]),
        st.tuples(st.sampled_from(["-", "not"]), inner).map(lambda t: [t[0], *group(t[1])]),
        st.tuples(st.sampled_from(["sum", "prod", "max"]), INDICES, inner).map(
            lambda t: [t[0], *bracketed(t[1]), *group(t[2])]
        ),
        st.tuples(NAMES, st.lists(inner, max_size=3)).map(lambda t: [t[0], "(", *listed(t[1]), ")"]),
        st.tuples(NAMES, st.lists(inner, min_size=1, max_size=2)).map(lambda t: [t[0], "[", *listed(t[1]), "]"]),
    )


ATOMS: Words = st.one_of(
    NAMES.map(lambda n: [n]),
    st.sampled_from(["0", "1.5", ".5", "2.", "1e-6", "inf"]).map(lambda n: [n]),
    st.tuples(NAMES, NAMES).map(lambda t: [t[0], ".", t[1]]),
    st.tuples(NAMES, st.integers(1, 64)).map(lambda t: [t[0], "{", "-", str(t[1]), "}"]),
)
EXPRESSIONS: Words = st.recursive(ATOMS, compound, max_leaves=12)


def definition(head: list[str]) -> Words:
    return st.tuples(NAMES, st.none() | INDICES, EXPRESSIONS).map(
        lambda t: [*head, t[0], *(bracketed(t[1]) if t[1] else []), "=", *t[2]]
    )


SEMICOLON = st.sampled_from([[], [";"], [";", ";"]])


def block(head: list[str]) -> Words:
    plain = st.one_of(definition([]), definition(["let"]))
    loop = st.lists(plain, max_size=2).map(lambda b: ["for", "r", "in", "R", "{", *chain(*b), "}"])
    statement = st.tuples(plain | loop, SEMICOLON).map(lambda t: t[0] + t[1])
    return st.lists(statement, max_size=3).map(lambda b: [*head, "{", *chain(*b), "}"])


BOUNDS = st.sampled_from([["-", "inf"], ["-", "1", "/", "2"], ["0"], ["1e-3"], ["-", "2", "^", "3", "+", "1"]])
INTERVAL = st.tuples(BOUNDS, st.sampled_from([["1"], ["inf"], ["2", "*", "(", "3", "-", "1", ")"]])).map(
    lambda t: ["in", "(", *t[0], ",", *t[1], ")"]
)


def declared(valued: bool) -> Words:
    kind = st.sampled_from([[], [":", "complex"], [":", "int"], [":", "real"]])
    value = EXPRESSIONS.map(lambda e: ["=", *e]) if valued else st.just([])
    return st.tuples(NAMES, st.none() | INDICES, kind, st.just([]) | INTERVAL, st.just([]) | value).map(
        lambda t: [t[0], *(bracketed(t[1]) if t[1] else []), *t[2], *t[3], *t[4]]
    )


def section(word: str, valued: bool = False) -> Words:
    return st.lists(declared(valued), min_size=1, max_size=4).map(lambda d: [word, *listed(d)])


ITEMS: Words = st.one_of(
    st.lists(st.sampled_from([["K"], ["R", "=", "2"]]), min_size=1, max_size=3).map(lambda d: ["dim", *listed(d)]),
    section("input"),
    section("param"),
    section("state", valued=True),
    definition(["let"]),
    EXPRESSIONS.map(lambda e: ["const", "c", "=", *e]),
    st.lists(definition([]), min_size=1, max_size=3).map(lambda b: ["output", *listed(b)]),
)
ONCE: Words = st.one_of(
    block(["lift"]),
    block(["combine", "(", "l", ",", "r", ")"]),
    st.just(["combine", "extern"]),
    block(["recurrence"]),
    st.sampled_from(["yes", "no", "assume"]).map(lambda w: ["associative", ":", w]),
    st.sampled_from(["tree", "left"]).map(lambda w: ["order", ":", w]),
)
DOCS = st.sampled_from([[], ['"""one line"""'], ['"""first\n\n     second\n   third \n"""'], ['"""\n  "quoted" \n"""']])


@st.composite
def files(draw: st.DrawFn) -> str:
    """A random file, with spaces, newlines and comments wherever they may stand."""
    items = draw(st.lists(ITEMS, max_size=4)) + draw(st.lists(ONCE, max_size=3, unique_by=lambda w: w[0]))
    body = [word for item in draw(st.permutations(items)) for word in item + draw(SEMICOLON)]
    fn = ["fn", "f", "(", "x", "[", "K", "]", ",", "y", ")", "[", "i", "]", "=", *draw(EXPRESSIONS)]
    words = [*draw(st.sampled_from([[], ["use", '"a.psm"'], fn])), "aggregator", "g", "{", *draw(DOCS), *body, "}"]
    random = draw(st.randoms(use_true_random=False))
    gaps = [" "] * 12 + ["\n", "\n\n\n", "\t", "\r\n", " # note\n", "\n# a\n  # b  \n", "#\n"]
    return "".join(random.choice(gaps) + word for word in words) + random.choice(gaps)


@settings(deadline=None, max_examples=150)
@given(files())
def test_any_layout(text: str) -> None:
    check(text)
