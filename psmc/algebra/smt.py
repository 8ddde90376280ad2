"""A second opinion on a proof, by z3: both laws written out at small dim sizes, and a counterexample asked for.

It shares the meaning of operators at single points with exact evaluation, and nothing with the normal forms. Whatever
z3 finds is evaluated exactly before it counts. z3 is optional: `pip install "psmc[proofs]"`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from psmc.algebra.exact import Array, Sizes, positions
from psmc.algebra.intervals import closure
from psmc.algebra.numbers import Complex, Number
from psmc.algebra.prover import deep_recursion
from psmc.algebra.refute import Law, Point, Refuter
from psmc.algebra.ring import UndefinedError
from psmc.algebra.samples import Element, Sampler, declared
from psmc.algebra.verdict import Counterexample, Proof, Proved, Refuted, Unknown, Verdict
from psmc.ir import Aggregator, Block, Interval

if TYPE_CHECKING:
    from psmc.algebra.smt_eval import Cells
    from psmc.algebra.smt_terms import Terms

_OPERANDS: Mapping[Law, tuple[str, ...]] = {
    "associativity": ("a", "b", "c"),
    "left identity": ("x",),
    "right identity": ("x",),
}
_SIZES = (1, 2)
_MAX_ENTRIES = 150  # variables of a law, written out
_MEMORY = 1024  # MiB
_SIMPLIFY = 0.25  # share of the time of a query
Word = Literal["agrees", "contradicts", "undecided"]


@dataclass(frozen=True)
class Opinion:
    """`reason`: why undecided. `counterexample`: what z3 found and exact evaluation confirmed, if it did."""

    word: Word
    reason: str = ""
    counterexample: Counterexample | None = None


def available() -> bool:
    """Whether z3 is installed."""
    return find_spec("z3") is not None


def opinion(agg: Aggregator, proof: Proof, budget: float = 20.0) -> Opinion | None:
    """What z3 says of both verdicts; None where there is none to speak of (`associative: no`, an extern rule).

    Takes about `budget` seconds at most. Raises ImportError without z3.
    """
    if not isinstance(agg.combine, Block):
        return None
    deadline = time.monotonic() + budget
    found: list[Opinion] = []
    with deep_recursion():
        if proof.associativity is not None:
            half = deadline - budget / 2
            found.append(_law_opinion(agg, "associativity", proof.associativity, half))
        if proof.identity is not None:
            found += _identity_opinions(agg, proof.identity, deadline)
    if not found:
        return None
    for word in ("contradicts", "undecided"):
        for each in found:
            if each.word == word:
                return each
    return next((o for o in found if o.counterexample is not None), found[0])


def _identity_opinions(agg: Aggregator, verdict: Verdict, deadline: float) -> Iterator[Opinion]:
    if isinstance(verdict, Refuted):
        yield _law_opinion(agg, verdict.counterexample.law, verdict, deadline)
        return
    for law in ("left identity", "right identity"):
        yield _law_opinion(agg, law, verdict, deadline)


def _law_opinion(agg: Aggregator, law: Law, verdict: Verdict, deadline: float) -> Opinion:
    from psmc.algebra.smt_values import UndecidedError

    try:
        return _judged(_Question(agg, law, deadline), law, verdict)
    except UndecidedError as error:
        return Opinion("undecided", f"{law}: {error}")
    except _z3_errors() as error:
        return Opinion("undecided", f"{law}: z3 gave up: {str(error).splitlines()[0][:80]}")


def _z3_errors() -> tuple[type[BaseException], ...]:
    import z3

    return (z3.Z3Exception, MemoryError, RecursionError)


def _judged(question: _Question, law: Law, verdict: Verdict) -> Opinion:
    if isinstance(verdict, Refuted) and None in (verdict.counterexample.left, verdict.counterexample.right):
        return Opinion("undecided", f"{law}: refuted where it has no value, which z3 is not asked about")
    if isinstance(verdict, Refuted) and _at_infinity([parts for _, parts in verdict.counterexample.elements]):
        return Opinion("undecided", f"{law}: refuted at an infinite element, which z3 is not asked about")
    if isinstance(verdict, Refuted):
        found = question.counterexample(dict(verdict.counterexample.dims))
        if found is None:
            return Opinion("contradicts", f"{law}: z3 proves at these sizes what is refuted")
        return Opinion("agrees", "", found)
    for sizes in question.all_sizes():
        found = question.counterexample(sizes)
        if found is not None and isinstance(verdict, Proved):
            return Opinion("contradicts", f"{law}: {found.text}", found)
        if found is not None:
            return Opinion("undecided", f"{law}: not proved, and z3 has a counterexample: {found.text}", found)
    if isinstance(verdict, Unknown):
        return Opinion("undecided", f"{law}: not proved, though z3 finds no counterexample with dims up to 2")
    return Opinion("agrees")


def _at_infinity(value: object) -> bool:
    """Whether there is an infinite number in nested lists."""
    if isinstance(value, list | tuple):
        return any(map(_at_infinity, value))
    return isinstance(value, Decimal) and value.is_infinite()


class _Question:
    """One law of one aggregator."""

    def __init__(self, agg: Aggregator, law: Law, deadline: float) -> None:
        self.agg, self.law, self.deadline = agg, law, deadline
        self.closed = closure(agg).closed
        self.refuter = Refuter(agg, Sampler.of(agg, self.closed))

    def all_sizes(self) -> list[dict[str, int]]:
        fixed = {d.name: d.size for d in self.agg.dims if d.size is not None}
        free = [d.name for d in self.agg.dims if d.size is None]
        return [{**fixed, **dict.fromkeys(free, n)} for n in (_SIZES if free else _SIZES[:1])]

    def counterexample(self, sizes: Sizes) -> Counterexample | None:
        """At these sizes: one that exact evaluation confirms, or None if there is none. Raises UndecidedError."""
        from psmc.algebra.smt_eval import run
        from psmc.algebra.smt_terms import Terms
        from psmc.algebra.smt_values import UndecidedError

        entries = sum(1 for t in declared(self.agg) for _ in positions(t.dims, sizes)) * len(_OPERANDS[self.law])
        if entries > _MAX_ENTRIES:
            raise UndecidedError(f"{entries} variables when written out")
        terms = Terms()
        params = {p.name: _variables(terms, p.name, p.kind, p.dims, sizes) for p in self.agg.params}
        elements = [
            {c.name: _variables(terms, f"{o}.{c.name}", c.kind, c.dims, sizes) for c in self.agg.state}
            for o in _OPERANDS[self.law]
        ]
        given = {("param", n): a for n, a in params.items()}

        def combine(left: Mapping[str, Cells], right: Mapping[str, Cells]) -> dict[str, Cells]:
            assert isinstance(self.agg.combine, Block)
            sides = {("left", n): a for n, a in left.items()} | {("right", n): a for n, a in right.items()}
            return run(terms, self.agg.combine, sizes, given | sides)

        if self.law == "associativity":
            a, b, c = elements
            left, right = combine(combine(a, b), c), combine(a, combine(b, c))
        else:
            (right,) = elements
            e = run(terms, Block(results=tuple(c.identity for c in self.agg.state)), sizes, given)
            left = combine(e, right) if self.law == "left identity" else combine(right, e)
        legal = self._assumptions(params, elements)
        self._check_logarithms(terms, legal)
        open_: UndecidedError | None = None
        for component in self.agg.state:
            for position in positions(component.dims, sizes):
                pair = left[component.name][position], right[component.name][position]
                try:
                    model = self._difference(terms, legal, *pair)
                    if model is not None:
                        return self._confirmed(sizes, model, params, elements)
                except UndecidedError as error:  # another entry may yet differ
                    open_ = open_ or error
        if open_ is not None:
            raise open_
        return None

    def _assumptions(self, params: Mapping[str, Cells], elements: list[dict[str, Cells]]) -> list[Any]:
        own = {p.name: p.interval for p in self.agg.params if p.interval is not None}
        out: list[Any] = []
        for name, interval in own.items():
            out += _inside(params[name], interval)
        for element in elements:
            for name, interval in self.closed.items():
                out += _inside(element[name], interval)
        return out

    # --- queries ------------------------------------------------------------------------------------

    def _check_logarithms(self, terms: Terms, legal: list[Any]) -> None:
        import z3

        from psmc.algebra.smt_values import UndecidedError

        for condition in terms.positive:
            if self._solve([*legal, *terms.facts, z3.Not(condition)]) is not None:
                raise UndecidedError("a logarithm may be -inf")

    def _difference(self, terms: Terms, legal: list[Any], left: Any, right: Any) -> Any:
        """A model in which both sides have values that differ; None if there is none."""
        from psmc.algebra.smt_values import both, logic

        same = terms.equal(left.value, right.value)
        if same is True:
            return None
        differ = logic("not", same)
        there = both(left.where, right.where, None if isinstance(differ, bool) else differ)
        query = [*legal, *([] if there is None else [there])]
        if not isinstance(differ, bool) and self._simplifies(differ):
            return None
        model = self._solve([*query, *terms.facts])
        if model is None or not terms.abstract:
            return model
        extra = terms.monotone()
        return self._solve([*query, *terms.facts, *extra]) if extra else model

    def _simplifies(self, differ: Any) -> bool:
        """Polynomial identities: the difference multiplies out to 0."""
        import z3

        goal = z3.Goal()
        goal.add(differ)
        tactic = z3.TryFor(z3.With("simplify", som=True), int(self._left() * _SIMPLIFY * 1000) + 1)
        try:
            (result,) = tactic(goal)
        except z3.Z3Exception:
            return False
        return bool(result.inconsistent())

    def _left(self) -> float:
        from psmc.algebra.smt_values import UndecidedError

        left = self.deadline - time.monotonic()
        if left <= 0:
            raise UndecidedError("out of time")
        return left

    def _solve(self, formulas: list[Any]) -> Any:
        """A model, or None. Raises UndecidedError if z3 does not know."""
        import z3

        from psmc.algebra.smt_values import UndecidedError

        solver = z3.Solver()
        solver.set("timeout", int(self._left() * 1000) + 1)
        solver.set("max_memory", _MEMORY)
        solver.add(*formulas)
        answer = solver.check()
        if answer == z3.unknown:
            raise UndecidedError(f"z3 does not know ({solver.reason_unknown()})")
        return solver.model() if answer == z3.sat else None

    # --- models -------------------------------------------------------------------------------------

    def _confirmed(
        self, sizes: Sizes, model: Any, params: Mapping[str, Cells], elements: list[dict[str, Cells]]
    ) -> Counterexample:
        from psmc.algebra.smt_values import UndecidedError

        point = Point(sizes, _numbers(model, params), tuple(_numbers(model, e) for e in elements))
        try:
            found = self.refuter.difference(self.law, point)
        except UndefinedError:
            found = None
        if found is None:
            raise UndecidedError("what z3 finds is none when evaluated")
        return self.refuter._counterexample(self.law, point, found)


def _variables(terms: Terms, name: str, kind: str, dims: tuple[str, ...], sizes: Sizes) -> Cells:
    from psmc.algebra.smt_values import Defined

    return {p: Defined(terms.variable(".".join((name, *map(str, p))), kind)) for p in positions(dims, sizes)}


def _inside(cells: Cells, interval: Interval) -> Iterator[Any]:
    from psmc.algebra.smt_values import number

    for cell in cells.values():
        x: Any = cell.value
        if interval.lo is not None:
            yield x.top > number(interval.lo) if interval.lo_open else x.top >= number(interval.lo)
        if interval.hi is not None:
            yield x.top < number(interval.hi) if interval.hi_open else x.top <= number(interval.hi)


def _numbers(model: Any, cells: Mapping[str, Cells]) -> Element:
    return {name: _array(model, own) for name, own in cells.items()}


def _array(model: Any, cells: Cells) -> Array:
    return {p: _number(model, d.value) for p, d in cells.items()}


def _number(model: Any, value: Any) -> Number:
    from psmc.algebra.smt_values import Pair

    if isinstance(value, Pair):
        re, im = (_number(model, v) for v in (value.re, value.im))
        assert not isinstance(re, Complex) and not isinstance(im, Complex)
        return Complex(re, im)
    found = model.eval(value.top, model_completion=True)
    if hasattr(found, "approx"):  # an algebraic number: near enough, since the point is evaluated anew
        found = found.approx(30)
    return Fraction(found.as_fraction()) if hasattr(found, "as_fraction") else Fraction(found.as_long())
