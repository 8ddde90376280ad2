"""The resolver: what names, indices and kinds mean. Each mistake's text is pinned in `tests/bad/PSM2*.txt`."""

from __future__ import annotations

import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psmc import ir
from psmc.diagnostics import PsmcError
from psmc.diagnostics.catalogue import CATALOGUE
from psmc.frontend import psm
from psmc.frontend import surface as sf
from psmc.frontend.resolve import resolve
from psmc.ir.text import show, show_assign, show_expr
from psmc.ir.verify import verify
from psmc.source import SourceFile, Span

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").rglob("*.psm"))


def one(text: str) -> ir.Aggregator:
    (agg,) = resolve(psm.parse(SourceFile("t.psm", text)))
    verify(agg)
    return agg


def errors(text: str) -> list[tuple[str, str]]:
    """(code, underlined text) of every diagnostic."""
    with pytest.raises(PsmcError) as caught:
        resolve(psm.parse(SourceFile("t.psm", text)))
    return [(d.code, d.span.text if d.span else "") for d in caught.value.diagnostics]


def vector(body: str, head: str = "", tail: str = "", claim: str = "associative: yes") -> str:
    """A spec over x[K], g with one component s[K]."""
    return f"""{head}
      aggregator t {{ dim K  input x[K], g  state s[K] = 0
      lift {{ {body} }} combine (l, r) {{ s[i] = l.s[i] + r.s[i] }} {tail} {claim} }}"""


def lift_of(body: str, head: str = "") -> str:
    """The lifted s, as text."""
    block = one(vector(body, head)).lift
    assert block is not None
    return "; ".join(show_assign(a) for a in (*block.lets, *block.results))


@pytest.mark.parametrize("code", [c for c in CATALOGUE if "PSM200" < c < "PSM230"])
def test_every_code_is_raised_and_pinned(code: str) -> None:
    assert list((ROOT / "tests" / "bad").glob(f"{code}_*.psm"))
    assert any(f'"{code}"' in p.read_text(encoding="utf-8") for p in (ROOT / "psmc" / "frontend").glob("*.py"))


def test_docstrings_are_trimmed() -> None:
    agg = one('aggregator t { """  two  \n     lines \n """ state s = 0 combine (l, r) { s = l.s } associative: yes }')
    assert agg.doc == "two\nlines"
    assert one(show(agg)) == agg


# --- real specs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_round_trip(path: Path) -> None:
    for agg in resolve(psm.parse(psm.read(path))):
        verify(agg)
        text = show(agg)
        assert resolve(psm.parse(SourceFile("again", text))) == (agg,)
        assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("path", EXAMPLES[::3], ids=lambda p: p.stem)
def test_index_names_do_not_matter(path: Path) -> None:
    """Renaming every index variable of the source gives an equal aggregator."""
    source = psm.read(path)
    (before,) = resolve(psm.parse(source))
    used = {i.name for i in _indices(psm.parse(source))}
    names = {name: f"{name}{name}_" for name in used}
    renamed = re.sub(r"(?<![\w.])(\w+)(?!\w)", lambda m: names.get(m[1], m[1]), source.text)
    (after,) = resolve(psm.parse(SourceFile("renamed", renamed)))
    assert after.combine == before.combine and after.lift == before.lift and after.readout == before.readout


def _indices(node: object) -> list[ir.Index]:
    """Every left-hand side and reduction index of a surface file, as (name, '')."""
    found: list[ir.Index] = []
    if isinstance(node, sf.Assign | sf.Reduction):
        found += [ir.Index(n.text, "") for n in node.indices]
    for name in getattr(node, "__match_args__", ()):
        value = getattr(node, name)
        for child in value if isinstance(value, tuple) else (value,):
            found += _indices(child)
    return found


def test_design_text_of_gla() -> None:
    agg = one("""
    aggregator gla { dim K, V
      input q[K], k[K], v[V]
      input g[K] in (-inf, 0]
      state a[K] = 1, S[K, V] = 0
      lift { S[i, j] = k[i] * v[j]; a[i] = exp(g[i]) }
      combine (l, r) { a[i] = l.a[i] * r.a[i]
        S[i, j] = r.a[i] * l.S[i, j] + r.S[i, j] }
      output o[j] = sum[i] q[i] * S[i, j] / sqrt(K)
      associative: yes }""")
    assert [d.name for d in agg.dims] == ["K", "V"] and agg.claim == "yes" and agg.order == "tree"
    assert agg.inputs[3] == ir.Tensor("g", ("K",), "real", ir.Interval(None, Fraction(0), True, False))
    assert agg.lift is not None and [r.name for r in agg.lift.results] == ["a", "S"]  # in the state's order
    assert show_expr(agg.output.results[0].value) == "(sum[j] q[j] * S[j, i]) / sqrt(K)"
    assert agg.component("S").identity.value is ir.Const(Fraction(0))


# --- statements in order ----------------------------------------------------------------------------


def test_assigned_names_are_new_values() -> None:
    agg = one("""aggregator t { input score, value  state m = -inf, u = 0
      lift { m = score; u = value }
      combine (l, r) { m = max(l.m, r.m); u = l.u * exp(l.m - m) + r.u * exp(r.m - m) }
      associative: yes }""")
    assert isinstance(agg.combine, ir.Block)
    assert [show_assign(a) for a in (*agg.combine.lets, *agg.combine.results)] == [
        "m_1 = max(l.m, r.m)",
        "m = m_1",
        "u = l.u * exp(l.m - m_1) + r.u * exp(r.m - m_1)",
    ]


def test_recurrence_reads_newest_and_prev() -> None:
    agg = one("""aggregator t { dim K  input x[K], g  state s[K] = 0
      recurrence { s[i] = g * s[i]; let e[i] = x[i] - prev.s[i]; s[i] = s[i] + e[i] }
      output o[i] = s[i] - prev.s[i]
      associative: yes }""")
    assert agg.recurrence is not None
    assert [show_assign(a) for a in (*agg.recurrence.lets, *agg.recurrence.results)] == [
        "s_1[i] = g * prev.s[i]",
        "e[i] = x[i] - prev.s[i]",
        "s[i] = s_1[i] + e[i]",
    ]


def test_lets_are_reassigned_and_dead_ones_dropped() -> None:
    assert lift_of("let y = g; let dead = y * 2; y = y * y; s[i] = x[i] * y") == "y = g; y_1 = y * y; s[i] = x[i] * y_1"


def test_fresh_names_avoid_the_users() -> None:
    assert lift_of("let s_1 = g; s[i] = x[i]; s[i] = s[i] * s_1") == "s_1 = g; s_2[i] = x[i]; s[i] = s_2[i] * s_1"


def test_loops_unroll_with_literal_subscripts() -> None:
    agg = one("""aggregator t { dim K, R = 3  input k[R, K], b[R]  state s[K] = 0
      recurrence { for r in R { let w = b[r] * (r + 1); s[i] = s[i] * w + k[r, i] } }
      associative: yes }""")
    assert agg.recurrence is not None
    assert [show_assign(a) for a in (*agg.recurrence.lets, *agg.recurrence.results)] == [
        "w = b[0] * 1",
        "s_1[i] = prev.s[i] * w + k[0, i]",
        "w_1 = b[1] * 2",
        "s_2[i] = s_1[i] * w_1 + k[1, i]",
        "w_2 = b[2] * 3",
        "s[i] = s_2[i] * w_2 + k[2, i]",
    ]


def test_nested_loops_and_loop_variables_end() -> None:
    head = "aggregator t { dim R = 2, P = 2  input k[R, P]  state s = 0 "
    agg = one(head + "recurrence { for r in R { for p in P { s = s + k[r, p] } } } associative: yes }")
    assert agg.recurrence is not None and len(agg.recurrence.lets) == 3
    assert show_assign(agg.recurrence.results[0]) == "s = s_3 + k[1, 1]"
    text = head + "recurrence { for r in R { s = s + k[r, 0] } s = s + k[r, 1] } associative: yes }"
    assert errors(text) == [("PSM204", "r")]
    text = head + "recurrence { for r in R { for r in P { s = s + k[r, r] } } } associative: yes }"
    assert errors(text) == [("PSM205", "r")]


def test_aggregator_level_lets_reach_every_block_that_reads_them() -> None:
    agg = one(
        vector(
            "s[i] = y[i]",
            tail="let y[i] = x[i] * w  let w = exp(g)  let n = sum[i] s[i]  output o = n * w",
        )
    )
    assert agg.lift is not None
    assert [a.name for a in agg.lift.lets] == ["w", "y"]
    assert [a.name for a in agg.readout.lets] == ["w", "n"]


def test_unused_lets_are_checked_all_the_same() -> None:
    assert errors(vector("s[i] = x[i]", tail="let y = nothing")) == [("PSM201", "nothing")]


def test_a_combine_may_share_lets_of_params() -> None:
    agg = one("""aggregator t { input x  param a  state s = 0  let w = exp(a)
      lift { s = w * x } combine (l, r) { s = w * l.s + r.s } associative: yes }""")
    assert isinstance(agg.combine, ir.Block) and [a.name for a in agg.combine.lets] == ["w"]


# --- consts, identities, gathers, taps ----------------------------------------------------------------


def test_consts_are_exact() -> None:
    assert lift_of("s[i] = x[i] * b", "const b = a * 3 + 1e-6  const a = 1/3") == "s[i] = x[i] * 1.000001"
    assert lift_of("s[i] = x[i] * a", "const a = sqrt(2) / 2") == "s[i] = x[i] * (sqrt(2) / 2)"
    inner = "aggregator t { input x  const c = 2^-3  state s = c lift { s = c * x } combine (l, r) { s = l.s + r.s }"
    assert one(inner + " associative: yes }").component("s").identity.value is ir.Const(Fraction(1, 8))


def test_identities() -> None:
    agg = one("""aggregator t { dim K, N = 4  input x[K]
      state A[K, K] = eye, p[N] : int = iota, m = -inf, B[K, K] = where(eye == 1, 0, -inf), c[K] = 1 / sqrt(K)
      lift { A[i, j] = x[i] * x[j]; p[n] = n; m = 0; B[i, j] = 0; c[i] = 1 }
      combine (l, r) { A[i, j] = l.A[i, j]; p[n] = r.p[l.p[n]]; m = max(l.m, r.m); B[i, j] = r.B[i, j]; c[i] = l.c[i] }
      associative: yes }""")
    i, j, n = ir.Index("i", "K"), ir.Index("j", "K"), ir.Index("i", "N")
    assert agg.component("A").identity.value is ir.Eye(i, j)
    assert agg.component("p").identity.value is ir.IndexValue(n)
    assert agg.component("m").identity.value is ir.Infinity(True)
    assert show_expr(agg.component("B").identity.value) == "where(eye(i, j) == 1, 0, -inf)"
    assert show_expr(agg.component("c").identity.value) == "1 / sqrt(K)"
    gather = agg.combine.result("p").value  # type: ignore[union-attr]
    assert isinstance(gather, ir.Ref) and isinstance(gather.subs[0], ir.Ref) and gather.kind == "int"


def test_subscripts() -> None:
    agg = one("""aggregator t { dim N = 3  input x[N], p[N] : int, j0 : int  const last = 2  state s = 0
      lift { s = x[p[j0]] + x[last] + sum[i] x[2 - i] * x[i] * i * N + x[0] } combine (l, r) { s = l.s + r.s }
      associative: yes }""")
    assert agg.lift is not None
    assert show_expr(agg.lift.results[0].value) == "x[p[j0]] + x[2] + (sum[i] x[2 - i] * x[i] * i) * N + x[0]"
    bad = (
        "aggregator t { dim N = 3  input x[N], y  state s = 0  lift { s = x[%s] }"
        " combine (l, r) { s = l.s } associative: yes }"
    )
    assert errors(bad % "3") == [("PSM227", "3")]
    assert errors(bad % "-1") == [("PSM227", "-1")]
    assert errors(bad % "1/2") == [("PSM208", "1/2")]
    assert errors(bad % "y") == [("PSM208", "y")]
    assert errors(bad % "N") == [("PSM204", "N")]


def test_eye_of_literals_is_a_number() -> None:
    agg = one("""aggregator t { dim R = 2  input x[R]  state s = 0
      recurrence { for r in R { s = s + eye(r, 0) * x[r] } } associative: yes }""")
    assert agg.recurrence is not None
    assert show_assign(agg.recurrence.results[0]) == "s = s_1 + 0 * x[1]"
    text = vector("s[i] = x[i]", tail="let m[i] = sum[j] eye(i, j) * x[i]  output o[i] = m[i]")
    assert [a.dim for a in one(text).readout.lets[0].indices] == ["K"]  # j's dim comes through eye


def test_taps() -> None:
    assert lift_of("s[i] = x[i] - x{-1}[i] * g{-64}") == "s[i] = x[i] - x{-1}[i] * g{-64}"
    for space in ("l.s{-1}[i]", "K{-1}"):
        assert [c for c, _ in errors(vector("s[i] = x[i]").replace("l.s[i]", space))] == ["PSM221"]


def test_kinds() -> None:
    agg = one("""aggregator t { input z : complex, n : int  state s : complex = 0, m : int = 0, b = 0
      lift { let hot = n > 0 and not (n == 3)  s = z * n; m = where(hot, n, 0); b = abs(z) }
      combine (l, r) { s = l.s * conj(r.s); m = l.m + r.m; b = l.b / r.b }
      output re = real(s), im = imag(s), c = complex(b, m)
      associative: yes }""")
    assert agg.lift is not None and agg.lift.lets[0].value.kind == "bool"
    assert [r.value.kind for r in agg.readout.results] == ["real", "real", "complex"]


# --- fns and use --------------------------------------------------------------------------------------

NORM = "const eps = 1e-6  fn norm(y[D])[i] = y[i] / sqrt(sum[m] y[m] * y[m] + eps)\n"


def test_fns_expand_hygienically() -> None:
    expected = "s[i] = x[i] / sqrt(sum[j] x[j] * x[j] + 1e-6)"
    assert lift_of("s[m] = norm(x)[m]", NORM) == expected
    assert lift_of("s[y] = norm(x)[y]", NORM) == expected  # names of the fn and of its user do not meet
    assert lift_of("s[i] = norm(x{-2})[i]", NORM) == expected.replace("x[", "x{-2}[")


def test_fns_of_fns_dims_and_scalars() -> None:
    head = NORM + "fn mean(y[D]) = (sum[i] y[i]) / D  fn both(y[D], c)[i] = c * norm(y)[i] + mean(y)  fn two() = 2"
    shown = lift_of("let z[i] = x[i] * g  s[i] = both(z, g + two())[i]", head)
    assert shown == ("z[i] = x[i] * g; s[i] = (g + 2) * (z[i] / sqrt(sum[j] z[j] * z[j] + 1e-6)) + (sum[j] z[j]) / K")


def test_fns_take_operands_and_prev() -> None:
    agg = one("""fn total(y[D]) = sum[i] y[i]
      aggregator t { dim K  input x[K]  state s[K] = 0
      lift { s[i] = x[i] } combine (l, r) { s[i] = l.s[i] * total(r.s) } output o = total(prev.s) + total(s)
      associative: yes }""")
    assert show_expr(agg.readout.results[0].value) == "sum[i] prev.s[i] + sum[i] s[i]"
    assert isinstance(agg.combine, ir.Block)
    assert show_expr(agg.combine.results[0].value) == "l.s[i] * sum[j] r.s[j]"


@pytest.mark.parametrize(
    ("head", "body", "expected"),
    [
        ("fn f(y) = y + x", "s[i] = f(g)", ("PSM201", "x")),
        ("fn f(y[A], z[A])[i] = y[i] * z[i]", "s[i] = f(x, x, g)[i]", ("PSM218", "f(x, x, g)[i]")),
        ("fn f(y[A])[i] = y[i]", "s[i] = f(x)", ("PSM203", "f(x)")),
        ("fn f(y[A])[i] = y[i]", "s[i] = f(x[i])[i]", ("PSM218", "x[i]")),
        ("fn f(y[A])[i] = y[i]", "s[i] = f(g)[i]", ("PSM218", "g")),
        ("fn f(y[A])[i] = y[i]", "s[i] = f(K)[i]", ("PSM218", "K")),
        ("fn f(y) = y", "s[i] = f(x)", ("PSM203", "x")),
        ("fn f(y)[i] = y", "s[i] = f(g)[i]", None),
        ("fn f(y, y) = y", "s[i] = x[i]", ("PSM202", "y")),
        ("fn f(y[i])[i] = y[i]", "s[i] = f(x)[i]", ("PSM202", "i")),
        ("fn exp(y) = y", "s[i] = x[i]", ("PSM202", "exp")),
        ("fn f(y) = y fn f(z) = z", "s[i] = x[i]", ("PSM202", "f")),
        ("const g = 2", "s[i] = g * x[i]", ("PSM202", "g")),
        ("const a = 1 const a = 2", "s[i] = x[i]", ("PSM202", "a")),
        ("const a = 1 > 0", "s[i] = x[i]", ("PSM208", "1 > 0")),
        ("fn f(y) = f(y)", "s[i] = f(g) * x[i]", ("PSM216", "f(y)")),
        ("fn f(y) = y", "s[i] = ff(g)", ("PSM201", "ff")),
        ("", "s[i] = exp(x)", ("PSM203", "x")),
        ("", "s[i] = exp(g)[i]", ("PSM203", "exp(g)[i]")),
        ("", "s[i] = add(g, g)", ("PSM201", "add")),
        ("", "s[i] = i[i]", ("PSM203", "i[i]")),
        ("", "s[i] = K[i]", ("PSM203", "K[i]")),
        ("", "let i = 2 s[i] = x[i]", ("PSM202", "i")),
        ("", "let x = 2 s[i] = x", ("PSM202", "x")),
        ("", "let y = g let y = g s[i] = y", ("PSM202", "y")),
        ("", "s[i] = x[i] + sum[i] x[i]", ("PSM205", "i")),
        ("", "s[i] = x[i] + sum[j, j] x[j]", ("PSM205", "j")),
        ("", "s[i] = x[i] + eye", ("PSM201", "eye")),
    ],
)  # fmt: skip
def test_mistakes(head: str, body: str, expected: tuple[str, str] | None) -> None:
    if expected is None:
        one(vector(body, head))
    else:
        assert errors(vector(body, head)) == [expected]


def _library(files: dict[str, str]) -> tuple[ir.Aggregator, ...]:
    def load(path: str, span: Span) -> sf.File:
        assert span.text.startswith("use")
        return psm.parse(SourceFile(path, files[path]))

    return resolve(load("main", Span(SourceFile("", "use"), 0, 3)), load=load)


MAIN = (
    "aggregator t { dim K input x[K] state s[K] = 0 lift { s[i] = norm(x)[i] }"
    " combine (l, r) { s[i] = l.s[i] } associative: yes }"
)


def test_use() -> None:
    (agg,) = _library(
        {
            "main": 'use "lib" ' + MAIN,
            "lib": 'use "base" ' + NORM.replace("const eps = 1e-6", ""),
            "base": "const eps = 1e-6",
        }
    )
    assert show_expr(agg.lift.results[0].value) == "x[i] / sqrt(sum[j] x[j] * x[j] + 1e-6)"  # type: ignore[union-attr]
    # the lib's consts are its own: 'eps' of another file neither meets nor shadows it
    _library({"main": 'use "lib" use "lib" const eps = 3 ' + MAIN, "lib": 'use "base" ' + NORM[17:], "base": NORM[:16]})


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"main": 'use "a" ' + MAIN, "a": 'use "b" ' + NORM, "b": 'use "a"'}, "PSM224"),
        ({"main": 'use "main" ' + NORM + MAIN}, "PSM224"),
        ({"main": 'use "a" ' + NORM + MAIN, "a": NORM}, "PSM202"),
        ({"main": 'use "a" use "b" ' + MAIN, "a": NORM, "b": NORM}, "PSM202"),
        ({"main": 'use "a" ' + MAIN, "a": "const norm = 2"}, "PSM201"),
        ({"main": 'use "a" ' + MAIN, "a": 'use "b"', "b": NORM}, "PSM201"),  # not re-exported
    ],
)
def test_use_goes_wrong(files: dict[str, str], code: str) -> None:
    with pytest.raises(PsmcError) as caught:
        _library(files)
    assert caught.value.diagnostics[0].code == code


# --- sections and claims -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        ("yes", ("yes", "tree")),
        ("assume", ("assume", "tree")),
        ("no", ("no", "tree")),
        ("no order: left", ("no", "left")),
    ],
)
def test_claims(claim: str, expected: tuple[str, str]) -> None:
    agg = one(vector("s[i] = x[i]", claim=f"associative: {claim}"))
    assert (agg.claim, agg.order) == expected


def test_a_recurrence_without_a_law_runs_from_the_left() -> None:
    agg = one("aggregator t { input x state s = 0 recurrence { s = tanh(s + x) } associative: no }")
    assert (agg.claim, agg.order) == ("no", "left")


def test_leaves_without_lift_and_extern() -> None:
    agg = one("aggregator t { dim K state s[K] = 0 combine (l, r) { s[i] = l.s[i] + r.s[i] } associative: yes }")
    assert agg.lift is None and agg.leaf_inputs == (ir.Tensor("s", ("K",)),)
    assert agg.output.results[0].value is ir.Ref("state", "s", (ir.Index("i", "K"),))
    extern = one("aggregator t { dim C input x[C] state s[C] = 0 lift { s[c] = x[c] } combine extern associative: no }")
    assert extern.combine == ir.Extern() and extern.order == "tree"


def test_outputs() -> None:
    agg = one(vector("s[i] = x[i]", tail="output s[i] = s[i] * g, n = sum[i] s[i]  output p[i] = prev.s[i]"))
    assert [r.name for r in agg.readout.results] == ["s", "n", "p"]
    assert errors(vector("s[i] = x[i]", tail="output o = g  output o = 2")) == [("PSM202", "o")]
    assert errors(vector("s[i] = x[i]", tail="output x[i] = s[i]")) == [("PSM202", "x")]
    assert errors(vector("s[i] = x[i]", tail="output o = g > 0")) == [("PSM208", "g > 0")]


def test_several_aggregators_report_together() -> None:
    texts = [vector("s[i] = y[i]").replace("aggregator t", f"aggregator t{n}") for n in range(3)]
    assert errors("\n".join(texts)) == [("PSM201", "y[i]")] * 3
    good = [vector("s[i] = x[i]").replace("aggregator t", f"aggregator t{n}") for n in range(3)]
    assert [a.name for a in resolve(psm.parse(SourceFile("t", "\n".join(good))))] == ["t0", "t1", "t2"]


def test_what_reads_a_mistake_is_silent() -> None:
    body = "let a = nothing  let b = a * 2  s[i] = b * x[i]  s[i] = s[i] + a"
    assert errors(vector(body, tail="output o[i] = s[i] * nope")) == [("PSM201", "nothing"), ("PSM201", "nope")]


def test_origins() -> None:
    text = vector("let y = g; s[i] = y * x[i]; s[i] = 2 * s[i]", tail="output o = g")
    agg = one(text)
    shown = {key: span.text for key, span in agg.origin.items()}
    assert shown["name"] == "t" and shown["claim"] == "associative: yes"
    assert shown["input x"] == "x[K]" and shown["state s"] == "s[K] = 0" and shown["identity s"] == "0"
    assert shown["lift s"] == "s[i] = 2 * s[i]" and shown["output o"] == "o = g"
    assert shown["combine"].startswith("combine (l, r)") and shown["combine s"] == "s[i] = l.s[i] + r.s[i]"
    assert agg.where("combine z", "combine s") is agg.origin["combine s"]


# --- limits ----------------------------------------------------------------------------------------------


def test_expansion_is_bounded_in_time_and_depth() -> None:
    fns = "".join(f"fn f{n}(y) = f{n - 1}(y) * f{n - 1}(y)\n" for n in range(1, 40)) + "fn f0(y) = y\n"
    assert [c for c, _ in errors(vector("s[i] = f39(x[i])", fns))] == ["PSM217"]
    deep = "".join(f"fn f{n}(y) = f{n - 1}(exp(f{n - 1}(y)))\n" for n in range(1, 11)) + "fn f0(y) = sin(y)\n"
    assert [c for c, _ in errors(vector("s[i] = f10(x[i])", deep))] == ["PSM217"]
    loops = "for a in R { for b in R { for c in R { s = s + x[a] } } }"
    text = f"aggregator t {{ dim R = 64 input x[R] state s = 0 recurrence {{ {loops} }} associative: yes }}"
    assert [c for c, _ in errors(text)] == ["PSM217"]


def test_deepest_source_resolves() -> None:
    sums = "".join(f"sum[j{n}] x[j{n}] * (2 + " for n in range(60)) + "g" + ")" * 60
    signs = "-" * 90 + "g"
    for text in ("exp(" * 195 + "g" + ")" * 195, "g" + " + g" * 190, signs, "g * (1 + " * 90 + "g" + ")" * 90, sums):
        agg = one(vector(f"let y = {text} s[i] = y"))
        assert one(show(agg)) == agg
    gather = (
        "aggregator t { dim N input p[N] : int, j : int state s : int = 0 lift { s = %s }"
        " combine extern associative: no }"
    )
    agg = one(gather % ("p[" * 190 + "j" + "]" * 190))
    assert one(show(agg)) == agg


# --- random texts: never anything but an aggregator or a diagnostic ----------------------------------------

SOURCES = [psm.read(p).text for p in EXAMPLES]
WORDS = re.findall(
    r"\S+",
    "l.S r.a S[i,j] a[i] sum[i] sum[m] max[j] k[i] v[j] exp( eye(i,j) prev.S x{-1} inf let dim V 2 ( ) [ ] * + - / ^ =",
)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_mutated_examples_never_crash(seed: int, edits: int) -> None:
    rng = random.Random(seed)
    tokens = re.findall(r"\w+|\s+|.", rng.choice(SOURCES))
    for _ in range(edits):
        at = rng.randrange(len(tokens))
        kind = rng.randrange(4)
        if kind == 0:
            del tokens[at]
        elif kind == 1:
            tokens[at] = rng.choice(WORDS)
        elif kind == 2:
            other = rng.randrange(len(tokens))
            tokens[at], tokens[other] = tokens[other], tokens[at]
        else:
            tokens.insert(at, tokens[rng.randrange(len(tokens))])
    try:
        found = resolve(psm.parse(SourceFile("mutant", "".join(tokens))))
    except PsmcError as error:
        assert str(error)
        return
    for agg in found:
        verify(agg)
        assert resolve(psm.parse(SourceFile("again", show(agg)))) == (agg,)
