"""Exact evaluation of the IR at given dim sizes: one row per operator, values in `numbers`.

It shares nothing with the normal forms, and runs combine step by step on concrete elements, so that it can contradict
a proof.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from itertools import product as positions_of
from math import inf

from psmc.algebra import numbers as nu
from psmc.algebra.numbers import INF, NEG_INF, ONE, ZERO, Complex, Number, Real, real
from psmc.algebra.ring import UndefinedError
from psmc.algebra.terms import OutOfBudgetError
from psmc.ir import Assign, Block, Const, DimValue, Expr, Eye, Index, IndexValue, Infinity, Op, Reduce, Ref, Sub
from psmc.ir.query import needs_safe_exp, signed_terms
from psmc.ir.rewrite import instantiate

Position = tuple[int, ...]
Array = dict[Position, "Number | None"]  # None: no value there
Sizes = Mapping[str, int]
Store = Mapping[tuple[str, str], Array]  # (space, name) -> array


class Evaluator:
    """Evaluates expressions over `store`; lets of `block` are computed where they are read.

    `plain`: exp(x - m) at x = -inf is what IEEE arithmetic makes of it, not the 0 of the language. Past the `deadline`
    (of time.monotonic) it raises OutOfBudgetError.
    """

    def __init__(
        self, sizes: Sizes, store: Store, lets: Mapping[str, Assign], *, plain: bool = False, deadline: float = inf
    ) -> None:
        self.sizes, self.store, self.lets, self.plain, self.deadline = sizes, store, lets, plain, deadline
        self._done: dict[tuple[Expr, tuple[tuple[Index, int], ...]], Number | bool | UndefinedError] = {}

    def at(self, assign: Assign, position: Position) -> Number:
        value = self.value(assign.value, dict(zip(assign.indices, position, strict=True)))
        assert not isinstance(value, bool)
        return value

    def value(self, expr: Expr, where: Mapping[Index, int]) -> Number | bool:
        key = (expr, tuple(sorted((i, where[i]) for i in expr.free)))
        found = self._done.get(key)
        if found is None:
            if len(self._done) % 512 == 511 and time.monotonic() > self.deadline:
                raise OutOfBudgetError("the time limit was reached")
            try:
                found = self._visit(expr, dict(key[1]))
            except UndefinedError as error:
                found = error
            self._done[key] = found
        if isinstance(found, UndefinedError):
            raise found
        return found

    def _visit(self, expr: Expr, where: dict[Index, int]) -> Number | bool:
        match expr:
            case Const(value=value):
                return value
            case Infinity(negative=negative):
                return NEG_INF if negative else INF
            case IndexValue(index=index):
                return Fraction(where[index])
            case DimValue(dim=dim):
                return Fraction(self.sizes[dim])
            case Eye(row=row, col=col):
                return ONE if self._sub(row, where) == self._sub(col, where) else ZERO
            case Ref(space=space, name=name, subs=subs):
                position = tuple(self._sub(s, where) for s in subs)
                if space == "let":
                    return self.at(self.lets[name], position)
                entry = self.store[space, name].get(position)
                if entry is None:
                    raise UndefinedError("an element without a value, or a position out of range")
                return entry
            case Reduce(op=op, index=index, body=body):
                out = self.value(body, {**where, index: 0})
                for k in range(1, self.sizes[index.dim]):
                    out = TABLE[_STEP[op]](out, self.value(body, {**where, index: k}))
                return out
            case Op(op="where", args=(condition, x, y)):
                return self.value(x if self.value(condition, where) else y, where)
            case Op(op="exp", args=(argument,)) if not self.plain and self._gone(argument, where):
                return ZERO
            case Op(op=op, args=args):
                return TABLE[op](*(self.value(a, where) for a in args))
        raise AssertionError(expr)

    def _gone(self, argument: Expr, where: dict[Index, int]) -> bool:
        """Whether a term of a sum under exp is -inf."""
        terms = signed_terms(argument, self._definition)
        return needs_safe_exp(terms) and any(
            isinstance(v := self.value(t, where), Decimal) and v.is_infinite() and (v > 0) == (sign < 0)
            for sign, t in terms
        )

    def _definition(self, ref: Ref) -> Expr | None:
        return instantiate(self.lets[ref.name], ref.subs) if ref.name in self.lets else None

    def _sub(self, sub: Sub, where: Mapping[Index, int]) -> int:
        if isinstance(sub, Index):
            return where[sub]
        if isinstance(sub, int):
            return sub
        value = self.value(sub, where)
        if not isinstance(value, Fraction) or value.denominator != 1:
            raise UndefinedError("a subscript that is not an integer")
        return int(value)


def positions(dims: tuple[str, ...], sizes: Sizes) -> Iterator[Position]:
    return positions_of(*(range(sizes[d]) for d in dims))


def run(block: Block, sizes: Sizes, store: Store, *, plain: bool = False, deadline: float = inf) -> dict[str, Array]:
    """All results of a block; entries without a value are None."""
    evaluator = Evaluator(sizes, store, {a.name: a for a in block.lets}, plain=plain, deadline=deadline)
    out: dict[str, Array] = {}
    for assign in block.results:
        array: Array = {}
        for position in positions(tuple(i.dim for i in assign.indices), sizes):
            try:
                array[position] = evaluator.at(assign, position)
            except UndefinedError:
                array[position] = None
        out[assign.name] = array
    return out


# --- operators ----------------------------------------------------------------------------------

_STEP = {"sum": "add", "max": "max", "prod": "mul"}
_TWO = Fraction(2)


def _order(test: Callable[[int], bool]) -> Callable[[Number, Number], bool]:
    return lambda x, y: test(nu.compare(real(x), real(y)))


def _equal(x: Number, y: Number) -> bool:
    if isinstance(x, Complex) or isinstance(y, Complex):
        (a, b), (c, d) = nu.parts(x), nu.parts(y)
        return nu.compare(a, c) == 0 and nu.compare(b, d) == 0
    return nu.compare(x, y) == 0


def _abs(x: Number) -> Number:
    if isinstance(x, Complex):
        return nu.sqrt(nu.add_real(nu.mul_real(x.re, x.re), nu.mul_real(x.im, x.im)))
    return x if x >= 0 else nu.neg(x)


def _exp(x: Number) -> Real:
    return real(nu.exp(real(x)))


def _softplus(x: Number) -> Number:
    v = real(x)
    if nu.infinite(v):
        return INF if v > 0 else ZERO
    return nu.log(nu.add_real(ONE, _exp(v)))


def _sigmoid(x: Number) -> Number:
    return nu.div_real(ONE, nu.add_real(ONE, _exp(nu.neg(x))))


def _tanh(x: Number) -> Number:
    v = real(x)
    if nu.infinite(v):
        return Fraction(nu.sign(v))
    square = _exp(nu.mul_real(_TWO, v))
    return nu.div_real(nu.add_real(square, -ONE), nu.add_real(square, ONE))


def _gelu(x: Number) -> Number:
    v = real(x)
    scaled = nu.div_real(v, nu.sqrt(_TWO))
    return nu.mul_real(nu.div_real(v, _TWO), nu.add_real(ONE, nu.erf(scaled)))


def _logaddexp(x: Number, y: Number) -> Number:
    return nu.log(nu.add_real(_exp(x), _exp(y)))


def _log(x: Number) -> Number:
    if isinstance(x, Complex):
        raise UndefinedError("log of a complex number")
    return nu.log(x)


TABLE: dict[str, Callable[..., Number | bool]] = {
    "or": lambda x, y: x or y,
    "and": lambda x, y: x and y,
    "not": lambda x: not x,
    "lt": _order(lambda c: c < 0),
    "le": _order(lambda c: c <= 0),
    "gt": _order(lambda c: c > 0),
    "ge": _order(lambda c: c >= 0),
    "eq": _equal,
    "ne": lambda x, y: not _equal(x, y),
    "add": nu.add,
    "sub": lambda x, y: nu.add(x, nu.neg(y)),
    "mul": nu.mul,
    "div": nu.div,
    "neg": nu.neg,
    "pow": lambda x, y: nu.power(x, real(y)),
    "where": lambda c, x, y: x if c else y,
    "max": lambda x, y: nu.greatest(real(x), real(y)),
    "min": lambda x, y: nu.least(real(x), real(y)),
    "abs": _abs,
    "sign": lambda x: Fraction(nu.compare(real(x), ZERO)),
    "clamp": lambda x, lo, hi: nu.least(nu.greatest(real(x), real(lo)), real(hi)),
    "exp": nu.exp,
    "expm1": lambda x: nu.add_real(_exp(x), -ONE),
    "log": _log,
    "log1p": lambda x: nu.log(nu.add_real(ONE, real(x))),
    "sqrt": lambda x: nu.sqrt(real(x)),
    "rsqrt": lambda x: nu.div_real(ONE, nu.sqrt(real(x))),
    "sin": lambda x: nu.sin(real(x)),
    "cos": lambda x: nu.cos(real(x)),
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "logsigmoid": lambda x: nu.neg(_softplus(nu.neg(x))),
    "softplus": _softplus,
    "relu": lambda x: nu.greatest(real(x), ZERO),
    "silu": lambda x: nu.mul_real(real(x), real(_sigmoid(x))),
    "gelu": _gelu,
    "erf": lambda x: nu.erf(real(x)),
    "logaddexp": _logaddexp,
    "stop": lambda x: x,
    "real": lambda x: nu.parts(x)[0],
    "imag": lambda x: nu.parts(x)[1],
    "conj": nu.conj,
    "complex": lambda x, y: Complex(real(x), real(y)),
}
