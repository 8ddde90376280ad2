"""Evaluation of the IR in doubles, as the oracle does it, without torch: one row per operator.

IEEE arithmetic never raises: a quotient by 0 is an infinity, what has no value is NaN, whole numbers wrap at 64 bits.
With `noise`, every rounded result is moved by some units in its last place: how far results then lie apart says what
rounding alone can do to them.
"""

from __future__ import annotations

import cmath
import math
import random
from collections.abc import Callable, Mapping
from typing import TypeAlias

from psmc.algebra.exact import Position, Sizes
from psmc.ir import Assign, Block, Const, DimValue, Expr, Eye, Index, IndexValue, Infinity, Op, Reduce, Ref, Sub
from psmc.ir.query import nearest_float, needs_safe_exp, signed_terms
from psmc.ir.rewrite import instantiate

Float: TypeAlias = "int | float | complex"  # bool is an int
Floats = dict[Position, Float]
Store = Mapping[tuple[str, str], Floats]
_UNIT = 2.0**-50
_EXACT = frozenset(("where", "max", "min", "neg", "abs", "sign", "clamp", "relu", "stop", "real", "imag", "conj"))
_INT_BOUND = 2**53  # ints of a spec beyond it are reals


def run(block: Block, sizes: Sizes, store: Store, noise: random.Random | None = None) -> dict[str, Floats]:
    """All results of a block; their entries are computed when they are read."""
    evaluation = _Evaluation(sizes, store, {a.name: a for a in block.lets}, noise)
    return {a.name: _Result(evaluation, a) for a in block.results}


class _Result(Floats):
    """One result of a block."""

    def __init__(self, evaluation: _Evaluation, assign: Assign) -> None:
        super().__init__()
        self.evaluation, self.assign = evaluation, assign

    def __missing__(self, position: Position) -> Float:
        return self.get(position)

    def get(self, position: Position, default: object = None) -> Float:
        sizes = self.evaluation.sizes
        if not all(0 <= p < sizes[i.dim] for p, i in zip(position, self.assign.indices, strict=True)):
            return math.nan
        return self.evaluation.at(self.assign, position)


class _Evaluation:
    def __init__(self, sizes: Sizes, store: Store, lets: Mapping[str, Assign], noise: random.Random | None) -> None:
        self.sizes, self.store, self.lets, self.noise = sizes, store, lets, noise
        self._done: dict[tuple[Expr, tuple[tuple[Index, int], ...]], Float] = {}

    def at(self, assign: Assign, position: Position) -> Float:
        return self.value(assign.value, dict(zip(assign.indices, position, strict=True)))

    def value(self, expr: Expr, where: Mapping[Index, int]) -> Float:
        key = (expr, tuple(sorted((i, where[i]) for i in expr.free)))
        found = self._done.get(key)
        if found is None:
            found = self._done[key] = self._visit(expr, dict(key[1]))
        return found

    def _visit(self, expr: Expr, where: dict[Index, int]) -> Float:
        match expr:
            case Const(value=value) if expr.kind == "int" and abs(value) < _INT_BOUND:
                return int(value)
            case Const(value=value):
                return nearest_float(value)
            case Infinity(negative=negative):
                return -math.inf if negative else math.inf
            case IndexValue(index=index):
                return where[index]
            case DimValue(dim=dim):
                return self.sizes[dim]
            case Eye(row=row, col=col):
                return int(self._sub(row, where) == self._sub(col, where))
            case Ref(space=space, name=name, subs=subs):
                position = tuple(self._sub(s, where) for s in subs)
                if space == "let":
                    return self.at(self.lets[name], position)
                return self.store[space, name].get(position, math.nan)
            case Reduce(op=op, index=index, body=body):
                out = self.value(body, {**where, index: 0})
                for k in range(1, self.sizes[index.dim]):
                    out = self._rounded(_STEP[op], TABLE[_STEP[op]](out, self.value(body, {**where, index: k})))
                return out
            case Op(op="exp", args=(argument,)):
                terms = signed_terms(argument, self._definition)
                gone = needs_safe_exp(terms) and any(
                    _real(s * self.value(t, {i: where[i] for i in t.free})) == -math.inf for s, t in terms
                )
                return 0.0 if gone else self._rounded("exp", _exp(self.value(argument, where)))
            case Op(op=op, args=args):
                return self._rounded(op, TABLE[op](*(self.value(a, where) for a in args)))
        raise AssertionError(expr)

    def _definition(self, ref: Ref) -> Expr | None:
        return instantiate(self.lets[ref.name], ref.subs) if ref.name in self.lets else None

    def _rounded(self, op: str, value: Float) -> Float:
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return (value + 2**63) % 2**64 - 2**63
        if self.noise is None or op in _EXACT:
            return value
        return value * (1 + _UNIT * self.noise.choice((-3, -2, -1, 1, 2, 3)))

    def _sub(self, sub: Sub, where: Mapping[Index, int]) -> int:
        if isinstance(sub, Index):
            return where[sub]
        value = sub if isinstance(sub, int) else self.value(sub, where)
        return value if isinstance(value, int) else -1


# --- operators ------------------------------------------------------------------------------------

_STEP = {"sum": "add", "max": "max", "prod": "mul"}


def _real(x: Float) -> int | float:
    return x.real


def _total(fn: Callable[..., Float], overflow: float = math.inf, domain: float = math.nan) -> Callable[..., Float]:
    """`fn` with the values that IEEE gives where Python raises."""

    def row(*args: Float) -> Float:
        try:
            return fn(*args)
        except OverflowError:
            return overflow
        except (ValueError, ZeroDivisionError):
            return domain

    return row


def _div(x: Float, y: Float) -> Float:
    try:
        return x / y
    except OverflowError:  # of whole numbers
        return math.inf
    except ZeroDivisionError:
        if isinstance(x, complex) or isinstance(y, complex) or x == 0 or x != x:
            return complex(math.nan, math.nan) if isinstance(x, complex) or isinstance(y, complex) else math.nan
        return math.copysign(math.inf, x) * math.copysign(1.0, y)


def _pow(x: Float, y: Float) -> Float:
    try:
        out = x**y if isinstance(y, int) or isinstance(x, complex) else math.pow(x, y.real)
        return float(out) if isinstance(out, int) else out
    except OverflowError:
        return math.inf
    except ZeroDivisionError:
        return math.inf
    except ValueError:  # 0 to a negative power, or a negative number to a fraction
        return math.inf if x == 0 else math.nan


def _exp(x: Float) -> Float:
    return _total(cmath.exp if isinstance(x, complex) else math.exp)(x)


def _log(x: Float) -> Float:
    if isinstance(x, complex):
        return _total(cmath.log, domain=-math.inf)(x)
    return -math.inf if x == 0 else _total(math.log)(x)


def _sqrt(x: Float) -> Float:
    return _total(math.sqrt)(x)


def _first(test: Callable[[Float, Float], bool]) -> Callable[..., Float]:
    return lambda x, y: x if test(x, y) or x != x else y


_max, _min = _first(lambda x, y: x.real >= y.real), _first(lambda x, y: x.real <= y.real)


def _expm1(x: Float) -> Float:
    return _total(math.expm1)(x)


def _sigmoid(x: Float) -> Float:
    return 1 / (1 + math.exp(-x.real)) if x.real >= -700 else _exp(x)


def _softplus(x: Float) -> Float:
    return max(x.real, 0.0) + math.log1p(math.exp(-abs(x.real))) if x == x else math.nan


def _logaddexp(x: Float, y: Float) -> Float:
    if x == y and math.isinf(x.real):
        return x
    high, low = (x.real, y.real) if x.real >= y.real else (y.real, x.real)
    return high + math.log1p(_exp(low - high).real) if not math.isinf(high) else high


def _sign(x: Float) -> Float:
    sign = (x.real > 0) - (x.real < 0)
    return sign if isinstance(x, int) else float(sign)


TABLE: dict[str, Callable[..., Float]] = {
    "or": lambda x, y: x or y,
    "and": lambda x, y: x and y,
    "not": lambda x: not x,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": _div,
    "neg": lambda x: -x,
    "pow": _pow,
    "where": lambda c, x, y: x if c else y,
    "max": _max,
    "min": _min,
    "abs": _total(abs),
    "sign": _sign,
    "clamp": lambda x, lo, hi: _min(_max(x, lo), hi),
    "exp": _exp,
    "expm1": _expm1,
    "log": _log,
    "log1p": lambda x: -math.inf if x == -1 else _total(math.log1p)(x),
    "sqrt": _sqrt,
    "rsqrt": lambda x: _div(1.0, _sqrt(x)),
    "sin": _total(math.sin),
    "cos": _total(math.cos),
    "tanh": lambda x: math.tanh(x.real),
    "sigmoid": _sigmoid,
    "logsigmoid": lambda x: -_softplus(-x),
    "softplus": _softplus,
    "relu": lambda x: _max(x, 0 if isinstance(x, int) else 0.0),
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * 0.5 * math.erfc(-x.real / math.sqrt(2)),
    "erf": lambda x: math.erf(x.real),
    "logaddexp": _logaddexp,
    "stop": lambda x: x,
    "real": _real,
    "imag": lambda x: x.imag,
    "conj": lambda x: x.conjugate(),
    "complex": lambda x, y: complex(x.real, y.real),
}
