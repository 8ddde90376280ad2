"""The decorator frontend: same IR as the .psm form, numpy's meaning of every array operation, mistakes told well."""

from __future__ import annotations

import linecache
import math
import os
import runpy
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import psmc
from psmc import ir, lang
from psmc.diagnostics import PsmcError
from psmc.diagnostics.catalogue import CATALOGUE
from psmc.frontend.decorator import extern, snake_case, trace
from psmc.frontend.psm import parse, read
from psmc.frontend.resolve import resolve
from psmc.ir.ops import OPS
from psmc.ir.rewrite import refs
from psmc.lang import exp, eye, let, maximum, outer, sqrt, where
from psmc.reference import fold
from psmc.source import SourceFile

EXAMPLES = Path(__file__).parent.parent / "examples"
INPUTS = "q[K] k[K] v[V] g[K] in (-inf, 0]"
STATE = "a[K]=1 S[K,V]=0"


def compiled(cls: type, **arguments: Any) -> ir.Aggregator:
    (agg,) = resolve(trace(cls, **{"associative": True, **arguments}))
    return agg


def spec(text: str) -> ir.Aggregator:
    (agg,) = resolve(parse(SourceFile("spec.psm", text)))
    return agg


def mistake(action: Callable[[], object]) -> Any:
    """The first diagnostic of a PsmcError, which must render with its place."""
    with pytest.raises(PsmcError) as caught:
        action()
    found = caught.value.diagnostics[0]
    assert found.span is not None
    assert f"error[{found.code}]" in str(caught.value)
    return found


# --- the same IR --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.psm")), ids=lambda p: p.stem)
def test_examples_give_the_same_ir(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[ir.Aggregator] = []

    def aggregator(**arguments: Any) -> Callable[[type], None]:
        return lambda cls: found.extend(resolve(trace(cls, **arguments)))

    monkeypatch.setattr(psmc, "aggregator", aggregator, raising=False)
    monkeypatch.setattr(psmc, "extern", extern, raising=False)
    runpy.run_path(str(path.with_suffix(".py")))
    assert tuple(found) == resolve(parse(read(path)))


def test_returned_values_that_others_use_are_statements() -> None:
    class Lse:
        def combine(l, r):  # noqa: E741
            m = maximum(l.m, r.m)
            return dict(s=l.s * exp(l.m - m) + r.s * exp(r.m - m), m=m)

    want = spec("""aggregator lse { state m = -inf, s = 0  associative: yes
      combine (l, r) { m = max(l.m, r.m)  s = l.s * exp(l.m - m) + r.s * exp(r.m - m) } }""")
    assert compiled(Lse, state="m=-inf s=0") == want


def test_a_let_of_the_components_own_name_is_the_component() -> None:
    class Named:
        def combine(l, r):  # noqa: E741
            m = let("m", maximum(l.m, r.m))
            return dict(u=l.u * exp(l.m - m) + r.u, m=m)

    assert compiled(Named, state="m=-inf u=0") == spec("""aggregator named { state m = -inf, u = 0  associative: yes
      combine (l, r) { m = max(l.m, r.m)  u = l.u * exp(l.m - m) + r.u } }""")


def test_let_names_a_value_and_output_may_use_it() -> None:
    class Norm:
        def lift(x):
            return dict(s=x.x)

        def combine(l, r):  # noqa: E741
            return dict(s=l.s + r.s)

        def output(s, x):
            size = let("size", sqrt((s.s * s.s).sum()))
            return dict(y=s.s / size, n=size)

    agg = compiled(Norm, inputs="x[K]", state="s[K]=0")
    assert [a.name for a in agg.readout.lets] == ["size"]
    assert [r.space for a in agg.readout.results for r in refs(a.value)] == ["state", "let", "let"]


# --- numpy's meaning ----------------------------------------------------------------------------

SHARED = "abs arange conj einsum exp expm1 eye log1p logaddexp maximum minimum outer sign tanh where"
NUMPY = SimpleNamespace(**{name: getattr(np, name) for name in SHARED.split()})
SIZES = {"K": 3, "V": 2}
# (expression over x and a namespace of functions, dims of the result)
MEANING: list[tuple[Callable[[Any, Any], Any], str]] = [
    (lambda x, f: x.k[:, None] * x.v, "K, V"),
    (lambda x, f: f.outer(x.k, x.v) - x.A * 2 + 1, "K, V"),
    (lambda x, f: (x.A @ x.v) / (1 + x.k * x.k), "K"),
    (lambda x, f: x.k @ x.A @ x.v, ""),
    (lambda x, f: x.A.T @ x.M @ x.A, "V, V"),
    (lambda x, f: x.M.T - x.M + f.eye(x.dims.K), "K, K"),
    (lambda x, f: x.A.sum(0) + x.A.sum(axis=1).sum() - x.A.sum(), "V"),
    (lambda x, f: x.A.max(axis=1) - x.A.max(), "K"),
    (lambda x, f: x.A.sum(-1, keepdims=True) * x.A, "K, V"),
    (lambda x, f: x.A.mean(0) + x.k.mean(), "V"),
    (lambda x, f: x.M.prod(1) * x.k, "K"),
    (lambda x, f: (x.M[:, :, None] + x.A[None, :, :]).max(1), "K, V"),
    (lambda x, f: f.einsum("ij,jk,k->i", x.M, x.A, x.v), "K"),
    (lambda x, f: f.einsum("ii,ij->j", x.M, x.A), "V"),
    (lambda x, f: f.einsum("ij,ij", x.A, x.A) * x.k, "K"),
    (lambda x, f: f.where(x.v < x.A, x.A, -f.abs(x.v)) ** 2, "K, V"),
    (lambda x, f: f.where((x.k > 0) & ~(x.k > 0.5) | (x.k < -1), 1, x.k), "K"),
    (lambda x, f: f.arange(x.dims.K) * x.k + x.dims.V, "K"),
    (lambda x, f: f.tanh(2 - x.A) / f.exp(-x.v * 0.5) + 3 / (4 + x.A * x.A), "K, V"),
    (lambda x, f: x.A[..., None].sum(0)[:, 0] if f is NUMPY else x.A[..., None].sum(0).sum(1), "V"),
    (lambda x, f: x.A.transpose(1, 0) @ x.k - x.v, "V"),
    (lambda x, f: f.minimum(x.A, 0)[None].sum(0).T, "V, K"),
]


def evaluate(fn: Callable[[Any, Any], Any], dims: str, state: str = "") -> tuple[np.ndarray, np.ndarray]:
    """The value by numpy, and by trace, resolve and the reference interpreter."""
    rng = np.random.default_rng(3)
    values = {
        "k": rng.normal(size=3),
        "v": rng.normal(size=2),
        "A": rng.normal(size=(3, 2)),
        "M": rng.normal(size=(3, 3)),
    }

    def lift(x):
        return dict(y=fn(x, lang))

    def combine(l, r):  # noqa: E741
        return dict(y=l.y + r.y)

    cls = type("Traced", (), {"lift": lift, "combine": combine})
    agg = compiled(cls, inputs="k[K] v[V] A[K, V] M[K, K]", state=f"y[{dims}]=0" if dims else "y=0")
    outputs, _ = fold(agg, {n: torch.from_numpy(a)[None, None] for n, a in values.items()})
    concrete = SimpleNamespace(**values, dims=SimpleNamespace(**SIZES))
    return np.asarray(fn(concrete, NUMPY)), outputs["y"][0, 0].numpy()


@pytest.mark.parametrize("number", range(len(MEANING)))
def test_arrays_mean_what_numpy_means(number: int) -> None:
    fn, dims = MEANING[number]
    expected, got = evaluate(fn, dims)
    assert expected.shape == got.shape
    np.testing.assert_allclose(got, expected, rtol=1e-12)


SHAPES = ((), ("K",), ("V",), ("K", "V"), ("K", "K"))
LEAVES = {("K",): "k", ("V",): "v", ("K", "V"): "A", ("K", "K"): "M"}


@st.composite
def expressions(draw: st.DrawFn, shape: tuple[str, ...], depth: int = 3) -> str:
    """Python text of an expression of this shape over x.k, x.v, x.A, x.M."""
    if depth == 0 or draw(st.integers(0, 4)) == 0:
        scalars = st.sampled_from(["2", "0.5", "x.k.sum()", "x.A.max()"])
        return f"x.{LEAVES[shape]}" if shape else draw(scalars)
    below = depth - 1
    kind = draw(st.sampled_from(["binary", "unary", "scaled", "reduce", "matmul"]))
    if kind == "binary":
        op = draw(st.sampled_from(["+", "-", "*"]))
        return f"({draw(expressions(shape, below))} {op} {draw(expressions(shape, below))})"
    if kind == "unary":
        return f"f.tanh({draw(expressions(shape, below))})"
    if kind == "scaled":
        return f"({draw(expressions((), below))} * {draw(expressions(shape, below))})"
    if kind == "reduce" and shape in (("K",), ("V",)):
        axis = 1 if shape == ("K",) else 0
        return f"{draw(expressions(('K', 'V'), below))}.sum({axis})"
    if kind == "matmul" and shape == ("K",):
        return f"({draw(expressions(('K', 'K'), below))} @ {draw(expressions(('K',), below))})"
    if kind == "matmul" and shape == ("K", "V"):
        return f"({draw(expressions(('K', 'K'), below))} @ {draw(expressions(('K', 'V'), below))})"
    if len(shape) == 2:
        return f"f.outer({draw(expressions(shape[:1], below))}, {draw(expressions(shape[1:], below))})"
    return f"(-{draw(expressions(shape, below))})"


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SHAPES).flatmap(lambda s: st.tuples(st.just(s), expressions(s))))
def test_random_expressions_mean_what_numpy_means(case: tuple[tuple[str, ...], str]) -> None:
    shape, text = case
    fn = eval(f"lambda x, f: {text}")  # our own text, made above
    expected, got = evaluate(fn, ", ".join(shape))
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=1e-9, atol=1e-9)


def test_gather_and_literal_places() -> None:
    class Perm:
        def lift(x):
            return dict(p=x.x, y=x.v[x.x] + x.v[0])

        def combine(l, r):  # noqa: E741
            return dict(p=r.p[l.p], y=l.y + r.y)

    agg = compiled(Perm, dims="N=3", inputs="x[N] : int, v[N]", state="p[N] : int = iota, y[N]=0")
    x, v = torch.tensor([[[2, 0, 1]]]), torch.tensor([[[1.0, 2.0, 4.0]]])
    outputs, _ = fold(agg, {"x": x, "v": v})
    assert outputs["y"][0, 0].tolist() == [5.0, 2.0, 3.0]


# --- recurrences --------------------------------------------------------------------------------


def test_assignments_are_statements_and_old_values_stay_old() -> None:
    class Swap:
        def recurrence(s, x):
            before = s.a
            s.a = s.a + x.x
            middle = s.a
            s.a = 2 * s.a
            s.b = before + 10 * middle + 100 * s.a

    agg = compiled(Swap, inputs="x", state="a=0 b=0")
    outputs, _ = fold(agg, {"x": torch.tensor([[1.0, 3.0]])})
    assert outputs["a"][0].tolist() == [2.0, 10.0]
    assert outputs["b"][0].tolist() == [0 + 10 + 200, 2 + 50 + 1000]


def test_prev_and_taps() -> None:
    class Tap:
        def recurrence(s, x, prev):
            s.h = s.h + x.x.lag(1)
            s.h = s.h + prev.h + x.x.lag(2)

        def output(s, x, prev):
            return dict(y=s.h - prev.h, z=x.x.lag(1).lag(1))

    agg = compiled(Tap, inputs="x", state="h=0")
    assert agg == spec("""aggregator tap { input x state h = 0  associative: yes
      recurrence { h = h + x{-1}  h = h + prev.h + x{-2} }  output y = h - prev.h, z = x{-2} }""")


def test_loops_are_unrolled_over_fixed_dims() -> None:
    class Steps:
        def recurrence(s, x):
            for r in x.dims.R:
                s.h = x.a[r] * s.h + x.b[r]

    agg = compiled(Steps, dims="R=3", inputs="a[R] b[R]", state="h=0")
    assert agg == spec("""aggregator steps { dim R = 3 input a[R], b[R] state h = 0 associative: yes
      recurrence { for r in R { h = a[r] * h + b[r] } } }""")


def test_params_in_combine_and_by_name() -> None:
    class Mixed:
        def lift(x, p):
            return dict(s=x.x * x.w * x.params.w * p.w)

        def combine(l, r, p):  # noqa: E741
            return dict(s=p.w * l.s + r.s)

    agg = compiled(Mixed, inputs="x", params="w", state="s=0", associative=False)
    assert [r.space for a in agg.lift.results for r in refs(a.value)] == ["input", "param"]


def test_inherited_and_static_methods() -> None:
    class Base:
        def combine(l, r):  # noqa: E741
            return dict(s=l.s + r.s)

    class Child(Base):
        @staticmethod
        def lift(x):
            return dict(s=np.float64(2) * x.x * np.float32(0.5))

    want = spec("""aggregator child { input x state s = 0 associative: yes
      lift { s = 2 * x * 0.5 }  combine (l, r) { s = l.s + r.s } }""")
    assert compiled(Child, inputs="x", state="s=0") == want


def test_extern_keeps_its_callable() -> None:
    def rule(l, r):  # noqa: E741
        return r

    class Rule:
        combine = extern(rule)

    file = trace(Rule, state="s[K]=0", associative="assume")
    node = next(i for i in file.aggregators[0].items if type(i).__name__ == "CombineExtern")
    assert node.fn is rule
    assert resolve(file)[0].combine == ir.Extern()
    assert mistake(lambda: extern(torch.nn.Linear)).code == "PSM258"


# --- mistakes -----------------------------------------------------------------------------------


def lift_of(fn: Callable[[Any], Any], **more: Any) -> type:
    def combine(l, r):  # noqa: E741
        return dict(a=l.a * r.a, S=r.a[:, None] * l.S + r.S)

    return type("Case", (), {"lift": fn, "combine": combine, **more})


BAD: dict[str, tuple[Callable[[Any], Any], str, str, str]] = {
    # name: lift, code, text under the carets, part of the message
    "shapes": (lambda x: dict(a=x.g, S=x.k * x.v), "PSM250", "x.k * x.v", "[K] and [V]"),
    "wrong shape": (lambda x: dict(a=x.g, S=outer(x.v, x.k)), "PSM251", "outer(x.v, x.k)", "[V, K]"),
    "wrong rank": (lambda x: dict(a=outer(x.g, x.g), S=0), "PSM251", "outer(x.g, x.g)", "[K, K]"),
    "unknown input": (lambda x: dict(a=x.gate, S=0), "PSM201", "x.gate", "'gate'"),
    "unknown dim": (lambda x: dict(a=x.g / x.dims.J, S=0), "PSM201", "x.dims.J", "'J'"),
    "unknown method": (lambda x: dict(a=x.g.cumsum(), S=0), "PSM253", "x.g.cumsum", "'cumsum'"),
    "if": (lambda x: dict(a=x.g if x.g > 0 else 1, S=0), "PSM252", "x.g > 0", "truth value"),
    "chain": (lambda x: dict(a=where(0 < x.g < 1, x.g, 1), S=0), "PSM252", "0 < x.g < 1", "truth value"),
    "numpy": (lambda x: dict(a=np.exp(x.g), S=0), "PSM252", "np.exp(x.g)", "numpy"),
    "numpy sum": (lambda x: dict(a=np.sum(x.g), S=0), "PSM252", "np.sum(x.g)", "numpy"),
    "numpy array": (lambda x: dict(a=np.ones(3) * x.g, S=0), "PSM252", "np.ones(3) * x.g", "numpy"),
    "torch": (lambda x: dict(a=torch.exp(x.g), S=0), "PSM252", "torch.exp(x.g)", "torch"),
    "tensor": (lambda x: dict(a=x.g * torch.ones(3), S=0), "PSM252", "x.g * torch.ones(3)", "tor"),
    "math": (lambda x: dict(a=math.exp(x.g), S=0), "PSM252", "math.exp(x.g)", "not a number"),
    "unpack": (lambda x: dict([*x.g]), "PSM252", "[*x.g]", "iterated"),
    "in place": (lambda x: x.g.__setitem__(0, 1), "PSM252", "x.g.__setitem__(0, 1)", "in place"),
    "string": (lambda x: dict(a=x.g + "1", S=0), "PSM252", 'x.g + "1"', "a str"),
    "slice": (lambda x: dict(a=x.g[1:], S=0), "PSM257", "x.g[1:]", "sliced"),
    "too many": (lambda x: dict(a=x.g[:, :], S=0), "PSM257", "x.g[:, :]", "2 subscripts"),
    "axis": (lambda x: dict(a=x.g.sum(1), S=0), "PSM257", "x.g.sum(1)", "no axis 1"),
    "own error": (lambda x: dict(a=[][0], S=0), "PSM254", "[][0]", "IndexError"),
    "modulo": (lambda x: dict(a=x.g % 2, S=0), "PSM254", "x.g % 2", "TypeError"),
    "not a dict": (lambda x: [x.g], "PSM253", "", "a list"),
    "nothing": (lambda x: None, "PSM253", "", "nothing"),
    "tap of a value": (lambda x: dict(a=(2 * x.g).lag(1), S=0), "PSM257", "(2 * x.g).lag(1)", "earlier"),
    "tap too far": (lambda x: dict(a=x.g.lag(65), S=0), "PSM107", "x.g.lag(65)", "64"),
    "nan": (lambda x: dict(a=x.g * float("nan"), S=0), "PSM252", 'x.g * float("nan")', "nan"),
    "huge": (lambda x: dict(a=x.g * 10**100, S=0), "PSM504", "x.g * 10**100", "range"),
    "outer": (lambda x: dict(a=x.g, S=outer(x.k, 1)), "PSM250", "outer(x.k, 1)", "two vectors"),
    "eye": (lambda x: dict(a=x.g, S=eye(3)), "PSM257", "eye(3)", "a dim"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_in_a_method(name: str) -> None:
    fn, code, under, message = BAD[name]
    found = mistake(lambda: compiled(lift_of(fn), inputs=INPUTS, state=STATE))
    assert found.code == code
    assert message in found.message
    assert found.helps
    if under:
        assert found.span.text == under
    assert found.span.source.name.endswith("test_decorator.py")


def test_an_exception_of_user_code_is_chained() -> None:
    with pytest.raises(PsmcError) as caught:
        compiled(lift_of(lambda x: 1 / 0), inputs=INPUTS, state=STATE)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_too_deep_and_too_large() -> None:
    def deep(x):
        y = x.g
        for _ in range(1000):
            y = y + 1
        return dict(a=y, S=0)

    def large(x):
        y = x.g
        for _ in range(40):
            y = y * y
        return dict(a=y, S=0)

    assert mistake(lambda: compiled(lift_of(deep), inputs=INPUTS, state=STATE)).code == "PSM502"
    assert mistake(lambda: compiled(lift_of(large), inputs=INPUTS, state=STATE)).code == "PSM217"


def test_methods_and_arguments() -> None:
    def with_self(self, x):
        return dict(a=x.g, S=0)

    def more(x, y):
        return dict(a=x.g, S=0)

    def leak(l, r):  # noqa: E741
        return dict(a=l.a * r.a, S=kept[0])

    kept: list[Any] = []

    def keep(x):
        kept.append(x.v[None, :] * x.k[:, None])
        return dict(a=x.g, S=0)

    arguments = dict(inputs=INPUTS, state=STATE)
    assert "no instance" in mistake(lambda: compiled(lift_of(with_self), **arguments)).helps[0]
    assert mistake(lambda: compiled(lift_of(more), **arguments)).code == "PSM255"
    assert mistake(lambda: compiled(lift_of(keep, combine=leak), **arguments)).code == "PSM256"
    assert mistake(lambda: compiled(type("T", (), {"lfit": keep, "combine": leak}), **arguments)).code == "PSM255"
    assert mistake(lambda: compiled(lift_of(3), **arguments)).code == "PSM255"
    good = lift_of(lambda x: dict(a=exp(x.g), S=outer(x.k, x.v)))
    assert mistake(lambda: compiled(good, inputs=INPUTS, state=STATE, associative="maybe")).code == "PSM108"
    assert mistake(lambda: compiled(good, inputs=INPUTS, state=STATE, order="up")).code == "PSM108"
    assert mistake(lambda: compiled(good, inputs=["q"], state=STATE)).code == "PSM258"
    assert mistake(lambda: compiled(good, inputs=INPUTS, state=STATE, dims="K V R=0.5")).code == "PSM109"
    assert mistake(lambda: compiled(good, inputs=INPUTS, state=STATE, name="for")).code == "PSM104"


def test_places_inside_declaration_strings() -> None:
    class Leaf:
        def combine(l, r):  # noqa: E741
            return dict(s=l.s + r.s)

    def plain() -> None:
        trace(Leaf, inputs="x in [1, 0]", state="s=0", associative=True)

    found = mistake(plain)
    assert (found.code, found.span.text) == ("PSM106", "[1, 0]")
    assert found.span.source.name == "<inputs of Leaf>"  # no decorator call to point into
    namespace: dict[str, Any] = {}
    text = (
        "from psmc.frontend.decorator import trace\n"
        "def deco(**a):\n    return lambda cls: trace(cls, **a)\n"
        "def build():\n"
        "    é = 1\n"
        "    @deco(state='s[K]=0 t[J', inputs='x[K] in [1, 0]', associative=True)\n"
        "    class Leaf:\n"
        "        def combine(l, r): return dict(s=l.s + r.s)\n"
    )
    cell(text, "<cell 1>", namespace)
    found = mistake(namespace["build"])
    assert found.span.source.name == "<cell 1>"
    assert found.span.source.position(found.span.start)[0] == 6


# --- the same diagnostics as a .psm file --------------------------------------------------------


def combine_of(fn: Callable[[Any, Any], Any]) -> type:
    return type("Spec", (), {"lift": lambda x: dict(a=x.g, S=0), "combine": fn})


SAME: dict[str, tuple[Callable[[], Any], str]] = {
    "missing component": (
        lambda: compiled(combine_of(lambda l, r: dict(a=l.a * r.a)), inputs=INPUTS, state=STATE),  # noqa: E741
        "combine (l, r) { a[i] = l.a[i] * r.a[i] }",
    ),
    "extra component": (
        lambda: compiled(combine_of(lambda l, r: dict(a=l.a, S=l.S, b=l.a)), inputs=INPUTS, state=STATE),  # noqa: E741
        "combine (l, r) { a[i] = l.a[i]  S[i, j] = l.S[i, j]  b[i] = l.a[i] }",
    ),
    "unknown component": (
        lambda: compiled(combine_of(lambda l, r: dict(a=l.A, S=l.S)), inputs=INPUTS, state=STATE),  # noqa: E741
        "combine (l, r) { a[i] = l.A[i]  S[i, j] = l.S[i, j] }",
    ),
    "condition as number": (
        lambda: compiled(combine_of(lambda l, r: dict(a=l.a > 0, S=l.S)), inputs=INPUTS, state=STATE),  # noqa: E741
        "combine (l, r) { a[i] = l.a[i] > 0  S[i, j] = l.S[i, j] }",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_both_frontends_say_the_same(name: str) -> None:
    action, combine = SAME[name]
    text = f"""aggregator spec {{ dim K, V  input q[K], k[K], v[V]  input g[K] in (-inf, 0]
      state a[K] = 1, S[K, V] = 0  lift {{ a[i] = g[i]  S[i, j] = 0 }}  {combine}  associative: yes }}"""
    ours, theirs = mistake(action), mistake(lambda: spec(text))
    assert (ours.code, ours.message, ours.helps) == (theirs.code, theirs.message, theirs.helps)


# --- notebooks ----------------------------------------------------------------------------------


def cell(text: str, name: str, namespace: dict[str, Any]) -> None:
    """Run code as a notebook does: its source is in linecache only."""
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(text, name, "exec"), namespace)


CELL = """\
class Sum:
    def combine(l, r):
        return dict(s={})
file = trace(Sum, state='s=0', associative=True)
"""


def test_cells_run_again_and_classes_redefined() -> None:
    namespace: dict[str, Any] = {"trace": trace}
    cell(CELL.format("l.s + r.s"), "<cell>", namespace)
    first = namespace["file"]
    cell(CELL.format("l.s + r.s"), "<cell>", namespace)
    assert resolve(namespace["file"]) == resolve(first)
    found = mistake(lambda: cell("# edited\n\n" + CELL.format("l.s + r.t"), "<cell>", namespace))
    assert (found.span.text, found.span.source.position(found.span.start)[0]) == ("r.t", 5)


def test_without_any_source() -> None:
    namespace: dict[str, Any] = {"trace": trace}
    text = CELL.format("l.s + r.t")
    found = mistake(lambda: exec(compile(text, "<nowhere>", "exec"), namespace))
    assert found.code == "PSM201"


def test_threads() -> None:
    cls = lift_of(lambda x: dict(a=exp(x.g), S=outer(x.k, x.v)))
    found: list[ir.Aggregator] = []
    jobs = [threading.Thread(target=lambda: found.append(compiled(cls, inputs=INPUTS, state=STATE))) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(found) == 4
    assert all(agg == found[0] for agg in found)


# --- psmc.lang on numbers -----------------------------------------------------------------------


def test_every_operator_has_a_function() -> None:
    spelled = {"max": "maximum", "min": "minimum"}
    names = {spelled.get(n, n) for n, info in OPS.items() if info.symbol is None}
    assert names <= set(lang.__all__)
    assert all(hasattr(lang, n) for n in lang.__all__)


PLAIN = {"conj": "conj_physical", "stop": "detach", **{n: f"nn.functional.{n}" for n in ("silu", "gelu", "softplus")},
         "logsigmoid": "nn.functional.logsigmoid"}  # fmt: skip


@pytest.mark.parametrize("name", sorted({*lang._PLAIN} - {"clamp", "complex", "real", "imag", "where"}))
def test_functions_compute_on_numbers(name: str) -> None:
    name = {"max": "maximum", "min": "minimum"}.get(name, name)
    target: Any = torch
    for part in PLAIN.get(name, name).split("."):
        target = getattr(target, part)
    for x in (0.3, 1.0, 40.0):
        args = (x, 0.7) if name in ("maximum", "minimum", "logaddexp") else (x,)
        want = target(*(torch.tensor(a, dtype=torch.float64) for a in args))
        assert getattr(lang, name)(*args) == pytest.approx(float(want), rel=1e-12)


def test_numbers_are_exact() -> None:
    class Ema:
        def recurrence(s, x):
            return dict(s=lang.const(0.9) * s.s + (1 - lang.const(0.9)) * x.x * Fraction(1, 3))

    (agg,) = (compiled(Ema, inputs="x", state="s=0"),)
    assert agg == spec(
        "aggregator ema { input x state s = 0 associative: yes recurrence { s = 0.9 * s + 0.1 * x * (1/3) } }"
    )


def test_snake_case() -> None:
    names = {"GLA": "gla", "GatedDeltanet": "gated_deltanet", "GLARecurrence": "gla_recurrence", "S4D": "s4d",
             "Mamba2": "mamba2", "RgLru": "rg_lru", "my_spec": "my_spec"}  # fmt: skip
    assert {n: snake_case(n) for n in names} == names


# --- pinned texts: PSMC_PIN=1 writes them -------------------------------------------------------

BAD_PYTHON = Path(__file__).parent / "bad_python"


@pytest.mark.parametrize("path", sorted(BAD_PYTHON.glob("*.py")), ids=lambda p: p.stem)
def test_bad_classes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BAD_PYTHON)
    monkeypatch.setattr(psmc, "aggregator", lambda **a: lambda cls: resolve(trace(cls, **a)), raising=False)
    with pytest.raises(PsmcError) as caught:
        runpy.run_path(str(path))
    text = f"{caught.value}\n"
    assert f"[{path.stem[:6]}]" in text
    pinned = path.with_suffix(".txt")
    if os.environ.get("PSMC_PIN"):
        pinned.write_text(text, encoding="utf-8")
    assert text == pinned.read_text(encoding="utf-8")


@pytest.mark.parametrize("code", [c for c in CATALOGUE if "PSM250" <= c <= "PSM258"])
def test_every_code_has_a_bad_class(code: str) -> None:
    assert any(p.name.startswith(code) for p in BAD_PYTHON.glob("*.txt"))
