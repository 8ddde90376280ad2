"""Square roots of perfect squares: x² + 2xy + y² is (x + y)², and a + 2√a√b + b is (√a + √b)²."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt

from psmc.algebra import interval_math as im
from psmc.algebra.bounds import atom_bounds
from psmc.algebra.ring import Ring, monomial, mul
from psmc.algebra.terms import Atom, Poly, total

_FREE = ("elem", "dim", "index")  # atoms that no law but commutativity holds between
_MAX_TERMS, _MAX_ROOT = 64, 8
_Exponents = tuple[Fraction, ...]


def square_root(ring: Ring, poly: Poly) -> Poly | None:
    """A Poly of which this one is the square, up to its sign; None if there is none, or it has other atoms."""
    atoms = sorted({a for m, _ in poly for a, _ in m.factors}, key=lambda a: a.key)
    if not poly or not poly.real or len(poly) > _MAX_TERMS or any(a.tag not in _FREE for a in atoms):
        return None
    if any(m.bound for m, _ in poly):
        return None
    left = {_exponents(m.factors, atoms): c for m, c in poly}
    first = max(left)
    coef = _rational_root(left[first])
    if coef is None:
        return None
    root = {_halved(first): coef}
    lead = next(iter(root))
    _subtract(left, {_sum(lead, lead): coef * coef})
    while left:  # the leading term of what is left is twice that of the root times the next term of the root
        top = max(left)
        term, weight = tuple(p - q for p, q in zip(top, lead, strict=True)), left[top] / (2 * coef)
        if len(root) == _MAX_ROOT or term >= min(root):
            return None
        _subtract(left, {_sum(e, term): 2 * c * weight for e, c in root.items()})
        _subtract(left, {_sum(term, term): weight * weight})
        root[term] = weight
    split = {a for e in root for a, p in zip(atoms, e, strict=True) if p.denominator != 1}
    if not all(im.non_negative(atom_bounds(ring, a)) for a in split):  # x^(3/2) is a root of x³ for x ≥ 0 alone
        return None
    found = total(monomial(ring, c, zip(atoms, e, strict=True)) for e, c in root.items())
    return found if mul(ring, found, found) == poly else None


def _exponents(factors: tuple[tuple[Atom, Fraction], ...], atoms: list[Atom]) -> _Exponents:
    powers = dict(factors)
    return tuple(powers.get(a, Fraction(0)) for a in atoms)


def _halved(e: _Exponents) -> _Exponents:
    return tuple(p / 2 for p in e)


def _sum(e: _Exponents, f: _Exponents) -> _Exponents:
    return tuple(p + q for p, q in zip(e, f, strict=True))


def _subtract(left: dict[_Exponents, Fraction], terms: dict[_Exponents, Fraction]) -> None:
    for e, c in terms.items():
        rest = left.pop(e, Fraction(0)) - c
        if rest:
            left[e] = rest


def _rational_root(x: Fraction) -> Fraction | None:
    if x <= 0:
        return None
    top, bottom = isqrt(x.numerator), isqrt(x.denominator)
    return Fraction(top, bottom) if top * top == x.numerator and bottom * bottom == x.denominator else None
