"""prove(): the verdicts on both laws of an aggregator.

    1  exact evaluation at small points looks for a counterexample (and is the second opinion on what follows)
    2  each component's two sides are brought to normal form, for all dims at once, and compared case by case
    3  what is neither proved nor refuted is searched longer, then Unknown

A proof that exact evaluation contradicts is never reported as one.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from psmc.algebra import laws
from psmc.algebra.equality import Outcome, decide
from psmc.algebra.facts import Facts
from psmc.algebra.intervals import Closure, closure
from psmc.algebra.refute import Law, Refuter, undefined_components
from psmc.algebra.ring import OutOfBudgetError, Ring
from psmc.algebra.samples import Sampler
from psmc.algebra.residual import residual_text
from psmc.algebra.verdict import Proof, Proved, Refuted, Unknown, Verdict
from psmc.ir import Aggregator, Block, Expr, Interval

_QUICK, _LONG = 32, 4000
_RECURSION = 20_000
Sides = Mapping[str, tuple[Expr, Expr]]


def prove(agg: Aggregator, budget: float = 20.0, *, associativity: bool | None = None) -> Proof:
    """Associativity and the identity laws of `agg`, over the (extended) reals and for all sizes of its dims.

    `associativity` None: tried unless the spec claims `no`. An extern rule has neither verdict. Takes at most about
    `budget` seconds of wall clock; what is open then is `Unknown`.
    """
    started = time.monotonic()
    if not isinstance(agg.combine, Block):
        return Proof(None, None)
    wanted = agg.claim != "no" if associativity is None else associativity
    with _deep_recursion():
        attempt = _Attempt(agg, started, budget)
        first = attempt.associativity() if wanted else None
        second, breaks = attempt.identity()
    return Proof(first, second, breaks, time.monotonic() - started)


@contextmanager
def _deep_recursion() -> Iterator[None]:
    """Composed rules nest three times as deep as the spec's own expressions."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _RECURSION))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@dataclass
class _Tally:
    """What a law's proof consisted of."""

    cases: int = 0
    notes: list[str] = field(default_factory=list)
    undefined: list[str] = field(default_factory=list)


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
            verdict = self._law(law, "x", sides[law], self.deadline)  # type: ignore[arg-type]
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
        found = self.refuter.search(law, range(_QUICK), deadline)
        if found is not None:
            return Refuted(found)
        verdict = self._compare(law, operands, sides, deadline)
        if isinstance(verdict, Proved):
            return verdict
        found = self.refuter.search(law, range(_QUICK, _LONG), deadline)
        return verdict if found is None else Refuted(found)

    def _compare(self, law: str, operands: str, sides: Sides, deadline: float) -> Proved | Unknown:
        used: set[str] = set()
        lines = []
        for name, (left, right) in sides.items():
            outcome = self._decide(operands, left, right, deadline, used)
            if isinstance(outcome, Unknown):
                return outcome
            if not outcome.equal:
                return Unknown(residual_text(name, outcome), f"{law} of '{name}': {outcome.reason}")
            lines.append(_line(law, name, outcome))
        return Proved("normal form", (*lines, *self._used_lines(used)))

    def _decide(self, operands: str, left: Expr, right: Expr, deadline: float, used: set[str]) -> Outcome | Unknown:
        """First for all sizes; where that fails, dims of fixed size are written out."""
        outcome: Outcome | Unknown | None = None
        for unroll in (False, True) if self.sizes else (False,):
            facts = Facts(self._intervals(operands), self.sizes, unroll, used=set())
            try:
                outcome = decide(left, right, Ring(facts, deadline))
            except (OutOfBudgetError, RecursionError) as error:
                outcome = Unknown("", f"gave up: {error}")
                continue
            if outcome.equal:
                used |= facts.used
                return outcome
        assert outcome is not None
        return outcome

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
        """e∘e = e. Where it has no value as written (inf - inf, 0/0) the law is the identity law itself: e is adjoined."""
        lines, undefined = [], []
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


def _line(law: str, name: str, outcome: Outcome) -> str:
    how = "equal normal forms" if outcome.cases <= 1 else f"equal in each of {outcome.cases} cases"
    return f"{law}: '{name}' {how}"


_ = random
