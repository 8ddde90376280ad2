"""Expressions as sums of products, distributed only where asked: the raw material of a factorisation.

A `Product` is a rational times powers of atoms in a canonical order; what an atom is, the caller decides. Everything
is exact over the reals; nothing inside an atom is touched, so that a user's stable forms stay as they were written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from psmc.derive.simplify import ONE, ZERO, make
from psmc.ir import Assign, Const, DimValue, Expr, Eye, Index, Op, Reduce
from psmc.ir.canonical import Names, canonical_assign
from psmc.ir.rewrite import rename, walk
from psmc.ir.text import show_expr

MAX_TERMS = 2048  # of one expansion: beyond it an expression counts as not separable
MAX_UNROLL = 16  # of a sum over a dim of fixed size that joins both sides


class NotSeparableError(Exception):
    """`node` joins both sides and is not a sum of products of one-sided expressions."""

    def __init__(self, node: Expr) -> None:
        super().__init__()
        self.node = node


@lru_cache(maxsize=8192)
def text(node: Expr) -> tuple[int, str]:
    """The canonical order of factors and terms: fewer free indices first, then by text."""
    return (len(node.free), show_expr(node))


@dataclass(frozen=True)
class Product:
    """coef · Π atom^power, atoms in canonical order, powers not 0."""

    coef: Fraction
    factors: tuple[tuple[Expr, int], ...] = ()

    def __mul__(self, other: Product) -> Product:
        return product(self.coef * other.coef, (*self.factors, *other.factors))

    def inverse(self) -> Product:
        return Product(1 / self.coef, tuple((f, -p) for f, p in self.factors))

    def scaled(self, by: Fraction) -> Product:
        return Product(self.coef * by, self.factors)

    def split(self, test: Callable[[Expr], bool]) -> tuple[Product, Product]:
        """(the factors that pass, with coef 1; the rest, with the coef)."""
        chosen = tuple(f for f in self.factors if test(f[0]))
        return Product(Fraction(1), chosen), Product(self.coef, tuple(f for f in self.factors if f not in chosen))

    def expr(self) -> Expr:
        out: Expr = Const(abs(self.coef))
        for atom, power in sorted(self.factors, key=lambda f: f[1] < 0):
            for _ in range(abs(power)):
                out = make("mul" if power > 0 else "div", out, atom)
        return make("neg", out) if self.coef < 0 else out


def product(coef: Fraction, factors: Iterable[tuple[Expr, int]]) -> Product:
    powers: dict[Expr, int] = {}
    for atom, power in factors:
        powers[atom] = powers.get(atom, 0) + power
    return Product(coef, tuple(sorted(((a, p) for a, p in powers.items() if p), key=lambda f: text(f[0]))))


def collected(products: Iterable[Product]) -> tuple[Product, ...]:
    """Like products added up, zeros gone, in a canonical order: positive ones first."""
    sums: dict[tuple[tuple[Expr, int], ...], Fraction] = {}
    for p in products:
        sums[p.factors] = sums.get(p.factors, Fraction(0)) + p.coef
    found = [Product(c, f) for f, c in sums.items() if c]
    return tuple(sorted(found, key=lambda p: (p.coef < 0, [(text(a), n) for a, n in p.factors])))


def total(products: Iterable[Product]) -> Expr:
    """Their sum."""
    out: Expr = ZERO
    for p in products:
        out = make("sub", out, p.scaled(Fraction(-1)).expr()) if p.coef < 0 else make("add", out, p.expr())
    return out


@dataclass(frozen=True)
class Context:
    """Sizes of dims that have one, and names that bound indices must not take."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    taken: frozenset[str] = frozenset()

    def alpha(self, node: Expr) -> Expr:
        """`node` with canonical names for its bound indices."""
        if not any(isinstance(n, Reduce) for n in walk(node)):
            return node
        return canonical_assign(Assign("", (), node), Names(self.taken | {i.name for i in node.free})).value


NO_CONTEXT = Context()


@dataclass(frozen=True)
class Expansion:
    """How far to expand. `sides` are the index sets that must not stay together in one atom; a sum is taken apart if it
    `opens`, everything else (exp, where, ...) only if it joins both sides. A sum over an index gives up the factors
    that do not depend on it."""

    sides: tuple[frozenset[Index], frozenset[Index]] = (frozenset(), frozenset())
    opens: Callable[[Expr], bool] = lambda _: False
    context: Context = NO_CONTEXT

    def mixed(self, node: Expr) -> bool:
        return all(node.free & side for side in self.sides)


def expand(node: Expr, how: Expansion) -> list[Product]:
    """`node` as a sum of products. Raises NotSeparableError."""
    found = _expand(node, how)
    if len(found) > MAX_TERMS:
        raise NotSeparableError(node)
    return found


def _expand(node: Expr, how: Expansion) -> list[Product]:
    match node:
        case Const(value=value):
            return [Product(value)] if value else []
        case Op(op="neg", args=(a,)):
            return [p.scaled(Fraction(-1)) for p in expand(a, how)]
        case Op(op="mul", args=(a, b)):
            left, right = expand(a, how), expand(b, how)
            if len(left) * len(right) > MAX_TERMS:
                raise NotSeparableError(node)
            return [x * y for x in left for y in right]
        case Op(op="div", args=(a, b)):
            below = expand(b, how)
            if len(below) == 1:
                return [x * below[0].inverse() for x in expand(a, how)]
        case Op(op="add" | "sub" as op, args=(a, b)) if how.opens(node) or how.mixed(node):
            sign = Fraction(1 if op == "add" else -1)
            return expand(a, how) + [p.scaled(sign) for p in expand(b, how)]
        case Reduce(op="sum", index=index, body=body):
            return _sum(index, body, how)
        case Eye():
            return [_atom(node)]
    return _joined(node, how) if how.mixed(node) else [_atom(how.context.alpha(node))]


def _atom(node: Expr) -> Product:
    return Product(Fraction(1), ((node, 1),))


def _sum(index: Index, body: Expr, how: Expansion) -> list[Product]:
    try:
        return [_summed(index, p, how) for p in expand(body, how)]
    except NotSeparableError:
        size = how.context.sizes.get(index.dim, MAX_UNROLL + 1)
        if size > MAX_UNROLL:
            raise
        return [p for n in range(size) for p in expand(rename(body, {index: n}), how)]


def _joined(node: Expr, how: Expansion) -> list[Product]:
    """An operator that joins both sides, taken apart by its own law."""
    match node:
        case Op(op="exp", args=(x,)):
            return [_exponential(x, how)]
        case Op(op="where", args=(test, a, b)) if not how.mixed(test):
            cases = ((a, make("where", test, ONE, ZERO)), (b, make("where", test, ZERO, ONE)))
            return [p * _atom(chosen) for branch, chosen in cases for p in expand(branch, how)]
        case Op(op="conj" | "stop" as op, args=(x,)):
            inner = expand(x, how)
            if op == "conj" or len(inner) == 1:
                return [Product(p.coef, tuple((make(op, f), n) for f, n in p.factors)) for p in inner]
        case Op(op="complex", args=(a, b)):
            imaginary = _atom(Op("complex", (ZERO, ONE)))
            return expand(a, how) + [p * imaginary for p in expand(b, how)]
        case Op(op="pow", args=(x, Const(value=n))) if n.denominator == 1 and 0 < n <= 4:
            out = [Product(Fraction(1))]
            for _ in range(int(n)):
                out = [p * q for p in out for q in expand(x, how)]
            return out
    raise NotSeparableError(node)


def _exponential(exponent: Expr, how: Expansion) -> Product:
    """exp of a sum of one-sided terms, as a product with one exponential a side."""
    groups: dict[tuple[bool, ...], list[Product]] = {}
    for p in collected(expand(exponent, how)):
        sides = tuple(any(f.free & side for f, _ in p.factors) for side in how.sides)
        if all(sides):
            raise NotSeparableError(exponent)
        groups.setdefault(sides, []).append(p)
    return product(Fraction(1), [(make("exp", total(ps)), 1) for ps in groups.values()])


def _summed(index: Index, term: Product, how: Expansion) -> Product:
    inner, outer = term.split(lambda f: index in f.free)
    if not inner.factors:
        return outer * _atom(DimValue(index.dim))
    body = inner.expr()
    if how.mixed(body):
        raise NotSeparableError(body)
    return outer * _atom(how.context.alpha(Reduce("sum", index, body)))


def tidy(node: Expr, context: Context = NO_CONTEXT) -> Expr:
    """`node` with like terms collected and factors in canonical order; its sums are distributed only if that leaves
    fewer terms (1 - (1 - a) is a; x - m, squared, stays)."""
    try:
        top = collected(_top(node, context))
        full = collected(expand(node, Expansion(opens=lambda _: True, context=context)))
    except NotSeparableError:
        return node
    return context.alpha(total(full if len(full) < len(top) else top))


def _top(node: Expr, context: Context) -> Sequence[Product]:
    """The terms of the outermost sum only."""
    match node:
        case Op(op="add" | "sub" as op, args=(a, b)):
            sign = Fraction(1 if op == "add" else -1)
            return [*_top(a, context), *(p.scaled(sign) for p in _top(b, context))]
        case Op(op="neg", args=(a,)):
            return [p.scaled(Fraction(-1)) for p in _top(a, context)]
    return expand(node, Expansion(context=context))
