"""Is a normal form identically zero?

Denominators are cleared; maxima and comparisons are split into all consistent cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, gcd

from psmc.algebra import powers
from psmc.algebra import ring as rg
from psmc.algebra.bounds import atom_bounds
from psmc.algebra.conjugation import conjugate
from psmc.algebra.extended import Infinite, Value
from psmc.algebra.facts import Facts
from psmc.algebra.knowledge import facts_as_constraints, is_positive
from psmc.algebra.linear import feasible
from psmc.algebra.normal import Normaliser, integral
from psmc.algebra.powers import guard_of
from psmc.algebra.ring import Ring, SplitError, UndefinedError
from psmc.algebra.terms import ONE, Atom, Mono, OutOfBudgetError, Poly, atoms_in, number, total
from psmc.ir import Expr, Index
from psmc.ir.rewrite import rename

MAX_CASES = 4000
MAX_DEPTH = 40
_MAX_CLEARINGS = 24
_MAX_WHOLE = 8  # values of a whole number
_REPORT = 16


@dataclass
class Outcome:
    """Whether left = right. `cases`: how many were needed; `residual`: left - right where the proof stopped.

    `undefined`: one side has no value there (0/0, inf - inf). `denominators`: what was divided by and may be 0;
    `radicands`: what a log or a root was taken of and may be < 0;
    `thin`: assumptions of cases of measure 0 in which a side has no value. Equality is claimed elsewhere.
    """

    equal: bool
    cases: int = 1
    residual: Poly | None = None
    facts: Facts | None = None
    reason: str = ""
    undefined: bool = False
    denominators: tuple[Poly, ...] = ()
    radicands: tuple[Poly, ...] = ()
    thin: tuple[Poly, ...] = ()


def decide(left: Expr, right: Expr, ring: Ring, report: Callable[[int], None] | None = None) -> Outcome:
    """Prove left = right under the ring's facts. `report` is told how many cases have been looked at."""
    search = _Search(report)
    search.run(left, right, ring, 0)
    search.outcome.denominators = tuple(ring.denominators[k] for k in sorted(ring.denominators))
    search.outcome.radicands = tuple(ring.radicands[k] for k in sorted(ring.radicands))
    return search.outcome


class _Search:
    def __init__(self, report: Callable[[int], None] | None) -> None:
        self.outcome = Outcome(True, cases=0)
        self.report = report

    def run(self, left: Expr, right: Expr, ring: Ring, depth: int) -> bool:
        """One case; False once a case failed."""
        self.outcome.cases += 1
        if self.report is not None and self.outcome.cases % _REPORT == 0:
            self.report(self.outcome.cases)
        if self.outcome.cases > MAX_CASES or depth > MAX_DEPTH:
            raise OutOfBudgetError("too many cases")
        try:
            nf = Normaliser(ring)
            x, y = nf(left), nf(right)
            residual = _difference(x, y)
            if residual is None:
                return True
            if isinstance(residual, Infinite):
                return self._fail(ring, None, "one side is infinite, the other is not")
            residual, zero = vanishes(ring, residual)
            if zero:
                return True
            free = left.free | right.free
            guard = next_guard(ring, residual, free) or _whole_guard(ring, residual, free)
            if guard is None:
                if all(is_positive(ring, residual.scaled(sign), strict=False) for sign in (Fraction(1), Fraction(-1))):
                    return True  # between 0 and 0, by the case's assumptions
                return self._fail(ring, residual, "the two sides have different normal forms")
        except SplitError as split:
            if split.guard is None:
                return self._fail(ring, None, "a condition under a reduction could not be split on")
            guard = split.guard
        except UndefinedError as error:
            thin = _equations(ring)
            if thin:
                self.outcome.thin = (*self.outcome.thin, *(p for p in thin if p not in self.outcome.thin))
                return True
            self.outcome.undefined = True
            return self._fail(ring, None, str(error))
        return self._split(left, right, ring, guard, depth)

    def _fail(self, ring: Ring, residual: Poly | None, reason: str) -> bool:
        self.outcome.equal = False
        self.outcome.residual, self.outcome.facts, self.outcome.reason = residual, ring.facts, reason
        return False

    def _split(self, left: Expr, right: Expr, ring: Ring, guard: Atom | Poly, depth: int) -> bool:
        if isinstance(guard, Atom) and guard.tag == "zero":
            return self._split_zero(left, right, ring, guard, depth)
        if isinstance(guard, Atom):
            row, col = guard.args
            if isinstance(row, Poly) or isinstance(col, Poly) or not guard.free <= left.free | right.free:
                return self._fail(ring, None, "a condition on a bound index or a gather could not be split on")
            old, new = (col, row) if isinstance(col, Index) else (row, col)
            same = {old: new}
            if not self.run(rename(left, same), rename(right, same), ring, depth + 1):
                return False
            facts = ring.facts.apart(guard)
            return _nowhere(facts, guard) or self.run(left, right, ring.under(facts), depth + 1)
        if not guard.free <= left.free | right.free:
            return self._fail(ring, None, "a condition under a reduction could not be split on")
        for poly, strict in (_tightened(guard, True), _tightened(-guard, False)):
            facts = ring.facts.with_case(poly, strict=strict)
            for factor in _factors_of_sign(ring, poly) if strict else ():
                facts = facts.with_case(factor, strict=True)
            branch = ring.under(facts)
            if not feasible(facts_as_constraints(branch, ()), ring.deadline):
                continue
            branch = ring.under(replace(facts, values=_solved(branch)))
            if not self.run(left, right, branch, depth + 1):
                return False
        return True


    def _split_zero(self, left: Expr, right: Expr, ring: Ring, zero: Atom, depth: int) -> bool:
        """A complex quantity is 0, or it is not."""
        found = _element(zero.args[0], ring.facts.values)
        if found is None or not zero.free <= left.free | right.free:
            return self._fail(ring, None, "a condition on a complex quantity could not be split on")
        atom, rest = found
        name, kind, conjugated, *subs = atom.args
        other = Atom("elem", (name, kind, 1 - conjugated, *subs), False)
        both = {atom: rest, other: conjugate(ring, rest)} if kind == "complex" else {atom: rest}
        branch = ring.under(replace(ring.facts, values={**ring.facts.values, **both}))
        return self.run(left, right, branch, depth + 1) and self.run(
            left, right, ring.under(ring.facts.apart(zero)), depth + 1
        )


def _nowhere(facts: Facts, eye: Atom) -> bool:
    """Whether an index of the eye is apart from all positions of its dim."""
    apart = {frozenset(e.args) for e in facts.distinct}
    return any(
        all(frozenset((i, k)) in apart for k in range(facts.sizes.get(i.dim, 0))) and i.dim in facts.sizes
        for i in eye.args if isinstance(i, Index)
    )  # fmt: skip


def _factors_of_sign(ring: Ring, poly: Poly) -> list[Poly]:
    """What else is > 0 where poly = unit · rest > 0: both, if one is known to be ≥ 0; their negatives, if ≤ 0."""
    (_, factors), rest = powers.content(ring, poly)
    if not factors:
        return []
    unit = rg.monomial(ring, Fraction(1), factors)
    if not (unit.real and rest.real):
        return []
    found: list[Poly] = []
    for sign in (Fraction(1), Fraction(-1)):
        known = [p for p in (unit, rest) if is_positive(ring, p.scaled(sign), strict=False)]
        if known:
            found += [p.scaled(sign) for p in (unit, rest) if p.constant is None]
            break
    return found


def _equations(ring: Ring) -> tuple[Poly, ...]:
    """P with P = 0 in this case, where that fixes a real or complex quantity: a set of measure 0."""
    return tuple(
        Poly({Mono(((atom, Fraction(1)),)): Fraction(1)}) - value
        for atom, value in sorted(ring.facts.values.items(), key=lambda kv: kv[0].key)
        if atom.args[1] in ("real", "complex")
    )


def _tightened(poly: Poly, strict: bool) -> tuple[Poly, bool]:
    """Of integers: g·q + c > 0 says q + ⌊(c - 1)/g⌋ ≥ 0."""
    if not integral(poly):
        return poly, strict
    constant = poly.terms.get(ONE, Fraction(0)) - (1 if strict else 0)
    rest = {m: c for m, c in poly if m.factors}
    by = gcd(*(int(c) for c in rest.values()))
    return Poly({**{m: c / by for m, c in rest.items()}, ONE: Fraction(constant // by)}), False


def _difference(x: Value, y: Value) -> Poly | Infinite | None:
    if isinstance(x, Infinite) or isinstance(y, Infinite):
        return None if x == y else Infinite(1)
    return x - y


def _solved(ring: Ring) -> dict[Atom, Poly]:
    """Elements that the case's assumptions fix: both P ≥ 0 and P ≤ 0 hold, and P is linear in a lone element."""
    values = dict(ring.facts.values)
    for case in ring.facts.cases:
        if not case.strict and is_positive(ring, -case.poly, strict=False):
            found = _element(case.poly, values)
            if found is not None:
                values = {a: _with(ring, v, *found) for a, v in values.items()} | dict((found,))
    return values


def _element(poly: Poly, values: Mapping[Atom, Poly]) -> tuple[Atom, Poly] | None:
    """An element that is not fixed yet, and what it is where the Poly is 0."""
    for mono, coef in poly:
        if len(mono.factors) != 1 or mono.bound or mono.factors[0][1] != 1 or mono.factors[0][0].tag != "elem":
            continue
        atom = mono.factors[0][0]
        rest = Poly({m: c for m, c in poly if m is not mono}).scaled(-1 / coef)
        if atom not in values and not any(a == atom or a in values for a in atoms_in(rest)):
            return atom, rest
    return None


def _with(ring: Ring, poly: Poly, atom: Atom, value: Poly) -> Poly:
    """The Poly with a value for an element where it is a factor of its own."""
    out = []
    for mono, coef in poly:
        powers_ = dict(mono.factors)
        p = powers_.pop(atom, Fraction(0))
        if mono.bound or p.denominator != 1 or p < 1:
            out.append(Poly({mono: coef}))
        else:
            out.append(rg.mul(ring, rg.monomial(ring, coef, powers_.items()), rg.int_power(ring, value, int(p))))
    return total(out)


def vanishes(ring: Ring, poly: Poly) -> tuple[Poly, bool]:
    """(poly without denominators, whether it is zero)."""
    poly = _cleared(ring, poly)
    if poly:
        merged = _merged(ring, poly)
        if merged is not None:
            poly = _cleared(ring, merged)
    return poly, not poly


def _merged(ring: Ring, poly: Poly) -> Poly | None:
    """Functions of rational arguments that are equal only as fractions become one; None if there are no such."""
    kinds: dict[str, list[Atom]] = {}
    image: dict[Atom, Atom] = {}
    outside = {a for m, _ in poly for a, _ in m.factors if a.free.isdisjoint(m.bound)}
    for atom in sorted(outside, key=lambda a: a.key):
        if len(atom.args) != 1 or not isinstance(atom.args[0], Poly) or "base" not in atom.key:
            continue
        for other in kinds.setdefault(atom.tag, []):
            if vanishes(ring, atom.args[0] - other.args[0])[1]:
                image[atom] = other
                break
        else:
            kinds[atom.tag].append(atom)
    if not image:
        return None
    out = []
    for mono, coef in poly:
        factors, bound = rg.opened(ring, mono)
        out.append(rg.times(ring, coef, [(image.get(a, a), p) for a, p in factors], bound))
    return total(out)


def _cleared(ring: Ring, poly: Poly) -> Poly:
    for _ in range(_MAX_CLEARINGS):
        if not any(a.tag == "base" and p < 0 and a.free.isdisjoint(m.bound) for m, _ in poly for a, p in m.factors):
            break
        (_, factors), _ = powers.content(ring, poly)
        poly = powers.over_unit(ring, poly, (Fraction(1), tuple(f for f in factors if f[0].tag == "base")))
    return poly


def _whole_guard(ring: Ring, poly: Poly, free: frozenset[Index]) -> Poly | None:
    """x - lo for a whole number x between few bounds: its values are looked at one after the other."""
    for atom in atoms_in(poly):
        if atom.tag == "elem" and atom.args[1] == "int" and atom.free <= free:
            known = atom_bounds(ring, atom)
            if known.lo is not None and known.hi is not None and 0 < known.hi - known.lo <= _MAX_WHOLE:
                return rg.lone(atom) - number(ceil(known.lo))
    return None


def next_guard(ring: Ring, poly: Poly, free: frozenset[Index]) -> Atom | Poly | None:
    """The simplest thing to split on: an eye, comparison or maximum over free indices only."""
    found: list[tuple[tuple[int, int, str], Atom | Poly]] = []
    for atom in atoms_in(poly):
        if atom.tag not in ("eye", "pos", "max", "zero"):
            continue
        guard = guard_of(atom)
        if guard is None or not guard.free <= free:
            continue
        if isinstance(guard, Atom) and guard.tag == "zero":
            found.append(((0, 0, guard.key), guard))
        elif isinstance(guard, Atom):
            if not any(isinstance(a, Poly) for a in guard.args):
                return guard
        elif not is_positive(ring, guard) and not is_positive(ring, -guard, strict=False):
            nested = sum(a.tag in ("pos", "max") for a in atoms_in(guard))
            found.append(((nested, sum(len(m.factors) for m, _ in guard), guard.key), guard))
    return min(found)[1] if found else None

