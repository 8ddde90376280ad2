"""From IR expressions to normal forms: one row per operator."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from psmc.algebra import atoms, powers
from psmc.algebra import extended as ex
from psmc.algebra import ring as rg
from psmc.algebra.conjugation import conjugate
from psmc.algebra.extended import INF, NEG_INF, Infinite, Value, finite
from psmc.algebra.knowledge import is_positive
from psmc.algebra.ring import Ring, SplitError, UndefinedError
from psmc.algebra.terms import UNIT, ZERO, Atom, Bag, Poly, Term, number
from psmc.ir import Const, DimValue, Expr, Eye, Index, IndexValue, Infinity, Op, Reduce, Ref, Sub
from psmc.ir.query import signed_terms
from psmc.ir.rewrite import rename

_HALF = Fraction(1, 2)
_I = ex.atom_value("i", real=False)
_MAX_UNROLL = 16


class Normaliser:
    """Normal forms of expressions under the ring's facts, each expression once."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._done: dict[Expr, Value] = {}

    def __call__(self, expr: Expr) -> Value:
        found = self._done.get(expr)
        if found is None:
            found = self._done[expr] = self._visit(expr)
        return found

    def _visit(self, expr: Expr) -> Value:
        self.ring.tick()
        match expr:
            case Const(value=value):
                return number(value)
            case Infinity(negative=negative):
                return NEG_INF if negative else INF
            case IndexValue(index=index):
                return atoms.index_value(self.ring, (index,), Fraction(1))
            case DimValue(dim=dim):
                size = self.ring.facts.sizes.get(dim)
                return ex.atom_value("dim", dim) if size is None else number(size)
            case Eye(row=row, col=col):
                return atoms.eye(self.ring, (self._sub(row), self._sub(col)), Fraction(1))
            case Ref(name=name, subs=subs, value_kind=kind):
                return atoms.elem(self.ring, (name, kind, 0, *map(self._sub, subs)), Fraction(1))
            case Reduce(op=op, index=index, body=body):
                return self._reduce(op, index, body)
            case Op(op="where", args=(condition, x, y)):
                return self._where(condition, x, y)
            case Op(op="exp", args=(argument,)):
                return self._exp(argument)
            case Op(op=op, args=args):
                return RULES[op](self.ring, *(self(a) for a in args))
        raise AssertionError(expr)

    def _exp(self, argument: Expr) -> Value:
        """exp of a difference is 0 where one of its terms is -inf, whatever the others are.

        As `needs_safe_exp` has it of the spec's own text: an identity element's constants are substituted here.
        """
        terms = signed_terms(argument)
        difference = len(terms) > 1 and any(sign < 0 for sign, _ in terms)
        if difference and any(self(t) == Infinite(-sign) for sign, t in terms):
            return ZERO
        return ex.exp(self.ring, self(argument))

    def _sub(self, sub: Sub) -> Index | int | Poly:
        return finite(self(sub)) if isinstance(sub, Expr) else sub

    def _where(self, condition: Expr, x: Expr, y: Expr) -> Value:
        guard = finite(self(condition))
        if guard.constant is not None:
            return self(x if guard.constant else y)
        try:
            return ex.select(self.ring, guard, self(x), self(y))
        except UndefinedError as error:  # a branch that has no value where it is not taken
            raise ex.splitting(guard) or error from None

    def _reduce(self, op: str, index: Index, body: Expr) -> Value:
        size = self.ring.facts.sizes.get(index.dim)
        if size is not None and size <= _MAX_UNROLL and self.ring.facts.unroll:
            return self._unrolled(op, [rename(body, {index: k}) for k in range(size)])
        # A name of its own: facts about free indices must not reach a bound one.
        new = self.ring.fresh(index)
        index, body = new, rename(body, {index: new})
        try:
            value = self(body)
        except SplitError as split:
            return self._split_reduce(op, index, body, split)
        if op == "sum":
            return ex.sum_over(self.ring, value, index)
        if op == "max":
            return ex.max_over(self.ring, value, index)
        return product_over(self.ring, finite(value), index)

    def _unrolled(self, op: str, bodies: list[Expr]) -> Value:
        out = self(bodies[0])
        for body in bodies[1:]:
            out = RULES[{"sum": "add", "max": "max", "prod": "mul"}[op]](self.ring, out, self(body))
        return out

    def _split_reduce(self, op: str, index: Index, body: Expr, split: SplitError) -> Value:
        """The body is infinite at or off index = target: take that position out. What is left must then be neutral."""
        eye = split.guard
        if not isinstance(eye, Atom) or eye.tag != "eye" or index not in eye.args:
            raise split
        target = eye.args[1] if eye.args[0] == index else eye.args[0]
        if isinstance(target, Poly):
            raise split
        at = self(rename(body, {index: target}))
        off = self._off(index, body, eye)
        neutral = {"max": NEG_INF, "sum": ZERO}.get(op)
        if neutral is not None and off == neutral:
            return at
        if isinstance(off, Infinite) and off == at:
            return at
        raise UndefinedError("a reduction over partly infinite values")

    def _off(self, index: Index, body: Expr, eye: Atom) -> Value:
        """The body where `eye` is 0."""
        facts = self.ring.facts
        inner = Normaliser(self.ring.under(facts.apart(eye)))
        try:
            return inner(body)
        except SplitError as split:
            guard = split.guard
            if not isinstance(guard, Atom) or guard.tag != "eye" or guard in facts.distinct:
                raise
            if index in guard.args:
                other = guard.args[1] if guard.args[0] == index else guard.args[0]
                at = inner(rename(body, {index: other}))
                off = inner._off(index, body, guard)
                if at == off:
                    return at
            raise UndefinedError("a reduction over partly infinite values") from None


# --- operators ----------------------------------------------------------------------------------


def product_over(ring: Ring, poly: Poly, index: Index) -> Poly:
    """Π over an index of fresh name: of a single monomial factor by factor, else one opaque atom."""
    if not poly or poly.constant == 1:
        return poly
    single = poly.single
    if single is None or single[0].bound or single[1] != 1 or any(index not in a.free for a, _ in single[0].factors):
        return rg.lone(Atom("prod", (Bag((Term((poly,), (index,)),)),), poly.real))
    out = []
    for atom, p in single[0].factors:
        if atom.tag == "exp":
            out.append(powers.exp(ring, rg.close(ring, atom.args[0].scaled(p), [index])))
        else:
            whole = Atom("prod", (Bag((Term((rg.lone(atom),), (index,)),)),), atom.real)
            out.append(rg.monomial(ring, Fraction(1), [(whole, p)]))
    return rg.product(ring, out)


def _rebuild_product(ring: Ring, args: tuple[Any, ...], p: Fraction) -> Poly:
    ((lits, bound),) = args[0]
    return powers.power(ring, product_over(ring, lits[0], bound[0]), p)


rg.REBUILD["prod"] = _rebuild_product


def _minus(ring: Ring, x: Value, y: Value) -> Value:
    return ex.add(x, ex.neg(y))


def _one_plus_exp(ring: Ring, x: Value) -> Value:
    return ex.add(UNIT, ex.exp(ring, x))


def _softplus(ring: Ring, x: Value) -> Value:
    return ex.log(ring, _one_plus_exp(ring, x))


def _sigmoid(ring: Ring, x: Value) -> Value:
    return ex.div(ring, UNIT, _one_plus_exp(ring, ex.neg(x)))


def _tanh(ring: Ring, x: Value) -> Value:
    if isinstance(x, Infinite):
        return number(x.sign)
    square = ex.exp(ring, x.scaled(Fraction(2)))
    return ex.div(ring, _minus(ring, square, UNIT), ex.add(square, UNIT))


def _silu(ring: Ring, x: Value) -> Value:
    return ex.mul(ring, x, _sigmoid(ring, x))


def _erf(ring: Ring, x: Value) -> Value:
    if isinstance(x, Infinite):
        return number(x.sign)
    return ex.atom_value("erf", x) if x else ZERO


def _gelu(ring: Ring, x: Value) -> Value:
    scaled = ex.mul(ring, x, powers.power(ring, number(2), -_HALF))
    return ex.mul(ring, ex.mul(ring, number(_HALF), x), ex.add(UNIT, _erf(ring, scaled)))


def _rotation(ring: Ring, x: Value) -> tuple[Poly, Poly]:
    turn = rg.mul(ring, _I, finite(x))
    return powers.exp(ring, turn), powers.exp(ring, -turn)


def _sin(ring: Ring, x: Value) -> Value:
    ahead, back = _rotation(ring, x)
    return rg.mul(ring, (back - ahead).scaled(_HALF), _I)  # 1/i = -i


def _cos(ring: Ring, x: Value) -> Value:
    ahead, back = _rotation(ring, x)
    return (ahead + back).scaled(_HALF)


def _logaddexp(ring: Ring, x: Value, y: Value) -> Value:
    return ex.log(ring, ex.add(ex.exp(ring, x), ex.exp(ring, y)))


def _pow(ring: Ring, x: Value, y: Value) -> Value:
    if isinstance(y, Poly) and y.constant is not None:
        return ex.power(ring, x, y.constant)
    base, exponent = finite(x), finite(y)
    if is_positive(ring, base):
        return ex.exp(ring, ex.mul(ring, exponent, ex.log(ring, base)))
    if integral(exponent) and base:
        # x^(m+n) = x^m x^n for integers m, n and x ≠ 0: a formal logarithm carries the law.
        return powers.exp(ring, rg.mul(ring, exponent, ex.atom_value("flog", base, real=base.real)))
    return ex.atom_value("pow", base, exponent, real=base.real and exponent.real)


def integral(poly: Poly) -> bool:
    """Certainly an integer."""
    return all(c.denominator == 1 and all(_integral_factor(a, p) for a, p in m.factors) for m, c in poly)


def _integral_factor(atom: Atom, p: Fraction) -> bool:
    whole = atom.tag in ("eye", "pos", "zero", "dim", "index") or (atom.tag == "elem" and atom.args[1] == "int")
    return whole and p.denominator == 1 and p > 0


def _abs(ring: Ring, x: Value) -> Value:
    if isinstance(x, Infinite):
        return INF
    if x.real:
        return ex.greatest(ring, x, -x)
    if not x:
        return ZERO
    (coef, factors), rest = powers.content(ring, x)  # |z w| = |z| |w|
    sizes = [_size(ring, rg.lone(atom), p) for atom, p in factors]
    if rest != UNIT and rest != -UNIT:
        sizes.append(_size(ring, rest, Fraction(1)))
    return rg.product(ring, (number(coef), *sizes))


def _size(ring: Ring, x: Poly, p: Fraction) -> Poly:
    """|x|^p of something complex or real."""
    if x.real:
        return powers.power(ring, finite(ex.greatest(ring, x, -x)), p, non_negative=True)
    square = rg.mul(ring, x, conjugate(ring, x))
    if square.constant is not None or powers.exponent_of(square) is not None:
        return powers.power(ring, square, p * _HALF, non_negative=True)
    # |z|² ≥ 0 although no interval says so.
    return rg.monomial(ring, Fraction(1), [(Atom("base", (square,), False), p * _HALF)])


def _sign(ring: Ring, x: Value) -> Value:
    return _minus(ring, ex.above(ring, x, ZERO), ex.above(ring, ZERO, x))


def _real(ring: Ring, x: Value) -> Value:
    z = finite(x)
    return z if z.real else (z + conjugate(ring, z)).scaled(_HALF)


def _imag(ring: Ring, x: Value) -> Value:
    z = finite(x)
    return ZERO if z.real else rg.mul(ring, (conjugate(ring, z) - z).scaled(_HALF), _I)


def _complex(ring: Ring, x: Value, y: Value) -> Value:
    return finite(x) + rg.mul(ring, _I, finite(y))


def _clamp(ring: Ring, x: Value, lo: Value, hi: Value) -> Value:
    return ex.least(ring, ex.greatest(ring, x, lo), hi)


RULES: dict[str, Callable[..., Value]] = {
    "or": lambda r, x, y: x + y - rg.mul(r, x, y),
    "and": rg.mul,
    "not": lambda r, x: UNIT - x,
    "lt": lambda r, x, y: ex.above(r, y, x),
    "le": lambda r, x, y: UNIT - ex.above(r, x, y),
    "gt": ex.above,
    "ge": lambda r, x, y: UNIT - ex.above(r, y, x),
    "eq": ex.equal,
    "ne": lambda r, x, y: UNIT - ex.equal(r, x, y),
    "add": lambda r, x, y: ex.add(x, y),
    "sub": _minus,
    "mul": ex.mul,
    "div": ex.div,
    "neg": lambda r, x: ex.neg(x),
    "pow": _pow,
    "where": ex.select,
    "max": ex.greatest,
    "min": ex.least,
    "abs": _abs,
    "sign": _sign,
    "clamp": _clamp,
    "exp": ex.exp,
    "expm1": lambda r, x: _minus(r, ex.exp(r, x), UNIT),
    "log": ex.log,
    "log1p": lambda r, x: ex.log(r, ex.add(UNIT, x)),
    "sqrt": lambda r, x: ex.power(r, x, _HALF),
    "rsqrt": lambda r, x: ex.power(r, x, -_HALF),
    "sin": _sin,
    "cos": _cos,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "logsigmoid": lambda r, x: ex.neg(_softplus(r, ex.neg(x))),
    "softplus": _softplus,
    "relu": lambda r, x: ex.greatest(r, x, ZERO),
    "silu": _silu,
    "gelu": _gelu,
    "erf": _erf,
    "logaddexp": _logaddexp,
    "stop": lambda r, x: x,
    "real": _real,
    "imag": _imag,
    "conj": lambda r, x: conjugate(r, finite(x)),
    "complex": _complex,
}
