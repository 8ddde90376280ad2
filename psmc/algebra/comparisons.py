"""Comparisons in normal form: [P > 0] and [P = 0] as polynomials in 0/1 atoms, maxima and products taken apart."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from psmc.algebra.conjugation import conjugate
from psmc.algebra.knowledge import is_positive
from psmc.algebra.lattice import bit_of, linear_max, split_on, with_bit
from psmc.algebra.powers import content, leading_sign
from psmc.algebra.ring import REBUILD, Ring, lone, monomial, mul
from psmc.algebra.terms import ONE, UNIT, ZERO, Atom, Mono, Poly

_MAX_FACTORS = 6


def is_above(ring: Ring, poly: Poly) -> Poly:
    """[poly > 0], as a Poly of value 0 or 1."""
    if is_positive(ring, poly):
        return UNIT
    if is_positive(ring, -poly, strict=False):
        return ZERO
    found = linear_max(ring, poly)
    if found is not None:
        atom, factor, rest = found
        if is_positive(ring, factor, strict=False) and not any(t.bound for t in atom.args[0]):
            terms = [_all_of(ring, [is_above(ring, mul(ring, factor, u) + rest) for u in t.lits]) for t in atom.args[0]]
            return _any_of(ring, terms)
        if is_positive(ring, -factor, strict=False):
            terms = [_any_of(ring, [is_above(ring, mul(ring, factor, u) + rest) for u in t.lits]) for t in atom.args[0]]
            return _all_of(ring, terms)
    bit = bit_of(poly)
    if bit is not None:
        on, off = (is_above(ring, with_bit(ring, poly, bit, value)) for value in (UNIT, ZERO))
        return mul(ring, lone(bit), on) + mul(ring, UNIT - lone(bit), off)
    _, rest = content(ring, poly, "positive")
    inner = _monotone(rest)
    if inner is not None:
        return is_above(ring, inner)
    single = rest.single
    if single is not None and rest.real and not single[0].bound and 1 < len(single[0].factors) <= _MAX_FACTORS:
        return _product_above(ring, single[0], single[1])
    if ring.eager:
        split_on(rest)
    return lone(Atom("pos", (rest,)))


def _monotone(poly: Poly) -> Poly | None:
    """Q - 1 for log Q, e for exp(e) - 1, and their negatives: positive where poly is."""
    whole = {m: c for m, c in poly if m.factors}
    if len(whole) != 1:
        return None
    ((mono, coef),) = whole.items()
    (atom, p), *more = mono.factors
    if more or p != 1 or mono.bound or not atom.real:
        return None
    constant = poly.terms.get(ONE, Fraction(0))
    sign = Fraction(1 if coef > 0 else -1)
    inner: Poly = atom.args[0]
    if atom.tag == "log" and not constant:
        return (inner - UNIT).scaled(sign)
    if atom.tag == "exp" and constant == -coef:
        return inner.scaled(sign)
    return None


def _product_above(ring: Ring, mono: Mono, coef: Fraction) -> Poly:
    """[u·v > 0] = [u > 0][v > 0] + [-u > 0][-v > 0]."""
    (atom, p), *others = mono.factors
    first = lone(atom)
    rest = monomial(ring, coef, others)
    if p.denominator != 1 or p % 2 == 0:  # a root, ≥ 0, or a square: only whether it is 0 matters
        apart = is_above(ring, first) + (is_above(ring, -first) if p.denominator == 1 else ZERO)
        return mul(ring, apart, is_above(ring, rest))
    return mul(ring, is_above(ring, first), is_above(ring, rest)) + mul(
        ring, is_above(ring, -first), is_above(ring, -rest)
    )


def _all_of(ring: Ring, terms: Iterable[Poly]) -> Poly:
    out = UNIT
    for term in terms:
        out = mul(ring, out, term)
    return out


def _any_of(ring: Ring, terms: Iterable[Poly]) -> Poly:
    return UNIT - _all_of(ring, (UNIT - t for t in terms))


def is_zero(ring: Ring, poly: Poly) -> Poly:
    """[poly == 0]."""
    if poly.constant is not None:
        return UNIT if poly.constant == 0 else ZERO
    if poly.real:
        return mul(ring, UNIT - is_above(ring, poly), UNIT - is_above(ring, -poly))
    if all(a.tag == "i" for m, _ in poly for a, _ in m.factors):
        return ZERO  # a number, with an imaginary part
    bit = bit_of(poly)
    if bit is not None:
        on, off = (is_zero(ring, with_bit(ring, poly, bit, value)) for value in (UNIT, ZERO))
        return mul(ring, lone(bit), on) + mul(ring, UNIT - lone(bit), off)
    (_, units), rest = content(ring, poly)
    factors = [lone(atom) for atom, p in units if p > 0 and atom.tag != "exp"]
    if factors and rest.constant is None:
        factors.append(rest)
    if len(factors) > 1 or (factors and rest.constant is not None):
        return _any_of(ring, [is_zero(ring, f) for f in factors]) if factors != [poly] else _zero(ring, poly)
    return _zero(ring, rest)


def _zero(ring: Ring, poly: Poly) -> Poly:
    """Of a complex Poly: of its negative and of its conjugate, the same."""
    other = conjugate(ring, poly)
    if not other:  # 0 by what is known in this case
        return UNIT
    atom = Atom("zero", (min((form.scaled(leading_sign(form)) for form in (poly, other)), key=lambda f: f.key),))
    return ZERO if atom in ring.facts.distinct else lone(atom)


REBUILD["pos"] = lambda ring, args, p: is_above(ring, args[0])
REBUILD["zero"] = lambda ring, args, p: is_zero(ring, args[0])
