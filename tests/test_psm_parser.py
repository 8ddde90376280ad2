"""The .psm grammar and parser: what parses to what, where it stands, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lark.exceptions import GrammarError

from psmc import assets
from psmc.diagnostics import PsmcError
from psmc.frontend import names, psm
from psmc.frontend import surface as s
from psmc.source import MAX_SOURCE_BYTES, SourceFile, Span

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").rglob("*.psm"))

EVERYTHING = '''# every construct of the language
use "lib.psm"
const eps = 1e-6
fn l2norm(x[K], e)[i] = x[i] * rsqrt(sum[j] x[j]^2 + e)
aggregator everything {
  """What it is.

     Indented."""
  dim K, V
  dim R = 2
  input q[K], k[R, K] : complex in [0, 1], p[K] : int
  input g in (-1/2, inf); param w[K] : real in (-inf, 2^-3 + 1e-3]
  state A[K, K] = eye, S[K, V] : complex in [0, 1) = 0, m in (0, inf) = -inf
  let n[i] = l2norm(q, eps)[i]
  const tau = 2
  fn twice(x) = 2 * x
  lift { A[i, m] = eye(i, m); let t = q{-1}[p[i]]; S[i, j] = t  m = k[0, 0] }
  combine (l, r) {
    A[i, m] = sum[p] r.A[i, p] * l.A[p, m]
    for r in R { S[i, j] = where(l.m <= r.m and not l.m == 0 or 1 < 2, l.S[i, j], -prev.S[i, j]) }
    m = max(l.m, r.m) + max[i, j] S[i, j] - prod[i] g
  }
  output o[j] = sum[i] q[i] * S[i, j] / sqrt(K), z = m
  output u = prev.m
  associative: no
  order: left
}
aggregator other { state s = 0 combine extern associative: assume }
aggregator third { state s = 0 recurrence { s = s + 1 } associative: yes }
'''


def source(text: str) -> SourceFile:
    return SourceFile("t.psm", text)


def parse(text: str) -> s.File:
    return psm.parse(source(text))


def value(text: str) -> s.ExprNode:
    return parse(f"const c = {text}").consts[0].value


def shape(node: Any) -> str:
    """An expression, fully parenthesised."""
    match node:
        case s.Number(value=number):
            return str(number)
        case s.Inf():
            return "inf"
        case s.Access(owner=owner, name=name, subs=subs, lag=lag):
            text = (f"{owner.text}." if owner else "") + name.text + (f"{{-{lag}}}" if lag else "")
            return text if subs is None else f"{text}[{', '.join(map(shape, subs))}]"
        case s.Call(fn=fn, args=args, subs=subs):
            text = f"{fn.text}({', '.join(map(shape, args))})"
            return text if subs is None else f"{text}[{', '.join(map(shape, subs))}]"
        case s.Unary(op=op, arg=arg):
            return f"({op} {shape(arg)})"
        case s.Binary(op=op, left=left, right=right):
            return f"({shape(left)} {op} {shape(right)})"
        case s.Reduction(op=op, indices=indices, body=body):
            return f"({op}[{', '.join(i.text for i in indices)}] {shape(body)})"
    raise AssertionError(node)


def refused(text: str, code: str) -> PsmcError:
    with pytest.raises(PsmcError) as caught:
        parse(text)
    assert caught.value.diagnostics[0].code == code, str(caught.value)
    assert str(caught.value)
    return caught.value


# --- the grammar ----------------------------------------------------------------------------------


def test_grammar_has_no_conflicts_and_the_loader_refuses_one() -> None:
    text = assets.text("grammar", "psm.lark")
    psm.load(text)
    shift_reduce = text.replace("?factor: power", "?factor: power | factor MINUS factor -> binary")
    assert shift_reduce != text
    with pytest.raises(GrammarError, match="Shift/Reduce"):
        psm.load(shift_reduce)
    reduce_reduce = text.replace("?atom: NUMBER ", "?atom: NUMBER -> inf\n     | NUMBER ")
    assert reduce_reduce != text
    with pytest.raises(GrammarError):
        psm.load(reduce_reduce)


def test_keyword_table_is_the_grammar() -> None:
    assert set(psm._scanner().words) == names.KEYWORDS


def test_assets_stay_inside_their_directory() -> None:
    with pytest.raises(ValueError, match="leaves"):
        assets.text("grammar", "../README.md")


def test_assets_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "psmc"
    (package / "_grammar").mkdir(parents=True)
    (package / "_grammar" / "psm.lark").write_text("installed", encoding="utf-8")
    monkeypatch.setattr(assets, "_PACKAGE", package)
    assets.directory.cache_clear()
    try:
        assert assets.text("grammar", "psm.lark") == "installed"
        with pytest.raises(FileNotFoundError, match="not installed completely"):
            assets.text("templates", "kernel.py.j2")
    finally:
        assets.directory.cache_clear()


# --- what parses to what --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a + b - c", "((a add b) sub c)"),
        ("a - b * c / d", "(a sub ((b mul c) div d))"),
        ("-a ^ b ^ -c", "(neg (a pow (b pow (neg c))))"),
        ("-a * b", "((neg a) mul b)"),
        ("a * -b", "(a mul (neg b))"),
        ("2 - -3", "(2 sub (neg 3))"),
        ("sum[i] x[i] * y[i] + z", "((sum[i] (x[i] mul y[i])) add z)"),
        ("sum[i] q[i] * S[i, j] / sqrt(K)", "(sum[i] ((q[i] mul S[i, j]) div sqrt(K)))"),
        ("a * sum[i] b * sum[j] c / d", "(a mul (sum[i] (b mul (sum[j] (c div d)))))"),
        ("a / -sum[i] b", "(a div (neg (sum[i] b)))"),
        ("-sum[i, j] -x", "(neg (sum[i, j] (neg x)))"),
        ("a + sum[i] b - c", "((a add (sum[i] b)) sub c)"),
        ("max(a, b) * max[i] c", "(max(a, b) mul (max[i] c))"),
        ("not a < b and c or d", "(((not (a lt b)) and c) or d)"),
        ("a or b and c", "(a or (b and c))"),
        ("a + 1 >= b == 2", None),
        ("f(x)[i, 0]", "f(x)[i, 0]"),
        ("f()", "f()"),
        ("x{-1}[p[i], 2]", "x{-1}[p[i], 2]"),
        ("prev.S[i] + l.S", "(prev.S[i] add l.S)"),
        ("1.50e1 + .5 + 2.", "((15 add 1/2) add 2)"),
        ("complex(real(z), left)", "complex(real(z), left)"),
        ("-inf", "(neg inf)"),
        ("a != b", "(a ne b)"),
    ],
)
def test_expressions(text: str, expected: str | None) -> None:
    if expected is None:
        refused(f"const c = {text}", "PSM101")
    else:
        assert shape(value(text)) == expected


def test_everything() -> None:
    file = parse(EVERYTHING)
    assert [u.path for u in file.uses] == ["lib.psm"]
    assert [(c.name.text, shape(c.value)) for c in file.consts] == [("eps", "1/1000000")]
    (fn,) = file.fns
    assert [(p.text, [d.text for d in dims]) for p, dims in fn.params] == [("x", ["K"]), ("e", [])]
    assert [i.text for i in fn.indices] == ["i"]
    agg, extern, third = file.aggregators
    assert agg.doc == "What it is.\n\nIndented."
    kinds = " ".join(type(i).__name__ for i in agg.items)
    assert kinds == (
        "Dim Dim Dim Declared Declared Declared Declared Declared Declared Declared Declared "
        "Assign Const Fn Lift Combine Output Output Claim Order"
    )
    assert [(d.name.text, d.size) for d in agg.items if isinstance(d, s.Dim)] == [("K", None), ("V", None), ("R", 2)]
    declared = {d.name.text: d for d in agg.items if isinstance(d, s.Declared)}
    assert [d.role for d in declared.values()] == ["input"] * 4 + ["param"] + ["state"] * 3
    assert (declared["k"].kind, declared["p"].kind, declared["q"].kind) == ("complex", "int", "real")
    bounds = {n: d.interval and dataclasses.astuple(d.interval)[:4] for n, d in declared.items()}
    assert bounds["k"] == (0, 1, False, False)
    assert bounds["g"] == (Fraction(-1, 2), None, True, True)
    assert bounds["w"] == (None, Fraction(1, 8) + Fraction(1, 1000), True, False)
    assert bounds["S"] == (0, 1, False, True)
    assert bounds["q"] is None
    assert {n: shape(d.identity) for n, d in declared.items() if d.identity} == {"A": "eye", "S": "0", "m": "(neg inf)"}
    combine = next(i for i in agg.items if isinstance(i, s.Combine))
    assert (combine.left.text, combine.right.text) == ("l", "r")
    loop = combine.body[1]
    assert isinstance(loop, s.For) and (loop.var.text, loop.dim.text, len(loop.body)) == ("r", "R", 1)
    lift = next(i for i in agg.items if isinstance(i, s.Lift))
    assert [(a.target.text, a.let) for a in lift.body if isinstance(a, s.Assign)] == [
        ("A", False),
        ("t", True),
        ("S", False),
        ("m", False),
    ]
    outputs = [[a.target.text for a in i.body] for i in agg.items if isinstance(i, s.Output)]
    assert outputs == [["o", "z"], ["u"]]
    assert (agg.items[-2].value, agg.items[-1].value) == ("no", "left")  # type: ignore[union-attr]
    assert any(isinstance(i, s.CombineExtern) for i in extern.items) and extern.items[-1].value == "assume"  # type: ignore[union-attr]
    assert any(isinstance(i, s.Recurrence) for i in third.items)


def test_empty_files() -> None:
    for text in ("", "\n", "# nothing\n", ";;"):
        assert parse(text).aggregators == ()


def nodes(node: Any) -> Iterator[Any]:
    if isinstance(node, tuple):
        for child in node:
            yield from nodes(child)
    elif dataclasses.is_dataclass(node) and not isinstance(node, Span | SourceFile):
        yield node
        for field in dataclasses.fields(node):
            yield from nodes(getattr(node, field.name))


@pytest.mark.parametrize("text", [EVERYTHING, *(p.read_text(encoding="utf-8") for p in EXAMPLES)])
def test_every_span_covers_its_node(text: str) -> None:
    seen = 0
    for node in nodes(parse(text)):
        span = getattr(node, "span", None)
        if span is None:
            continue
        seen += 1
        if isinstance(node, s.Name):
            assert span.text == node.text
        elif isinstance(node, s.ExprNode):
            assert shape(value(f"({span.text})")) == shape(node)
        elif isinstance(node, s.Lift | s.Combine | s.Recurrence | s.Output | s.Claim | s.Order | s.Aggregator):
            keyword = {"claim": "associative"}.get(type(node).__name__.lower(), type(node).__name__.lower())
            assert span.text.startswith(keyword) and span.text[-1] not in " \n;"
        elif isinstance(node, s.Assign):
            assert span.text.startswith("let" if node.let else node.target.text)
        elif isinstance(node, s.Declared):
            assert span.text.startswith(node.name.text)
        elif isinstance(node, s.Interval):
            assert span.text[0] in "([" and span.text[-1] in ")]"
    assert seen > 10


def test_declarations_of_a_decorator() -> None:
    python = source('@aggregator(inputs="q[K] k[K], beta in [0, 1] g : complex", state="a[K]=1 S[K,V]=-inf")')
    start = python.text.index("q[K]")
    found = psm.parse_declarations(python, "input", start, python.text.index('"', start))
    assert [(d.role, d.name.text, d.kind) for d in found] == [
        ("input", "q", "real"),
        ("input", "k", "real"),
        ("input", "beta", "real"),
        ("input", "g", "complex"),
    ]
    assert found[2].span.text == "beta in [0, 1]"
    start = python.text.index("a[K]=1")
    state = psm.parse_declarations(python, "state", start, python.text.index('"', start))
    assert [shape(d.identity) for d in state] == ["1", "(neg inf)"]
    assert state[1].span.text == "S[K,V]=-inf"
    with pytest.raises(PsmcError) as caught:
        psm.parse_declarations(source("q[K] in [1, 0] k[K] = 2"), "input")
    assert [d.code for d in caught.value.diagnostics] == ["PSM106", "PSM110"]


# --- what is refused ------------------------------------------------------------------------------

DEEP = 10_000


@pytest.mark.parametrize(
    "text",
    [
        "(" * DEEP + "x" + ")" * DEEP,
        "(" * DEEP,
        "f(" * DEEP + "x" + ")" * DEEP,
        "x[" * DEEP + "0" + "]" * DEEP,
        "-" * DEEP + "x",
        "not " * DEEP + "x",
        "2 ^ " * DEEP + "x",
        "2 ^ -" * DEEP + "x",
        "sum[i] " * DEEP + "x",
        "x + " * DEEP + "x",
        "x * " * DEEP + "x",
        "x + " * 200_000 + "x",
        "x or " * DEEP + "x",
        "(x * (" * 150 + "x" + "+ x) - x)" * 150,
    ],
    ids=lambda t: t[:8],
)
def test_deep_nesting_is_refused(text: str) -> None:
    start = time.perf_counter()
    refused(f"const c = {text}", "PSM502")
    assert time.perf_counter() - start < 10


def test_too_much_is_refused_before_it_is_parsed() -> None:
    start = time.perf_counter()
    refused("aggregator a { lift { s = max(" + "x, " * 200_000 + ") } }", "PSM501")
    refused("aggregator a { input x } " * 20_000, "PSM501")
    assert time.perf_counter() - start < 5


def test_rows_of_operators_that_are_no_chain() -> None:
    """What begins anew at a bracket, a comparison, a looser operator or the next statement is as deep as it is."""
    for text in (
        "+".join(["2 * x"] * 190), "*".join(["-x"] * 190), "x * " * 150 + "sum[i] " + "x * " * 150 + "x",
        "+".join(["-x ^ -2"] * 190), "x + " * 150 + "x < " + "x + " * 150 + "x",
        "(" + "x + " * 150 + "x) * (" + "x + " * 150 + "x)", " or ".join(["not x < -y and y > 0"] * 100),
    ):  # fmt: skip
        value(text)
    psm.parse(SourceFile("a.psm", "aggregator a { lift { " + "s = x + y * -y " * 300 + "} }"))


def test_deep_blocks_are_refused() -> None:
    refused("aggregator a { lift {" + "for r in R {" * DEEP, "PSM502")


def test_nesting_up_to_the_bound_is_fine() -> None:
    assert shape(value("x" + " + x" * 199)).count("add") == 199
    assert shape(value("(" * 199 + "x" + ")" * 199)) == "x"
    assert shape(value("-" * 199 + "x")).count("neg") == 199


def test_wide_files_are_fine() -> None:
    body = "\n".join(f"s{n} = l.s{n} + r.s{n}" for n in range(3000))
    combine = parse(f"aggregator a {{ combine (l, r) {{ {body} }} }}").aggregators[0].items[0]
    assert isinstance(combine, s.Combine) and len(combine.body) == 3000


@pytest.mark.parametrize("text", ["1e999999999", "1e-999999999", "9" * 100_000, "0." + "0" * 100_000, "1e401"])
def test_numbers_out_of_range(text: str) -> None:
    start = time.perf_counter()
    refused(f"const c = {text}", "PSM504")
    assert time.perf_counter() - start < 10  # a bound on hangs, not a measurement


@pytest.mark.parametrize("text", ["2^9999999999", "(2^64)^64", "(((2^64)^64)^64)^64", "10^64^64"])
def test_bounds_that_explode(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(PsmcError) as caught:
        parse(f"aggregator a {{ input x in (0, {text}] }}")
    assert caught.value.diagnostics[0].code in ("PSM504", "PSM106")
    assert time.perf_counter() - start < 10  # a bound on hangs, not a measurement


@pytest.mark.parametrize(
    "name", ["False", "lambda", "def", "tl", "torch", "triton", "self", "__import__", "__x", "class"]
)
def test_names_of_python_and_triton(name: str) -> None:
    for text in (f"dim {name}", f"input {name}", f"lift {{ {name} = 1 }}", f"lift {{ x = {name} }}", f"let {name} = 1"):
        error = refused(f"aggregator a {{ {text} }}", "PSM104")
        assert error.diagnostics[0].span is not None and error.diagnostics[0].span.text == name


@pytest.mark.parametrize(
    "name", ["_", "_x", "yes", "tree", "left", "complex", "eye", "prev", "l", "summary", "inputs", "int"]
)
def test_names_that_look_special_and_are_not(name: str) -> None:
    assert parse(f"aggregator {name} {{ input {name}[{name}] lift {{ {name} = {name} }} }}").aggregators


def test_several_mistakes_are_reported_together() -> None:
    error = refused("aggregator a { input x in [2, 1], y = 3, None  associative: maybe }", "PSM106")
    assert [d.code for d in error.diagnostics] == ["PSM106", "PSM110", "PSM104", "PSM108"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    large = tmp_path / "large.psm"
    large.write_bytes(b"#" * (10 * MAX_SOURCE_BYTES))
    nul = tmp_path / "nul.psm"
    nul.write_bytes(b"aggregator a {\0}")
    latin = tmp_path / "latin.psm"
    latin.write_bytes("# é".encode("latin-1"))
    for path, code in ((large, "PSM501"), (latin, "PSM102"), (tmp_path, "PSM102"), (tmp_path / "none.psm", "PSM102")):
        with pytest.raises(PsmcError) as caught:
            psm.read(path)
        assert caught.value.diagnostics[0].code == code
        assert caught.value.diagnostics[0].helps
    with pytest.raises(PsmcError) as caught:
        psm.parse(psm.read(nul))
    assert caught.value.diagnostics[0].code == "PSM102"
    refused("#" * (MAX_SOURCE_BYTES + 1), "PSM501")
    refused("#" + "é" * (MAX_SOURCE_BYTES // 2 + 1), "PSM501")


WORDS = [
    *sorted(names.KEYWORDS),
    "x",
    "S",
    "K",
    "β",
    "lambda",
    "0",
    "1.5",
    "2x",
    "1e9",
    "yes",
    '"a"',
    '"',
    '"""',
    "#",
    "\n",
]
MARKS = [*"()[]{},;:=+-*/^<>.!@%&|'\\$?~`", "==", "<=", "\0", "\x1b", "\ud800", "\u00a0", "é", "𝑥"]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(WORDS + MARKS), max_size=40).map(" ".join) | st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        parse(text)
    except PsmcError as error:
        for diagnostic in error.diagnostics:
            assert diagnostic.span is not None and "\x1b" not in str(error)
            assert 0 <= diagnostic.span.start <= diagnostic.span.end <= len(text)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_file_parses_or_is_refused(data: st.DataObject) -> None:
    """A token deleted, doubled, swapped or replaced."""
    tokens = [str(t) for t in psm.tokens(source(EVERYTHING)).code]
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(tokens) - 2))
        how = data.draw(st.sampled_from(["delete", "double", "swap", "replace"]))
        if how == "delete":
            del tokens[at]
        elif how == "double":
            tokens.insert(at, tokens[at])
        elif how == "swap":
            tokens[at], tokens[at + 1] = tokens[at + 1], tokens[at]
        else:
            tokens[at] = data.draw(st.sampled_from(tokens))
    try:
        parse(" ".join(tokens))
    except PsmcError as error:
        assert len(str(error).splitlines()) >= 3


# --- cost and determinism -------------------------------------------------------------------------


def test_messages_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "from psmc.frontend import psm; from psmc.source import SourceFile; from psmc.diagnostics import PsmcError\n"
        "for t in ('aggregator a { x', 'aggregator a { lift { s = ] } }', 'aggregator a { input x k', 'fn f(a) ='):\n"
        "    try: psm.parse(SourceFile('t', t))\n"
        "    except PsmcError as e: print(e)\n"
    )
    texts = set()
    for seed in ("0", "1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        texts.add(run.stdout)
    assert len(texts) == 1 and "PSM101" in texts.pop()
