"""Intervals of normal forms."""

from __future__ import annotations

from fractions import Fraction

from psmc.algebra import interval_math as im
from psmc.algebra.ring import Ring
from psmc.algebra.terms import Atom, Mono, Poly
from psmc.ir import Interval

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
        root = im.POSITIVE if im.positive(x) else im.NON_NEGATIVE
        x = im.power(x, int(p)) if p.denominator == 1 else root
        out = im.mul(out, x)
    if mono.bound:  # a sum of at least one such term per bound index
        lo = out.lo if out.lo is not None and out.lo >= 0 else None
        hi = out.hi if out.hi is not None and out.hi <= 0 else None
        out = Interval(lo, hi, lo is None or out.lo_open, hi is None or out.hi_open)
    return out


def atom_bounds(ring: Ring, atom: Atom) -> Interval:
    """An interval that holds every value of an atom, in the current case."""
    narrowed = ring.facts.narrowed.get(atom)
    known = _by_tag(ring, atom)
    return known if narrowed is None else im.intersect(known, narrowed)


def _by_tag(ring: Ring, atom: Atom) -> Interval:
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
            if not atom.real:
                return im.ANY
            found = im.exp(bounds(ring, atom.args[0]))
            # log 0 = -inf and exp(-inf) = 0 are within the meaning of the language
            return im.closed(found) if "plog" in atom.key else found
        case "log":
            return im.log(bounds(ring, atom.args[0]))
        case "base":
            return bounds(ring, atom.args[0])
        case "eye" | "pos" | "zero":
            return im.UNIT_RANGE
        case "max":
            return _max_bounds(ring, atom)
        case "erf":
            return im.SIGNED_UNIT
    return im.ANY


def _max_bounds(ring: Ring, atom: Atom) -> Interval:
    out: Interval | None = None
    for term in atom.args[0]:
        low: Interval | None = None
        for lit in term.lits:
            here = bounds(ring, lit)
            low = here if low is None else im.least(low, here)
        assert low is not None
        out = low if out is None else im.greatest(out, low)
    return out or im.ANY
