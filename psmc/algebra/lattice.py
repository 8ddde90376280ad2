"""Max, min and comparisons in normal form.

A `max` atom is a maximum of terms, each a minimum of Polys over all values of its own bound indices. Maxima inside maxima are
flattened, positive multiples and sums distribute, common summands and common positive factors are taken out; min(x, y) is
-max(-x, -y). A comparison is the atom [P > 0], of value 0 or 1; comparisons of maxima become polynomials in such atoms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import product as combinations

from psmc.algebra import interval_math as im
from psmc.algebra.labels import canonical_order
from psmc.algebra.linear import Constraint, feasible
from psmc.algebra.ring import (
    REBUILD,
    OutOfBudgetError,
    Ring,
    Substitution,
    bounds,
    content,
    least_coefficients,
    monomial,
    mul,
    over_unit,
    power,
    rename,
)
from psmc.algebra.terms import ONE, UNIT, ZERO, Atom, Bag, Mono, Poly, Term
from psmc.ir import Index, Interval

_MAX_TERMS = 256
Member = tuple[tuple[Poly, ...], tuple[Index, ...]]  # lits and bound, the bound under fresh names


# --- knowledge ----------------------------------------------------------------------------------


def is_positive(ring: Ring, poly: Poly, *, strict: bool = True) -> bool:
    """Certainly > 0 (≥ 0 if not strict), by intervals or by the assumptions of the case."""
    if not poly.real:
        return False
    if poly.constant is not None:
        return poly.constant > 0 or (not strict and poly.constant == 0)
    known = bounds(ring, poly)
    if im.positive(known) if strict else im.non_negative(known):
        return True
    if not ring.facts.cases:
        return False
    ring.tick()
    against = _constraint(-poly, strict=not strict)
    return not feasible([*facts_as_constraints(ring, (poly,)), against])


def facts_as_constraints(ring: Ring, polys: Iterable[Poly]) -> list[Constraint]:
    """The case's assumptions, and the known bounds of every monomial they and `polys` mention."""
    cases = [_constraint(c.poly, strict=c.strict) for c in ring.facts.cases]
    monos = sorted({m for p in (*polys, *(c.poly for c in ring.facts.cases)) for m in p.terms if m is not ONE and m.factors})
    for mono in monos:
        known = bounds(ring, Poly({mono: Fraction(1)}))
        if known.lo is not None:
            cases.append(Constraint({mono.key: Fraction(1)}, -known.lo, known.lo_open))
        if known.hi is not None:
            cases.append(Constraint({mono.key: Fraction(-1)}, known.hi, known.hi_open))
    return cases


def _constraint(poly: Poly, *, strict: bool) -> Constraint:
    return Constraint({m.key: c for m, c in poly if m.factors}, poly.terms.get(ONE, Fraction(0)), strict)


# --- maximum ------------------------------------------------------------------------------------


def maximum(ring: Ring, members: Iterable[Member]) -> Poly:
    """The greatest of the members' minima, in normal form."""
    terms = _unique(ring, [t for lits, bound in members for t in _flatten(ring, lits, bound)])
    terms = _absorb(ring, terms)
    if len(terms) == 1 and len(terms[0].lits) > 1 and not terms[0].bound:
        return -maximum(ring, [((-lit,), ()) for lit in terms[0].lits])
    if len(terms) == 1 and len(terms[0].lits) == 1 and not terms[0].bound:
        return terms[0].lits[0]
    if any(_hides_max(lit) for t in terms for lit in t.lits) and not any(t.bound for t in terms):
        # max(-max[m] f, r) = -max[m] min(f, -r)
        return -maximum(ring, [(tuple(-u for u in choice), ()) for choice in combinations(*(t.lits for t in terms))])
    shift, unit, rest = _normalised(ring, terms)
    if rest is None:
        return shift
    body, sign = _oriented(ring, rest)
    return shift + mul(ring, unit.scaled(sign), Poly({Mono(((body, Fraction(1)),)): Fraction(1)}))


def greatest(ring: Ring, *polys: Poly) -> Poly:
    return maximum(ring, [((p,), ()) for p in polys])


def least(ring: Ring, *polys: Poly) -> Poly:
    return maximum(ring, [(polys, ())])


def over_index(ring: Ring, poly: Poly, index: Index) -> Poly:
    """max over an index of any name."""
    new = ring.fresh(index)
    return maximum(ring, [((rename(ring, poly, {index: new}),), (new,))])


def _flatten(ring: Ring, lits: tuple[Poly, ...], bound: tuple[Index, ...]) -> Iterator[Term]:
    """Terms whose lits hold no maximum linearly. Lits of one term are joined by min, terms by max."""
    ring.tick()
    for k, lit in enumerate(lits):
        found = _linear_max(ring, lit)
        if found is None:
            continue
        atom, factor, rest = found
        others = lits[:k] + lits[k + 1 :]
        count = 0
        if is_positive(ring, factor, strict=False):
            for term in atom.args[0]:
                inner, new = _open(ring, term)
                yield from _flatten(ring, others + tuple(mul(ring, factor, u) + rest for u in inner), bound + new)
            return
        # -max_t min_u x = min_t max_u -x: one term for each way to choose a u for every t.
        for choice in combinations(*(term.lits for term in atom.args[0])):
            count += 1
            if count > _MAX_TERMS:
                raise OutOfBudgetError("a maximum of minima grew too large")
            yield from _flatten(ring, others + tuple(mul(ring, factor, u) + rest for u in choice), bound)
        return
    yield _term(ring, lits, bound)


def _hides_max(lit: Poly) -> bool:
    """lit = rest - c · (a maximum over some index), c > 0."""
    return any(
        c < 0 and len(m.factors) == 1 and m.factors[0][0].tag == "max" and m.factors[0][1] == 1
        and any(t.bound for t in m.factors[0][0].args[0])
        for m, c in lit
    )  # fmt: skip


def _linear_max(ring: Ring, lit: Poly) -> tuple[Atom, Poly, Poly] | None:
    """(max atom, factor of known sign, rest) with lit = factor · max + rest. A negative factor needs terms without bound indices."""
    for mono, coef in lit:
        for atom, p in mono.factors:
            if atom.tag != "max" or p != 1 or mono.bound:
                continue
            factor = Poly({Mono(tuple(f for f in mono.factors if f[0] is not atom)): coef})
            if factor.constant is None and any(a.tag == "max" for a, _ in mono.factors if a is not atom):
                continue
            rest = Poly({m: c for m, c in lit if m is not mono})
            if is_positive(ring, factor, strict=False):
                return atom, factor, rest
            if is_positive(ring, -factor, strict=False) and not any(t.bound for t in atom.args[0]):
                return atom, factor, rest
    return None


def _open(ring: Ring, term: Term) -> tuple[tuple[Poly, ...], tuple[Index, ...]]:
    if not term.bound:
        return tuple(term.lits), ()
    names = {b: ring.fresh(b) for b in term.bound}
    return tuple(rename(ring, lit, names) for lit in term.lits), tuple(names[b] for b in term.bound)


def _term(ring: Ring, lits: Sequence[Poly], bound: Sequence[Index]) -> Term:
    unique = sorted(dict.fromkeys(lits), key=lambda p: p.key)
    kept = [p for k, p in enumerate(unique) if not any(_drops(ring, q, p, j < k) for j, q in enumerate(unique) if j != k)]
    used = [b for b in bound if any(b in p.free for p in kept)]
    height = max(p.height for p in kept) + 1
    return Term(tuple(kept), canonical_order(used, [(p, "") for p in kept], height))


def _drops(ring: Ring, q: Poly, p: Poly, first: bool) -> bool:
    """min(p, q) = q: p may go. Of two equal ones the later goes."""
    return is_positive(ring, p - q, strict=False) and (first or not is_positive(ring, q - p, strict=False))


def _unique(ring: Ring, terms: Iterable[Term]) -> list[Term]:
    out = sorted(dict.fromkeys(terms), key=lambda t: t.key)
    if len(out) > _MAX_TERMS:
        raise OutOfBudgetError("a maximum grew too large")
    return out


def _absorb(ring: Ring, terms: list[Term]) -> list[Term]:
    """Drop a term that another one is never below: every lit of the other is ≥ some lit of it."""

    def below(t: Term, other: Term) -> bool:
        return not t.bound and not other.bound and all(
            any(u == v or is_positive(ring, v - u, strict=False) for u in t.lits) for v in other.lits
        )  # fmt: skip

    kept: list[Term] = []
    for k, term in enumerate(terms):
        if not any(below(term, o) and (o in kept or not below(o, term)) for j, o in enumerate(terms) if j != k):
            kept.append(term)
    return kept


def _normalised(ring: Ring, terms: list[Term]) -> tuple[Poly, Poly, list[Member] | None]:
    """max(terms) = shift + unit · max(rest): the common summand and the common positive factor taken out."""
    members = [_open(ring, t) for t in terms]
    fixed = [Poly({m: c for m, c in lit if m.free.isdisjoint(bound)}) for lits, bound in members for lit in lits]
    shift = least_coefficients(fixed)
    members = [(tuple(lit - shift for lit in lits), bound) for lits, bound in members]
    # Gather all monomials in one Poly to find what they share; bound indices count as free ones that units may not hold.
    bound_names = frozenset(b for _, bound in members for b in bound)
    pool: dict[Mono, Fraction] = {}
    for lits, _ in members:
        for lit in lits:
            for mono, coef in lit:
                while mono in pool:  # same monomial in several lits: only its factors and its coefficient's size matter
                    coef = Fraction(_gcd(pool.pop(mono), coef))
                pool[mono] = coef
    if not pool:
        return shift, UNIT, None
    (coef, factors), _ = content(ring, Poly(pool), only_positive=True)
    kept = [(a, p) for a, p in factors if a.free.isdisjoint(bound_names) and a.tag != "exp"]
    kept += [
        (Atom("exp", (e,), True), Fraction(1))
        for a, _ in factors if a.tag == "exp"
        for e in [Poly({m: c for m, c in a.args[0] if m.free.isdisjoint(bound_names)})] if e
    ]  # fmt: skip
    unit = monomial(ring, coef, kept)
    members = [(tuple(over_unit(ring, lit, (coef, tuple(kept))) for lit in lits), bound) for lits, bound in members]
    return shift, unit, members


def _gcd(x: Fraction, y: Fraction) -> Fraction:
    from math import gcd

    return Fraction(
        gcd(abs(x.numerator) * y.denominator, abs(y.numerator) * x.denominator), x.denominator * y.denominator
    )


def _oriented(ring: Ring, members: list[Member]) -> tuple[Atom, Fraction]:
    """The max atom of members, or its dual under a minus sign where that reads less: max of minima and min of maxima
    of the same lattice polynomial must meet in one form."""
    atom = _max_atom(ring, members)
    if all(len(lits) == 1 for lits, _ in members) or any(bound for _, bound in members):
        return atom, Fraction(1)
    dual: list[Member] = []
    for choice in combinations(*(lits for lits, _ in members)):
        dual.append((tuple(-u for u in choice), ()))
        if len(dual) > _MAX_TERMS:
            return atom, Fraction(1)
    terms = _absorb(ring, _unique(ring, [_term(ring, lits, ()) for lits, _ in dual]))
    shift, unit, rest = _normalised(ring, terms)
    if rest is None or shift or unit != UNIT:
        return atom, Fraction(1)
    other = _max_atom(ring, rest)
    return (atom, Fraction(1)) if (len(atom.args[0]), atom.key) <= (len(other.args[0]), other.key) else (other, Fraction(-1))


def _max_atom(ring: Ring, members: Iterable[Member]) -> Atom:
    terms = _unique(ring, [_term(ring, lits, bound) for lits, bound in members])
    return Atom("max", (Bag(terms),))


def max_bounds(ring: Ring, atom: Atom) -> Interval:
    out: Interval | None = None
    for term in atom.args[0]:
        low: Interval | None = None
        for lit in term.lits:
            here = bounds(ring, lit)
            low = here if low is None else im.least(low, here)
        assert low is not None
        out = low if out is None else im.greatest(out, low)
    return out or im.ANY


def rename_terms(ring: Ring, terms: Bag, sub: Substitution) -> Bag:
    out = []
    for term in terms:
        lits, bound = _open(ring, term)
        out.append((tuple(rename(ring, lit, sub) for lit in lits), bound))
    return Bag(out)


# --- comparisons --------------------------------------------------------------------------------


def is_above(ring: Ring, poly: Poly) -> Poly:
    """[poly > 0], as a Poly of value 0 or 1."""
    if is_positive(ring, poly):
        return UNIT
    if is_positive(ring, -poly, strict=False):
        return ZERO
    found = _linear_max(ring, poly)
    if found is not None:
        atom, factor, rest = found
        if is_positive(ring, factor, strict=False) and not any(t.bound for t in atom.args[0]):
            terms = [_all_of(ring, [is_above(ring, mul(ring, factor, u) + rest) for u in t.lits]) for t in atom.args[0]]
            return _any_of(ring, terms)
        if is_positive(ring, -factor, strict=False):
            terms = [_any_of(ring, [is_above(ring, mul(ring, factor, u) + rest) for u in t.lits]) for t in atom.args[0]]
            return _all_of(ring, terms)
    _, rest = content(ring, poly, only_positive=True)
    return Poly({Mono(((Atom("pos", (rest,)), Fraction(1)),)): Fraction(1)})


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
    _, rest = content(ring, poly, only_positive=True)
    return Poly({Mono(((Atom("zero", (rest,)), Fraction(1)),)): Fraction(1)})


def guard_of(atom: Atom) -> Atom | Poly | None:
    """What to split on to get rid of an atom: an eye, a Poly to compare with 0, or None."""
    if atom.tag == "eye":
        return atom
    if atom.tag == "pos":
        return atom.args[0]  # type: ignore[no-any-return]
    if atom.tag == "max":
        lits = sorted({lit for term in atom.args[0] if not term.bound for lit in term.lits}, key=lambda p: p.key)
        return lits[0] - lits[1] if len(lits) > 1 else None
    return None


REBUILD |= {
    "max": lambda ring, args, p: power(ring, maximum(ring, args[0]), p),
    "pos": lambda ring, args, p: is_above(ring, args[0]),
    "zero": lambda ring, args, p: is_zero(ring, args[0]),
}
