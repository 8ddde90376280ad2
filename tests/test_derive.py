"""Derivatives: every row and every derived block against torch.autograd in fp64, on an evaluator of its own."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psmc.algebra.prover import prove
from psmc.algebra.verdict import Proved
from psmc.derive.adjoint import Adjoint, adjoint
from psmc.derive.realify import realify, split
from psmc.derive.simplify import make, simplify
from psmc.derive.step import StepBackward, step, step_backward
from psmc.derive.vjp import ROWS, vjp
from psmc.diagnostics import PsmcError
from psmc.frontend.psm import parse, read
from psmc.frontend.resolve import resolve
from psmc.ir import (
    OPS,
    Aggregator,
    Assign,
    Block,
    Component,
    Const,
    Dim,
    DimValue,
    Expr,
    Eye,
    Index,
    IndexValue,
    Infinity,
    Op,
    Reduce,
    Ref,
    Tensor,
)
from psmc.ir.rewrite import walk
from psmc.ir.verify import verify
from psmc.reference.evaluate import Env, run
from psmc.structure.analyse import analyse
from psmc.structure.live import live_state

SIZES = defaultdict(lambda: 2, {"D": 3, "K": 4})


EXAMPLES = Path(__file__).parent.parent / "examples"


def _where_pair(pick: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: torch.where(pick(a, b), a, b)  # a tie reads, and differentiates, the left operand


TORCH: dict[str, Callable[..., Any]] = {
    "or": lambda a, b: a | b,
    "and": lambda a, b: a & b,
    "not": lambda a: ~a,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "pow": lambda a, b: a**b,
    "where": lambda t, a, b: torch.where(t, a.to(torch.result_type(a, b)), b.to(torch.result_type(a, b))),
    "max": _where_pair(lambda a, b: a >= b),
    "min": _where_pair(lambda a, b: a <= b),
    "abs": torch.abs,
    "sign": torch.sign,
    "clamp": torch.clamp,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "logsigmoid": torch.nn.functional.logsigmoid,
    "softplus": torch.nn.functional.softplus,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "erf": torch.erf,
    "logaddexp": torch.logaddexp,
    "stop": lambda a: a.detach(),
    "real": lambda a: a.real if a.is_complex() else a,
    "imag": lambda a: a.imag if a.is_complex() else a * 0,
    "conj": lambda a: a.conj().resolve_conj(),
    "complex": torch.complex,
}

class Evaluator:
    """Scalar by scalar: each node at each assignment of its free indices is one 0-dim tensor."""

    def __init__(self, env: Mapping[tuple[str, str, int], torch.Tensor]) -> None:
        self.env = dict(env)
        self.memo: dict[Any, torch.Tensor] = {}

    def tensor(self, node: Expr, indices: tuple[Index, ...]) -> torch.Tensor:
        def fill(left: tuple[Index, ...], at: dict[Index, int]) -> torch.Tensor:
            if not left:
                return self(node, at)
            return torch.stack([fill(left[1:], {**at, left[0]: k}) for k in range(SIZES[left[0].dim])])

        return fill(indices, {})

    def _sub(self, sub: Any, at: dict[Index, int]) -> int:
        return sub if isinstance(sub, int) else at[sub] if isinstance(sub, Index) else int(self(sub, at))

    def run(self, block: Block) -> dict[str, torch.Tensor]:
        for let in block.lets:
            self.env["let", let.name, 0] = self.tensor(let.value, let.indices)
        return {r.name: self.tensor(r.value, r.indices) for r in block.results}

    def __call__(self, node: Expr, at: dict[Index, int]) -> torch.Tensor:
        here = {i: at[i] for i in node.free}
        key = (node, tuple(sorted(here.items())))
        if key not in self.memo:
            self.memo[key] = self._eval(node, here)
        return self.memo[key]

    def _eval(self, node: Expr, at: dict[Index, int]) -> torch.Tensor:
        def number(value: Any) -> torch.Tensor:
            return torch.tensor(float(value), dtype=torch.float64)

        match node:
            case Const(value=value):
                return number(value)
            case Infinity(negative=negative):
                return number(-math.inf if negative else math.inf)
            case IndexValue(index=index):
                return number(at[index])
            case DimValue(dim=dim):
                return number(SIZES[dim])
            case Eye(row=row, col=col):
                return number(self._sub(row, at) == self._sub(col, at))
            case Ref():
                return self.env[node.space, node.name, node.lag][tuple(self._sub(s, at) for s in node.subs)]
            case Op(op=op, args=args):
                return TORCH[op](*(self(a, at) for a in args))
            case Reduce(op=op, index=index, body=body):
                items = torch.stack([self(body, {**at, index: k}) for k in range(SIZES[index.dim])])
                if op == "max":
                    return items[torch.nonzero(items == items.max())[0, 0]]
                return items.sum(0) if op == "sum" else items.prod(0)
        raise AssertionError(node)


def check(results: list[tuple[Expr, tuple[Index, ...]]], wrt: list[Ref], env: dict[tuple[str, str, int], Any]) -> None:
    """vjp against autograd, with random cotangents of the results' shapes."""
    generator = torch.Generator().manual_seed(5)
    for w in wrt:
        env[w.space, w.name, w.lag] = env[w.space, w.name, w.lag].clone().requires_grad_()
    evaluate = Evaluator(env)
    loss = torch.zeros((), dtype=torch.float64)
    cotangents: list[Expr] = []
    for number, (value, indices) in enumerate(results):
        out = evaluate.tensor(value, indices)
        ct = torch.randn(out.shape, dtype=out.dtype, generator=generator)
        env["let", f"d_{number}", 0] = ct
        cotangents.append(Ref("let", f"d_{number}", indices, "complex" if ct.is_complex() else "real"))
        loss = loss + (out * ct.conj()).real.sum()
    tensors = [env[w.space, w.name, w.lag] for w in wrt]
    expected = torch.autograd.grad(loss, tensors, allow_unused=True) if loss.requires_grad else [None] * len(wrt)
    actual = vjp([r for r, _ in results], cotangents, wrt)
    with torch.no_grad():
        for ref, want, got in zip(wrt, expected, actual, strict=True):
            indices = tuple(s for s in ref.subs if isinstance(s, Index))
            want = torch.zeros_like(env[ref.space, ref.name, ref.lag]) if want is None else want
            for form in (got, None if got is None else simplify(got)):
                value = torch.zeros_like(want) if form is None else Evaluator(env).tensor(form, indices)
                torch.testing.assert_close(value.to(want.dtype).expand(want.shape), want, rtol=1e-9, atol=1e-12)


def x(name: str, *subs: Any, kind: Any = "real", lag: int = 0) -> Ref:
    return Ref("input", name, subs, kind, lag)


def c(value: Any) -> Const:
    return Const(Fraction(value))


def real(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)


POSITIVE = {"log", "log1p", "sqrt", "rsqrt", "pow"}
LOGIC = {"or", "and", "not"}
i, j, k, d = Index("i", "K"), Index("j", "V"), Index("m", "K"), Index("i", "D")


def _row_expression(op: str, args: tuple[Expr, ...]) -> Expr:
    """A real- or complex-valued expression that has `op` at its heart; booleans select."""
    if op in LOGIC:
        tests = tuple(Op("gt", (a, c(0))) for a in args)
        return Op("where", (Op(op, tests), args[0], Op("mul", (args[0], args[0]))))
    if op == "where":
        return Op(op, (Op("gt", (args[0], c(0))), args[1], args[2]))
    node = Op(op, args)
    return Op("where", (node, args[0], Op("mul", (args[1], args[0])))) if node.kind == "bool" else node


def test_every_operator_has_a_row() -> None:
    assert ROWS.keys() == OPS.keys() == TORCH.keys()


@pytest.mark.parametrize("op", sorted(OPS))
def test_row_real(op: str) -> None:
    args = tuple(x(n) for n in "abc"[: OPS[op].arity])
    if op == "clamp":
        for value in (0.3, -2.0, 3.0, -1.0, 1.0):
            numbers = torch.tensor([value, -1.0, 1.0], dtype=torch.float64)
            check([(Op(op, args), ())], list(args), {("input", n, 0): numbers[k] for k, n in enumerate("abc")})
        return
    for seed in range(4):
        env = {("input", n, 0): real(low=0.1 if op in POSITIVE else -2, seed=7 * seed + k) for k, n in enumerate("abc")}
        check([(_row_expression(op, args), ())], list(args), env)


COMPLEX_OPS = ["add", "sub", "mul", "div", "neg", "pow", "where", "exp", "log", "stop", "real", "imag", "conj", "abs"]


@pytest.mark.parametrize("op", COMPLEX_OPS)
@pytest.mark.parametrize("second", ["real", "complex"])
def test_row_complex(op: str, second: Any) -> None:
    arity = OPS[op].arity
    a, b = x("a", kind="complex"), x("b", kind=second)
    args = (a, b)[:arity] if op != "where" else (Op("gt", (x("t"), c(0))), a, b)
    bt = torch.complex(real(seed=2), real(seed=3)) if second == "complex" else real(seed=2, low=0.2)
    at = torch.complex(real(seed=0), real(seed=1))
    env = {("input", "a", 0): at, ("input", "b", 0): bt, ("input", "t", 0): real()}
    check([(Op(op, args), ())], [a, b], env)
    if arity == 2:
        check([(Op(op, (args[1], args[0])), ())], [a, b], env)


@pytest.mark.parametrize("exponent", ["2", "3", "-1", "1/2", "0", "1", "5/2"])
def test_pow_constant(exponent: str) -> None:
    check([(Op("pow", (x("a"), c(exponent))), ())], [x("a")], {("input", "a", 0): real(low=0.2)})


def gradient_at(node: Expr, names: str, *values: float) -> list[float]:
    env = {("input", n, 0): torch.tensor(v, dtype=torch.float64) for n, v in zip(names, values, strict=True)}
    grads = vjp([node], [c(1)], [x(n) for n in names])
    return [0.0 if g is None else float(Evaluator(env)(g, {})) for g in grads]


def test_ties_and_edges() -> None:
    ab = (x("a"), x("b"))
    assert gradient_at(Op("max", ab), "ab", 1.0, 1.0) == [1.0, 0.0]
    assert gradient_at(Op("min", ab), "ab", 1.0, 1.0) == [1.0, 0.0]
    assert gradient_at(Op("abs", ab[:1]), "a", 0.0) == [0.0]
    assert gradient_at(Op("relu", ab[:1]), "a", 0.0) == [0.0]
    clamp = Op("clamp", (x("a"), x("b"), x("c")))
    assert gradient_at(clamp, "abc", 1.0, 1.0, 2.0) == [1.0, 0.0, 0.0]
    assert gradient_at(clamp, "abc", 2.0, 1.0, 2.0) == [1.0, 0.0, 0.0]
    assert gradient_at(clamp, "abc", 0.0, 3.0, 2.0) == [0.0, 0.0, 1.0]
    assert gradient_at(Op("stop", (x("a"),)), "a", 2.0) == [0.0]


def test_nothing_is_poisoned_at_minus_infinity() -> None:
    inf = math.inf
    rescaled = Op("mul", (x("u"), Op("exp", (Op("sub", (x("a"), x("b"))),))))
    assert gradient_at(rescaled, "uab", 3.0, -inf, 0.5) == [0.0, 0.0, -0.0]
    both = Op("logaddexp", (x("a"), x("b")))
    assert gradient_at(both, "ab", -inf, -inf) == [0.5, 0.5]
    assert gradient_at(both, "ab", -inf, 2.0) == [0.0, 1.0]
    assert gradient_at(Op("softplus", (x("a"),)), "a", -inf) == [0.0]


def test_shared_subexpressions_cost_once() -> None:
    node: Expr = x("a")
    for _ in range(60):  # 2^60 paths
        node = Op("mul", (node, Op("sin", (node,))))
    (grad,) = vjp([node], [c(1)], [x("a")])
    assert grad is not None
    assert sum(1 for _ in walk(grad)) < 60 * 10
    env = {("input", "a", 0): torch.tensor(0.3, dtype=torch.float64)}
    assert math.isfinite(float(Evaluator(env)(grad, {})))


INDEXED: dict[str, tuple[Expr, tuple[Index, ...]]] = {
    "contraction": (Reduce("sum", i, Op("mul", (x("q", i), x("S", i, j)))), (j,)),
    "matvec": (Reduce("sum", k, Op("mul", (x("M", i, k), x("q", k)))), (i,)),
    "outer": (Op("mul", (Op("exp", (x("q", i),)), x("v", j))), (i, j)),
    "broadcast result": (Op("tanh", (x("v", j),)), (i, j)),
    "sum of a constant": (Reduce("sum", i, x("v", j)), (j,)),
    "transpose": (Op("mul", (x("M", i, k), x("M", k, i))), (i, k)),
    "diagonal": (Op("mul", (x("M", i, i), x("q", i))), (i,)),
    "trace": (Reduce("sum", i, Op("sin", (x("M", i, i),))), ()),
    "literal": (Op("mul", (x("S", 2, j), x("q", i))), (i, j)),
    "gather": (Op("mul", (x("q", x("p", i, kind="int")), x("S", i, j))), (i, j)),
    "gather of rows": (Op("exp", (x("S", x("p", i, kind="int"), j),)), (i, j)),
    "max": (Reduce("max", i, Op("mul", (x("q", i), x("S", i, j)))), (j,)),
    "prod": (Reduce("prod", i, Op("add", (x("q", i), x("v", j)))), (j,)),
    "logsumexp": (
        Op("log", (Reduce("sum", i, Op("exp", (Op("sub", (x("q", i), Reduce("max", i, x("q", i)))),))),)),
        (),
    ),
    "delta rule": (
        Op(
            "sub",
            (x("S", i, j), Op("mul", (x("q", i), Reduce("sum", k, Op("mul", (x("q", k), x("S", k, j))))))),
        ),
        (i, j),
    ),
    "eye and index values": (Op("mul", (Op("add", (Eye(i, k), IndexValue(i))), x("M", i, k))), (i, k)),
    "nested": (Reduce("sum", i, Op("mul", (x("q", i), Reduce("sum", i, Op("sin", (x("q", i),)))))), ()),
}


@pytest.mark.parametrize("name", sorted(INDEXED))
def test_indexed(name: str) -> None:
    env = {
        ("input", "q", 0): real(4, seed=1),
        ("input", "v", 0): real(2, seed=2),
        ("input", "S", 0): real(4, 2, seed=3),
        ("input", "M", 0): real(4, 4, seed=4),
        ("input", "p", 0): torch.tensor([2, 0, 2, 3]),
    }
    s = Index("s", "V")
    check([INDEXED[name]], [x("q", k), x("v", s), x("S", i, j), x("M", k, i)], env)


def test_reduce_max_takes_the_first() -> None:
    (grad,) = vjp([Reduce("max", i, x("q", i))], [c(1)], [x("q", i)])
    env = {("input", "q", 0): torch.tensor([1.0, 3.0, 3.0, 2.0], dtype=torch.float64)}
    assert grad is not None
    assert Evaluator(env).tensor(grad, (i,)).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_lags_are_distinct_tensors() -> None:
    now, before = x("a"), x("a", lag=1)
    env = {("input", "a", 0): real(seed=1), ("input", "a", 1): real(seed=2)}
    check([(Op("mul", (now, Op("exp", (before,)))), ())], [now, before], env)


def test_simplify() -> None:
    a, b = x("a"), x("b")
    z = x("z", kind="complex")
    gt = Op("gt", (a, b))
    cases: list[tuple[Expr, Expr]] = [
        (Op("add", (c(0), a)), a),
        (Op("mul", (c(1), a)), a),
        (Op("mul", (a, c(0))), c(0)),
        (Op("neg", (Op("neg", (a,)),)), a),
        (Op("add", (c("1/3"), c("1/6"))), c("1/2")),
        (Op("where", (gt, a, a)), a),
        (Op("where", (gt, Op("where", (gt, a, b)), b)), Op("where", (gt, a, b))),
        (Op("where", (Op("lt", (c(1), c(2))), a, b)), a),
        (Op("add", (a, Op("neg", (b,)))), Op("sub", (a, b))),
        (Op("real", (Op("conj", (Op("complex", (a, b)),)),)), a),
        (Op("imag", (a,)), c(0)),
        (Op("conj", (Op("conj", (z,)),)), z),
        (Op("div", (c(1), c(0))), Op("div", (c(1), c(0)))),
        (Op("pow", (c(2), c(10))), c(1024)),
    ]
    for node, want in cases:
        assert simplify(node) is want
    # a sum of the user's is never reordered
    chain = Op("add", (Op("add", (a, b)), Op("add", (b, a))))
    assert simplify(chain) is chain
    assert make("mul", c(0), Infinity()) is Op("mul", (c(0), Infinity()))


# --- one token backwards -----------------------------------------------------------------------------


class E:
    """Python operators on expressions, to write specs by hand."""

    def __init__(self, node: Any) -> None:
        self.node: Expr = node.node if isinstance(node, E) else node if isinstance(node, Expr) else c(node)

    def op(self, name: str, *args: Any) -> E:
        return E(Op(name, (self.node, *(E(a).node for a in args))))

    def __add__(self, other: Any) -> E:
        return self.op("add", other)

    def __sub__(self, other: Any) -> E:
        return self.op("sub", other)

    def __rsub__(self, other: Any) -> E:
        return E(other) - self

    def __mul__(self, other: Any) -> E:
        return self.op("mul", other)

    def __truediv__(self, other: Any) -> E:
        return self.op("div", other)

    def __getattr__(self, name: str) -> Callable[..., E]:
        return lambda *args: self.op(name, *args)


Values = dict[str, Any]


class Space:
    """`l.u`: a reference to one tensor of a space; its indices and kind come from the declaration."""

    def __init__(self, space: Any, kinds: Mapping[str, tuple[tuple[Index, ...], Any]]) -> None:
        self._space, self._kinds = space, kinds

    def __getattr__(self, name: str) -> E:
        subs, kind = self._kinds[name]
        return E(Ref(self._space, name, subs, kind))

    def lag(self, name: str) -> E:
        subs, kind = self._kinds[name]
        return E(Ref(self._space, name, subs, kind, 1))


def spec(
    inputs: str,
    state: str,
    combine: Callable[[Space, Space], Values],
    lift: Callable[[Space, Space], Values] | None = None,
    output: Callable[[Space, Space, Space, Space], Values] | None = None,
    params: str = "",
    identity: Values | None = None,
) -> Aggregator:
    """Names in `inputs`, `params`, `state`: `x`, `x:complex`, `x[D]`. Lane-wise: index i runs over D."""

    def declare(text: str) -> dict[str, tuple[tuple[Index, ...], Any]]:
        out: dict[str, tuple[tuple[Index, ...], Any]] = {}
        for word in text.split():
            name, _, kind = word.partition(":")
            out[name.removesuffix("[D]")] = ((d,) if name.endswith("[D]") else (), kind or "real")
        return out

    ins, pars, comps = declare(inputs), declare(params), declare(state)

    def block(values: Values, like: Mapping[str, tuple[tuple[Index, ...], Any]]) -> Block:
        return Block(
            results=tuple(
                Assign(n, like[n][0] if n in like else tuple(sorted(E(v).node.free)), E(v).node)
                for n, v in values.items()
            )
        )

    xs, ps = Space("input", ins), Space("param", pars)
    starts = {n: Assign(n, comps[n][0], E((identity or {}).get(n, 0)).node) for n in comps}
    return Aggregator(
        name="hand",
        dims=(Dim("D"),) if "[D]" in inputs + state else (),
        inputs=tuple(Tensor(n, tuple(i.dim for i in subs), kind) for n, (subs, kind) in ins.items()),
        params=tuple(Tensor(n, tuple(i.dim for i in subs), kind) for n, (subs, kind) in pars.items()),
        state=tuple(
            Component(n, tuple(i.dim for i in subs), kind, None, starts[n]) for n, (subs, kind) in comps.items()
        ),
        lift=block(lift(xs, ps), comps) if lift else None,
        combine=block(combine(Space("left", comps), Space("right", comps)), comps),
        recurrence=None,
        readout=block(output(Space("state", comps), Space("prev", comps), xs, ps), {}) if output else Block(),
        claim="yes",
    )


def _rescaled(left: Space, right: Space) -> Values:
    m = left.m.max(right.m)
    a, b = (left.m - m).exp(), (right.m - m).exp()
    return {"m": m, "u": left.u * a + right.u * b, "w": left.w * a + right.w * b}


def _welford(left: Space, right: Space) -> Values:
    n = left.n + right.n
    gap = right.mean - left.mean
    return {"n": n, "mean": left.mean + gap * right.n / n, "M": left.M + right.M + gap * gap * left.n * right.n / n}


def _affine2(left: Space, right: Space) -> Values:
    def product(r: str, q: str) -> E:
        return sum_e(getattr(right, f"a{r}{p}") * getattr(left, q.format(p)) for p in "12")

    matrix = {f"a{r}{q}": product(r, f"a{{}}{q}") for r in "12" for q in "12"}
    return matrix | {f"b{r}": product(r, "b{}") + getattr(right, f"b{r}") for r in "12"}


def sum_e(terms: Any) -> E:
    first, *rest = list(terms)
    for term in rest:
        first = first + term
    return E(first)


SPECS: dict[str, tuple[Aggregator, tuple[str, ...]]] = {
    "ema": (
        spec(
            "x", "s a",
            lift=lambda x, p: {"s": (1 - p.decay.sigmoid()) * x.x, "a": p.decay.sigmoid()},
            combine=lambda le, r: {"s": r.a * le.s + r.s, "a": le.a * r.a},
            output=lambda s, prev, x, p: {"y": s.s * x.x + prev.s.tanh()},
            params="decay", identity={"a": 1},
        ),
        ("s",),
    ),
    "softmax average": (
        spec(
            "score value", "m u w",
            lift=lambda x, p: {"m": x.score * p.scale, "u": 1, "w": x.value},
            combine=_rescaled,
            output=lambda s, prev, x, p: {"y": s.w / s.u, "lse": s.m + s.u.log()},
            params="scale", identity={"m": -100},
        ),
        ("m", "u", "w"),
    ),
    "max-plus": (
        spec("", "a b", combine=lambda le, r: {"a": le.a + r.a, "b": (le.b + r.a).max(r.b)}, identity={"b": -100}),
        ("a", "b"),
    ),
    "complex": (
        spec(
            "g x:complex", "a:complex h:complex",
            lift=lambda x, p: {"a": (x.g * -1).complex(p.theta).exp(), "h": x.x * p.c},
            combine=lambda le, r: {"a": le.a * r.a, "h": r.a * le.h + r.h},
            output=lambda s, prev, x, p: {"y": (s.h * p.c.conj()).real() + prev.h.abs(), "z": s.h * x.x},
            params="theta c:complex", identity={"a": 1},
        ),
        ("h",),
    ),
    "affine 2x2": (
        spec("", "a11 a12 a21 a22 b1 b2", combine=_affine2, identity={"a11": 1, "a22": 1}),
        ("a11", "a12", "a21", "a22", "b1", "b2"),
    ),
    "affine 2x2, its vector": (
        spec(
            "a11 a12 a21 a22 b1 b2", "a11 a12 a21 a22 b1 b2",
            lift=lambda x, p: {n: getattr(x, n) for n in ("a11", "a12", "a21", "a22", "b1", "b2")},
            combine=_affine2,
            output=lambda s, prev, x, p: {"y": s.b1 * s.b2, "w": prev.b1 * x.a12},
            identity={"a11": 1, "a22": 1},
        ),
        ("b1", "b2"),
    ),
    "Möbius": (
        spec(
            "x y", "a b c d",
            lift=lambda x, p: {"a": x.x, "b": x.y * x.y, "c": 1, "d": x.y.exp()},
            combine=lambda le, r: {
                "a": r.a * le.a + r.b * le.c, "b": r.a * le.b + r.b * le.d,
                "c": r.c * le.a + r.d * le.c, "d": r.c * le.b + r.d * le.d,
            },
            output=lambda s, prev, x, p: {"y": (s.a + s.b) / (s.c + s.d)},
            identity={"a": 1, "d": 1},
        ),
        ("a", "b", "c", "d"),
    ),
    "Welford": (
        spec(
            "x", "n mean M", lift=lambda x, p: {"n": 1, "mean": x.x, "M": 0}, combine=_welford,
            output=lambda s, prev, x, p: {"variance": s.M / s.n, "z": (x.x - s.mean) / (s.M / s.n + 1).sqrt()},
        ),
        ("n", "mean", "M"),
    ),
    "lanes and a tap": (
        spec(
            "x[D] g", "a[D] h[D]",
            lift=lambda x, p: {"a": (x.g * p.rate).sigmoid(), "h": x.x * x.g + x.lag("x") * p.tap},
            combine=lambda le, r: {"a": le.a * r.a, "h": r.a * le.h + r.h},
            output=lambda s, prev, x, p: {"y": s.h * p.rate + prev.h},
            params="rate[D] tap", identity={"a": 1},
        ),
        ("h",),
    ),
}  # fmt: skip

LENGTH = 5


class Fold:
    """A sequential fold through the oracle's interpreter, every value an autograd leaf or a function of leaves."""

    def __init__(self, agg: Aggregator, live: tuple[str, ...], carried: bool) -> None:
        self.agg, self.live, self.carried = agg, live, carried
        generator = torch.Generator().manual_seed(11)

        def draw(tensor: Tensor | Component) -> torch.Tensor:
            shape = tuple(SIZES[n] for n in tensor.dims)
            dtype = torch.complex128 if tensor.kind == "complex" else torch.float64
            value = torch.randn(shape, dtype=dtype, generator=generator) * 0.7
            if tensor.interval is not None:  # a value inside, away from the ends
                lo, hi = tensor.interval.lo, tensor.interval.hi
                unit = 0.1 + 0.8 * torch.sigmoid(value)
                low = float(lo) if lo is not None else float(hi or 0) - 2
                value = low + unit * ((float(hi) if hi is not None else low + 2) - low)
            return value.requires_grad_()

        self.tokens = [{t.name: draw(t) for t in agg.leaf_inputs} for _ in range(LENGTH)]
        self.params = {t.name: draw(t) for t in agg.params}
        self.start = {n: draw(agg.component(n)) for n in live}
        if "n" in live and not agg.component("n").dims:  # a count
            self.start["n"] = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        identity = Block(results=tuple(c.identity for c in agg.state if c.name in live))
        self.before = [self.start if carried else Evaluator({}).run(identity)]
        self.outputs: list[dict[str, torch.Tensor]] = []
        update = step(agg, live)
        first = Block(agg.leaf.lets, tuple(agg.leaf.result(n) for n in live))
        for t in range(LENGTH):
            env = self.env(t)
            new = Evaluator(env).run(update if t or carried else first)
            env |= {("state", n, 0): v for n, v in new.items()}
            self.outputs.append(Evaluator(env).run(agg.output))
            self.before.append(new)
        self.d_outputs = [{n: draw_like(v, generator) for n, v in out.items()} for out in self.outputs]
        self.d_last = {n: draw_like(v, generator) for n, v in self.before[-1].items()}

    def env(self, t: int) -> dict[tuple[str, str, int], torch.Tensor]:
        env = {("prev", n, 0): v for n, v in self.before[t].items()}
        env |= {("input", n, 0): v for n, v in self.tokens[t].items()}
        env |= {("input", n, 1): self.tokens[t - 1][n] if t else v * 0 for n, v in self.tokens[t].items()}
        return env | {("param", n, 0): v for n, v in self.params.items()}

    def leaves(self) -> list[torch.Tensor]:
        tokens = [v for token in self.tokens for v in token.values()]
        return [*tokens, *self.params.values(), *(self.start.values() if self.carried else ())]

    def expected(self) -> list[torch.Tensor]:
        pairs = [(v, ct[n]) for out, ct in zip(self.outputs, self.d_outputs, strict=True) for n, v in out.items()]
        pairs += [(v, self.d_last[n]) for n, v in self.before[-1].items()]
        loss = sum((v * ct.conj()).real.sum() for v, ct in pairs)
        grads = torch.autograd.grad(loss, self.leaves(), allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, self.leaves(), strict=True)]


def draw_like(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    dtype = value.dtype if value.is_floating_point() or value.is_complex() else torch.float64
    return torch.randn(value.shape, dtype=dtype, generator=generator)


def backward_env(fold: Fold, t: int, back: StepBackward, cotangent: Mapping[str, torch.Tensor]) -> Any:
    env = fold.env(t) | {("state", n, 0): v for n, v in fold.before[t + 1].items()}
    env |= {("let", back.outputs[n], 0): v for n, v in fold.d_outputs[t].items()}
    env |= {("let", back.state[n], 0): v for n, v in cotangent.items()}
    return {k: v.detach() for k, v in env.items()}


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_step_backward(name: str, carried: bool) -> None:
    check_backward(*SPECS[name], carried)


def check_backward(agg: Aggregator, live: tuple[str, ...], carried: bool) -> None:
    fold = Fold(agg, live, carried)
    tokens = [{n: torch.zeros_like(v) for n, v in token.items()} for token in fold.tokens]
    params = {n: torch.zeros_like(v) for n, v in fold.params.items()}
    cotangent = dict(fold.d_last)
    for t in reversed(range(LENGTH)):
        back = step_backward(agg, live, first=t == 0 and not carried)
        out = Evaluator(backward_env(fold, t, back, cotangent)).run(back.block)
        for n, result in back.inputs.items():
            tokens[t][n] = tokens[t][n] + out[result]
        for (n, lag), result in back.taps.items():
            if t >= lag:
                tokens[t - lag][n] = tokens[t - lag][n] + out[result]
        for n, result in back.params.items():
            params[n] = params[n] + out[result]
        cotangent = {n: out[result] for n, result in back.prev.items()}
    actual = [*(v for token in tokens for v in token.values()), *params.values()]
    actual += [cotangent[n] for n in fold.start] if carried else []
    assert carried or not cotangent
    for got, want in zip(actual, fold.expected(), strict=True):
        torch.testing.assert_close(got.to(want.dtype).expand(want.shape), want, rtol=1e-9, atol=1e-11)


# --- complex to real ---------------------------------------------------------------------------------

Z, W, R = x("z", kind="complex"), x("w", kind="complex"), x("r")
COMPLEX: dict[str, Expr] = {
    "mul": Op("mul", (Z, W)),
    "mul by real": Op("mul", (R, Z)),
    "div": Op("div", (Z, W)),
    "div by real": Op("div", (Z, R)),
    "real over complex": Op("div", (R, Z)),
    "sub": Op("sub", (R, Op("neg", (Z,)))),
    "conj": Op("mul", (Op("conj", (Z,)), W)),
    "abs": Op("abs", (Op("sub", (Z, W)),)),
    "exp": Op("exp", (Op("complex", (Op("neg", (R,)), Op("imag", (Z,)))),)),
    "parts": Op("sub", (Op("real", (Z,)), Op("real", (R,)))),
    "where": Op("where", (Op("gt", (R, c(0))), Op("mul", (Z, W)), R)),
    "ne": Op("where", (Op("ne", (Z, W)), Z, W)),
    "square": Op("pow", (Z, c(2))),
    "seventh": Op("pow", (Z, c(7))),
    "inverse square": Op("pow", (Z, c(-2))),
    "stop": Op("mul", (Op("stop", (Z,)), W)),
    "s4d": Op("mul", (Op("div", (Op("sub", (Op("exp", (Z,)), c(1))), Z)), R)),
}


@pytest.mark.parametrize("name", sorted(COMPLEX))
def test_realify_values_and_gradients(name: str) -> None:
    """Values and torch's own complex gradients, its real part by re and its imaginary part by im."""
    generator = torch.Generator().manual_seed(3)
    whole = {n: torch.randn((), dtype=torch.complex128, generator=generator).requires_grad_() for n in "zw"}
    whole["r"] = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    out = Evaluator({("input", n, 0): v for n, v in whole.items()})(COMPLEX[name], {})
    parts = {("input", "r", 0): whole["r"].detach()}
    for n in "zw":
        parts |= {("input", f"{n}_re", 0): whole[n].detach().real, ("input", f"{n}_im", 0): whole[n].detach().imag}
    re, im = split(COMPLEX[name])
    assert all(node.kind != "complex" for node in walk(re, im))
    evaluate = Evaluator(parts)
    got = torch.complex(evaluate(re, {}), evaluate(im, {}))
    torch.testing.assert_close(got, out.to(torch.complex128))

    ct = torch.randn((), dtype=torch.complex128, generator=generator)
    (out * ct.conj()).real.backward()
    names = [f"{n}_{p}" for n in "zw" for p in ("re", "im")] + ["r"]
    grads = vjp([re, im], [Ref("let", "c_re", ()), Ref("let", "c_im", ())], [x(n) for n in names])
    evaluate = Evaluator(parts | {("let", "c_re", 0): ct.real, ("let", "c_im", 0): ct.imag})
    zero = torch.zeros((), dtype=torch.float64)
    actual = {n: zero if g is None else evaluate(g, {}) for n, g in zip(names, grads, strict=True)}
    for n in "zw":
        want = torch.zeros_like(whole[n]) if whole[n].grad is None else whole[n].grad
        torch.testing.assert_close(torch.complex(actual[f"{n}_re"], actual[f"{n}_im"]), want)
    torch.testing.assert_close(actual["r"], torch.zeros(()).double() if whole["r"].grad is None else whole["r"].grad)


def test_realified_abs_has_gradient_zero_at_zero() -> None:
    re, _ = split(Op("abs", (Z,)))
    grads = vjp([re], [c(1)], [x("z_re"), x("z_im")])
    zero = torch.zeros((), dtype=torch.float64)
    evaluate = Evaluator({("input", "z_re", 0): zero, ("input", "z_im", 0): zero})
    assert [float(evaluate(g, {})) for g in grads if g is not None] == [0.0, 0.0]


@pytest.mark.parametrize("node", [Op("log", (Z,)), Op("pow", (Z, c("1/2"))), Op("pow", (Z, R))])
def test_realify_refuses_by_name(node: Op) -> None:
    with pytest.raises(PsmcError) as caught:
        split(node)
    assert caught.value.diagnostics[0].code == "PSM510"
    assert f"'{node.op}'" in caught.value.diagnostics[0].message


def join(values: Mapping[str, torch.Tensor], names: Mapping[str, tuple[str, str]], name: str) -> torch.Tensor:
    if name not in names:
        return values[name]
    return torch.complex(*(values[part].expand_as(values[names[name][0]]) for part in names[name]))


def test_realify_aggregator() -> None:
    """The realified fold equals the complex one, and its token backwards gives torch's complex gradients."""
    agg, live = SPECS["complex"]
    real_agg, names = realify(agg)
    assert names.keys() == {"x", "a", "h", "c", "z"}
    assert all(t.kind == "real" for t in (*real_agg.inputs, *real_agg.params))
    assert all(component.kind == "real" for component in real_agg.state)
    real_live = tuple(part for n in live for part in names.get(n, (n,)))
    fold = Fold(agg, live, True)

    def parts(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for n, v in values.items():
            out |= {names[n][0]: v.real, names[n][1]: v.imag} if n in names else {n: v}
        return {n: v.detach() for n, v in out.items()}

    params = parts(fold.params)
    state = parts(fold.start)
    states = [state]
    for t in range(LENGTH):
        env = {("prev", n, 0): v for n, v in state.items()} | {("param", n, 0): v for n, v in params.items()}
        env |= {("input", n, 0): v for n, v in parts(fold.tokens[t]).items()}
        state = Evaluator(env).run(step(real_agg, real_live))
        out = Evaluator(env | {("state", n, 0): v for n, v in state.items()}).run(real_agg.output)
        for n, v in fold.outputs[t].items():
            torch.testing.assert_close(join(out, names, n), v.detach())
        states.append(state)
    back = step_backward(real_agg, real_live)
    cotangent = parts(fold.d_last)
    found: dict[str, torch.Tensor] = {n: torch.zeros(()).double() for n in params}
    tokens: list[dict[str, torch.Tensor]] = []
    for t in reversed(range(LENGTH)):
        env = {("prev", n, 0): v for n, v in states[t].items()} | {("param", n, 0): v for n, v in params.items()}
        env |= {("state", n, 0): v for n, v in states[t + 1].items()}
        env |= {("input", n, 0): v for n, v in parts(fold.tokens[t]).items()}
        env |= {("let", back.outputs[n], 0): v for n, v in parts(fold.d_outputs[t]).items()}
        env |= {("let", back.state[n], 0): v for n, v in cotangent.items()}
        got = Evaluator(env).run(back.block)
        found = {n: v + got[back.params[n]] for n, v in found.items()}
        tokens.insert(0, {n: got[result] for n, result in back.inputs.items()})
        cotangent = {n: got[result] for n, result in back.prev.items()}
    actual = [join(token, names, n) for token in tokens for n in fold.tokens[0]]
    actual += [join(found, names, n) for n in fold.params] + [join(cotangent, names, n) for n in fold.start]
    for value, want in zip(actual, fold.expected(), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-11)


def test_realify_leaves_real_specs_alone() -> None:
    agg, _ = SPECS["softmax average"]
    assert realify(agg) == (agg, {})


# --- the adjoint recurrence --------------------------------------------------------------------------

ADJOINTS = sorted(n for n in SPECS if n != "complex")


def adjoint_element(fold: Fold, adj: Adjoint, t: int) -> dict[str, torch.Tensor]:
    """The lifted token t of the adjoint aggregator."""
    back = fold.env(t) | {("state", n, 0): v for n, v in fold.before[t + 1].items()}
    env = {("input", name, 0): back["prev", n, 0] for n, name in adj.prev.items()}
    env |= {("input", name, 0): back["state", n, 0] for n, name in adj.state.items()}
    env |= {("input", name, 0): back["input", n, lag] for (n, lag), name in adj.inputs.items()}
    env |= {("input", name, 0): fold.d_outputs[t][n] for n, name in adj.outputs.items()}
    env |= {("param", n, 0): v for n, v in fold.params.items()}
    assert {t.name for t in adj.aggregator.inputs} == {name for space, name, _ in env if space == "input"}
    return Evaluator({k: v.detach() for k, v in env.items()}).run(adj.aggregator.leaf)


def compose(adj: Adjoint, left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    env = {("left", n, 0): v for n, v in left.items()} | {("right", n, 0): v for n, v in right.items()}
    assert isinstance(adj.aggregator.combine, Block)
    return Evaluator(env).run(adj.aggregator.combine)


@pytest.mark.parametrize("name", ADJOINTS)
def test_adjoint_in_reverse_is_autograd(name: str) -> None:
    check_adjoint(*SPECS[name])


def check_adjoint(agg: Aggregator, live: tuple[str, ...]) -> None:
    fold = Fold(agg, live, True)
    adj = adjoint(agg, live)
    smooth = [n for n in live if n in adj.cotangent]
    identity = Block(results=tuple(component.identity for component in adj.aggregator.state))
    prefix = Evaluator({}).run(identity) | {adj.cotangent[n]: fold.d_last[n] for n in smooth}
    elements = [adjoint_element(fold, adj, t) for t in range(LENGTH)]
    tokens = [{n: torch.zeros_like(v) for n, v in token.items()} for token in fold.tokens]
    back = step_backward(agg, live)
    for t in reversed(range(LENGTH)):  # λ_t is before token t's own element
        cotangent = {n: prefix[adj.cotangent[n]] for n in smooth}
        out = Evaluator(backward_env(fold, t, back, cotangent)).run(back.block)
        for n, result in back.inputs.items():
            tokens[t][n] = tokens[t][n] + out[result]
        for (n, lag), result in back.taps.items():
            if t >= lag:
                tokens[t - lag][n] = tokens[t - lag][n] + out[result]
        prefix = compose(adj, prefix, elements[t])
    expected = iter(fold.expected())
    for token in tokens:
        for value in token.values():
            torch.testing.assert_close(value, next(expected), rtol=1e-9, atol=1e-11)
    for _ in fold.params:
        next(expected)
    for n in fold.start:
        torch.testing.assert_close(prefix[adj.cotangent[n]], next(expected), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ADJOINTS)
def test_adjoint_is_a_monoid(name: str) -> None:
    agg, live = SPECS[name]
    adj = adjoint(agg, live)
    generator = torch.Generator().manual_seed(2)

    def element() -> dict[str, torch.Tensor]:
        sizes = {part.name: tuple(SIZES[n] for n in part.dims) for part in adj.aggregator.state}
        return {n: torch.randn(size, dtype=torch.float64, generator=generator) for n, size in sizes.items()}

    a, b, e = element(), element(), element()
    torch.testing.assert_close(compose(adj, compose(adj, a, b), e), compose(adj, a, compose(adj, b, e)))
    unit = Evaluator({}).run(Block(results=tuple(component.identity for component in adj.aggregator.state)))
    torch.testing.assert_close(compose(adj, unit, a), a)
    torch.testing.assert_close(compose(adj, a, unit), a)


def test_adjoint_carries_only_what_is_not_zero() -> None:
    def carried(name: str) -> list[tuple[str, str]]:
        return sorted(adjoint(*SPECS[name]).jacobian)

    assert carried("ema") == [("s", "s")]
    # sums pass through unchanged; m feeds u and w, nothing feeds m back
    assert carried("softmax average") == [("m", "m"), ("m", "u"), ("m", "w"), ("u", "u"), ("w", "w")]
    assert carried("Welford") == [("mean", "M"), ("mean", "mean"), ("n", "M"), ("n", "mean")]
    assert carried("max-plus") == [("b", "b")]


def test_adjoint_of_a_broadcast_sums_over_lanes() -> None:
    """A scalar component that scales a vector: its cotangent is the sum over the vector's lanes."""
    agg = spec(
        "g x[D]", "a h[D]",
        lift=lambda x, p: {"a": x.g, "h": x.x},
        combine=lambda le, r: {"a": le.a * r.a, "h": r.h + le.h * le.a},
        output=lambda s, prev, x, p: {"y": s.h * s.a},
        identity={"a": 1},
    )  # fmt: skip
    adj = adjoint(agg, ("a", "h"))
    assert sorted(adj.jacobian) == [("a", "a"), ("a", "h"), ("h", "h")]
    fold = Fold(agg, ("a", "h"), True)
    identity = Block(results=tuple(component.identity for component in adj.aggregator.state))
    prefix = Evaluator({}).run(identity) | {adj.cotangent[n]: fold.d_last[n] for n in ("a", "h")}
    for t in reversed(range(LENGTH)):
        prefix = compose(adj, prefix, adjoint_element(fold, adj, t))
    expected = fold.expected()[-2:]
    for n, want in zip(("a", "h"), expected, strict=True):
        torch.testing.assert_close(prefix[adj.cotangent[n]], want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["ema", "softmax_average", "welford", "lru", "affine2x2", "gla", "mlstm"])
def test_adjoint_is_proved_associative(name: str) -> None:
    (agg,) = resolve(parse(read(EXAMPLES / f"{name}.psm")))
    agg, _ = realify(agg)
    proof = prove(adjoint(agg, live_state(agg)).aggregator)
    assert isinstance(proof.associativity, Proved) and isinstance(proof.identity, Proved)


@pytest.mark.parametrize("score", [0.3, -math.inf])
def test_nothing_is_poisoned_by_the_identity(score: float) -> None:
    """From the identity (m = -inf), and with a token that weighs nothing, every gradient is finite."""
    (agg,) = resolve(parse(read(EXAMPLES / "softmax_average.psm")))
    live = live_state(agg)

    def number(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    start = {"m": 0.5, "u": 1.0, "w": 2.0} if score == -math.inf else {"m": -math.inf, "u": 0.0, "w": 0.0}
    env = {("prev", n, 0): number(v) for n, v in start.items()}
    env |= {("input", "score", 0): number(score), ("input", "value", 0): number(2.0)}
    env |= {("state", n, 0): v for n, v in run(step(agg, live), Env(env, {})).items()}
    env |= {("let", "d_y", 0): number(1.0)} | {("let", f"d_{n}", 0): number(0.7) for n in "muw"}
    whole = step_backward(agg, live)
    out = run(whole.block, Env(env, {}))
    assert all(bool(v.isfinite().all()) for v in out.values())
    if score != -math.inf:
        alone = step_backward(agg, live, first=True)
        for n, v in run(alone.block, Env(env, {})).items():
            torch.testing.assert_close(v.expand(1), out[n])


# --- random specs --------------------------------------------------------------------------------------

UNARY: list[Callable[[E], E]] = [
    lambda a: a.tanh(),
    lambda a: a.sin(),
    lambda a: a.sigmoid(),
    lambda a: a.softplus(),
    lambda a: (a * a + 1).rsqrt(),
    lambda a: (a * a + 1).log(),
    lambda a: a.tanh().exp(),
    lambda a: a.abs(),
    lambda a: a.stop() * a,
]
BINARY: list[Callable[[E, E], E]] = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b,
    lambda a, b: a / (b * b + 1),
    lambda a, b: a.max(b),
    lambda a, b: a.min(b),
    lambda a, b: a.logaddexp(b),
    lambda a, b: E(Op("where", (a.gt(b).node, (a * b).node, b.node))),
]


@st.composite
def expression(draw: Callable[..., Any], leaves: list[E]) -> E:
    pool = list(leaves)
    for _ in range(draw(st.integers(0, 5))):
        a, b = draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
        pool.append(draw(st.sampled_from(UNARY))(a) if draw(st.booleans()) else draw(st.sampled_from(BINARY))(a, b))
    return pool[-1]


@st.composite
def random_spec(draw: Callable[..., Any]) -> tuple[Aggregator, tuple[str, ...]]:
    """Any lane-wise update at all: backwards along a sequential fold needs no associativity."""
    names = "abc"[: draw(st.integers(1, 3))]

    def values(keys: str, leaves: list[E]) -> Values:
        return {n: draw(expression(leaves)) for n in keys}

    def of(space: Space, keys: str) -> list[E]:
        return [getattr(space, n) for n in keys]

    agg = spec(
        "x y", " ".join(names), params="p",
        lift=lambda x, p: values(names, of(x, "xy") + of(p, "p")),
        combine=lambda le, r: values(names, of(le, names) + of(r, names)),
        output=lambda s, prev, x, p: values("vw", of(prev, names) + of(x, "xy") + of(p, "p") + of(s, names)),
    )  # fmt: skip
    return agg, tuple(names)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_spec(), st.booleans())
def test_random_specs(made: tuple[Aggregator, tuple[str, ...]], carried: bool) -> None:
    check_backward(*made, carried)
    check_adjoint(*made)


# A rule from Python, whole numbers, and outputs that read a tree's levels have no such token.
OTHER = ("transformer_psm", "s5_word", "s5_word_recurrence", "log_linear_attention")
DIFFERENTIABLE = sorted(p.stem for p in EXAMPLES.glob("*.psm") if p.stem not in OTHER)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example's token backwards, matrix states included; the adjoint recurrence of the lane-wise ones."""
    for agg in resolve(parse(read(EXAMPLES / f"{name}.psm"))):
        for dim in agg.dims:
            if dim.size is not None:
                monkeypatch.setitem(SIZES, dim.name, dim.size)
        live = live_state(agg)
        check_backward(agg, live, True)
        adjoints = not any(component.kind == "complex" for component in agg.state)
        if adjoints and analyse(agg).pointwise:
            check_adjoint(agg, live)
            verify(adjoint(agg, live).aggregator)
        verify(realify(agg)[0])


def test_derivations_do_not_depend_on_the_hash_seed() -> None:
    program = """
from psmc.algebra.prover import prove
from psmc.algebra.verdict import Proved
from psmc.derive.adjoint import adjoint
from psmc.derive.realify import realify
from psmc.derive.step import step_backward
from psmc.frontend.psm import parse, read
from psmc.frontend.resolve import resolve
from psmc.structure.live import live_state
for name in ("softmax_average", "s4d", "gla"):
    agg, _ = realify(resolve(parse(read(f"examples/{name}.psm")))[0])
    print(step_backward(agg, live_state(agg)), adjoint(agg, live_state(agg)))
"""
    texts = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=EXAMPLES.parent, env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(texts) == 1 and len(texts.pop()) > 1000


def test_deep_expressions() -> None:
    """As deep as the parser lets through (200), with the indices of an input renamed on the way."""
    lanes = (Index("i", "D"), Index("j", "K"))
    state = Ref("left", "h", lanes)
    update: Expr = Op("add", (Ref("right", "h", lanes), state))
    for _ in range(66):
        update = Op("sin", (Op("add", (Op("mul", (update, state)), state)),))
    leaf: Expr = x("x", lanes[1])
    for _ in range(198):
        leaf = Op("sin", (leaf,))
    zero = Assign("h", lanes, c(0))
    agg = Aggregator(
        name="deep", dims=(Dim("D"), Dim("K")), inputs=(Tensor("x", ("K",)),), params=(),
        state=(Component("h", ("D", "K"), "real", None, zero),), lift=Block((), (replace(zero, value=leaf),)),
        combine=Block((), (replace(zero, value=update),)), recurrence=None, readout=Block(), claim="yes",
    )  # fmt: skip
    assert set(step_backward(agg, ("h",)).inputs) == {"x"}
    assert set(adjoint(agg, ("h",)).jacobian) == {("h", "h")}
