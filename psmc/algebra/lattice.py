"""Max and min in normal form.

A `max` atom is a maximum of terms, each a minimum of Polys over all values of its own bound indices. Maxima inside
maxima are flattened, positive multiples and sums distribute, common summands and common positive factors are taken out;
min(x, y) is -max(-x, -y).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from itertools import product as combinations

from psmc.algebra.knowledge import is_positive
from psmc.algebra.labels import canonical_order
from psmc.algebra.powers import content, least_coefficients, over_unit, power
from psmc.algebra.ring import (
    IDEMPOTENT,
    REBUILD,
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
from psmc.algebra.terms import UNIT, ZERO, Atom, Bag, Mono, OutOfBudgetError, Poly, Term, total
from psmc.ir import Index

_MAX_TERMS = 256
_MAX_LITS = 32
_MAX_FLAT = 20_000  # terms before equal ones are dropped
Member = tuple[tuple[Poly, ...], tuple[Index, ...]]  # lits and bound, the bound under fresh names


def maximum(ring: Ring, members: Iterable[Member]) -> Poly:
    """The greatest of the members' minima, in normal form."""
    members = list(members)
    bit = next((b for lits, bound in members for lit in lits for b in [bit_of(lit, bound)] if b is not None), None)
    if bit is not None:  # max(b x + (1 - b) y, z) = b max(x, z) + (1 - b) max(y, z)
        on, off = (
            maximum(ring, [(tuple(with_bit(ring, lit, bit, value) for lit in lits), bound) for lits, bound in members])
            for value in (UNIT, ZERO)
        )
        return mul(ring, lone(bit), on) + mul(ring, UNIT - lone(bit), off)
    flat = list(islice((t for m in members for t in _flatten(ring, *m)), _MAX_FLAT + 1))
    if len(flat) > _MAX_FLAT:
        raise OutOfBudgetError("a maximum grew too large")
    terms = _unique(ring, flat)
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
        split_on(first - second)
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
        found = linear_max(ring, lit)
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
            if len(lits) != 1 or index not in bound or isinstance(other, Poly):  # a gather may be no position
                continue
            off = with_bit(ring, lits[0], eye, ZERO)
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


def linear_max(ring: Ring, lit: Poly) -> tuple[Atom, Poly, Poly] | None:
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
    return Term(tuple(kept), canonical_order(used, [(p, "") for p in kept], height, ring.tick))


def _drops(ring: Ring, q: Poly, p: Poly, first: bool) -> bool:
    """min(p, q) = q: p may go. Of two equal ones the later goes."""
    ring.tick()
    return _never_below(ring, p, q) and (first or not _never_below(ring, q, p))


def _never_below(ring: Ring, p: Poly, q: Poly) -> bool:
    """Certainly p ≥ q."""
    found = ring.above.get((p, q))
    if found is None:
        found = ring.above[p, q] = is_positive(ring, p - q, strict=False)
    return found


def _unique(ring: Ring, terms: Iterable[Term]) -> list[Term]:
    out = sorted(dict.fromkeys(terms), key=lambda t: t.key)
    if len(out) > _MAX_TERMS:
        raise OutOfBudgetError("a maximum grew too large")
    return out


def _absorb(ring: Ring, terms: list[Term]) -> list[Term]:
    """Drop a term that another one is never below: every lit of the other is ≥ some lit of it, whatever both bind."""

    def below(t: Term, other: Term) -> bool:
        ring.tick()
        same = t.bound == other.bound
        return all(any((same and u == v) or _never_below(ring, v, u) for u in t.lits) for v in other.lits)

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


# --- 0 or 1 -------------------------------------------------------------------------------------


def bit_of(poly: Poly, bound: tuple[Index, ...] = ()) -> Atom | None:
    """A factor of value 0 or 1 that nothing binds: what depends on it is written out for both values."""
    for mono, _ in poly:
        for atom, _ in mono.factors:
            if atom.tag in IDEMPOTENT and atom.free.isdisjoint((*mono.bound, *bound)):
                return atom
    return None


def with_bit(ring: Ring, poly: Poly, bit: Atom, value: Poly) -> Poly:
    """The Poly where `bit`, as a factor, has a value."""
    out = []
    for mono, coef in poly:
        if all(a != bit for a, _ in mono.factors):
            out.append(Poly({mono: coef}))
        elif value:
            factors, bound = opened(ring, mono)
            out.append(times(ring, coef, [f for f in factors if f[0] != bit], bound))
    return total(out)


def split_on(guard: Poly) -> None:
    """Ask for a case split, unless the guard depends on a bound index (which have fresh names)."""
    if not any(i.name.startswith("~") for i in guard.free):
        raise SplitError(guard)


REBUILD["max"] = lambda ring, args, p: power(ring, maximum(ring, args[0]), p)
