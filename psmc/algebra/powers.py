"""Powers, exp and log of normal forms, and the units (monomials) that are taken out of them first."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from math import gcd, lcm
from typing import Literal

from psmc.algebra import interval_math as im
from psmc.algebra.bounds import atom_bounds, bounds
from psmc.algebra.knowledge import is_positive
from psmc.algebra.ring import (
    IDEMPOTENT,
    REBUILD,
    Ring,
    SplitError,
    UndefinedError,
    int_power,
    is_real,
    lone,
    monomial,
    mul,
    opened,
    product,
    times,
)
from psmc.algebra.roots import square_root
from psmc.algebra.terms import UNIT, ZERO, Atom, OutOfBudgetError, Poly, atoms_in, number, total


def _positive_root(ring: Ring, poly: Poly) -> Poly | None:
    """The root ≥ 0 of a perfect square; splits on its sign where that is not known, but not under a reduction."""
    root = square_root(ring, poly)
    if root is None:
        return None
    for signed in (root, -root):
        if is_positive(ring, signed, strict=False):
            return signed
    if any(i.name.startswith("~") for i in root.free):
        return None
    raise SplitError(root)


_MAX_BITS = 10_000  # of a coefficient


def power(ring: Ring, poly: Poly, k: Fraction, *, non_negative: bool = False) -> Poly:
    """poly^k for a rational k. Fractional powers are of things known to be ≥ 0, else uninterpreted."""
    if k.denominator == 1 and k >= 0:
        return int_power(ring, poly, int(k))
    if not poly:
        if k < 0:
            raise UndefinedError("division by 0")
        return ZERO
    unit, rest = content(ring, poly, of="any" if k.denominator == 1 else "non-negative")
    if k < 0:
        for atom, _ in unit[1]:
            if _rests_at_zero(atom):
                _refuse_plateaus(ring, lone(atom))
            _note_denominator(ring, lone(atom))
    out = _unit_power(ring, unit, k)
    if k.denominator == 1 and rest.constant is not None:
        return out.scaled(_number_power(rest.constant, int(k)))
    if rest.constant == 1:
        return out
    root = _positive_root(ring, rest) if k.denominator % 2 == 0 else None
    if root is not None:
        return mul(ring, out, power(ring, root, 2 * k))
    if k < 0:
        _refuse_plateaus(ring, rest)
        _note_denominator(ring, rest)
    if k.denominator != 1 and not non_negative and not im.non_negative(bounds(ring, rest)):
        _note_radicand(ring, rest)
        return mul(ring, out, lone(Atom("pow", (rest, number(k)))))
    if k.denominator == 1:
        sign = leading_sign(rest)
        rest, out = rest.scaled(sign), out.scaled(sign if int(k) % 2 else Fraction(1))
    return mul(ring, out, monomial(ring, Fraction(1), [(Atom("base", (rest,), rest.real), k)]))


def _note_denominator(ring: Ring, poly: Poly) -> None:
    """Keep what must not be 0 for the two sides to have values, unless it never is."""
    known = bounds(ring, poly)
    if not (im.positive(known) or im.positive(im.neg(known))):
        ring.denominators.setdefault(poly.key, poly)


def _note_radicand(ring: Ring, poly: Poly) -> None:
    if poly.real and not im.non_negative(bounds(ring, poly)):
        ring.radicands.setdefault(poly.key, poly)


def _refuse_plateaus(ring: Ring, poly: Poly) -> None:
    """A denominator must not vanish on a whole region, as max(x, 0) and [x > 0] do: split until it cannot."""
    sign = bounds(ring, poly)
    if im.positive(sign) or im.positive(im.neg(sign)):
        return
    for atom in atoms_in(poly):
        if atom.tag in _FLAT:
            raise SplitError(guard_of(atom))


_FLAT = ("max", *IDEMPOTENT)  # constant on regions


def _rests_at_zero(atom: Atom) -> bool:
    """Whether a factor may be 0 on a whole region. The greatest of x and y is so only where one of them is."""
    if atom.tag == "max":
        lits = [lit for term in atom.args[0] for lit in term.lits]
        return any(not lit or any(a.tag in _FLAT for a in atoms_in(lit)) for lit in lits)
    return any(a.tag in _FLAT for a in atoms_in(lone(atom)))


def guard_of(atom: Atom) -> Atom | Poly | None:
    """What to split on to get rid of an atom: an eye, a complex zero, a Poly to compare with 0, or None."""
    if atom.tag in ("eye", "zero"):
        return atom
    if atom.tag == "pos":
        return atom.args[0]  # type: ignore[no-any-return]
    if atom.tag == "max":
        lits = sorted({lit for term in atom.args[0] if not term.bound for lit in term.lits}, key=lambda p: p.key)
        return lits[0] - lits[1] if len(lits) > 1 else None
    return None


def leading_sign(poly: Poly) -> Fraction:
    """Sign of the first coefficient; by their majority where that is clear, so that it does not hang on index names."""
    balance = sum(1 if c > 0 else -1 for _, c in poly)
    first = next(iter(poly))[1]
    return Fraction(1 if (balance or first) > 0 else -1)


Unit = tuple[Fraction, tuple[tuple[Atom, Fraction], ...]]


def _unit_power(ring: Ring, unit: Unit, k: Fraction) -> Poly:
    coef, factors = unit
    scaled = [(a, p * k) for a, p in factors]
    if k.denominator == 1:
        return monomial(ring, _number_power(coef, int(k)), scaled)
    for n, sign in ((coef.numerator, 1), (coef.denominator, -1)):
        scaled += [(Atom("prime", (p,)), e * sign * k) for p, e in _primes(n)]
    return monomial(ring, Fraction(1), scaled)


def _number_power(x: Fraction, k: int) -> Fraction:
    if (max(abs(x.numerator), x.denominator).bit_length() - 1) * abs(k) > _MAX_BITS:
        raise OutOfBudgetError("a number grew too large")
    return x**k


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


Sign = Literal["positive", "non-negative", "any"]
_KNOWN = {"positive": im.positive, "non-negative": im.non_negative}


def content(ring: Ring, poly: Poly, of: Sign = "any") -> tuple[Unit, Poly]:
    """poly = unit · rest, with units known to have the sign `of`.

    The unit is the positive rational content, and per atom and per exponent the least power over all monomials (0 where
    absent), so that the rest does not change when poly is multiplied by a unit.
    """
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
            elif atom.free.isdisjoint(bound) and atom.tag not in IDEMPOTENT and atom.tag != "i":
                here[atom] = p
        exponents.append(exponent)
        if least is None:
            least = here
        else:
            zero = Fraction(0)
            both = sorted({*least, *here}, key=lambda a: a.key)
            least = {a: min(least.get(a, zero), here.get(a, zero)) for a in both}
    assert least is not None
    if of != "any":
        least = {a: p for a, p in least.items() if _KNOWN[of](atom_bounds(ring, a))}
    common = least_coefficients(exponents)
    if common and not is_real(ring, common) and all(is_real(ring, e) for e in exponents):
        common = Poly({m: c for m, c in common if m.real})  # part of (e^ix + e^-ix)/2 would not be real
    if of == "positive":  # exp(log x) is 0 at x = 0
        common = Poly({m: c for m, c in common if "plog" not in m.key})
    factors = [(a, p) for a, p in least.items() if p]
    if common and (of == "any" or is_real(ring, common)):
        factors.append((Atom("exp", (common,), is_real(ring, common)), Fraction(1)))
    coef = Fraction(numerators, denominators)
    unit: Unit = (coef, tuple(factors))
    if not factors and coef == 1:
        return unit, poly
    rest = over_unit(ring, poly, unit)
    if any(a.tag == "base" for a, _ in factors) and rest:
        # Powers of a sum were expanded: what is left may have a unit of its own.
        (more, others), rest = content(ring, rest, of)
        powers_: dict[Atom, Fraction] = dict(factors)
        for atom, p in others:
            powers_[atom] = powers_.get(atom, Fraction(0)) + p
        unit = (coef * more, tuple(powers_.items()))
    return unit, rest


def over_unit(ring: Ring, poly: Poly, unit: Unit) -> Poly:
    """poly / unit, where powers of one `base` cancel before they are expanded."""
    coef, factors = unit
    inverse = [(a, -p) for a, p in factors]
    out = []
    for mono, c in poly:
        own, bound = opened(ring, mono)
        out.append(times(ring, c / coef, (*own, *inverse), bound))
    return total(out)


def least_coefficients(polys: Iterable[Poly]) -> Poly:
    """Per monomial the least coefficient, 0 where absent: subtracting it commutes with adding the same to all."""
    polys = list(polys)
    monos = sorted({m for p in polys for m in p.terms})
    return Poly({m: min(p.terms.get(m, Fraction(0)) for p in polys) for m in monos})


# --- exp and log --------------------------------------------------------------------------------


def exp(ring: Ring, poly: Poly) -> Poly:
    """exp(c log Q + rest) is Q^c exp(rest) also where Q may be 0, if c > 0 and no other term may be infinite."""
    if not poly:
        return UNIT
    logs = {m: c for m, c in poly if "plog" in m.key}
    alone = [(m.factors[0][0], c) for m, c in logs.items() if not m.bound and m.factors[0][1] == len(m.factors) == 1]
    if logs and len(alone) == len(logs) and all(a.tag == "plog" and c > 0 and _at_least_0(ring, a) for a, c in alone):
        rest = exp(ring, Poly({m: c for m, c in poly if m not in logs}))
        return product(ring, (rest, *(power(ring, a.args[0], c, non_negative=True) for a, c in alone)))
    return monomial(ring, Fraction(1), [(Atom("exp", (poly,)), Fraction(1))])


def _at_least_0(ring: Ring, log_: Atom) -> bool:
    return im.non_negative(bounds(ring, log_.args[0]))


def log(ring: Ring, poly: Poly) -> Poly:
    """log of something finite and not 0. Only positive factors are taken out."""
    if poly.constant is not None and poly.constant <= 0:
        raise UndefinedError("log of a number that is not positive")
    if not is_real(ring, poly):
        return lone(Atom("clog", (poly,), False))
    if (exponent := exponent_of(poly)) is not None and is_real(ring, exponent):  # also where it is -inf
        return exponent
    (coef, factors), rest = content(ring, poly, "positive")
    out = []
    for n, sign in ((coef.numerator, 1), (coef.denominator, -1)):
        out += [lone(Atom("log", (number(p),))).scaled(Fraction(e * sign)) for p, e in _primes(n)]
    for atom, p in factors:
        if atom.tag == "exp":
            out.append(atom.args[0].scaled(p))
        else:
            inner = atom.args[0] if atom.tag == "base" else monomial(ring, Fraction(1), [(atom, Fraction(1))])
            out.append(lone(Atom("log", (inner,))).scaled(p))
    if rest.constant != 1:
        known = im.positive(bounds(ring, rest))
        if not known:
            _refuse_plateaus(ring, rest)
            _note_radicand(ring, rest)
        out.append(lone(Atom("log" if known else "plog", (rest,))))
    return total(out)


def exponent_of(poly: Poly) -> Poly | None:
    """x of exp(x)."""
    single = poly.single
    if single is None or single[1] != 1 or single[0].bound or len(single[0].factors) != 1:
        return None
    ((atom, p),) = single[0].factors
    return atom.args[0].scaled(p) if atom.tag == "exp" else None


REBUILD |= {
    "exp": lambda ring, args, p: exp(ring, args[0].scaled(p)),
    "base": lambda ring, args, p: power(ring, args[0], p, non_negative=True),  # it was found so when it was built
    "log": lambda ring, args, p: power(ring, log(ring, args[0]), p),
    "plog": lambda ring, args, p: power(ring, log(ring, args[0]), p),
}
