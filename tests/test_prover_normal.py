"""The normal form of an expression has the expression's value, at random points and sizes, whatever the operators."""

from __future__ import annotations

import math
import random
import time
from fractions import Fraction

import pytest
from prover_specs import spec

from psmc.algebra import exact, extended, intervals, normal
from psmc.algebra import interval_math as im
from psmc.algebra import numbers as nu
from psmc.algebra.exact import Evaluator
from psmc.algebra.facts import Facts
from psmc.algebra.normal import Normaliser
from psmc.algebra.prover import deep_recursion
from psmc.algebra.residual import expression
from psmc.algebra.ring import Ring, SplitError, UndefinedError, mul
from psmc.algebra.roots import square_root
from psmc.algebra.terms import UNIT, OutOfBudgetError, Poly
from psmc.ir import OPS, Block, Const, DimValue, Expr, Eye, Index, IndexValue, Interval, Op, Reduce, Ref
from psmc.ir.rewrite import refs
from psmc.ir.text import show_expr

ROW, COL = Index("i", "K"), Index("j", "K")
NUMBERS = ["0", "1", "2", "-1", "1/2", "3"]
UNARY = ["neg", "abs", "sign", "relu", "exp", "log", "sqrt", "tanh", "sigmoid", "softplus", "expm1", "stop", "gelu"]
UNARY += ["sin", "erf", "rsqrt", "silu", "logsigmoid", "log1p", "cos"]
BINARY = ["add", "sub", "mul", "add", "mul", "max", "min", "div", "logaddexp", "pow"]
COMPARE = ["lt", "le", "gt", "ge", "eq", "ne"]


def scalar(name: str) -> Ref:
    return Ref("state", name, ())


def random_expr(rng: random.Random, depth: int, free: tuple[Index, ...], bound: int = 0) -> Expr:
    """A real expression over x, y, p (positive), vectors v, matrices A, ints q[i] that are positions."""
    if depth == 0 or rng.random() < 0.1:
        leaves: list[Expr] = [scalar("x"), scalar("y"), scalar("p"), Const(Fraction(rng.choice(NUMBERS)))]
        for index in free:
            gathered = Ref("state", "v", (Ref("state", "q", (index,), "int"),))
            leaves += [Ref("state", "v", (index,)), IndexValue(index), gathered]
        if len(free) > 1:
            i, j = rng.sample(free, 2)
            leaves += [Ref("state", "A", (i, j)), Eye(i, j), Ref("state", "A", (i, i)), Ref("state", "A", (j, i))]
        if rng.random() < 0.1:
            leaves.append(DimValue("K"))
        return rng.choice(leaves)
    kind = rng.random()
    if kind < 0.2 and len(free) < 3:
        index = Index(f"m{bound}", "K")
        op = rng.choice(("sum", "sum", "max", "prod"))
        return Reduce(op, index, random_expr(rng, depth - 1, (*free, index), bound + 1))
    if kind < 0.3:
        left, right = (random_expr(rng, depth - 1, free, bound) for _ in "xy")
        test = Op(rng.choice(COMPARE), (left, right))
        return Op("where", (test, *(random_expr(rng, depth - 1, free, bound) for _ in "xy")))
    if kind < 0.5:
        return Op(rng.choice(UNARY), (random_expr(rng, depth - 1, free, bound),))
    if kind < 0.53:
        return Op("clamp", tuple(random_expr(rng, depth - 1, free, bound) for _ in "xyz"))
    name = rng.choice(BINARY)
    left = random_expr(rng, depth - 1, free, bound)
    right = Const(Fraction(rng.choice((2, 3, -1)))) if name == "pow" else random_expr(rng, depth - 1, free, bound)
    return Op(name, (left, right))


def random_store(rng: random.Random, size: int) -> dict[tuple[str, str], exact.Array]:
    def draw() -> Fraction:
        return Fraction(rng.randint(-4, 4), rng.choice((1, 1, 2)))

    return {
        ("state", "x"): {(): draw()},
        ("state", "y"): {(): draw()},
        ("state", "p"): {(): abs(draw()) + Fraction(1, 2)},
        ("state", "v"): {(k,): draw() for k in range(size)},
        ("state", "q"): {(k,): Fraction(rng.randrange(size)) for k in range(size)},
        ("state", "A"): {(k, m): draw() for k in range(size) for m in range(size)},
    }


FACTS = Facts({"p": Interval(Fraction(0), None, True, True)})


def normal_form(expr: Expr, eager: bool) -> Expr | None:
    try:
        value = Normaliser(Ring(FACTS, time.monotonic() + 2, eager=eager, work=20_000))(expr)
        return None if isinstance(value, extended.Infinite) else expression(value)
    except (OutOfBudgetError, UndefinedError, SplitError):
        return None
    except TypeError as error:  # sin, cos are written with i, which ordered operators refuse
        assert "complex" in str(error)
        return None


def disagreement(expr: Expr, other: Expr, rng: random.Random, points: int) -> str:
    for _ in range(points):
        size = rng.randint(1, 3)
        store = random_store(rng, size)
        evaluator = Evaluator({"K": size}, store, {})
        where = {i: rng.randrange(size) for i in (ROW, COL)}
        try:
            left, right = evaluator.value(expr, where), evaluator.value(other, where)
        except UndefinedError:
            continue
        if nu.differ(left, right):
            return f"{show_expr(expr)}\n  became {show_expr(other)}\n  {left} against {right} at {store} {where}"
    return ""


@pytest.mark.parametrize("seed", range(4))
def test_normal_form_keeps_the_value(seed: int) -> None:
    decided = 0
    for k in range(50):
        rng = random.Random(f"{seed}.{k}")
        expr = random_expr(rng, rng.choice((2, 3, 3, 4)), (ROW, COL))
        with deep_recursion():
            other = normal_form(expr, eager=False)
            if other is not None:
                decided += 1
                assert not (text := disagreement(expr, other, rng, 4)), text
    assert decided > 20


@pytest.mark.parametrize(("op", "value"), [("eq", -1), ("eq", 0), ("eq", 1), ("ne", 2), ("eq", Fraction(1, 2))])
def test_an_index_compared_with_a_number(op: str, value: int | Fraction) -> None:
    """A position outside the dim is never met, and no dim is known to hold more than position 0."""
    index = Index("m", "K")
    test = Op(op, (IndexValue(index), Const(Fraction(value))))
    body = Op("where", (test, Ref("state", "v", (index,)), Const(Fraction(0))))
    for reduction in ("sum", "max"):
        expr = Reduce(reduction, index, body)
        other = normal_form(expr, eager=False)
        assert other is not None
        assert not (text := disagreement(expr, other, random.Random(str(value)), 20)), text


@pytest.mark.parametrize("seed", range(4))
def test_bounds_hold(seed: int) -> None:
    for k in range(80):
        rng = random.Random(f"b{seed}.{k}")
        expr = random_expr(rng, 3, (ROW, COL))
        env = {("state", n): Interval(Fraction(-4), Fraction(4), False, False) for n in "xyvA"}
        env |= {("state", "p"): Interval(Fraction(0), None, True, True), ("state", "q"): im.NON_NEGATIVE}
        found = intervals.bounds(expr, env)
        for _ in range(4):
            size = rng.randint(1, 3)
            where = {i: rng.randrange(size) for i in (ROW, COL)}
            try:
                value = Evaluator({"K": size}, random_store(rng, size), {}).value(expr, where)
            except UndefinedError:
                continue
            if isinstance(value, nu.Complex) or nu.infinite(value):
                continue
            assert im.holds(found, Fraction(value)), f"{show_expr(expr)} = {value} outside {found}"


@pytest.mark.parametrize("table", [exact.TABLE, normal.RULES, intervals.TABLE], ids=["exact", "normal", "intervals"])
def test_every_operator_has_a_row(table: dict[str, object]) -> None:
    assert set(table) == set(OPS)


def test_generator_covers_the_operators() -> None:
    seen = set()
    for k in range(400):
        expr = random_expr(random.Random(k), 4, (ROW, COL))
        assert all(r.name in "xypvqA" for r in refs(expr))
        stack: list[Expr] = [expr]
        while stack:
            node = stack.pop()
            if isinstance(node, Op):
                seen.add(node.op)
                stack += node.args
            elif isinstance(node, Reduce):
                stack.append(node.body)
    assert seen >= {*UNARY, *BINARY, *COMPARE, "clamp", "where"}


ROOTS = ["l.s + l.t", "l.s - 2 * l.t", "l.s * l.t + 1", "3 * l.s^2 - l.t / 2 + 1", "l.s - l.t + l.s * l.t", "-l.s", "1 / l.s - l.t"]


@pytest.mark.parametrize("text", ROOTS)
def test_square_roots(text: str) -> None:
    combine = spec(f"state s = 0, t = 0 combine (l, r) {{ s = {text}; t = r.t }}").combine
    assert isinstance(combine, Block)
    ring = Ring(Facts(), math.inf)
    poly = Normaliser(ring)(combine.results[0].value)
    assert isinstance(poly, Poly)
    square = mul(ring, poly, poly)
    assert square_root(ring, square) in (poly, -poly)
    for other in (square + UNIT, square + poly, square.scaled(Fraction(2)), -square, mul(ring, square, poly)):
        assert square_root(ring, other) is None
