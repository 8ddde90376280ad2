"""Arithmetic of normal forms: products, contractions and renaming, each result canonical.

Two rules keep bound indices apart: opening a binder renames it to a name never used before, and `monomial` expects
its `bound` indices to be such names.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

from psmc.algebra.facts import Facts
from psmc.algebra.labels import canonical_order
from psmc.algebra.terms import MAX_TERMS, UNIT, ZERO, Atom, Bag, Mono, OutOfBudgetError, Poly, Term, total
from psmc.ir import Index, Interval

Substitution = Mapping[Index, Any]  # to an Index, an int, or a Poly (a gather)
IDEMPOTENT = ("eye", "pos", "zero")
MAX_WORK = 400_000  # monomials built
_MAX_POWER = 64


class UndefinedError(Exception):
    """The expression has no value: 0/0, inf - inf, log of a negative number."""


class SplitError(Exception):
    """The value depends on `guard`: an eye atom, or whether a Poly is > 0. None: nothing that can be split on."""

    def __init__(self, guard: Atom | Poly | None) -> None:
        super().__init__(guard)
        self.guard = guard


class Ring:
    """What arithmetic depends on: known facts, a supply of fresh index names, limits of time and of work.

    `eager`: maxima and comparisons are split on where they are met, instead of being kept as atoms.
    """

    def __init__(self, facts: Facts, deadline: float, *, eager: bool = False, work: int = MAX_WORK) -> None:
        self.facts, self.deadline, self.eager, self.work = facts, deadline, eager, work
        self._names = itertools.count(1)
        self._ticks = [0]  # shared with the rings of all cases
        self.signs: dict[tuple[Poly, bool], bool] = {}
        self._bounds: dict[Poly, Interval] = {}
        self.above: dict[tuple[Poly, Poly], bool] = {}
        self.reals: dict[Poly, bool] = {}
        # What was divided by and may be 0, what a log or a root was taken of and may be < 0: by key, shared too.
        self.denominators: dict[str, Poly] = {}
        self.radicands: dict[str, Poly] = {}

    def tick(self) -> None:
        self._ticks[0] += 1
        if self._ticks[0] > self.work:
            raise OutOfBudgetError("the limit of work was reached")
        if self._ticks[0] % 64 == 0 and time.monotonic() > self.deadline:
            raise OutOfBudgetError("the time limit was reached")

    def fresh(self, index: Index) -> Index:
        return Index(f"~{next(self._names)}", index.dim)

    def under(self, facts: Facts) -> Ring:
        """The same supply of names and time limit, other facts."""
        ring = Ring(facts, self.deadline, eager=self.eager, work=self.work)
        ring._names, ring._ticks = self._names, self._ticks
        ring.denominators, ring.radicands = self.denominators, self.radicands
        return ring


# How to rebuild an atom under a power after its indices changed: tag -> (ring, its args renamed, power) -> Poly.
REBUILD: dict[str, Callable[[Ring, tuple[Any, ...], Fraction], Poly]] = {}

# Whether a Poly is real although it is written with complex quantities: set by conjugation.py, which lies above.
REALITY: list[Callable[[Ring, Poly], bool]] = []


def is_real(ring: Ring, poly: Poly) -> bool:
    """Certainly real."""
    if poly.real:
        return True
    found = ring.reals.get(poly)
    if found is None:
        found = ring.reals[poly] = REALITY[0](ring, poly)
    return found


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
            powers[Atom("exp", (exponent,), is_real(ring, exponent))] = Fraction(1)
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
    return Poly({Mono(pairs, canonical_order(bound, parts, height, ring.tick)): coef})


def _settle(ring: Ring, atom: Atom, power: Fraction) -> tuple[Fraction, Fraction, Poly | None]:
    """(power that stays, rational factor, further factor) of atom^power."""
    if not power:
        return power, Fraction(1), None
    if atom.tag == "i":
        turns = int(power) % 4
        return Fraction(turns % 2), Fraction(-1 if turns >= 2 else 1), None
    if atom.tag in IDEMPOTENT:
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
    """Use one eye(r, c): replace a bound side everywhere, or write the free sides alike. None: nothing to do.

    Not by a gather: the sum over i of eye(i, p) is 0 where p is no position.
    """
    for eye in [a for a in plain if a.tag == "eye"]:
        row, col = eye.args
        rest = [(a, p) for a, p in plain.items() if a is not eye]
        for old, new in ((row, col), (col, row)):
            if isinstance(old, Index) and old in bound and not isinstance(new, Poly):
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
                extra.append(REBUILD["base"](ring, (atom.args[0],), coef))
                continue
        kept[mono] = coef
    return exponent if len(kept) == len(exponent) else Poly(kept)


# --- products and contractions ------------------------------------------------------------------


def opened(ring: Ring, mono: Mono) -> tuple[tuple[tuple[Atom, Fraction], ...], tuple[Index, ...]]:
    """Factors and bound indices of a monomial, the latter under new names.

    The renaming is one to one, so that every factor stays one factor, except for signs that sorting may flip: those
    come as `rational` factors, which only `times` understands.
    """
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
            out.append((Atom("rational", (renamed[1],)), Fraction(1)))
    return tuple(out), tuple(names[b] for b in mono.bound)


def mul(ring: Ring, p: Poly, q: Poly) -> Poly:
    if not p or not q:
        return ZERO
    for one, other in ((p, q), (q, p)):
        if one.constant is not None:
            return other.scaled(one.constant)
    if len(p) * len(q) > MAX_TERMS:
        raise OutOfBudgetError("an expression grew too large")
    out = []
    for m, c in p:
        for n, d in q:
            left, right = opened(ring, m), opened(ring, n)
            out.append(times(ring, c * d, (*left[0], *right[0]), (*left[1], *right[1])))
    return total(out)


def times(ring: Ring, coef: Fraction, factors: Iterable[tuple[Atom, Fraction]], bound: Iterable[Index]) -> Poly:
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
        out.append(times(ring, coef, factors, (*inner, *bound)))
    return total(out)


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
    return rename_terms(ring, x, sub) if isinstance(x, Bag) else x


def open_term(ring: Ring, term: Term) -> tuple[tuple[Poly, ...], tuple[Index, ...]]:
    """Lits and bound indices of a term, the latter under new names."""
    if not term.bound:
        return tuple(term.lits), ()
    names = {b: ring.fresh(b) for b in term.bound}
    return tuple(rename(ring, lit, names) for lit in term.lits), tuple(names[b] for b in term.bound)


def rename_terms(ring: Ring, terms: Bag, sub: Substitution) -> Bag:
    """The members of a maximum or product, opened and renamed."""
    out = []
    for term in terms:
        lits, bound = open_term(ring, term)
        out.append((tuple(rename(ring, lit, sub) for lit in lits), bound))
    return Bag(out)


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


def lone(atom: Atom) -> Poly:
    """The atom as a Poly."""
    return Poly({Mono(((atom, Fraction(1)),)): Fraction(1)})


