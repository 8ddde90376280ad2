"""The typed IR: canonical form, canonical text, verifier."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psmc import ir
from psmc.frontend.psm import parse
from psmc.frontend.resolve import resolve
from psmc.ir.canonical import Names, canonical, canonical_assign, fold, tighten
from psmc.ir.rewrite import inline, walk
from psmc.ir.text import show, show_expr, show_interval, show_number
from psmc.ir.verify import verify
from psmc.source import SourceFile

II, J, M = ir.Index("i", "K"), ir.Index("j", "V"), ir.Index("m", "K")


def x(*subs: ir.Sub, name: str = "x") -> ir.Ref:
    return ir.Ref("input", name, subs)


def number(value: int | str) -> ir.Const:
    return ir.Const(Fraction(value))


def mul(*factors: ir.Expr) -> ir.Expr:
    out = factors[0]
    for factor in factors[1:]:
        out = ir.Op("mul", (out, factor))
    return out


def spec(body: str, *, inputs: str = "q[K], k[K], v[V], c", head: str = "") -> ir.Aggregator:
    text = f"""aggregator t {{ dim K, V  {head} input {inputs}  state S[K, V] = 0
      lift {{ S[i, j] = k[i] * v[j] }} combine (l, r) {{ S[i, j] = l.S[i, j] + r.S[i, j] }}
      {body} associative: yes }}"""
    (agg,) = resolve(parse(SourceFile("t.psm", text)))
    return agg


# --- canonical form -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        ("neg", ("1/3",), "-1/3"),
        ("div", ("1", "3"), "1/3"),
        ("sub", ("1", "3"), "-2"),
        ("mul", ("2/3", "3"), "2"),
        ("pow", ("2", "-2"), "1/4"),
    ],
)
def test_fold_is_exact(op: str, args: tuple[str, ...], expected: str) -> None:
    assert fold(op, tuple(number(a) for a in args)) is number(expected)


def test_fold_leaves_what_has_no_value_or_grows() -> None:
    for op, left, right in (("div", 1, 0), ("pow", 0, -1), ("pow", 7, 10**9), ("pow", 2, 300)):
        folded = fold(op, (number(left), number(right)))
        assert isinstance(folded, ir.Op) and folded.args == (number(left), number(right))
    assert fold("neg", (ir.Infinity(),)) is ir.Infinity(True)
    assert isinstance(fold("add", (number(1), x())), ir.Op)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("sum[i] q[i] * S[i, j] / c", "(sum[m] q[m] * S[m, j]) / c"),
        ("sum[i] c * q[i] * S[i, j]", "c * sum[m] q[m] * S[m, j]"),
        ("sum[i] q[i] * c * S[i, j] * v[j]", "(sum[m] q[m] * S[m, j]) * c * v[j]"),
        ("sum[i] c * v[j] * q[i]", "c * v[j] * sum[m] q[m]"),
        ("sum[i] c / q[i]", "c * sum[m] 1 / q[m]"),
        ("sum[i] 1 / q[i]", "sum[m] 1 / q[m]"),
        ("sum[i] q[i] * (c * k[i])", "sum[m] q[m] * (c * k[m])"),  # only the chain itself, nothing is flattened
        ("sum[i] (q[i] + c)", "sum[m] (q[m] + c)"),
        ("max[i] c * q[i]", "max[m] c * q[m]"),  # c may be negative
        ("prod[i] c * q[i]", "prod[m] c * q[m]"),
        ("sum[i, m] q[i] * k[m] * c", "(sum[m] q[m]) * (sum[m] k[m]) * c"),
        ("sum[i] sum[m] k[m] * S[i, j]", "(sum[m] k[m]) * sum[m] S[m, j]"),
        ("sum[i] 2 * q[i] * 3", "2 * (sum[m] q[m]) * 3"),
    ],
)
def test_sums_are_pulled_tight(before: str, after: str) -> None:
    (tight,) = spec(f"output o[j] = {before} + v[j]").readout.results
    text = f"o[i] = {after} + v[j]".replace("j]", "i]").replace("m", "j")
    assert show_expr(tight.value) == text.split(" = ", 1)[1].replace("suj", "sum").replace("jax", "max")


def test_canonical_names_skip_declared_ones() -> None:
    agg = spec("output o[a, b] = sum[d] q[a] * v[b] * S[d, b]", inputs="q[K], k[K], v[V], n, m")
    (result,) = agg.readout.results
    assert [i.name for i in result.indices] == ["i", "j"]
    assert show_expr(result.value) == "q[i] * v[j] * sum[p] S[p, j]"


def test_canonical_names_never_run_out() -> None:
    names = Names(["i", "m1"])
    assert [names[n] for n in (0, 6, 7, 8, 9, 10)] == ["j", "u", "i1", "j1", "n1", "p1"]


def test_renamed_indices_give_identical_expressions() -> None:
    one = spec("output o[j] = sum[i] q[i] * S[i, j] / sqrt(K), n = sum[i, j] S[i, j] * q[i]")
    two = spec("output o[alpha] = sum[b] q[b] * S[b, alpha] / sqrt(K), n = sum[u, w] S[u, w] * q[u]")
    assert one == two
    assert all(a.value is b.value for a, b in zip(one.readout.results, two.readout.results, strict=True))


def test_order_of_products_and_sums_is_kept() -> None:
    texts = ["q[i] * (c * k[i])", "q[i] * c * k[i]", "(q[i] + c) + k[i]", "q[i] + (c + k[i])", "c * k[i] * q[i]"]
    shown = [show_expr(spec(f"output o[i] = {t}").readout.results[0].value) for t in texts]
    assert shown == [t.replace("(q[i] + c) + k[i]", "q[i] + c + k[i]") for t in texts]


def test_canonical_is_idempotent_and_prunes() -> None:
    agg = spec("output o[j] = sum[i] q[i] * S[i, j] / c")
    assert canonical(agg) == agg
    dead = replace(agg, lift=replace(agg.lift, lets=(ir.Assign("dead", (), number(1)),)))  # type: ignore[type-var]
    assert canonical(dead) == agg


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0", "0"), ("-3", "-3"), ("1/2", "0.5"), ("-1/8", "-0.125"), ("1/3", "1/3"), ("1/1000000", "1e-6"),
        ("3/2000000", "1.5e-6"), ("100", "100"), ("30000000", "3e7"), ("123/100", "1.23"), ("1/1024", "0.0009765625"),
        ("1/1000", "0.001"),
    ],
)  # fmt: skip
def test_numbers(value: str, text: str) -> None:
    assert show_number(Fraction(value)) == text
    assert Fraction(text) == Fraction(value)


def test_intervals() -> None:
    assert show_interval(ir.Interval(None, Fraction(0), True, False)) == "(-inf, 0]"
    assert show_interval(ir.Interval(Fraction(1, 2), None, False, True)) == "[0.5, inf)"


@pytest.mark.parametrize(
    "text",
    [
        "q[i] * (-2)", "-2 * q[i]", "(-2)^c * q[i]", "q[i]^(-1)", "-q[i]^2", "(-q[i])^2", "-(q[i] * c)", "-q[i] * c",
        "c * (c - (c - k[i]))", "c * (c - (-c))", "q[i] / (c * k[i])", "q[i] / c * k[i]", "(q[i] + c) * k[i]",
        "-sum[j] k[j]", "-(sum[j] k[j]) * c", "c * (-sum[j] k[j])", "c * (sum[j] k[j]) * q[i]", "c * sum[j] k[j]",
        "(sum[j] k[j])^2", "max[j] (-k[j])", "max[j, m] k[j] * S[j, m]", "max[j] k[j] * max[m] S[j, m]",
        "sum[j] k[j] * max[m] S[j, m]", "where(q[i] > 0 and not (c < 1) or c == 2, 1, 0)",
        "where((q[i] > 0 or c > 0) and c != 1, 1, inf)", "1/3 * q[i]", "q[i] * (1/3)", "q[i]^0.5", "(q[i]^2)^2",
        "q[i]^(c^2)", "q{-1}[i] * q{-64}[i]", "(sum[j] prev.S[i, j]) * eye(i, i)", "i * K",
        "logaddexp(q[i], max(c, -inf))",
    ],
)  # fmt: skip
def test_expressions_round_trip(text: str) -> None:
    agg = spec(f"output o[i] = q[i] + ({text})")
    assert show_expr(agg.readout.results[0].value) == f"q[i] + {text}" or text.startswith(("-", "where"))
    again = resolve(parse(SourceFile("again", show(agg))))
    assert again == (agg,)
    assert show(again[0]) == show(agg)


EVERYTHING = '''
aggregator everything {
  """Says "everything"

    indented, ends in a quote: "x"
  """
  dim K, V, R = 2
  input q[K] in (-inf, 0.5], k[R, K], v[V], p[K] : int in [0, 4], z[K] : complex, gate in [0, 1]
  param A[K, V] in (0, inf), b
  state S[K, V] = 0, E[K, K] = 2 * eye - 1, w[K] : int = iota, n in (0, inf) = 1/3, u[K] : complex = 0, m = -inf
  let scale = 1 / sqrt(K)
  let kk = sum[i] k[0, i] * k[1, i] * scale
  let unused_by_outputs[i] = q[i] * kk
  lift {
    let g = sigmoid(gate)
    S[i, j] = unused_by_outputs[i] * v[j] * g
    E[i, j] = eye(i, j) - k[0, i] * k[1, j]
    w[i] = p[p[i]]
    n = g; u[i] = z[i] * complex(0, 1); m = q{-2}[0] + i0
  }
  combine (l, r) {
    S[i, j] = l.S[i, j] + A[i, j] * r.S[i, j]
    E[i, j] = sum[a] r.E[i, a] * l.E[a, j]
    w[i] = r.w[l.w[i]]
    n = l.n + r.n
    u[i] = l.u[i] * conj(r.u[i]) + b
    m = max(l.m, r.m)
  }
  output o[j] = (sum[i] q[i] * S[i, j]) * kk - prev.n, e = n
  output S[i, j] = S[i, j]
  associative: yes
}
'''.replace("q{-2}[0] + i0", "gate{-2}")


def test_everything_round_trips() -> None:
    (agg,) = resolve(parse(SourceFile("everything", EVERYTHING)))
    verify(agg)
    text = show(agg)
    (again,) = resolve(parse(SourceFile("again", text)))
    assert again == agg
    assert show(again) == text
    assert agg.doc == 'Says "everything"\n\nindented, ends in a quote: "x"'


def test_show_prints_the_obvious_spec() -> None:
    assert show(spec("output o[j] = sum[i] q[i] * S[i, j] / sqrt(K)", inputs="q[K], k[K] in (0, 1], v[V]")) == (
        "aggregator t {\n"
        "  dim K, V\n"
        "  input q[K], k[K] in (0, 1], v[V]\n"
        "  state S[K, V] = 0\n"
        "\n"
        "  lift {\n"
        "    S[i, j] = k[i] * v[j]\n"
        "  }\n"
        "\n"
        "  combine (l, r) {\n"
        "    S[i, j] = l.S[i, j] + r.S[i, j]\n"
        "  }\n"
        "\n"
        "  output o[i] = (sum[j] q[j] * S[j, i]) / sqrt(K)\n"
        "\n"
        "  associative: yes\n"
        "}\n"
    )


def test_long_sums_break_and_still_parse() -> None:
    long = " + ".join(f"v[j] * {n} * c" for n in range(2, 40))
    agg = spec(f"output o[j] = {long} - (c + v[j])")
    assert max(len(line) for line in show(agg).splitlines()) <= 100
    assert resolve(parse(SourceFile("again", show(agg)))) == (agg,)


def test_lets_of_the_same_name_in_two_blocks_are_told_apart() -> None:
    agg = spec("output o = c")
    lift = replace(agg.lift, lets=(ir.Assign("w", (), x(name="c")),))  # type: ignore[type-var]
    readout = ir.Block((ir.Assign("w", (), number(2)),), (ir.Assign("o", (), ir.Ref("let", "w", (), "int")),))
    agg = replace(agg, lift=lift, readout=readout)
    (again,) = resolve(parse(SourceFile("again", show(agg))))
    assert again.readout.results[0].value is number(2)


# --- random expressions: text round trip, canonical form keeps values ----------------------------

SCALARS = [x(name="c"), number(2), number("1/3"), number(-1)]


def _vectors(index: ir.Index) -> list[ir.Expr]:
    return [x(index, name="q"), x(index, name="k")] if index.dim == "K" else [x(index, name="v")]


@st.composite
def expressions(draw: st.DrawFn, scope: tuple[ir.Index, ...] = (J,), depth: int = 4) -> ir.Expr:
    """Expressions over q[K], k[K], v[V], c and S[K, V] with bound indices of unique names."""
    leaves = [*SCALARS, *(leaf for index in scope for leaf in _vectors(index))]
    rows, cols = [i for i in scope if i.dim == "K"], [i for i in scope if i.dim == "V"]
    leaves += [ir.Ref("state", "S", (a, b)) for a, b in product(rows, cols)]
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(leaves))
    op = draw(st.sampled_from(["add", "sub", "mul", "mul", "mul", "div", "neg", "max", "sum", "sum", "max[]", "pow"]))

    def sub(inner: tuple[ir.Index, ...] = scope) -> ir.Expr:
        return draw(expressions(inner, depth - 1))

    if op in ("sum", "max[]"):
        bound = ir.Index(f"b{len(scope)}", draw(st.sampled_from(["K", "V"])))
        head = draw(st.sampled_from(_vectors(bound)))
        body = sub((*scope, bound))
        body = body if bound in body.free else ir.Op("mul", (body, head))
        return ir.Reduce(op[:3], bound, body)
    if op == "neg":
        return ir.Op("neg", (sub(),))
    if op == "pow":
        return ir.Op("pow", (sub(), number(draw(st.integers(-2, 3)))))
    if op == "div":
        return ir.Op(
            "div", (sub(), draw(st.sampled_from([x(name="c"), number(3), *(ir.Op("exp", (v,)) for v in leaves[4:5])])))
        )
    return ir.Op(op, (sub(), sub()))


def evaluate(root: ir.Expr, env: dict[ir.Index, int]) -> Fraction | None:
    """Exact value with K = 2, V = 3; None where undefined. exp is any positive function here."""

    @cache
    def go(node: ir.Expr, at: tuple[tuple[ir.Index, int], ...]) -> Fraction | None:
        where = dict(at)
        match node:
            case ir.Const(value=value):
                return value
            case ir.Ref(name=name, subs=subs):
                position = [where[s] for s in subs if isinstance(s, ir.Index)]
                seed = sum(ord(ch) for ch in name) * 31 + sum((7 * n + 3) * (p + 1) for n, p in enumerate(position))
                return Fraction(seed % 17 - 8 or 5, seed % 5 + 1)
            case ir.Reduce(op=op, index=index, body=body):
                size = {"K": 2, "V": 3}[index.dim]
                values = [go(body, tuple(sorted({**where, index: n}.items()))) for n in range(size)]
                if any(v is None for v in values):
                    return None
                return sum(values, Fraction(0)) if op == "sum" else max(values)  # type: ignore[arg-type, type-var]
            case ir.Op(op=op, args=args):
                values = [go(a, at) for a in args]
                if any(v is None for v in values):
                    return None
                return _apply(op, [v for v in values if v is not None])
        raise AssertionError(node)

    return go(root, tuple(sorted(env.items())))


def _apply(op: str, values: list[Fraction]) -> Fraction | None:
    first, last = values[0], values[-1]
    match op:
        case "add":
            return first + last
        case "sub":
            return first - last
        case "mul":
            return first * last
        case "div":
            return first / last if last else None
        case "neg":
            return -first
        case "max":
            return max(first, last)
        case "exp":
            return first * first + 1
        case "pow":
            big = max(first.numerator.bit_length(), first.denominator.bit_length()) > 2000
            return None if big or (first == 0 and last < 0) else Fraction(first ** int(last))
    raise AssertionError(op)


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_canonical_form_keeps_values(expr: ir.Expr) -> None:
    names = Names(["K", "V", "q", "k", "v", "c", "S", "o"])
    out = canonical_assign(ir.Assign("o", (J,), expr), names)
    assert canonical_assign(out, names) == out
    assert tighten(out.value) is out.value
    for at in range(3):
        before, after = evaluate(expr, {J: at}), evaluate(out.value, {out.indices[0]: at})
        assert before is None or after is None or before == after


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_random_specs_round_trip(expr: ir.Expr) -> None:
    base = spec("output o[j] = v[j]")
    value = ir.Op("add", (expr, x(J, name="v")))  # j always has a dim
    agg = canonical(replace(base, readout=ir.Block((), (ir.Assign("o", (J,), value),))))
    verify(agg)
    text = show(agg)
    again = resolve(parse(SourceFile("again", text)))
    assert again == (agg,)
    assert show(again[0]) == text


# --- verifier -----------------------------------------------------------------------------------


def _broken() -> list[tuple[str, ir.Aggregator]]:
    agg = spec("output o[j] = sum[i] q[i] * S[i, j]")
    lift, rule = agg.lift, agg.combine
    assert isinstance(lift, ir.Block) and isinstance(rule, ir.Block)

    def readout(value: ir.Expr, *indices: ir.Index) -> ir.Aggregator:
        return replace(agg, readout=ir.Block((), (ir.Assign("o", indices, value),)))

    (s,) = agg.state
    return [
        ("exactly one of", replace(agg, combine=None)),
        ("exactly one of", replace(agg, recurrence=lift)),
        ("no state", replace(agg, state=(), lift=None)),
        ("assigns", replace(agg, combine=ir.Block())),
        ("reads input", replace(agg, combine=replace(rule, results=lift.results))),
        ("reads left", replace(agg, lift=replace(lift, results=rule.results))),
        ("unbound i", readout(x(II, name="q"))),
        ("2 subscripts, not 1", readout(x(II, II, name="q"), II)),
        ("runs over K, not V", readout(x(II, name="v"), II)),
        ("position 0 of K", readout(x(0, name="q"))),
        ("undeclared input", readout(x(name="nothing"))),
        ("before it is defined", readout(ir.Ref("let", "y", ()))),
        ("is bound twice", readout(ir.Reduce("sum", II, x(II, name="q")), II)),
        ("lag 1", readout(ir.Ref("state", "S", (II, J), "real", 1), II, J)),
        ("not complex", readout(ir.Ref("input", "c", (), "complex"))),
        ("condition", readout(ir.Op("lt", (x(name="c"), number(0))))),
        ("a gather by real", readout(x(x(name="c"), name="q"))),
        ("unknown dim", readout(ir.DimValue("Z"))),
        ("appears twice among lets", replace(agg, lift=replace(lift, lets=(ir.Assign("y", (), number(1)),) * 2))),
        ("name of something declared", replace(agg, lift=replace(lift, lets=(ir.Assign("q", (), number(1)),)))),
        ("has dims", replace(agg, state=(replace(s, identity=ir.Assign("S", (), number(0))),))),
        ("appears twice among dims", replace(agg, inputs=(*agg.inputs, ir.Tensor("K")))),
        ("extern", replace(agg, combine=ir.Extern())),
        ("an order without", replace(agg, order="left")),
    ]


@pytest.mark.parametrize(("text", "agg"), _broken(), ids=lambda v: v if isinstance(v, str) else "")
def test_verifier_finds(text: str, agg: ir.Aggregator) -> None:
    with pytest.raises(AssertionError, match=text):
        verify(agg)


def test_inlining_twice_captures_nothing() -> None:
    """An index that a reduction further out had to rename is incoming further in."""
    i, j, m = (ir.Index(x, "K") for x in "ijm")

    def ref(name: str, *subs: ir.Index) -> ir.Expr:
        return ir.Ref("let" if name in ("q", "far") else "param", name, subs)

    def product(index: ir.Index, a: ir.Expr, b: ir.Expr) -> ir.Expr:
        return ir.Reduce("sum", index, ir.Op("mul", (a, b)))

    q = ir.Assign("q", (i, j), product(m, ref("r", i, m), ref("w", m, j)))
    far = ir.Assign("far", (i, j), product(m, ref("q", i, m), ref("k", j, m)))
    h = ir.Assign("h", (i, j), product(m, ref("far", i, m), ref("v", m, j)))
    (found,) = inline(ir.Block((q, far), (h,))).results
    assert found.value.free == {i, j}
    for node in walk(found.value):
        assert not isinstance(node, ir.Ref) or len(set(node.subs)) == 2, show_expr(found.value)
