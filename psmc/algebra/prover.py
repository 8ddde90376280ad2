"""prove(): the verdicts on both laws of an aggregator.

    1  exact evaluation at small points looks for a counterexample
    2  each component's two sides are brought to normal form, for all dims at once, and compared case by case
    3  a proof is held against more points; what is neither proved nor refuted is searched longer, then Unknown

Where the two methods contradict each other neither is believed: Unknown, and our bug.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from psmc.algebra import laws
from psmc.algebra.equality import Outcome, decide
from psmc.algebra.facts import Facts
from psmc.algebra.intervals import Closure, closure
from psmc.algebra.refute import Law, Refuter, undefined_components
from psmc.algebra.residual import residual_text
from psmc.algebra.ring import MAX_WORK, OutOfBudgetError, Ring
from psmc.algebra.samples import Sampler
from psmc.algebra.verdict import Counterexample, Proof, Proved, Refuted, Unknown, Verdict
from psmc.ir import Aggregator, Block, Expr, Interval

# Points that are looked at before a proof is tried, after one failed, and (others) after one succeeded.
_QUICK, _LONG, _AFTER = range(32), range(32, 1500), range(10_000, 10_024)
# (split eagerly, write out sums over dims of fixed size, share of what is left of time and work)
_WAYS = ((False, False, 0.4), (True, False, 0.6), (False, True, 0.5), (True, True, 1.0))
_RECURSION = 20_000
Sides = Mapping[str, tuple[Expr, Expr]]


def prove(agg: Aggregator, budget: float = 20.0, *, associativity: bool | None = None) -> Proof:
    """Associativity and the identity laws of `agg`, over the (extended) reals and for all sizes of its dims.

    `associativity` None: the laws are tried unless the spec claims `no`. An extern rule has neither verdict. Takes at
    most about `budget` seconds of wall clock; what is open then is `Unknown`.
    """
    started = time.monotonic()
    if not isinstance(agg.combine, Block):
        return Proof(None, None)
    wanted = agg.claim != "no" if associativity is None else associativity
    with deep_recursion():
        attempt = _Attempt(agg, started, budget)
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
    def __init__(self, agg: Aggregator, started: float, budget: float) -> None:
        self.agg, self.budget = agg, budget
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
            # The normal forms must see it too.
            left, right = sides[found.component]
            outcome = self._decide(operands, left, right, deadline, set())
            equal = isinstance(outcome, Outcome) and outcome.equal
            return _contradiction(found) if equal else Refuted(found)
        verdict = self._compare(law, operands, sides, deadline)
        proved = isinstance(verdict, Proved)
        found = self.refuter.search(law, _AFTER if proved else _LONG, deadline)
        if found is None:
            return verdict
        return _contradiction(found) if proved else Refuted(found)

    def _compare(self, law: str, operands: str, sides: Sides, deadline: float) -> Proved | Unknown:
        used: set[str] = set()
        lines = []
        for name, (left, right) in sides.items():
            outcome = self._decide(operands, left, right, deadline, used)
            if isinstance(outcome, Unknown):
                return outcome
            if not outcome.equal:
                reason = f"{law} of '{name}': {outcome.reason}"
                return Unknown(residual_text(name, outcome), reason, outcome.undefined)
            lines.append(_line(law, name, outcome))
        return Proved("normal form", (*lines, *self._used_lines(used)))

    def _decide(self, operands: str, left: Expr, right: Expr, deadline: float, used: set[str]) -> Outcome | Unknown:
        """First with maxima and comparisons as atoms, then splitting on each as it is met (both need splits in the
        end, and either can be the shorter way), then with the sums over dims of fixed size written out."""
        best: Outcome | Unknown | None = None
        for eager, unroll, share in _WAYS if self.sizes else _WAYS[:2]:
            facts = Facts(self._intervals(operands), self.sizes, unroll, used=set())
            limit = time.monotonic() + share * max(0.0, deadline - time.monotonic())
            try:
                outcome = decide(left, right, Ring(facts, limit, eager=eager, work=int(share * MAX_WORK)))
            except (OutOfBudgetError, RecursionError) as error:
                best = best or Unknown("", f"gave up: {error}")
                continue
            if outcome.equal:
                used |= facts.used
                return outcome
            best = outcome
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
            outcome = self._decide("", left, right, self.deadline, set())
            if isinstance(outcome, Unknown):
                return outcome, undefined
            if outcome.undefined:
                undefined.append(name)
                lines.append(f"e∘e: '{name}' has no value as written ({outcome.reason}); e∘e = e by the laws above")
            elif not outcome.equal:
                return Unknown(residual_text(name, outcome), f"e∘e of '{name}': {outcome.reason}"), undefined
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


def _line(law: str, name: str, outcome: Outcome) -> str:
    how = "equal normal forms" if outcome.cases <= 1 else f"equal in each of {outcome.cases} cases"
    return f"{law}: '{name}' {how}"

