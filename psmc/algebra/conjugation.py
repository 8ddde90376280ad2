"""Complex conjugates of normal forms. What is its own conjugate is real, however it is written: (e^ix + e^-ix)/2."""

from __future__ import annotations

from fractions import Fraction

from psmc.algebra import atoms, powers
from psmc.algebra import ring as rg
from psmc.algebra.ring import Ring
from psmc.algebra.terms import Atom, Poly, number, total


def conjugate(ring: Ring, poly: Poly) -> Poly:
    """Complex conjugate, factor by factor."""
    if poly.real:
        return poly
    out = []
    for mono, coef in poly:
        factors, bound = rg.opened(ring, mono)
        parts = [_conjugate_factor(ring, a, p) for a, p in factors]
        out.append(rg.close(ring, rg.product(ring, (number(coef), *parts)), bound))
    return total(out)


def _conjugate_factor(ring: Ring, atom: Atom, p: Fraction) -> Poly:
    if atom.tag == "rational":
        return number(atom.args[0] ** int(p))
    if atom.real:
        return rg.monomial(ring, Fraction(1), [(atom, p)])
    match atom.tag:
        case "i":
            return rg.monomial(ring, Fraction(-1 if int(p) % 2 else 1), [(atom, p)])
        case "elem":
            name, kind, conjugated, *subs = atom.args
            return atoms.elem(ring, (name, kind, 1 - conjugated, *subs), p)
        case "exp":
            return powers.exp(ring, conjugate(ring, atom.args[0]).scaled(p))
        case "base" if p.denominator == 1:
            return powers.power(ring, conjugate(ring, atom.args[0]), p)
        case "base":
            return rg.monomial(ring, Fraction(1), [(atom, p)])  # |z|, real
    return atoms.opaque("conj")(ring, (rg.lone(atom),), p)


def is_real(ring: Ring, poly: Poly) -> bool:
    return poly.real or conjugate(ring, poly) == poly


rg.REALITY.append(is_real)
