"""Numbers of a formula for z3: rationals, infinities, and quotients of z3 terms; arithmetic and order on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import z3

from psmc.algebra import exact
from psmc.algebra import numbers as nu
from psmc.algebra.ring import UndefinedError

_UNIT = 0  # the atom whose value is 1
_MAX_ATOMS = 10
Linear: TypeAlias = "tuple[tuple[int, Fraction], ...]"  # Σ coefficient · atom


class UndecidedError(Exception):
    """Outside the fragment that is translated."""


@dataclass(frozen=True)
class Term:
    """The finite real top / bottom; `bottom` None is 1, and is never 0 where the value is defined."""

    top: Any
    bottom: Any = None
    linear: Linear | None = None


@dataclass(frozen=True)
class Pair:
    """A complex number."""

    re: Real
    im: Real


Real: TypeAlias = "nu.Real | Term"  # a Decimal is ±inf
Value: TypeAlias = "Real | Pair | bool | z3.BoolRef"


@dataclass(frozen=True)
class Defined:
    """A value and where it has one; None is everywhere."""

    value: Value
    where: Any = None


def both(*conditions: Any) -> Any:
    """Conjunction; None is true."""
    kept: dict[int, Any] = {c.get_id(): c for c in conditions if c is not None}
    if not kept:
        return None
    return next(iter(kept.values())) if len(kept) == 1 else z3.And(*kept.values())


def number(x: Real) -> Any:
    """A rational as a z3 numeral, a term as its top. Integers stay integers."""
    if isinstance(x, Term):
        return x.top
    assert isinstance(x, Fraction)
    return z3.IntVal(int(x)) if x.denominator == 1 else z3.RealVal(f"{x.numerator}/{x.denominator}")


@dataclass
class _Atom:
    term: Term
    power: Callable[[], Term]  # its exponential
    found: Term | None = None


class Arithmetic:
    """Arithmetic on values. `facts` hold of every solution; `positive` must be proved before a verdict counts."""

    def __init__(self) -> None:
        self.facts: list[Any] = []
        self.positive: list[Any] = []
        self.abstract = False  # a function was abstracted: a solution need not be one
        self._atoms: list[_Atom] = [_Atom(Term(z3.IntVal(1)), self._euler)]
        self._keys: dict[tuple[object, ...], Term] = {}
        self._circle: dict[int, tuple[Real, Real]] = {}
        self._choices: dict[int, tuple[Any, Real, Real]] = {}
        self._alive: list[Any] = []  # z3 numbers terms anew once they are dropped
        self._count = 0
        self._partial: list[Any] = []  # where operands of the current row have values

    # --- variables and atoms ----------------------------------------------------------------------

    def fresh(self, name: str) -> Any:
        self._count += 1
        return z3.Real(f"{name}!{self._count}")

    def variable(self, name: str, kind: str) -> Value:
        if kind == "complex":
            return Pair(self._atom(z3.Real(f"{name}.re")), self._atom(z3.Real(f"{name}.im")))
        return self._atom(z3.Int(name) if kind == "int" else z3.Real(name))

    def _atom(self, top: Any, power: Callable[[], Term] | None = None, bottom: Any = None) -> Term:
        term = Term(top, bottom, ((len(self._atoms), Fraction(1)),))
        self._atoms.append(_Atom(term, power or self._unknown_power))
        return term

    def _unknown_power(self) -> Term:
        unknown = self.fresh("exp")
        self.facts.append(unknown > 0)
        return Term(unknown)

    def _euler(self) -> Term:
        unknown = self.fresh("e")
        self.facts += [unknown > z3.Q(271, 100), unknown < z3.Q(272, 100)]
        return Term(unknown)

    def power_of(self, number_: int) -> Term:
        """The exponential of an atom."""
        atom = self._atoms[number_]
        if atom.found is None:
            self.abstract = True
            atom.found = atom.power()
        return atom.found

    def monotone(self) -> list[Any]:
        """What the abstraction forgets: exp keeps the order, and exp(0) = 1."""
        used = [(a.term, a.found) for a in self._atoms[1:] if a.found is not None]
        if len(used) > _MAX_ATOMS:
            return []
        out = []
        for n, (x, power_x) in enumerate(used):
            others: list[tuple[Real, Real]] = [(Fraction(0), Fraction(1)), *used[n + 1 :]]
            for y, power_y in others:
                out.append(self._less(x, y) == self._less(power_x, power_y))
                out.append(self._less(y, x) == self._less(power_y, power_x))
        return out

    def _less(self, x: Real, y: Real) -> Any:
        return self.compare("lt", x, y)

    def _linear(self, x: Real) -> Linear:
        if isinstance(x, Fraction):
            return ((_UNIT, x),) if x else ()
        assert isinstance(x, Term)
        if x.linear is not None:
            return x.linear
        known = self._known("opaque", x)
        if known is None:
            known = self._remember("opaque", x, self._atom(x.top, None, x.bottom))
        assert known.linear is not None
        return known.linear

    def _key(self, what: str, *xs: Real) -> tuple[object, ...]:
        out: list[object] = [what]
        for x in xs:
            for part in (number(x), _bottom(x)):
                plain = part if part is None or what == "choice" else z3.simplify(part, som=True)
                self._alive.append(plain)
                out.append(None if plain is None else plain.get_id())
        return tuple(out)

    def _known(self, what: str, *xs: Real) -> Term | None:
        return self._keys.get(self._key(what, *xs))

    def _remember(self, what: str, x: Real, term: Term) -> Term:
        self._keys[self._key(what, x)] = term
        return term

    # --- arithmetic ---------------------------------------------------------------------------------

    def add(self, x: Real, y: Real) -> Real:
        if not isinstance(x, Term) and not isinstance(y, Term):
            return nu.add_real(x, y)
        if endless(x) or endless(y):
            return x if endless(x) else y
        if x == 0 or y == 0:
            return y if x == 0 else x
        return self._over(
            lambda a, b: a + b, x, y, None if _opaque(x) or _opaque(y) else _sum(self._linear(x), self._linear(y))
        )

    def _over(self, top: Callable[[Any, Any], Any], x: Real, y: Real, linear: Linear | None) -> Term:
        """Over a common denominator."""
        p, q = _bottom(x), _bottom(y)
        if p is not None and q is not None and p.eq(q):
            return Term(top(number(x), number(y)), p, linear)
        a, b = number(x), number(y)
        return Term(top(a if q is None else a * q, b if p is None else b * p), _product(p, q), linear)

    def neg(self, x: Real) -> Real:
        return self.mul(Fraction(-1), x)

    def mul(self, x: Real, y: Real) -> Real:
        if not isinstance(x, Term) and not isinstance(y, Term):
            return nu.mul_real(x, y)
        if endless(x) or endless(y):
            raise UndecidedError("a product of an infinity and a variable")
        if x == 0 or y == 0:
            return Fraction(0)
        if x == 1 or y == 1:
            return y if x == 1 else x
        linear = None
        for factor, other in ((x, y), (y, x)):
            if isinstance(factor, Fraction) and not _opaque(other):
                linear = tuple((a, c * factor) for a, c in self._linear(other))
        return Term(number(x) * number(y), _product(_bottom(x), _bottom(y)), linear)

    def div(self, x: Real, y: Real) -> Real:
        if not isinstance(x, Term) and not isinstance(y, Term):
            return nu.div_real(x, y)
        if isinstance(y, Fraction):
            if y == 0:
                raise UndefinedError("division by 0")
            return self.mul(x, 1 / y)
        if endless(y):
            return Fraction(0)
        if endless(x):
            raise UndecidedError("a quotient of an infinity and a variable")
        assert isinstance(y, Term)
        self._partial.append(y.top != 0)
        top = number(x) if y.bottom is None else number(x) * y.bottom
        return Term(top, _product(_bottom(x), y.top))

    # --- order --------------------------------------------------------------------------------------

    def compare(self, op: str, x: Real, y: Real) -> Value:
        if not isinstance(x, Term) and not isinstance(y, Term):
            return _SIGNS[op](nu.compare(x, y))
        for sign, one in ((1, x), (-1, y)):
            if not isinstance(one, Term) and nu.infinite(one):
                return _SIGNS[op](sign * nu.sign(one))
        difference = self.add(x, self.neg(y))
        if isinstance(difference, Fraction):
            return _SIGNS[op](nu.sign(difference))
        assert isinstance(difference, Term)
        plain = op in ("eq", "ne") or difference.bottom is None
        return _ORDER[op](difference.top if plain else difference.top * difference.bottom)

    def choose(self, condition: Value, x: Value, y: Value) -> Value:
        """x where the condition holds, else y."""
        if isinstance(condition, bool):
            return x if condition else y
        if isinstance(x, Pair) or isinstance(y, Pair):
            (a, b), (c, d) = parts(x), parts(y)
            return Pair(real(self.choose(condition, a, c)), real(self.choose(condition, b, d)))
        p, q = real(x), real(y)
        if _plain(p, q) and p == q:
            return p
        if endless(p) or endless(q):
            raise UndecidedError("a choice between an infinity and a number")
        if isinstance(p, Term) and isinstance(q, Term) and p.top.eq(q.top) and _same(p.bottom, q.bottom):
            return p
        a, b = _bottom(p), _bottom(q)
        bottom = None
        if a is not None or b is not None:
            one = z3.IntVal(1)
            bottom = z3.If(condition, one if a is None else a, one if b is None else b)
        top = z3.If(condition, number(p), number(q))
        known = self._known("choice", Term(top, bottom))
        if known is not None:
            return known
        made = self._atom(top, lambda: self._chosen_power(condition, p, q), bottom)
        assert made.linear is not None
        self._choices[made.linear[0][0]] = (condition, p, q)
        return self._remember("choice", Term(top, bottom), made)

    def _chosen_power(self, condition: Any, x: Real, y: Real) -> Term:
        """The exponential of a choice."""
        raise AssertionError("of `Terms` only")

    def greatest(self, x: Real, y: Real) -> Real:
        if endless(x) or endless(y):
            one, other = (x, y) if endless(x) else (y, x)
            return one if one > 0 else other  # type: ignore[operator]
        return real(self.choose(self.compare("ge", x, y), x, y))

    def least(self, x: Real, y: Real) -> Real:
        return self.neg(self.greatest(self.neg(x), self.neg(y)))

    # --- complex ------------------------------------------------------------------------------------

    def plus(self, x: Value, y: Value) -> Value:
        if not isinstance(x, Pair) and not isinstance(y, Pair):
            return self.add(real(x), real(y))
        (a, b), (c, d) = parts(x), parts(y)
        return Pair(self.add(a, c), self.add(b, d))

    def times(self, x: Value, y: Value) -> Value:
        if not isinstance(x, Pair) and not isinstance(y, Pair):
            return self.mul(real(x), real(y))
        (a, b), (c, d) = parts(x), parts(y)
        return Pair(self.add(self.mul(a, c), self.neg(self.mul(b, d))), self.add(self.mul(a, d), self.mul(b, c)))

    def over(self, x: Value, y: Value) -> Value:
        if isinstance(y, Pair):
            norm = self.add(self.mul(y.re, y.re), self.mul(y.im, y.im))
            return self.over(self.times(x, Pair(y.re, self.neg(y.im))), norm)
        if isinstance(x, Pair):
            return Pair(self.div(x.re, real(y)), self.div(x.im, real(y)))
        return self.div(real(x), real(y))

    def equal(self, x: Value, y: Value) -> Value:
        """As a condition."""
        (a, b), (c, d) = parts(x), parts(y)
        return logic("and", self.compare("eq", a, c), self.compare("eq", b, d))

    def taken(self) -> list[Any]:
        """Where the operators applied since the last call have values."""
        found, self._partial = self._partial, []
        return found


def logic(op: str, x: Value, y: Value = False) -> Value:
    if isinstance(x, bool) and isinstance(y, bool):
        folded = exact.TABLE[op](x) if op == "not" else exact.TABLE[op](x, y)
        assert isinstance(folded, bool)
        return folded
    return z3.Not(x) if op == "not" else z3.And(x, y) if op == "and" else z3.Or(x, y)


def parts(x: Value) -> tuple[Real, Real]:
    return (x.re, x.im) if isinstance(x, Pair) else (real(x), Fraction(0))


def real(x: Value) -> Real:
    if isinstance(x, Pair):
        raise UndecidedError("a complex number where a real one is needed")
    assert not isinstance(x, bool | z3.BoolRef)
    return x


def endless(x: Real) -> bool:
    return not isinstance(x, Term) and nu.infinite(x)


def _plain(*xs: Real) -> bool:
    return not any(isinstance(x, Term) for x in xs)


def _opaque(x: Real) -> bool:
    """Not a sum of known atoms."""
    return isinstance(x, Term) and x.linear is None


def _bottom(x: Real) -> Any:
    return x.bottom if isinstance(x, Term) else None


def _same(x: Any, y: Any) -> bool:
    return x is y or (x is not None and y is not None and x.eq(y))


def _product(x: Any, y: Any) -> Any:
    return y if x is None else x if y is None else x * y


def _sum(x: Linear, y: Linear) -> Linear:
    out: dict[int, Fraction] = dict(x)
    for atom, coef in y:
        out[atom] = out.get(atom, Fraction(0)) + coef
    return tuple(sorted((a, c) for a, c in out.items() if c))


_SIGNS: Mapping[str, Callable[[int], bool]] = {
    "lt": lambda s: s < 0,
    "le": lambda s: s <= 0,
    "gt": lambda s: s > 0,
    "ge": lambda s: s >= 0,
    "eq": lambda s: s == 0,
    "ne": lambda s: s != 0,
}
_ORDER: Mapping[str, Callable[[Any], Any]] = {
    "lt": lambda x: x < 0,
    "le": lambda x: x <= 0,
    "gt": lambda x: x > 0,
    "ge": lambda x: x >= 0,
    "eq": lambda x: x == 0,
    "ne": lambda x: x != 0,
}
