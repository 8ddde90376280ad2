"""Every table that interprets the operators has a row for each, and all rows mean the same.

`TABLES` says which keys a table has; `EVALUATORS` run an expression. Another interpreter of the IR adds itself to both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from psmc import reference
from psmc.algebra import exact, floats, intervals, normal
from psmc.codegen import torch_code, torch_ops, triton_ops
from psmc.codegen.torch_value import Like
from psmc.derive import vjp as vjp_rows
from psmc.derive.vjp import vjp
from psmc.ir import OPS, REDUCTIONS, Aggregator, Assign, Block, Dim, Expr, Index, Op, Reduce, Ref
from psmc.ir import Tensor as Declared
from psmc.ir.rewrite import refs as refs_of
from psmc.reference.evaluate import POINTWISE, evaluate
from psmc.reference.evaluate import REDUCTIONS as REDUCTION_ROWS

ROW, COL = Index("i", "K"), Index("j", "V")
Values = dict[str, Tensor]


def refs(names: str, axes: tuple[Index, ...] = (), kind: str = "real") -> tuple[Ref, ...]:
    return tuple(Ref("input", name, axes, kind) for name in names)


def numbers(names: str, sample: Iterable[complex], dtype: torch.dtype = torch.float64) -> Values:
    return {n: torch.tensor(v, dtype=dtype, requires_grad=True) for n, v in zip(names, sample, strict=True)}


def by_oracle(expr: Expr, axes: tuple[Index, ...], values: Values) -> Tensor:
    env = reference.Env({("input", n, 0): v for n, v in values.items()}, {"K": 4, "V": 3})
    return evaluate(expr, env, axes)


def by_printed_torch(expr: Expr, axes: tuple[Index, ...], values: Values) -> Tensor:
    inputs = tuple(Declared(n, kind="complex" if v.is_complex() else "real") for n, v in values.items())
    out = Block(results=(Assign("o", axes, expr),))
    agg = Aggregator("t", (Dim("K"), Dim("V")), inputs, (), (), Block(), Block(), None, out, "no")
    likes = tuple(Like(f"x.{t.name}", t.kind) for t in inputs)
    source = torch_code.print_block(agg, out, torch_code.Signature("output", "x, n", likes))
    scope: dict[str, object] = {"torch": torch, "math": math}
    exec(torch_code.join([source]), scope)
    return scope["output"](SimpleNamespace(**values), SimpleNamespace(K=4, V=3))["o"]  # type: ignore[operator]


class _ByVjp(torch.autograd.Function):
    """The oracle's value, with the derived cotangents as its gradient."""

    @staticmethod
    def forward(ctx: Any, expr: Expr, axes: tuple[Index, ...], names: tuple[str, ...], *values: Tensor) -> Tensor:
        ctx.expr, ctx.axes, ctx.names = expr, axes, names
        ctx.save_for_backward(*values)
        return by_oracle(expr, axes, dict(zip(names, values, strict=True)))

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        values = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        reads = {r.name: r for r in refs_of(ctx.expr)}
        wrt = [reads.get(n, Ref("input", n, ())) for n in ctx.names]
        ct = Ref("input", "ct", ctx.axes, ctx.expr.kind)
        out = []
        for ref, grad in zip(wrt, vjp([ctx.expr], [ct], wrt), strict=True):
            own = values[ref.name]
            found = None if grad is None else by_oracle(grad, ref.subs, {**values, "ct": cotangent})
            out.append(None if found is None else found.to(own.dtype).expand_as(own))
        return None, None, None, *out


def by_vjp(expr: Expr, axes: tuple[Index, ...], values: Values) -> Tensor:
    return _ByVjp.apply(expr, axes, tuple(values), *values.values())  # type: ignore[no-any-return, no-untyped-call]


# table -> (its keys, what it may lack: ops without such a meaning)
TABLES: dict[str, tuple[Iterable[str], set[str]]] = {
    "oracle": (POINTWISE, set()),
    "printed torch": (torch_ops.TENSOR_OPS, set()),
    "derived gradients": (vjp_rows.ROWS, set()),
    "normal forms": (normal.RULES, set()),
    "intervals": (intervals.TABLE, set()),
    "exact values": (exact.TABLE, set()),
    "plain floats": (floats.TABLE, set()),
    "printed triton": (triton_ops.SCALAR_OPS, {"complex"}),
    "printed triton, numbers": (triton_ops.NUMBER_OPS, {"complex"}),
}
REDUCTION_TABLES: dict[str, Iterable[str]] = {
    "oracle": REDUCTION_ROWS,
    "printed torch": torch_ops.TENSOR_REDUCTIONS,
    "printed torch, constants": torch_ops.CONSTANT_REDUCTIONS,
}
EVALUATORS: dict[str, Callable[[Expr, tuple[Index, ...], Values], Tensor]] = {
    "oracle": by_oracle,
    "printed torch": by_printed_torch,
    "derived gradients": by_vjp,
}

# Independent formulas, and a sample of the domain. Comparisons and logic are tested as conditions below.
m = mpmath.mp
REAL: dict[str, tuple[Callable[..., object], list[tuple[float, ...]]]] = {
    "add": (lambda a, b: a + b, [(1.5, -2.25)]),
    "sub": (lambda a, b: a - b, [(1.5, -2.25)]),
    "mul": (lambda a, b: a * b, [(1.5, -2.25), (0.0, 3.0)]),
    "div": (lambda a, b: a / b, [(1.5, -2.25), (0.0, 3.0)]),
    "neg": (lambda a: -a, [(1.5,)]),
    "pow": (lambda a, b: a**b, [(1.5, -2.25), (0.3, 0.5), (4.0, 2.0)]),
    "where": (lambda c, a, b: a if c > 0 else b, []),
    "max": (lambda a, b: a if a >= b else b, [(1.0, 2.0), (2.0, -1.0)]),
    "min": (lambda a, b: a if a <= b else b, [(1.0, 2.0), (2.0, -1.0)]),
    "abs": (lambda a: a if a > 0 else -a, [(1.5,), (-0.5,)]),
    "sign": (lambda a: (a > 0) - (a < 0), [(1.5,), (-0.5,)]),
    "clamp": (lambda x, a, b: max(a, min(x, b)), [(0.5, 0.0, 1.0), (-0.5, 0.0, 1.0), (1.5, 0.0, 1.0)]),
    "exp": (lambda a: m.e**a, [(0.7,), (-30.0,)]),
    "expm1": (lambda a: m.e**a - 1, [(0.7,), (-1e-9,)]),
    "log": (lambda a: m.quad(lambda t: 1 / t, [1, a]), [(0.7,), (3.0,)]),
    "log1p": (lambda a: m.log(1 + a), [(0.7,), (1e-9,)]),
    "sqrt": (lambda a: a ** m.mpf("0.5"), [(0.7,), (1e-8,)]),
    "rsqrt": (lambda a: a ** m.mpf("-0.5"), [(0.7,), (1e-8,)]),
    "sin": (lambda a: (m.e ** (1j * a)).imag, [(0.7,), (-4.0,)]),
    "cos": (lambda a: (m.e ** (1j * a)).real, [(0.7,), (-4.0,)]),
    "tanh": (lambda a: 1 - 2 / (m.e ** (2 * a) + 1), [(0.7,), (-25.0,)]),
    "sigmoid": (lambda a: 1 / (1 + m.e**-a), [(0.7,), (-40.0,)]),
    "logsigmoid": (lambda a: -m.log(1 + m.e**-a), [(0.7,), (-40.0,), (40.0,)]),
    "softplus": (lambda a: m.log(1 + m.e**a), [(0.7,), (-40.0,), (25.0,)]),
    "relu": (lambda a: a if a > 0 else 0 * a, [(0.7,), (-0.7,)]),
    "silu": (lambda a: a / (1 + m.e**-a), [(0.7,), (-3.0,)]),
    "gelu": (lambda a: a * m.ncdf(a), [(0.7,), (-2.0,)]),
    "erf": (lambda a: 2 / m.sqrt(m.pi) * m.quad(lambda t: m.e ** -(t * t), [0, a]), [(0.7,), (-2.0,)]),
    "logaddexp": (lambda a, b: m.log(m.e**a + m.e**b), [(0.7, -1.0), (50.0, 90.0), (-800.0, -801.0)]),
    "real": (lambda a: a, [(0.7,)]),
    "imag": (lambda a: 0 * a, [(0.7,)]),
    "conj": (lambda a: a, [(0.7,)]),
}
COMPLEX: dict[str, Callable[..., object]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "pow": lambda a, b: m.e ** (b * m.log(a)),
    "abs": lambda a: m.sqrt(a.real**2 + a.imag**2),
    "exp": lambda a: m.e**a,
    "log": lambda a: m.mpc(m.log(abs(a)), m.atan2(a.imag, a.real)),
    "real": lambda a: a.real,
    "imag": lambda a: a.imag,
    "conj": lambda a: m.mpc(a.real, -a.imag),
}
LOGIC: dict[str, Callable[..., bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


@pytest.mark.parametrize("table", TABLES)
def test_a_row_for_each_operator(table: str) -> None:
    keys, excused = TABLES[table]
    assert set(keys) | excused == set(OPS)
    assert not set(keys) & excused


@pytest.mark.parametrize("table", REDUCTION_TABLES)
def test_a_row_for_each_reduction(table: str) -> None:
    assert set(REDUCTION_TABLES[table]) == set(REDUCTIONS)


def test_each_operator_is_compared_below() -> None:
    assert {*REAL, *LOGIC, "and", "or", "not", "stop", "complex"} == set(OPS)


@pytest.mark.parametrize("by", EVALUATORS)
@pytest.mark.parametrize("op", [op for op, (_, samples) in REAL.items() if samples])
def test_real_values_and_gradients(op: str, by: str) -> None:
    formula, samples = REAL[op]
    names = "abc"[: OPS[op].arity]
    for sample in samples:
        values = numbers(names, sample)
        out = EVALUATORS[by](Op(op, refs(names)), (), values)
        assert out.dtype == torch.float64
        exact = tuple(m.mpf(v) for v in sample)
        with mpmath.workdps(40):
            assert out.item() == pytest.approx(float(formula(*exact)), rel=1e-13, abs=1e-300)
        if out.requires_grad:
            out.backward()
        for place, value in enumerate(values.values()):
            with mpmath.workdps(40):
                one = tuple(int(place == n) for n in range(len(exact)))
                slope = mpmath.diff(formula, exact, one, h=m.mpf(10) ** -15)
            got = 0.0 if value.grad is None else value.grad.item()
            assert got == pytest.approx(float(slope), rel=1e-9, abs=1e-12), (op, sample, place)


@pytest.mark.parametrize("by", EVALUATORS)
@pytest.mark.parametrize("op", COMPLEX)
def test_complex_values_and_gradients(op: str, by: str) -> None:
    names = "ab"[: OPS[op].arity]
    sample = (0.7 - 0.4j, -1.1 + 0.3j)[: OPS[op].arity]
    values = numbers(names, sample, torch.complex128)
    out = EVALUATORS[by](Op(op, refs(names, (), "complex")), (), values)
    weight = 0.3 - 0.8j

    def loss(*args: complex) -> float:
        value = COMPLEX[op](*(m.mpc(a) for a in args))
        return float((m.mpc(value) * weight).real)

    assert complex(out.item()) == pytest.approx(complex(m.mpc(COMPLEX[op](*(m.mpc(v) for v in sample)))), rel=1e-13)
    (out * weight).real.backward()
    step = 1e-6
    for place, value in enumerate(values.values()):
        shifted = [
            [(v + d if n == place else v) for n, v in enumerate(sample)] for d in (step, -step, step * 1j, -step * 1j)
        ]
        up, down, left, right = (loss(*s) for s in shifted)
        expected = complex((up - down) / (2 * step), (left - right) / (2 * step))
        assert complex(value.grad.item()) == pytest.approx(expected, rel=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("by", EVALUATORS)
def test_conditions(by: str) -> None:
    a, b, c = refs("abc")
    grid = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    x, y = grid.repeat(4), grid.repeat_interleave(4)
    values = {"a": x, "b": y, "c": torch.full_like(x, 7.0)}

    def pick(condition: Expr) -> list[bool]:
        return (EVALUATORS[by](Op("where", (condition, c, a)), (), values) == 7.0).tolist()

    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    for op, rule in LOGIC.items():
        assert pick(Op(op, (a, b))) == [rule(u, v) for u, v in pairs]
    less, small = Op("lt", (a, b)), Op("le", (a, Op("mul", (b, b))))
    assert pick(Op("and", (less, small))) == [u < v and u <= v * v for u, v in pairs]
    assert pick(Op("or", (less, Op("not", (small,))))) == [u < v or not u <= v * v for u, v in pairs]
    assert pick(Op("not", (Op("and", (less, small)),))) == [not (u < v and u <= v * v) for u, v in pairs]


@pytest.mark.parametrize("by", EVALUATORS)
def test_where_sends_the_gradient_to_the_branch_taken(by: str) -> None:
    a, b, c = refs("abc")
    values = numbers("abc", (1.0, 2.0, 3.0))
    out = EVALUATORS[by](Op("where", (Op("lt", (a, b)), Op("mul", (b, c)), Op("div", (a, c)))), (), values)
    out.backward()
    assert out.item() == 6.0
    assert [v.grad.item() if v.grad is not None else 0.0 for v in values.values()] == [0.0, 3.0, 2.0]


@pytest.mark.parametrize("by", EVALUATORS)
@pytest.mark.parametrize("op", ["max", "min"])
def test_ties_take_the_left_operand(op: str, by: str) -> None:
    values = {n: torch.full((2,), 1.5, dtype=torch.float64, requires_grad=True) for n in "ab"}
    EVALUATORS[by](Op(op, refs("ab")), (), values).sum().backward()
    assert values["a"].grad.tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    assert values["b"].grad is None or values["b"].grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("by", EVALUATORS)
def test_stop_and_complex(by: str) -> None:
    a, b = refs("ab")
    values = numbers("ab", (2.0, -3.0))
    out = EVALUATORS[by](Op("mul", (Op("stop", (a,)), b)), (), values)
    out.backward()
    assert values["a"].grad is None or values["a"].grad.item() == 0.0
    assert values["b"].grad.item() == 2.0  # type: ignore[union-attr]
    number = Op("complex", (a, Op("mul", (a, b))))
    out = EVALUATORS[by](number, (), values)
    assert out.item() == complex(2.0, -6.0)


@pytest.mark.parametrize("by", EVALUATORS)
@pytest.mark.parametrize("x, m", [(-math.inf, 0.5), (-math.inf, -math.inf), (-math.inf, math.inf), (0.5, 1.5)])
def test_exp_of_a_difference_at_minus_infinity(x: float, m: float, by: str) -> None:
    values = numbers("ab", (x, m))
    a, b = refs("ab")
    out = EVALUATORS[by](Op("exp", (Op("sub", (a, b)),)), (), values)
    out.backward()
    value = math.exp(x - m) if math.isfinite(x) else 0.0
    assert [out.item(), values["a"].grad.item(), values["b"].grad.item()] == [value, value, -value]  # type: ignore[union-attr]


@pytest.mark.parametrize("by", EVALUATORS)
def test_logaddexp_at_infinity(by: str) -> None:
    inf = math.inf
    values = {
        "a": torch.tensor([-inf, -inf, inf], dtype=torch.float64, requires_grad=True),
        "b": torch.tensor([-inf, 2.0, 1.0], dtype=torch.float64, requires_grad=True),
    }
    out = EVALUATORS[by](Op("logaddexp", refs("ab")), (), values)
    out.sum().backward()
    assert out.tolist() == [-inf, 2.0, inf]
    assert values["a"].grad.tolist() == [0.5, 0.0, 1.0]  # type: ignore[union-attr]
    assert values["b"].grad.tolist() == [0.5, 1.0, 0.0]  # type: ignore[union-attr]


@pytest.mark.parametrize("by", EVALUATORS)
@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions(op: str, by: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 3, dtype=torch.float64, generator=generator)
    x[0, 1] = x[0, 2] = 9.0  # equal ones: the first is the maximum
    x.requires_grad_()
    (a,) = refs("a", (ROW, COL))
    expected = {"sum": x.sum(1), "prod": x[:, 0] * x[:, 1] * x[:, 2] * x[:, 3], "max": x.detach().amax(1)}[op]
    out = EVALUATORS[by](Reduce(op, ROW, a), (COL,), {"a": x})
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), x)
    slope = {"sum": torch.ones_like(x), "prod": expected.detach()[:, None] / x.detach()}.get(op)
    if slope is None:
        first = torch.tensor(x.detach().numpy().argmax(1))
        slope = torch.zeros_like(x).scatter(1, first[:, None], 1.0)
    torch.testing.assert_close(grad, slope)


@pytest.mark.parametrize("by", EVALUATORS)
@pytest.mark.parametrize("op, expected", [("sum", 8.0), ("prod", 16.0), ("max", 2.0)])
def test_reductions_of_what_does_not_depend_on_the_index(op: str, expected: float, by: str) -> None:
    (a,) = refs("a")
    out = EVALUATORS[by](Reduce(op, ROW, a), (), {"a": torch.tensor([2.0], dtype=torch.float64)})
    assert out.tolist() == [expected]
