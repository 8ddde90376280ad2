"""Max, min and comparisons in normal form.

A `max` atom is a maximum of terms, each a minimum of Polys over all values of its own bound indices. Maxima inside
maxima are flattened, positive multiples and sums distribute, common summands and common positive factors are taken out;
min(x, y) is -max(-x, -y). A comparison is the atom [P > 0], of value 0 or 1; comparisons of maxima become polynomials
in such atoms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import product as combinations

from psmc.algebra import interval_math as im
from psmc.algebra.bounds import bounds
from psmc.algebra.labels import canonical_order
from psmc.algebra.linear import Constraint, feasible
from psmc.algebra.powers import content, least_coefficients, over_unit, power
from psmc.algebra.ring import (
    IDEMPOTENT,
    REBUILD,
    OutOfBudgetError,
    Ring,
    SplitError,
    lone,
    monomial,
    mul,
    open_term,
    opened,
    rename,
    times,
)
from psmc.algebra.terms import ONE, UNIT, ZERO, Atom, Bag, Mono, Poly, Term, total
from psmc.ir import Index

_MAX_TERMS = 256
_MAX_LITS = 32
_MAX_FACTORS = 6
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
    if not ring.facts.cases or not _could_follow(ring, poly):
        return False
    found = ring.signs.get((poly, strict))
    if found is None:
        ring.tick()
        against = _constraint(-poly, strict=not strict)
        found = ring.signs[poly, strict] = not feasible([*facts_as_constraints(ring, (poly,)), against])
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
        (lit,) = terms[0].lits
        assert isinstance(lit, Poly)
        return lit
    if any(_hides_max(lit) for t in terms for lit in t.lits) and not any(t.bound for t in terms):
        # max(-max[m] f, r) = -max[m] min(f, -r)
        return -maximum(ring, [(tuple(-u for u in choice), ()) for choice in combinations(*(t.lits for t in terms))])
    if ring.eager and not any(t.bound for t in terms):
        first, second, *_ = sorted({lit for t in terms for lit in t.lits}, key=lambda p: (len(p), p.key))
        _split_on(first - second)
    shift, unit, rest = _normalised(ring, terms)
    if rest is None:
        return shift
    body, sign = _oriented(ring, rest)
    return shift + mul(ring, unit.scaled(sign), Poly({Mono(((body, Fraction(1)),)): Fraction(1)}))


def greatest(ring: Ring, *polys: Poly) -> Poly:
    return maximum(ring, [((p,), ()) for p in polys])


def least(ring: Ring, *polys: Poly) -> Poly:
    return maximum(ring, [(polys, ())])


def _flatten(ring: Ring, lits: tuple[Poly, ...], bound: tuple[Index, ...]) -> Iterator[Term]:
    """Terms whose lits hold no maximum linearly. Lits of one term are joined by min, terms by max."""
    ring.tick()
    lits = tuple(dict.fromkeys(lits))
    if len(lits) > _MAX_LITS:
        raise OutOfBudgetError("a minimum grew too large")
    for k, lit in enumerate(lits):
        found = _linear_max(ring, lit)
        if found is None:
            continue
        atom, factor, rest = found
        others = lits[:k] + lits[k + 1 :]
        if is_positive(ring, factor, strict=False):
            for term in atom.args[0]:
                inner, new = open_term(ring, term)
                yield from _flatten(ring, others + tuple(mul(ring, factor, u) + rest for u in inner), bound + new)
            return
        # -max_t min_u x = min_t max_u -x: one term for each way to choose a u for every t.
        for count, choice in enumerate(combinations(*(term.lits for term in atom.args[0]))):
            if count >= _MAX_TERMS:
                raise OutOfBudgetError("a maximum of minima grew too large")
            yield from _flatten(ring, others + tuple(mul(ring, factor, u) + rest for u in choice), bound)
        return
    yield _term(ring, *_off_eye(ring, lits, bound))


def _off_eye(ring: Ring, lits: tuple[Poly, ...], bound: tuple[Index, ...]) -> Member:
    """max[m] f(eye(m, j), m): only m = j counts where the rest is the same for all m and never greater."""
    for eye in [a for lit in lits[:1] for m, _ in lit for a, _ in m.factors if a.tag == "eye"]:
        for index, other in (eye.args, eye.args[::-1]):
            if len(lits) != 1 or index not in bound or (isinstance(other, Poly) and index in other.free):
                continue
            off = _at(ring, lits[0], eye, ZERO)
            on = rename(ring, lits[0], {index: other})
            if index not in off.free and is_positive(ring, on - off, strict=False):
                return _off_eye(ring, (on,), tuple(b for b in bound if b != index))
    return lits, bound


def _hides_max(lit: Poly) -> bool:
    """lit = rest - c · (a maximum over some index), c > 0."""
    return any(
        c < 0 and len(m.factors) == 1 and m.factors[0][0].tag == "max" and m.factors[0][1] == 1
        and any(t.bound for t in m.factors[0][0].args[0])
        for m, c in lit
    )  # fmt: skip


def _linear_max(ring: Ring, lit: Poly) -> tuple[Atom, Poly, Poly] | None:
    """(max atom, factor of known sign, rest) with lit = factor · max + rest.

    A negative factor needs terms without bound indices.
    """
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


def _term(ring: Ring, lits: Sequence[Poly], bound: Sequence[Index]) -> Term:
    unique = sorted(dict.fromkeys(lits), key=lambda p: p.key)
    kept = []
    for k, p in enumerate(unique):
        if not any(_drops(ring, q, p, j < k) for j, q in enumerate(unique) if j != k):
            kept.append(p)
    used = [b for b in bound if any(b in p.free for p in kept)]
    height = max(p.height for p in kept) + 1
    return Term(tuple(kept), canonical_order(used, [(p, "") for p in kept], height))


def _drops(ring: Ring, q: Poly, p: Poly, first: bool) -> bool:
    """min(p, q) = q: p may go. Of two equal ones the later goes."""
    ring.tick()
    return is_positive(ring, p - q, strict=False) and (first or not is_positive(ring, q - p, strict=False))


def _unique(ring: Ring, terms: Iterable[Term]) -> list[Term]:
    out = sorted(dict.fromkeys(terms), key=lambda t: t.key)
    if len(out) > _MAX_TERMS:
        raise OutOfBudgetError("a maximum grew too large")
    return out


def _absorb(ring: Ring, terms: list[Term]) -> list[Term]:
    """Drop a term that another one is never below: every lit of the other is ≥ some lit of it."""

    def below(t: Term, other: Term) -> bool:
        ring.tick()
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
    members = [open_term(ring, t) for t in terms]
    fixed = [Poly({m: c for m, c in lit if m.free.isdisjoint(bound)}) for lits, bound in members for lit in lits]
    shift = least_coefficients(fixed)
    members = [(tuple(lit - shift for lit in lits), bound) for lits, bound in members]
    # All monomials in one Poly, to find what they share; bound indices are free there, and units may not hold them.
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
    (coef, factors), _ = content(ring, Poly(pool), "positive")
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
    if (len(atom.args[0]), atom.key) <= (len(other.args[0]), other.key):
        return atom, Fraction(1)
    return other, Fraction(-1)


def _max_atom(ring: Ring, members: Iterable[Member]) -> Atom:
    terms = _unique(ring, [_term(ring, lits, bound) for lits, bound in members])
    return Atom("max", (Bag(terms),))


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
    bit = _bit(poly)
    if bit is not None:
        on, off = (is_above(ring, _at(ring, poly, bit, value)) for value in (UNIT, ZERO))
        return mul(ring, lone(bit), on) + mul(ring, UNIT - lone(bit), off)
    _, rest = content(ring, poly, "positive")
    single = rest.single
    if single is not None and not single[0].bound and 1 < len(single[0].factors) <= _MAX_FACTORS:
        return _product_above(ring, single[0], single[1])
    if ring.eager:
        _split_on(rest)
    return lone(Atom("pos", (rest,)))


def _split_on(guard: Poly) -> None:
    """Ask for a case split, unless the guard depends on a bound index (which have fresh names)."""
    if not any(i.name.startswith("~") for i in guard.free):
        raise SplitError(guard)


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


def _bit(poly: Poly) -> Atom | None:
    """A factor of value 0 or 1 that no sum binds: [P > 0] is decided for both values instead."""
    for mono, _ in poly:
        for atom, _ in mono.factors:
            if atom.tag in IDEMPOTENT and atom.free.isdisjoint(mono.bound):
                return atom
    return None


def _at(ring: Ring, poly: Poly, bit: Atom, value: Poly) -> Poly:
    """The Poly where `bit`, as a factor, has a value."""
    out = []
    for mono, coef in poly:
        if all(a != bit for a, _ in mono.factors):
            out.append(Poly({mono: coef}))
        elif value:
            factors, bound = opened(ring, mono)
            out.append(times(ring, coef, [f for f in factors if f[0] != bit], bound))
    return total(out)


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
    _, rest = content(ring, poly, "positive")
    return Poly({Mono(((Atom("zero", (rest,)), Fraction(1)),)): Fraction(1)})


REBUILD |= {
    "max": lambda ring, args, p: power(ring, maximum(ring, args[0]), p),
    "pos": lambda ring, args, p: is_above(ring, args[0]),
    "zero": lambda ring, args, p: is_zero(ring, args[0]),
}
