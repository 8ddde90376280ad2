"""Values in the extended reals: a Poly (finite) or ±inf. What has no value raises UndefinedError."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from psmc.algebra import atoms, comparisons, lattice, powers
from psmc.algebra import ring as rg
from psmc.algebra.knowledge import is_positive
from psmc.algebra.ring import Ring, SplitError, UndefinedError
from psmc.algebra.terms import ONE, UNIT, ZERO, Atom, Poly
from psmc.ir import Index


@dataclass(frozen=True)
class Infinite:
    sign: int


Value: TypeAlias = Poly | Infinite
INF, NEG_INF = Infinite(1), Infinite(-1)


def finite(x: Value) -> Poly:
    if isinstance(x, Infinite):
        raise UndefinedError("an operator at infinity")
    return x


def neg(x: Value) -> Value:
    return Infinite(-x.sign) if isinstance(x, Infinite) else -x


def add(x: Value, y: Value) -> Value:
    if isinstance(x, Infinite) or isinstance(y, Infinite):
        if isinstance(x, Infinite) and isinstance(y, Infinite) and x.sign != y.sign:
            raise UndefinedError("inf - inf")
        return x if isinstance(x, Infinite) else y
    return x + y


def sign_of(ring: Ring, x: Value) -> int:
    """1 or -1 where certain; splits on guards, else undefined (0 times inf, unknown sign times inf)."""
    if isinstance(x, Infinite):
        return x.sign
    if is_positive(ring, x):
        return 1
    if is_positive(ring, -x):
        return -1
    raise splitting(x) or UndefinedError("infinity times something of unknown sign, or 0")


def splitting(x: Poly) -> SplitError | None:
    """A reason to split: some 0/1 quantity of x decides."""
    for mono, _ in x:
        for atom, _ in mono.factors:
            if atom.tag in ("eye", "pos", "zero"):
                return SplitError(powers.guard_of(atom))
    return None


def mul(ring: Ring, x: Value, y: Value) -> Value:
    if isinstance(x, Infinite) or isinstance(y, Infinite):
        return Infinite(sign_of(ring, x) * sign_of(ring, y))
    return rg.mul(ring, x, y)


def div(ring: Ring, x: Value, y: Value) -> Value:
    if isinstance(y, Infinite):
        if isinstance(x, Infinite):
            raise UndefinedError("inf / inf")
        return ZERO
    if isinstance(x, Infinite):
        return Infinite(x.sign * sign_of(ring, y))
    return rg.mul(ring, x, powers.power(ring, y, Fraction(-1)))


def greatest(ring: Ring, x: Value, y: Value) -> Value:
    for one, other in ((x, y), (y, x)):
        if isinstance(one, Infinite):
            return one if one.sign > 0 else other
    return lattice.greatest(ring, finite(x), finite(y))


def least(ring: Ring, x: Value, y: Value) -> Value:
    for one, other in ((x, y), (y, x)):
        if isinstance(one, Infinite):
            return one if one.sign < 0 else other
    return lattice.least(ring, finite(x), finite(y))


def above(ring: Ring, x: Value, y: Value) -> Poly:
    """[x > y]."""
    if isinstance(x, Infinite) or isinstance(y, Infinite):
        left = x.sign if isinstance(x, Infinite) else 0
        right = y.sign if isinstance(y, Infinite) else 0
        return UNIT if left > right else ZERO
    return comparisons.is_above(ring, x - y)


def equal(ring: Ring, x: Value, y: Value) -> Poly:
    """[x == y]."""
    if isinstance(x, Infinite) or isinstance(y, Infinite):
        return UNIT if x == y else ZERO
    positions = _positions(ring, x - y)
    return atoms.eye(ring, positions, Fraction(1)) if positions else comparisons.is_zero(ring, x - y)


def _positions(ring: Ring, difference: Poly) -> tuple[Index, Index | int] | None:
    """(i, j) if the difference is ±(i - j) of indices of one dim, (i, k) if ±(i - k) and the dim holds position k."""
    constant = difference.terms.get(ONE, Fraction(0))
    found: dict[Fraction, Index] = {}
    for mono, coef in difference:
        if mono.factors:
            (atom, p), *more = mono.factors
            if more or atom.tag != "index" or p != 1 or abs(coef) != 1 or coef in found:
                return None
            found[coef] = atom.args[0]
    if len(found) == 2:
        i, j = found[Fraction(1)], found[Fraction(-1)]
        return (i, j) if i.dim == j.dim and not constant else None
    if len(found) != 1:
        return None
    ((sign, i),) = found.items()
    k = -constant * sign
    if k.denominator != 1 or not 0 <= k < ring.facts.sizes.get(i.dim, 1):
        return None
    return i, int(k)


def select(ring: Ring, condition: Poly, x: Value, y: Value) -> Value:
    """where(condition, x, y) of an undecided condition."""
    if isinstance(x, Infinite) or isinstance(y, Infinite):
        if x == y:
            return x
        raise splitting(condition) or UndefinedError("a condition that cannot be split on")
    return rg.mul(ring, condition, x) + rg.mul(ring, UNIT - condition, y)


def exp(ring: Ring, x: Value) -> Value:
    if isinstance(x, Infinite):
        return INF if x.sign > 0 else ZERO
    return powers.exp(ring, x)


def log(ring: Ring, x: Value) -> Value:
    if isinstance(x, Infinite):
        if x.sign < 0:
            raise UndefinedError("log(-inf)")
        return INF
    if not x:
        return NEG_INF
    single = x.single
    if single is not None:
        for atom, _ in single[0].factors:
            if atom.tag in ("eye", "pos"):
                raise SplitError(powers.guard_of(atom))
    return powers.log(ring, x)


def power(ring: Ring, x: Value, k: Fraction) -> Value:
    if isinstance(x, Infinite):
        if k == 0:
            raise UndefinedError("inf^0")
        if k < 0:
            return ZERO
        if x.sign < 0 and k.denominator != 1:
            raise UndefinedError("root of -inf")
        return INF if x.sign > 0 or k % 2 == 0 else NEG_INF
    return powers.power(ring, x, k)


def sum_over(ring: Ring, x: Value, index: Index) -> Value:
    """Σ over an index of fresh name."""
    return x if isinstance(x, Infinite) else rg.close(ring, x, [index])


def max_over(ring: Ring, x: Value, index: Index) -> Value:
    return x if isinstance(x, Infinite) else lattice.maximum(ring, [((x,), (index,))])


def atom_value(tag: str, *args: object, real: bool = True) -> Poly:
    return rg.lone(Atom(tag, args, real))
