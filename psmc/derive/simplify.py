"""Local simplification of derived expressions: units, zeros, exact constants. One rule per operator.

`make` builds an operator and applies its rule at once, so derived code never carries `0 + x` or `1 * x`; `simplify`
applies the same rules to an existing expression. Every rule is exact in floating point (signed zeros and `0 * x` at
a non-finite x aside) and none reorders a sum or a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from psmc.ir import Block, Const, DimValue, Expr, Index, Infinity, Op, Reduce
from psmc.ir.rewrite import map_values, transform

ZERO = Const(Fraction(0))
ONE = Const(Fraction(1))
HALF = Const(Fraction(1, 2))

_MAX_EXPONENT = 64  # constants are folded exactly, so powers of them must stay small


def make(op: str, *args: Expr) -> Expr:
    """`Op(op, args)`, simplified. Raises TypeError if the operand kinds do not fit."""
    rule = _RULES.get(op)
    found = rule(args) if rule is not None else None
    return Op(op, args) if found is None else found


def simplify(root: Expr) -> Expr:
    """`root` with every node simplified, bottom up and memoised."""
    return transform(root, _rule)


def simplify_block(block: Block) -> Block:
    """Every right-hand side simplified. Lets stay as they are."""
    return map_values(block, simplify)


def total(terms: Sequence[Expr]) -> Expr:
    """Their sum from left to right; 0 if there are none."""
    out: Expr = ZERO
    for term in terms:
        out = make("add", out, term)
    return out


def plus(a: Expr | None, b: Expr | None) -> Expr | None:
    """a + b, where None stands for a term that is not there."""
    return b if a is None else a if b is None else make("add", a, b)


def sum_over(indices: Sequence[Index], body: Expr) -> Expr:
    """`body` summed over `indices`, with the factors that do not depend on an index outside of its sum."""
    for index in sorted(indices):
        body = _sum(index, body)
    return body


def _sum(index: Index, body: Expr) -> Expr:
    outer: list[Expr | None] = []  # factors met on the way in; None is a negation
    while index in body.free and isinstance(body, Op) and body.op in ("neg", "mul"):
        if body.op == "neg":
            outer.append(None)
            body = body.args[0]
            continue
        left, right = body.args
        if index in left.free and index in right.free:
            break
        outer.append(left if index not in left.free else right)
        body = right if index not in left.free else left
    out = Reduce("sum", index, body) if index in body.free else make("mul", DimValue(index.dim), body)
    for factor in reversed(outer):
        out = make("neg", out) if factor is None else make("mul", factor, out)
    return out


def _rule(node: Expr) -> Expr | None:
    if isinstance(node, Op):
        rule = _RULES.get(node.op)
        return rule(node.args) if rule is not None else None
    if isinstance(node, Reduce) and isinstance(node.body, Const):
        if node.body.value == 0 and node.op == "sum":
            return ZERO
        if node.body.value == 1 and node.op == "prod":
            return ONE
    return None


# --- rules: operands -> simpler expression, or None ------------------------------------------------

_Rule = Callable[[tuple[Expr, ...]], "Expr | None"]


def _value(node: Expr) -> Fraction | None:
    return node.value if isinstance(node, Const) else None


def _negated(node: Expr) -> Expr | None:
    """x where node is -x."""
    return node.args[0] if isinstance(node, Op) and node.op == "neg" else None


def _is(op: str, node: Expr) -> tuple[Expr, ...] | None:
    return node.args if isinstance(node, Op) and node.op == op else None


def _add(args: tuple[Expr, ...]) -> Expr | None:
    a, b = args
    u, v = _value(a), _value(b)
    if u is not None and v is not None:
        return Const(u + v)
    if u == 0:
        return b
    if v == 0:
        return a
    if (y := _negated(b)) is not None:
        return make("sub", a, y)
    if (x := _negated(a)) is not None:
        return make("sub", b, x)
    return None


def _sub(args: tuple[Expr, ...]) -> Expr | None:
    a, b = args
    u, v = _value(a), _value(b)
    if u is not None and v is not None:
        return Const(u - v)
    if u == 0:
        return make("neg", b)
    if v == 0:
        return a
    if (y := _negated(b)) is not None:
        return make("add", a, y)
    return None


def _mul(args: tuple[Expr, ...]) -> Expr | None:
    a, b = args
    u, v = _value(a), _value(b)
    if u is not None and v is not None:
        return Const(u * v)
    for value, other in ((u, b), (v, a)):
        if value == 0 and not isinstance(other, Infinity):
            return ZERO
        if value == 1:
            return other
        if value == -1:
            return make("neg", other)
    if (x := _negated(a)) is not None:
        return make("neg", make("mul", x, b))
    if (y := _negated(b)) is not None:
        return make("neg", make("mul", a, y))
    return None


def _div(args: tuple[Expr, ...]) -> Expr | None:
    a, b = args
    u, v = _value(a), _value(b)
    if u is not None and v:
        return Const(u / v)
    if v == 1:
        return a
    if v == -1:
        return make("neg", a)
    if u == 0 and v != 0:
        return ZERO
    if (x := _negated(a)) is not None:
        return make("neg", make("div", x, b))
    return None


def _neg(args: tuple[Expr, ...]) -> Expr | None:
    (x,) = args
    if isinstance(x, Const):
        return Const(-x.value)
    if isinstance(x, Infinity):
        return Infinity(not x.negative)
    return _negated(x)


def _pow(args: tuple[Expr, ...]) -> Expr | None:
    base, exponent = (_value(a) for a in args)
    if exponent == 1:
        return args[0]
    if exponent == 0:
        return ONE
    if base is None or exponent is None or exponent.denominator != 1:
        return None
    if abs(exponent) > _MAX_EXPONENT or (base == 0 and exponent < 0):
        return None
    return Const(base ** int(exponent))


_DECIDE: dict[str, Callable[[Fraction, Fraction], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


def _where(args: tuple[Expr, ...]) -> Expr | None:
    test, a, b = args
    if a == b:
        return a
    if (inner := _is("not", test)) is not None:
        return make("where", inner[0], b, a)
    if isinstance(test, Op) and test.op in _DECIDE:
        u, v = (_value(x) for x in test.args)
        if u is not None and v is not None:
            return a if _DECIDE[test.op](u, v) else b
    if (inner := _is("where", a)) is not None and inner[0] == test:
        return make("where", test, inner[1], b)
    if (inner := _is("where", b)) is not None and inner[0] == test:
        return make("where", test, a, inner[2])
    return None


def _extremum(pick: Callable[[Fraction, Fraction], Fraction]) -> _Rule:
    def rule(args: tuple[Expr, ...]) -> Expr | None:
        a, b = args
        u, v = _value(a), _value(b)
        if u is not None and v is not None:
            return Const(pick(u, v))
        return a if a == b else None

    return rule


def _at(points: dict[int, int]) -> _Rule:
    """Known exact values of a function."""

    def rule(args: tuple[Expr, ...]) -> Expr | None:
        value = _value(args[0])
        if value is None or value.denominator != 1 or int(value) not in points:
            return None
        return Const(Fraction(points[int(value)]))

    return rule


def _fold(fn: Callable[[Fraction], Fraction]) -> _Rule:
    def rule(args: tuple[Expr, ...]) -> Expr | None:
        value = _value(args[0])
        return None if value is None else Const(fn(value))

    return rule


def _real(args: tuple[Expr, ...]) -> Expr | None:
    (z,) = args
    if z.kind != "complex":
        return z
    if (pair := _is("complex", z)) is not None:
        return pair[0]
    return make("real", inner[0]) if (inner := _is("conj", z)) is not None else None


def _imag(args: tuple[Expr, ...]) -> Expr | None:
    (z,) = args
    if z.kind != "complex":
        return ZERO
    if (pair := _is("complex", z)) is not None:
        return pair[1]
    return make("neg", make("imag", inner[0])) if (inner := _is("conj", z)) is not None else None


def _conj(args: tuple[Expr, ...]) -> Expr | None:
    (z,) = args
    if z.kind != "complex":
        return z
    inner = _is("conj", z)
    return inner[0] if inner is not None else None


_RULES: dict[str, _Rule] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "pow": _pow,
    "where": _where,
    "max": _extremum(max),
    "min": _extremum(min),
    "abs": _fold(abs),
    "sign": _fold(lambda v: Fraction((v > 0) - (v < 0))),
    "relu": _fold(lambda v: max(v, Fraction(0))),
    "stop": _fold(lambda v: v),
    "exp": _at({0: 1}),
    "expm1": _at({0: 0}),
    "log": _at({1: 0}),
    "log1p": _at({0: 0}),
    "sqrt": _at({0: 0, 1: 1}),
    "rsqrt": _at({1: 1}),
    "sin": _at({0: 0}),
    "cos": _at({0: 1}),
    "tanh": _at({0: 0}),
    "real": _real,
    "imag": _imag,
    "conj": _conj,
}
