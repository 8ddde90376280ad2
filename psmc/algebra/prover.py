"""prove(): the verdicts on both laws of an aggregator.

    1  exact evaluation at small points looks for a counterexample
    2  each component's two sides are brought to normal form, for all dims at once, and compared case by case
    3  a proof is held against more points; what is neither proved nor refuted is searched longer, then Unknown

Where the two methods contradict each other neither is believed: Unknown, and our bug.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from psmc.algebra import laws
from psmc.algebra.equality import Outcome, decide
from psmc.algebra.facts import Facts
from psmc.algebra.intervals import Closure, closure
from psmc.algebra.parametrise import applies, parametrised, takes_logs
from psmc.algebra.refute import Law, Refuter, undefined_components
from psmc.algebra.residual import residual_text, shown
from psmc.algebra.ring import MAX_WORK, Ring
from psmc.algebra.samples import Sampler
from psmc.algebra.terms import OutOfBudgetError
from psmc.algebra.verdict import Counterexample, Proof, Proved, Refuted, Unknown, Verdict
from psmc.ir import Aggregator, Block, Expr, Interval

# Points that are looked at before a proof is tried, after one failed, and (others) after one succeeded.
_QUICK, _LONG, _AFTER = range(32), range(32, 1500), range(10_000, 10_024)


@dataclass(frozen=True)
class _Way:
    """One way to normal form. `share` is of what is left of the time, and of the work."""

    share: float
    eager: bool = False  # split on maxima and comparisons as they are met: either can be the shorter way
    unroll: bool = False  # sums over dims of fixed size written out
    images: bool = False  # intervals as images of the line


_WAYS = (
    _Way(0.4), _Way(0.5, eager=True),
    _Way(0.4, images=True), _Way(0.5, eager=True, images=True),
    _Way(0.5, unroll=True), _Way(1.0, eager=True, unroll=True),
)  # fmt: skip
_GLANCE, _GLANCE_SHARE = 2.0, 0.1  # seconds, and share of the work, for a proof of what evaluation has refuted
_MAX_CONDITIONS = 6
_WHERE = "where both sides have values"
_RECURSION = 20_000
Sides = Mapping[str, tuple[Expr, Expr]]


@dataclass(frozen=True)
class Progress:
    """What is being looked at: a law, a component of the state, and how many cases have been split so far."""

    law: str
    component: str
    cases: int


def prove(
    agg: Aggregator, budget: float = 20.0, *, associativity: bool | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Proof:  # fmt: skip
    """Associativity and the identity laws of `agg`, over the (extended) reals and for all sizes of its dims.

    `associativity` None: the laws are tried unless the spec claims `no`. An extern rule has neither verdict. Takes at
    most about `budget` seconds of wall clock; what is open then is `Unknown`. `progress` is called now and then.
    """
    started = time.monotonic()
    if not isinstance(agg.combine, Block):
        return Proof(None, None)
    wanted = agg.claim != "no" if associativity is None else associativity
    with deep_recursion():
        attempt = _Attempt(agg, started, budget, progress)
        first = attempt.associativity() if wanted else None
        second, breaks = attempt.identity() if wanted else (None, ())
    return Proof(first, second, breaks, time.monotonic() - started)


def survives(agg: Aggregator, budget: float = 1.0) -> bool:
    """No counterexample to either law at the first few points: a cheap filter of candidates."""
    refuter = Refuter(agg, Sampler.of(agg, closure(agg).closed))
    deadline = time.monotonic() + budget
    laws_: tuple[Law, ...] = ("associativity", "left identity", "right identity")
    with deep_recursion():
        return all(refuter.first(law, _QUICK, deadline) is None for law in laws_)


@contextmanager
def deep_recursion() -> Iterator[None]:
    """Composed rules nest three times as deep as the spec's own expressions."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _RECURSION))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


class _Attempt:
    def __init__(
        self, agg: Aggregator, started: float, budget: float, progress: Callable[[Progress], None] | None
    ) -> None:
        self.agg, self.budget, self.progress = agg, budget, progress
        self.deadline = started + budget
        self.closure: Closure = closure(agg)
        self.sampler = Sampler.of(agg, self.closure.closed)
        self.refuter = Refuter(agg, self.sampler)
        self.sizes = {d.name: d.size for d in agg.dims if d.size is not None}

    def associativity(self) -> Verdict:
        return self._law("associativity", "abc", laws.associativity(self.agg), self.deadline - self.budget * 0.4)

    def identity(self) -> tuple[Verdict, tuple[str, ...]]:
        sides = laws.identities(self.agg)
        verdicts: list[Verdict] = []
        for law in ("left identity", "right identity"):
            verdict = self._law(law, "x", sides[law], self.deadline)
            if not isinstance(verdict, Proved):
                return verdict, self._float_breaks()
            verdicts.append(verdict)
        idempotent, undefined = self._idempotent(sides["idempotent"])
        if not isinstance(idempotent, Proved):
            return idempotent, self._float_breaks()
        lines = tuple(
            dict.fromkeys(line for v in (*verdicts, idempotent) if isinstance(v, Proved) for line in v.certificate)
        )
        breaks = [c.name for c in self.agg.state if c.name in {*self._float_breaks(), *undefined}]
        return Proved("normal form", lines), tuple(breaks)

    # --- one law --------------------------------------------------------------------------------

    def _law(self, law: Law, operands: str, sides: Sides, deadline: float) -> Verdict:
        found = self.refuter.search(law, _QUICK, deadline)
        if found is not None:
            # The normal forms must see it too: a glance at what they would have said.
            left, right = sides[found.component]
            glance = min(deadline, time.monotonic() + _GLANCE)
            outcome = self._decide(operands, left, right, glance, set(), ways=1, share=_GLANCE_SHARE)
            equal = isinstance(outcome, Outcome) and outcome.equal
            return _contradiction(found) if equal else Refuted(found)
        verdict = self._compare(law, operands, sides, deadline)
        if law != "associativity" and (isinstance(verdict, Unknown) or _is_conditional(verdict)):
            # Perhaps one side has no value in a whole region: e∘x = x is then false there.
            found = self.refuter.without_value(law, _QUICK, deadline)
            if found is not None:
                return Refuted(found)
        proved = isinstance(verdict, Proved)
        found = self.refuter.search(law, _AFTER if proved else _LONG, deadline)
        if found is None:
            return verdict
        return _contradiction(found) if proved else Refuted(found)

    def _compare(self, law: str, operands: str, sides: Sides, deadline: float) -> Proved | Unknown:
        used: set[str] = set()
        lines, conditions = [], []
        for name, (left, right) in sides.items():
            outcome = self._decide(operands, left, right, deadline, used, self._report(law, name))
            if isinstance(outcome, Unknown):
                return replace(outcome, reason=f"{law} of '{name}': {outcome.reason}")
            if not outcome.equal:
                reason = f"{law} of '{name}': {outcome.reason}"
                return Unknown(residual_text(name, outcome), reason, outcome.undefined)
            lines.append(_line(law, name, outcome))
            conditions += [f"{shown(p)} = 0" for p in (*outcome.denominators, *outcome.thin)]
            conditions += [f"{shown(p)} < 0" for p in outcome.radicands]
        return Proved("normal form", (*lines, *_condition_lines(law, conditions), *self._used_lines(used)))

    def _report(self, law: str, component: str) -> Callable[[int], None] | None:
        progress = self.progress
        if progress is None:
            return None
        progress(Progress(law, component, 0))
        return lambda cases: progress(Progress(law, component, cases))

    def _decide(
        self, operands: str, left: Expr, right: Expr, deadline: float, used: set[str],
        report: Callable[[int], None] | None = None, *, ways: int = len(_WAYS), share: float = 1.0,
    ) -> Outcome | Unknown:  # fmt: skip
        """One way after another, until one proves it. Of what does not, the first outcome is kept. No more than `ways`
        that apply are tried, with a `share` of the work."""
        best: Outcome | Unknown | None = None
        known = self._intervals(operands)
        disguised = takes_logs(left) or takes_logs(right)
        for way in sorted(_WAYS, key=lambda w: disguised and not w.images):
            if (way.unroll and not self.sizes) or (way.images and not any(applies(s, known) for s in (left, right))):
                continue
            if not ways:
                break
            ways -= 1
            sides, intervals, replaced = (left, right), known, frozenset[str]()
            if way.images:
                (x, new, one), (y, more, two) = (parametrised(s, known) for s in sides)
                sides, intervals, replaced = (x, y), known | new | more, one | two
            facts = Facts(intervals, self.sizes, way.unroll, used=set())
            limit = time.monotonic() + way.share * max(0.0, deadline - time.monotonic())
            work = int(way.share * share * MAX_WORK)
            try:
                outcome = decide(*sides, Ring(facts, limit, eager=way.eager, work=work), report)
            except (OutOfBudgetError, RecursionError) as error:
                best = best or Unknown("", f"gave up: {error}")
                continue
            if outcome.equal:
                used |= {n for n in facts.used if n in known} | replaced
                return outcome
            best = outcome if best is None or isinstance(best, Unknown) else best
        assert best is not None
        return best

    def _intervals(self, operands: str) -> dict[str, Interval]:
        own = {p.name: p.interval for p in self.agg.params if p.interval is not None}
        return own | {f"{o}.{n}": i for o in operands for n, i in self.closure.closed.items()}

    def _used_lines(self, used: set[str]) -> list[str]:
        names = sorted({n.split(".")[-1] for n in used})
        params = {p.name for p in self.agg.params}
        return [
            f"uses the interval of param '{n}'" if n in params
            else f"uses the interval of '{n}', closed: every lifted token lands in it and combine keeps it"
            for n in names
        ]  # fmt: skip

    # --- e∘e ------------------------------------------------------------------------------------

    def _idempotent(self, sides: Sides) -> tuple[Verdict, list[str]]:
        """e∘e = e. Where it has no value as written (inf - inf, 0/0) it is the identity law itself: e is adjoined."""
        lines: list[str] = []
        undefined: list[str] = []
        for name, (left, right) in sides.items():
            outcome = self._decide("", left, right, self.deadline, set(), self._report("e∘e", name))
            if isinstance(outcome, Unknown):
                return outcome, undefined
            if outcome.undefined:
                undefined.append(name)
                lines.append(f"e∘e: '{name}' has no value as written ({outcome.reason}); e∘e = e by the laws above")
            elif not outcome.equal:
                found = self.refuter.of_identity(self.deadline)
                open_ = Unknown(residual_text(name, outcome), f"e∘e of '{name}': {outcome.reason}")
                return (open_ if found is None else Refuted(found)), undefined
            else:
                lines.append(_line("e∘e", name, outcome))
        return Proved("normal form", tuple(lines)), undefined

    def _float_breaks(self) -> tuple[str, ...]:
        """Components for which e∘e, e∘x or x∘e meets inf - inf, 0·inf or 0/0 on the way."""
        broken: set[str] = set()
        for trial in range(8):
            point = self.refuter._point("left identity", trial)
            (x,), e = point.operands, self.refuter.identity(point)
            alone = {n for n, array in x.items() if any(v is None for v in array.values())}
            pairs = ((e, e), (e, x), (x, e)) if trial else ((e, e),)
            for left, right in pairs:
                broken |= set(undefined_components(self.refuter, point, left, right)) - alone
        return tuple(c.name for c in self.agg.state if c.name in broken)


def _contradiction(found: Counterexample) -> Unknown:
    return Unknown(
        f"PSM901 (a bug of psmc, please report it): normal forms prove what evaluation refutes {found.text}",
        "two methods contradict each other",
    )


def _is_conditional(verdict: Proved) -> bool:
    return any(_WHERE in line for line in verdict.certificate)


def _condition_lines(law: str, conditions: list[str]) -> list[str]:
    """Where a side may have no value, shortest first."""
    found = sorted(dict.fromkeys(conditions), key=lambda c: (len(c), c))
    if not found:
        return []
    more = f", and {len(found) - _MAX_CONDITIONS} more" if len(found) > _MAX_CONDITIONS else ""
    return [f"{law}: {_WHERE}; not where {' or '.join(found[:_MAX_CONDITIONS])}{more}"]


def _line(law: str, name: str, outcome: Outcome) -> str:
    how = "equal normal forms" if outcome.cases <= 1 else f"equal in each of {outcome.cases} cases"
    return f"{law}: '{name}' {how}"

