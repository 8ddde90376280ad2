"""Combine, written out at given dim sizes as terms for z3: one row an operator.

It shares nothing with the normal forms: like exact evaluation it runs the rule on elements, but these are variables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import z3

from psmc.algebra import exact
from psmc.algebra import numbers as nu
from psmc.algebra.exact import Position, Sizes, positions
from psmc.algebra.ring import UndefinedError
from psmc.algebra.smt_terms import Terms
from psmc.algebra.smt_values import Defined, Pair, Term, UndecidedError, Value, both, logic, parts, real
from psmc.ir import Assign, Block, Const, DimValue, Expr, Eye, Index, IndexValue, Infinity, Op, Reduce, Ref, Sub

Cells = dict[Position, Defined]
Store = Mapping[tuple[str, str], Cells]
NEVER = z3.BoolVal(False)
_MAX_NODES = 20_000  # evaluated in one block
_ONE, _ZERO = Fraction(1), Fraction(0)


def run(terms: Terms, block: Block, sizes: Sizes, store: Store) -> dict[str, Cells]:
    """All results of a block. Raises UndecidedError outside the fragment."""
    evaluation = _Evaluation(terms, sizes, store, {a.name: a for a in block.lets})
    return {
        a.name: {p: evaluation.at(a, p) for p in positions(tuple(i.dim for i in a.indices), sizes)}
        for a in block.results
    }


class _Evaluation:
    def __init__(self, terms: Terms, sizes: Sizes, store: Store, lets: Mapping[str, Assign]) -> None:
        self.terms, self.sizes, self.store, self.lets = terms, sizes, store, lets
        self._done: dict[tuple[Expr, tuple[tuple[Index, int], ...]], Defined] = {}

    def at(self, assign: Assign, position: Position) -> Defined:
        return self.value(assign.value, dict(zip(assign.indices, position, strict=True)))

    def value(self, expr: Expr, where: Mapping[Index, int]) -> Defined:
        key = (expr, tuple(sorted((i, where[i]) for i in expr.free)))
        found = self._done.get(key)
        if found is None:
            if len(self._done) > _MAX_NODES:
                raise UndecidedError("too large when written out")
            found = self._done[key] = self._visit(expr, dict(key[1]))
        return found

    def _visit(self, expr: Expr, where: dict[Index, int]) -> Defined:
        match expr:
            case Const(value=value):
                return Defined(value)
            case Infinity(negative=negative):
                return Defined(nu.NEG_INF if negative else nu.INF)
            case IndexValue(index=index):
                return Defined(Fraction(where[index]))
            case DimValue(dim=dim):
                return Defined(Fraction(self.sizes[dim]))
            case Eye(row=row, col=col):
                return self._row("where", self._row("eq", self._sub(row, where), self._sub(col, where)), _YES, _NO)
            case Ref():
                return self._read(expr, where)
            case Reduce(op=op, index=index, body=body):
                out = self.value(body, {**where, index: 0})
                for k in range(1, self.sizes[index.dim]):
                    out = self._row(_STEP[op], out, self.value(body, {**where, index: k}))
                return out
            case Op(op=op, args=args):
                return self._row(op, *(self.value(a, where) for a in args))
        raise AssertionError(expr)

    def _row(self, op: str, *args: Defined) -> Defined:
        """An operator on values; `where` needs a value of the branch that is taken only."""
        try:
            value = self._folded(op, args)
            if value is None:
                value = TABLE[op](self.terms, *(a.value for a in args))
        except UndefinedError:
            return Defined(_ZERO, NEVER)
        own = self.terms.taken()
        if op == "where":
            condition, x, y = args
            if isinstance(condition.value, bool):
                return Defined(value, both(condition.where, (x if condition.value else y).where))
            if x.where is None and y.where is None:
                return Defined(value, condition.where)
            yes, no = (NEVER if d.where is NEVER else z3.BoolVal(True) if d.where is None else d.where for d in (x, y))
            return Defined(value, both(condition.where, z3.If(condition.value, yes, no)))
        return Defined(value, both(*own, *(a.where for a in args)))

    def _folded(self, op: str, args: tuple[Defined, ...]) -> Value | None:
        """Of numbers only, and exact; None: not that."""
        values = [a.value for a in args]
        if op == "where" or any(isinstance(v, Term | Pair | z3.BoolRef) for v in values):
            return None
        found = exact.TABLE[op](*values)
        if isinstance(found, bool | Fraction) or (not isinstance(found, nu.Complex) and nu.infinite(found)):
            return found
        return None

    # --- subscripts ---------------------------------------------------------------------------------

    def _sub(self, sub: Sub, where: Mapping[Index, int]) -> Defined:
        if isinstance(sub, Index):
            return Defined(Fraction(where[sub]))
        return Defined(Fraction(sub)) if isinstance(sub, int) else self.value(sub, where)

    def _read(self, ref: Ref, where: Mapping[Index, int]) -> Defined:
        return self._cell(ref, [self._sub(s, where) for s in ref.subs], ())

    def _cell(self, ref: Ref, subs: list[Defined], position: Position) -> Defined:
        """The entry at `position` and further subscripts; a variable one is a choice among all places."""
        if len(position) == len(subs):
            return (
                self.at(self.lets[ref.name], position)
                if ref.space == "let"
                else self.store[ref.space, ref.name][position]
            )
        sub = subs[len(position)]
        places = self._places(ref, position)
        if isinstance(sub.value, Fraction):
            if int(sub.value) not in places:
                return Defined(_ZERO, NEVER)
            found = self._cell(ref, subs, (*position, int(sub.value)))
            return Defined(found.value, both(found.where, sub.where))
        out = self._cell(ref, subs, (*position, places[-1]))
        for k in reversed(places[:-1]):
            here = Defined(self.terms.compare("eq", real(sub.value), Fraction(k)))
            out = self._row("where", here, self._cell(ref, subs, (*position, k)), out)
        inside = [
            self.terms.compare("ge", real(sub.value), _ZERO),
            self.terms.compare("le", real(sub.value), Fraction(places[-1])),
        ]
        return Defined(out.value, both(out.where, sub.where, *inside))

    def _places(self, ref: Ref, position: Position) -> range:
        if ref.space == "let":
            return range(self.sizes[self.lets[ref.name].indices[len(position)].dim])
        axis = len(position)
        return range(1 + max(p[axis] for p in self.store[ref.space, ref.name]))


# --- operators ------------------------------------------------------------------------------------

_STEP = {"sum": "add", "max": "max", "prod": "mul"}
_YES, _NO = Defined(_ONE), Defined(_ZERO)
_TWO = Fraction(2)


def _order(op: str) -> Callable[..., Value]:
    return lambda t, x, y: t.compare(op, real(x), real(y))


def _real(fn: Callable[..., Value]) -> Callable[..., Value]:
    return lambda t, *xs: fn(t, *(real(x) for x in xs))


def _exp(t: Terms, x: Value) -> Value:
    if isinstance(x, Pair):
        return t.times(t.exp(x.re), t.cis(x.im))
    return t.exp(real(x))


def _sigmoid(t: Terms, x: Any) -> Any:
    return t.div(_ONE, t.add(_ONE, t.exp(t.neg(x))))


def _softplus(t: Terms, x: Any) -> Any:
    return t.log(t.add(_ONE, t.exp(x)))


def _tanh(t: Terms, x: Any) -> Any:
    square = t.exp(t.mul(_TWO, x))
    return t.div(t.add(square, Fraction(-1)), t.add(square, _ONE))


def _logaddexp(t: Terms, x: Any, y: Any) -> Any:
    for one, other in ((x, y), (y, x)):
        if not isinstance(one, Term) and nu.infinite(one) and one < 0:
            return other
    return t.log(t.add(t.exp(x), t.exp(y)))


def _abs(t: Terms, x: Value) -> Value:
    if isinstance(x, Pair):
        return t.sqrt(t.add(t.mul(x.re, x.re), t.mul(x.im, x.im)))
    return t.choose(t.compare("ge", real(x), _ZERO), x, t.neg(real(x)))


def _sign(t: Terms, x: Any) -> Value:
    return t.choose(t.compare("gt", x, _ZERO), _ONE, t.choose(t.compare("lt", x, _ZERO), Fraction(-1), _ZERO))


def _outside(name: str) -> Callable[..., Value]:
    def row(*_: Any) -> Value:
        raise UndecidedError(f"{name} is outside the fragment")

    return row


TABLE: dict[str, Callable[..., Value]] = {
    "or": lambda t, x, y: logic("or", x, y),
    "and": lambda t, x, y: logic("and", x, y),
    "not": lambda t, x: logic("not", x),
    **{op: _order(op) for op in ("lt", "le", "gt", "ge")},
    "eq": lambda t, x, y: t.equal(x, y),
    "ne": lambda t, x, y: logic("not", t.equal(x, y)),
    "add": lambda t, x, y: t.plus(x, y),
    "sub": lambda t, x, y: t.plus(x, t.times(Fraction(-1), y)),
    "mul": lambda t, x, y: t.times(x, y),
    "div": lambda t, x, y: t.over(x, y),
    "neg": lambda t, x: t.times(Fraction(-1), x),
    "pow": lambda t, x, y: t.power(x, real(y)),
    "where": lambda t, c, x, y: t.choose(c, x, y),
    "max": _real(lambda t, x, y: t.greatest(x, y)),
    "min": _real(lambda t, x, y: t.least(x, y)),
    "abs": _abs,
    "sign": _real(_sign),
    "clamp": _real(lambda t, x, lo, hi: t.least(t.greatest(x, lo), hi)),
    "exp": _exp,
    "expm1": _real(lambda t, x: t.add(t.exp(x), Fraction(-1))),
    "log": _real(lambda t, x: t.log(x)),
    "log1p": _real(lambda t, x: t.log(t.add(_ONE, x))),
    "sqrt": _real(lambda t, x: t.sqrt(x)),
    "rsqrt": _real(lambda t, x: t.div(_ONE, t.sqrt(x))),
    "sin": _real(lambda t, x: t.cis(x).im),
    "cos": _real(lambda t, x: t.cis(x).re),
    "tanh": _real(_tanh),
    "sigmoid": _real(_sigmoid),
    "logsigmoid": _real(lambda t, x: t.neg(_softplus(t, t.neg(x)))),
    "softplus": _real(_softplus),
    "relu": _real(lambda t, x: t.greatest(x, _ZERO)),
    "silu": _real(lambda t, x: t.mul(x, _sigmoid(t, x))),
    "gelu": _outside("gelu"),
    "erf": _outside("erf"),
    "logaddexp": _real(_logaddexp),
    "stop": lambda t, x: x,
    "real": lambda t, x: parts(x)[0],
    "imag": lambda t, x: parts(x)[1],
    "conj": lambda t, x: Pair(x.re, t.neg(x.im)) if isinstance(x, Pair) else x,
    "complex": lambda t, x, y: Pair(real(x), real(y)),
}
