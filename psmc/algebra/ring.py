"""Arithmetic of normal forms: sums, products, contractions, powers, exp and log, each result canonical.

Two rules keep bound indices apart: opening a binder renames it to a name never used before, and `monomial` expects its `bound`
indices to be such names.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from math import gcd, lcm
from typing import Any

from psmc.algebra import interval_math as im
from psmc.algebra.facts import Facts
from psmc.algebra.labels import canonical_order
from psmc.algebra.terms import ONE, UNIT, ZERO, Atom, Mono, Poly, number, total
from psmc.ir import Index, Interval

Substitution = Mapping[Index, Any]  # to an Index, an int, or a Poly (a gather)
_IDEMPOTENT = ("eye", "pos", "zero")
_MAX_TERMS = 20_000
_MAX_POWER = 64


class OutOfBudgetError(Exception):
    """Time or size limit reached."""


class UndefinedError(Exception):
    """The expression has no value: 0/0, inf - inf, log of a negative number."""


class SplitError(Exception):
    """The value depends on whether `guard` (None: nothing that can be split on) holds: an eye atom, or a Poly being > 0."""

    def __init__(self, guard: Atom | Poly | None) -> None:
        super().__init__(guard)
        self.guard = guard


class Ring:
    """What arithmetic depends on: known facts, a supply of fresh index names, a time limit."""

    def __init__(self, facts: Facts, deadline: float) -> None:
        self.facts, self.deadline = facts, deadline
        self._names = itertools.count(1)
        self._ticks = 0
        self._bounds: dict[Poly, Interval] = {}

    def tick(self) -> None:
        self._ticks += 1
        if self._ticks % 64 == 0 and time.monotonic() > self.deadline:
            raise OutOfBudgetError("the time limit was reached")

    def fresh(self, index: Index) -> Index:
        return Index(f"~{next(self._names)}", index.dim)

    def under(self, facts: Facts) -> Ring:
        """The same supply of names and time limit, other facts."""
        ring = Ring(facts, self.deadline)
        ring._names = self._names
        return ring


# How to rebuild an atom under a power after its indices changed: tag -> (ring, args with substituted indices, power) -> Poly.
REBUILD: dict[str, Callable[[Ring, tuple[Any, ...], Fraction], Poly]] = {}

# --- monomials ----------------------------------------------------------------------------------


def monomial(ring: Ring, coef: Fraction, factors: Iterable[tuple[Atom, Fraction]], bound: Iterable[Index] = ()) -> Poly:
    """coef · Σ over bound of the product of factors, in normal form."""
    ring.tick()
    powers: dict[Atom, Fraction] = {}
    exponent = ZERO
    for atom, power in factors:
        if atom.tag == "exp":
            exponent = exponent + atom.args[0].scaled(power)
        else:
            powers[atom] = powers.get(atom, Fraction(0)) + power
    extra: list[Poly] = []
    if exponent:
        exponent = _take_logs(ring, exponent, extra)
        if exponent:
            powers[Atom("exp", (exponent,), exponent.real)] = Fraction(1)
    plain: dict[Atom, Fraction] = {}
    for atom in sorted(powers, key=lambda a: a.key):
        kept, scale, poly = _settle(ring, atom, powers[atom])
        coef *= scale
        if kept:
            plain[atom] = kept
        if poly is not None:
            extra.append(poly)
    if not coef or _exclusive(plain):
        return ZERO
    bound = list(bound)
    if extra:
        out = monomial(ring, coef, plain.items())
        for poly in extra:
            out = mul(ring, out, poly)
        return close(ring, out, bound)
    solved = _contract_eye(ring, coef, plain, bound)
    if solved is not None:
        return solved
    for index in [b for b in bound if not any(b in a.free for a in plain)]:
        bound.remove(index)
        size = ring.facts.sizes.get(index.dim)
        if size is not None:
            coef *= size
        else:
            atom = Atom("dim", (index.dim,))
            plain[atom] = plain.get(atom, Fraction(0)) + 1
    pairs = tuple(sorted(((a, p) for a, p in plain.items() if p), key=lambda f: f[0].key))
    height = max((a.height for a, _ in pairs), default=0) + 1
    parts = [(a, f"^{p}" if p != 1 else "") for a, p in pairs if not a.free.isdisjoint(bound)] if bound else []
    return Poly({Mono(pairs, canonical_order(bound, parts, height)): coef})


def _settle(ring: Ring, atom: Atom, power: Fraction) -> tuple[Fraction, Fraction, Poly | None]:
    """(power that stays, rational factor, further factor) of atom^power."""
    if not power:
        return power, Fraction(1), None
    if atom.tag == "i":
        turns = int(power) % 4
        return Fraction(turns % 2), Fraction(-1 if turns >= 2 else 1), None
    if atom.tag in _IDEMPOTENT:
        if power < 0:
            raise UndefinedError("division by something that may be 0")
        return Fraction(1), Fraction(1), None
    if atom.tag == "prime":
        whole = power.numerator // power.denominator
        return power - whole, Fraction(atom.args[0]) ** whole, None
    if atom.tag == "base":
        whole = power.numerator // power.denominator
        if whole > 0:
            return power - whole, Fraction(1), int_power(ring, atom.args[0], whole)
    return power, Fraction(1), None


def _exclusive(plain: Mapping[Atom, Fraction]) -> bool:
    """[P > 0][-P > 0] = 0."""
    guards = {a.args[0] for a in plain if a.tag == "pos"}
    return len(guards) > 1 and any(-g in guards for g in guards)


def _contract_eye(ring: Ring, coef: Fraction, plain: dict[Atom, Fraction], bound: list[Index]) -> Poly | None:
    """Use one eye(r, c): replace a bound side everywhere, or write the free sides alike. None if there is nothing to do."""
    for eye in [a for a in plain if a.tag == "eye"]:
        row, col = eye.args
        rest = [(a, p) for a, p in plain.items() if a is not eye]
        for old, new in ((row, col), (col, row)):
            if isinstance(old, Index) and old in bound and not (isinstance(new, Poly) and old in new.free):
                left = [b for b in bound if b != old]
                return close(ring, rename_factors(ring, coef, rest, {old: new}), left)
        old, new = (col, row) if isinstance(col, Index) else (row, col)
        if isinstance(old, Index) and not isinstance(new, Poly) and any(old in a.free for a, _ in rest):
            renamed = rename_factors(ring, coef, rest, {old: new})
            return close(ring, mul(ring, Poly({Mono(((eye, Fraction(1)),)): Fraction(1)}), renamed), bound)
    return None


def _take_logs(ring: Ring, exponent: Poly, extra: list[Poly]) -> Poly:
    """exp(c log Q + rest) = Q^c exp(rest), the power appended to `extra`. Q > 0 (log), or c is an integer (flog)."""
    kept = {}
    for mono, coef in exponent:
        if len(mono.factors) == 1 and not mono.bound and mono.factors[0][1] == 1:
            atom = mono.factors[0][0]
            if atom.tag == "log" or (atom.tag == "flog" and coef.denominator == 1):
                extra.append(power(ring, atom.args[0], coef))
                continue
        kept[mono] = coef
    return exponent if len(kept) == len(exponent) else Poly(kept)


# --- products and contractions ------------------------------------------------------------------


def opened(ring: Ring, mono: Mono) -> tuple[tuple[tuple[Atom, Fraction], ...], tuple[Index, ...]]:
    """Factors and bound indices of a monomial, the latter under new names. The renaming is one to one, so that every factor
    stays one factor, except for signs that sorting may flip: those come as powers of a constant inside the factors."""
    if not mono.bound:
        return mono.factors, ()
    names = {b: ring.fresh(b) for b in mono.bound}
    out: list[tuple[Atom, Fraction]] = []
    for atom, p in mono.factors:
        if atom.free.isdisjoint(names):
            out.append((atom, p))
            continue
        renamed = rename_factor(ring, atom, p, names).single
        assert renamed is not None and not renamed[0].bound
        out += renamed[0].factors
        if renamed[1] != 1:
            out.append((_RATIONAL(renamed[1]), Fraction(1)))
    return tuple(out), tuple(names[b] for b in mono.bound)


def _RATIONAL(value: Fraction) -> Atom:
    return Atom("rational", (value,))


def mul(ring: Ring, p: Poly, q: Poly) -> Poly:
    if not p or not q:
        return ZERO
    for one, other in ((p, q), (q, p)):
        if one.constant is not None:
            return other.scaled(one.constant)
    if len(p) * len(q) > _MAX_TERMS:
        raise OutOfBudgetError("an expression grew too large")
    out = []
    for m, c in p:
        for n, d in q:
            left, right = opened(ring, m), opened(ring, n)
            out.append(_monomial(ring, c * d, (*left[0], *right[0]), (*left[1], *right[1])))
    return total(out)


def _monomial(ring: Ring, coef: Fraction, factors: Iterable[tuple[Atom, Fraction]], bound: Iterable[Index]) -> Poly:
    kept = []
    for atom, p in factors:
        if atom.tag == "rational":
            coef *= atom.args[0]
        else:
            kept.append((atom, p))
    return monomial(ring, coef, kept, bound)


def product(ring: Ring, polys: Iterable[Poly]) -> Poly:
    out = UNIT
    for poly in polys:
        out = mul(ring, out, poly)
    return out


def close(ring: Ring, poly: Poly, bound: Iterable[Index]) -> Poly:
    """Σ over `bound`, whose names must be fresh."""
    bound = list(bound)
    if not bound:
        return poly
    out = []
    for mono, coef in poly:
        factors, inner = opened(ring, mono)
        out.append(_monomial(ring, coef, factors, (*inner, *bound)))
    return total(out)


def contract(ring: Ring, poly: Poly, index: Index) -> Poly:
    """Σ over an index of any name."""
    new = ring.fresh(index)
    return close(ring, rename(ring, poly, {index: new}), [new])


# --- renaming -----------------------------------------------------------------------------------


def rename(ring: Ring, poly: Poly, sub: Substitution) -> Poly:
    """Substitute free indices."""
    if poly.free.isdisjoint(sub):
        return poly
    out = []
    for mono, coef in poly:
        if mono.free.isdisjoint(sub):
            out.append(Poly({mono: coef}))
            continue
        factors, bound = opened(ring, mono)
        out.append(close(ring, rename_factors(ring, coef, factors, sub), bound))
    return total(out)


def rename_factors(ring: Ring, coef: Fraction, factors: Iterable[tuple[Atom, Fraction]], sub: Substitution) -> Poly:
    simple: list[tuple[Atom, Fraction]] = []
    others: list[Poly] = []
    for atom, p in factors:
        if atom.tag == "rational":
            coef *= atom.args[0] ** int(p)
        elif atom.free.isdisjoint(sub):
            simple.append((atom, p))
        else:
            image = rename_factor(ring, atom, p, sub)
            single = image.single
            if single is not None and not single[0].bound:
                simple += single[0].factors
                coef *= single[1]
            else:
                others.append(image)
    return product(ring, (monomial(ring, coef, simple), *others))


def rename_factor(ring: Ring, atom: Atom, p: Fraction, sub: Substitution) -> Poly:
    args = tuple(_rename_arg(ring, x, sub) for x in atom.args)
    return REBUILD[atom.tag](ring, args, p)


def _rename_arg(ring: Ring, x: Any, sub: Substitution) -> Any:
    if isinstance(x, Index):
        return sub.get(x, x)
    if isinstance(x, Poly):
        return rename(ring, x, sub)
    from psmc.algebra.lattice import rename_terms
    from psmc.algebra.terms import Bag

    return rename_terms(ring, x, sub) if isinstance(x, Bag) else x


# --- powers -------------------------------------------------------------------------------------


def int_power(ring: Ring, poly: Poly, k: int) -> Poly:
    """poly^k, k ≥ 0, expanded."""
    if k > _MAX_POWER:
        raise OutOfBudgetError("a power is too large to expand")
    out = UNIT
    for bit in bin(k)[2:]:
        out = mul(ring, out, out)
        if bit == "1":
            out = mul(ring, out, poly)
    return out


def power(ring: Ring, poly: Poly, k: Fraction, *, non_negative: bool = False) -> Poly:
    """poly^k for a rational k. Fractional powers are of things known to be ≥ 0, else uninterpreted."""
    if k.denominator == 1 and k >= 0:
        return int_power(ring, poly, int(k))
    if not poly:
        if k < 0:
            raise UndefinedError("division by 0")
        return ZERO
    unit, rest = content(ring, poly, only_positive=k.denominator != 1)
    out = _unit_power(ring, unit, k)
    if k.denominator == 1 and rest.constant is not None:
        return out.scaled(rest.constant ** int(k))
    if rest.constant == 1:
        return out
    if k < 0:
        _refuse_plateaus(ring, rest)
    if k.denominator != 1 and not non_negative and not im.non_negative(bounds(ring, rest)):
        return mul(ring, out, _atom(Atom("pow", (rest, number(k)))))
    if k.denominator == 1:
        sign = _leading_sign(rest)
        rest, out = rest.scaled(sign), out.scaled(sign if int(k) % 2 else Fraction(1))
    return mul(ring, out, monomial(ring, Fraction(1), [(Atom("base", (rest,), rest.real), k)]))


def _refuse_plateaus(ring: Ring, poly: Poly) -> None:
    """A denominator must not vanish on a whole region, as max(x, 0) and [x > 0] do: split until it cannot."""
    for mono, _ in poly:
        for atom, _ in mono.factors:
            if atom.tag in ("max", *_IDEMPOTENT):
                sign = bounds(ring, poly)
                if not im.positive(sign) and not im.positive(im.neg(sign)):
                    from psmc.algebra.lattice import guard_of

                    raise SplitError(guard_of(atom))


def _atom(atom: Atom) -> Poly:
    return Poly({Mono(((atom, Fraction(1)),)): Fraction(1)})


def _leading_sign(poly: Poly) -> Fraction:
    """Sign of the first coefficient; by their majority where that is clear, so that it does not hang on index names."""
    balance = sum(1 if c > 0 else -1 for _, c in poly)
    first = next(iter(poly))[1]
    return Fraction(1 if (balance or first) > 0 else -1)


Unit = tuple[Fraction, tuple[tuple[Atom, Fraction], ...]]


def _unit_power(ring: Ring, unit: Unit, k: Fraction) -> Poly:
    coef, factors = unit
    scaled = [(a, p * k) for a, p in factors]
    if k.denominator == 1:
        return monomial(ring, coef ** int(k), scaled)
    for n, sign in ((coef.numerator, 1), (coef.denominator, -1)):
        scaled += [(Atom("prime", (p,)), e * sign * k) for p, e in _primes(n)]
    return monomial(ring, Fraction(1), scaled)


def _primes(n: int) -> list[tuple[int, int]]:
    """Prime factorisation; a large cofactor stays whole (it is then one opaque positive number, which is sound)."""
    out, d = [], 2
    while d * d <= n and d < 1000:
        e = 0
        while n % d == 0:
            n, e = n // d, e + 1
        if e:
            out.append((d, e))
        d += 1
    if n > 1:
        out.append((n, 1))
    return out


def content(ring: Ring, poly: Poly, *, only_positive: bool = False) -> tuple[Unit, Poly]:
    """poly = unit · rest: the positive rational content, and per atom and per exponent the least power over all monomials (0 where
    absent), so that the rest does not change when poly is multiplied by a unit. `only_positive`: units known to be > 0."""
    least: dict[Atom, Fraction] | None = None
    exponents: list[Poly] = []
    numerators = denominators = 0
    for mono, coef in poly:
        numerators = gcd(numerators, abs(coef.numerator))
        denominators = lcm(denominators or 1, coef.denominator)
        bound = frozenset(mono.bound)
        here: dict[Atom, Fraction] = {}
        exponent = ZERO
        for atom, p in mono.factors:
            if atom.tag == "exp":
                exponent = Poly({m: c for m, c in atom.args[0] if m.free.isdisjoint(bound)})
            elif atom.free.isdisjoint(bound) and atom.tag not in _IDEMPOTENT and atom.tag != "i":
                here[atom] = p
        exponents.append(exponent)
        if least is None:
            least = here
        else:
            zero = Fraction(0)
            least = {a: min(least.get(a, zero), here.get(a, zero)) for a in sorted({*least, *here}, key=lambda a: a.key)}
    assert least is not None
    if only_positive:
        least = {a: p for a, p in least.items() if im.positive(atom_bounds(ring, a))}
    common = least_coefficients(exponents)
    factors = [(a, p) for a, p in least.items() if p]
    if common and (not only_positive or common.real):
        factors.append((Atom("exp", (common,), common.real), Fraction(1)))
    coef = Fraction(numerators, denominators)
    unit: Unit = (coef, tuple(factors))
    if not factors and coef == 1:
        return unit, poly
    return unit, over_unit(ring, poly, unit)


def over_unit(ring: Ring, poly: Poly, unit: Unit) -> Poly:
    """poly / unit, where powers of one `base` cancel before they are expanded."""
    coef, factors = unit
    inverse = [(a, -p) for a, p in factors]
    out = []
    for mono, c in poly:
        own, bound = opened(ring, mono)
        out.append(_monomial(ring, c / coef, (*own, *inverse), bound))
    return total(out)


def least_coefficients(polys: Iterable[Poly]) -> Poly:
    """Per monomial the least coefficient, 0 where absent: subtracting it commutes with adding the same to all."""
    polys = list(polys)
    monos = sorted({m for p in polys for m in p.terms})
    return Poly({m: min(p.terms.get(m, Fraction(0)) for p in polys) for m in monos})


# --- exp and log --------------------------------------------------------------------------------


def exp(ring: Ring, poly: Poly) -> Poly:
    return monomial(ring, Fraction(1), [(Atom("exp", (poly,), poly.real), Fraction(1))]) if poly else UNIT


def log(ring: Ring, poly: Poly) -> Poly:
    """log of something finite and not 0. Only positive factors are taken out."""
    if poly.constant is not None and poly.constant <= 0:
        raise UndefinedError("log of a number that is not positive")
    if not poly.real:
        return _atom(Atom("clog", (poly,), False))
    (coef, factors), rest = content(ring, poly, only_positive=True)
    out = []
    for n, sign in ((coef.numerator, 1), (coef.denominator, -1)):
        out += [_atom(Atom("log", (number(p),))).scaled(Fraction(e * sign)) for p, e in _primes(n)]
    for atom, p in factors:
        if atom.tag == "exp":
            out.append(atom.args[0].scaled(p))
        else:
            inner = atom.args[0] if atom.tag == "base" else monomial(ring, Fraction(1), [(atom, Fraction(1))])
            out.append(_atom(Atom("log", (inner,))).scaled(p))
    if rest.constant != 1:
        known = im.positive(bounds(ring, rest))
        out.append(_atom(Atom("log" if known else "plog", (rest,))))
    return total(out)


# --- bounds -------------------------------------------------------------------------------------


def bounds(ring: Ring, poly: Poly) -> Interval:
    """An interval that holds every value of a real Poly."""
    if not poly.real:
        return im.ANY
    found = ring._bounds.get(poly)
    if found is None:
        found = im.point(0)
        for mono, coef in poly:
            found = im.add(found, im.mul(im.point(coef), _mono_bounds(ring, mono)))
        ring._bounds[poly] = found
    return found


def _mono_bounds(ring: Ring, mono: Mono) -> Interval:
    out = im.point(1)
    for atom, p in mono.factors:
        x = atom_bounds(ring, atom)
        if p.denominator == 1:
            x = im.power(x, int(p))
        else:
            x = im.POSITIVE if im.positive(x) else im.NON_NEGATIVE
        out = im.mul(out, x)
    if mono.bound:  # a sum of at least one such term per bound index
        lo = out.lo if out.lo is not None and out.lo >= 0 else None
        hi = out.hi if out.hi is not None and out.hi <= 0 else None
        out = Interval(lo, hi, lo is None or out.lo_open, hi is None or out.hi_open)
    return out


def atom_bounds(ring: Ring, atom: Atom) -> Interval:
    match atom.tag:
        case "elem":
            return ring.facts.interval(atom.args[0]) if atom.real else im.ANY
        case "dim":
            return Interval(Fraction(1), None, False, True)
        case "index":
            return im.NON_NEGATIVE
        case "prime":
            return im.point(atom.args[0])
        case "exp":
            return im.exp(bounds(ring, atom.args[0])) if atom.real else im.ANY
        case "log":
            return im.log(bounds(ring, atom.args[0]))
        case "base":
            return bounds(ring, atom.args[0])
        case "eye" | "pos" | "zero":
            return im.UNIT_RANGE
        case "max":
            from psmc.algebra.lattice import max_bounds

            return max_bounds(ring, atom)
        case "erf":
            return im.SIGNED_UNIT
    return im.ANY


# --- rebuilding ---------------------------------------------------------------------------------


def elem(ring: Ring, args: tuple[Any, ...], p: Fraction) -> Poly:
    """An element under a power; subscripts that are plain numbers or index values become that."""
    name, kind, conjugated, *subs = args
    atom = Atom("elem", (name, kind, conjugated, *map(_subscript, subs)), kind != "complex")
    known = ring.facts.values.get(atom)
    return power(ring, known, p) if known is not None else Poly({Mono(((atom, p),)): Fraction(1)})


def _subscript(s: Any) -> Any:
    if isinstance(s, Poly):
        if s.constant is not None and s.constant.denominator == 1:
            return int(s.constant)
        single = s.single
        if single and single[1] == 1 and len(single[0].factors) == 1 and not single[0].bound:
            atom, p = single[0].factors[0]
            if atom.tag == "index" and p == 1:
                return atom.args[0]
    return s


def eye(ring: Ring, args: tuple[Any, ...], p: Fraction) -> Poly:
    row, col = map(_subscript, args)
    if row == col:
        return UNIT
    if isinstance(row, int) and isinstance(col, int):
        return ZERO
    row, col = sorted((row, col), key=_eye_rank)
    atom = Atom("eye", (row, col))
    return ZERO if atom in ring.facts.distinct else _atom(atom)


def _eye_rank(s: Any) -> tuple[int, str]:
    return (0, "") if isinstance(s, int) else (1, s.name) if isinstance(s, Index) else (2, s.key)


def index_value(ring: Ring, args: tuple[Any, ...], p: Fraction) -> Poly:
    (s,) = args
    if isinstance(s, Poly):
        return power(ring, s, p)
    return power(ring, number(s), p) if isinstance(s, int) else Poly({Mono(((Atom("index", (s,)), p),)): Fraction(1)})


def opaque(tag: str) -> Callable[[Ring, tuple[Any, ...], Fraction], Poly]:
    def rebuild(ring: Ring, args: tuple[Any, ...], p: Fraction) -> Poly:
        real = all(a.real for a in args if isinstance(a, Poly))
        return Poly({Mono(((Atom(tag, args, real), p),)): Fraction(1)})

    return rebuild


REBUILD |= {
    "elem": elem,
    "eye": eye,
    "index": index_value,
    "exp": lambda ring, args, p: exp(ring, args[0].scaled(p)),
    "base": lambda ring, args, p: power(ring, args[0], p, non_negative=True),  # it was found so when it was built
    "log": lambda ring, args, p: power(ring, log(ring, args[0]), p),
    "plog": lambda ring, args, p: power(ring, log(ring, args[0]), p),
    **{tag: opaque(tag) for tag in ("flog", "pow", "erf", "clog")},
}
