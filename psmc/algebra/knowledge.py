"""What follows from intervals and from the assumptions of the current case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

from psmc.algebra import interval_math as im
from psmc.algebra.bounds import bounds
from psmc.algebra.linear import Constraint, feasible
from psmc.algebra.ring import Ring
from psmc.algebra.terms import ONE, Atom, Mono, Poly


def is_positive(ring: Ring, poly: Poly, *, strict: bool = True) -> bool:
    """Certainly > 0 (≥ 0 if not strict), by intervals or by the assumptions of the case."""
    if not poly.real:
        return False
    if poly.constant is not None:
        return poly.constant > 0 or (not strict and poly.constant == 0)
    known = bounds(ring, poly)
    if im.positive(known) if strict else im.non_negative(known):
        return True
    if not ring.facts.cases or not _could_follow(ring, poly):
        return False
    found = ring.signs.get((poly, strict))
    if found is None:
        ring.tick()
        against = _constraint(-poly, strict=not strict)
        found = ring.signs[poly, strict] = not feasible([*facts_as_constraints(ring, (poly,)), against], ring.deadline)
    return found


def _could_follow(ring: Ring, poly: Poly) -> bool:
    """A sum of assumptions and bounds can give poly only if each of its monomials is in an assumption or bounded."""
    assumed = {m for c in ring.facts.cases for m in c.poly.terms}
    for mono, coef in poly:
        if mono not in assumed and mono.factors:
            known = bounds(ring, Poly({mono: Fraction(1)}))
            if (known.lo if coef > 0 else known.hi) is None:
                return False
    return True


def facts_as_constraints(ring: Ring, polys: Iterable[Poly]) -> list[Constraint]:
    """The case's assumptions, and the known bounds of every monomial they and `polys` mention."""
    cases = [_constraint(c.poly, strict=c.strict) for c in ring.facts.cases]
    mentioned = (*polys, *(c.poly for c in ring.facts.cases))
    monos = sorted({m for p in mentioned for m in p.terms if m.factors})
    for mono in monos:
        known = bounds(ring, Poly({mono: Fraction(1)}))
        if known.lo is not None:
            cases.append(Constraint({mono.key: Fraction(1)}, -known.lo, known.lo_open))
        if known.hi is not None:
            cases.append(Constraint({mono.key: Fraction(-1)}, known.hi, known.hi_open))
    return cases + [c for m in monos for c in (*_products(ring, m, monos), *_below_size(ring, m))]


def _below_size(ring: Ring, mono: Mono) -> Iterator[Constraint]:
    """i ≤ K - 1 for an index i over K."""
    if mono.bound or len(mono.factors) != 1 or mono.factors[0][0].tag != "index" or mono.factors[0][1] != 1:
        return
    dim = mono.factors[0][0].args[0].dim
    size = ring.facts.sizes.get(dim)
    if size is not None:
        yield Constraint({mono.key: Fraction(-1)}, Fraction(size - 1), False)
    else:
        whole = Mono(((Atom("dim", (dim,)), Fraction(1)),))
        yield Constraint({mono.key: Fraction(-1), whole.key: Fraction(1)}, Fraction(-1), False)


def _products(ring: Ring, mono: Mono, monos: Sequence[Mono]) -> Iterator[Constraint]:
    """lo·rest ≤ x·rest ≤ hi·rest, for a rest ≥ 0 that is mentioned too."""
    if mono.bound or len(mono.factors) < 2:
        return
    for atom, p in mono.factors:
        rest = Mono(tuple((a, q) if a is not atom else (a, q - 1) for a, q in mono.factors if a is not atom or q > 1))
        if p < 1 or rest not in monos or not im.non_negative(bounds(ring, Poly({rest: Fraction(1)}))):
            continue
        known = bounds(ring, Poly({Mono(((atom, Fraction(1)),)): Fraction(1)}))
        if known.lo is not None:
            yield Constraint({mono.key: Fraction(1), rest.key: -known.lo}, Fraction(0), False)
        if known.hi is not None:
            yield Constraint({mono.key: Fraction(-1), rest.key: known.hi}, Fraction(0), False)


def _constraint(poly: Poly, *, strict: bool) -> Constraint:
    return Constraint({m.key: c for m, c in poly if m.factors}, poly.terms.get(ONE, Fraction(0)), strict)
