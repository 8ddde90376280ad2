"""The search: every tile is checked in a process of its own, then those that are right are timed in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from psmc.plan.tiles import Candidate, Row, candidates, changed
from psmc.tuning import worker
from psmc.tuning.module import Target
from psmc.tuning.processes import LATE, Processes
from psmc.tuning.result import Result, Tried
from psmc.tuning.worker import Job, Timed

_WORTH = 1.01  # a gain below this is noise
_FOR_CHECKS = 0.6  # of the time
_LEAST = 60.0  # seconds that one check may take
_WAYS = ("fwd", "fwd+bwd")
Choose = Callable[[str, Sequence[Row], frozenset[str]], tuple[Candidate, ...]]


class NothingRuns(Exception):
    """The module cannot be loaded, or none of its kernels runs at these shapes; the text says why."""


@dataclass
class Search:
    """One search. `says` is told what begins; `choose` gives the candidates for rows of a module, by their names."""

    target: Target
    plan: str
    seconds: float
    jobs: int
    says: Callable[[str], None] = lambda _: None
    choose: Choose = candidates
    processes: Processes = field(default_factory=Processes)

    def run(self) -> Result:
        """Raises NothingRuns."""
        self.began = time.monotonic()
        self.says("shipped tiles")
        found, why = self.processes.one(worker.place, self.target, limit=self._longest)
        if why is not None:
            raise NothingRuns(why)
        (device, triton), self.shipped = found[0]
        base = Tried(Candidate("", ()), shipped=True)
        self.used = self._check([base], math.inf) or tuple(self._likely() for _ in self.target.shapes)
        every = frozenset[str]().union(*self.used)
        if not every:
            raise NothingRuns("no kernel runs at these shapes")
        tried = [Tried(c) for c in self.choose(self.plan, self.shipped, every)]
        for one in tried:
            one.shipped = all(row in self.shipped for row in one.candidate.rows)
            if one.shipped:
                one.error, one.where, one.fault = base.error, base.where, base.fault
        self._check(_in_turn([t for t in tried if not t.shipped]), _FOR_CHECKS)
        self.base = () if base.right else next((t.candidate.rows for t in tried if t.right), None)
        result = Result(device, triton, tuple(tried))
        if self.base is None:
            return result
        self._time(tried)
        result.rows = self._final(tried, result.notes)
        for one in tried:
            one.chosen = one.right and all(row in result.rows for row in one.candidate.rows)
        return result

    @property
    def _longest(self) -> float:
        return max(_LEAST, self.seconds)

    def _likely(self) -> frozenset[str]:
        """The rows that a call is likely to read, where the shipped tiles do not live to say so."""
        dtype = self.target.dtype
        size = 2 if dtype == "bf16" or (dtype == "fp16" and self.plan != "chunked") else 4
        products = {"bf16": "bf16", "fp16": "tf32", "fp32": "tf32x3"}[dtype]
        return frozenset(row.name for row in self.shipped if row.size in (size, products))

    # --- checks

    def _check(self, tried: Sequence[Tried], share: float) -> tuple[frozenset[str], ...]:
        """Fills in errors and faults, as far as this share of the time lasts; the rows read by each shape."""
        used: tuple[frozenset[str], ...] = ()
        for one in tried:
            one.fault = "not tried: out of time"
        pieces = [(self.target, one.candidate.rows) for one in tried]
        deadline = self.began + share * self.seconds
        for at, (found, why) in self.processes.each(worker.check, pieces, self.jobs, deadline, self._longest):
            one = tried[at]
            self.says(f"checked {one.candidate.kernel or 'all kernels'}")
            one.fault = why or ""
            for checked in found:
                one.error, one.where, used = checked.error, checked.where, checked.used
                if not checked.right:
                    one.fault = f"wrong: error {checked.error:.1g} in {checked.where}"
        return used

    # --- times

    def _jobs(self, rows: Sequence[Row], ways: Iterable[str]) -> list[Job]:
        """At the shapes that read these rows."""
        names = {row.name for row in rows}
        instead = () if all(row in self.shipped for row in rows) else tuple(rows)
        return [(at, way, instead) for at, used in enumerate(self.used) if not names or names & used for way in ways]

    def _time(self, tried: Sequence[Tried]) -> None:
        right = [one for one in _in_turn(tried) if one.right]
        own = {id(one): self._jobs(one.candidate.rows, [_way(one.candidate.kernel)]) for one in right}
        found = self._clock([job for one in right for job in own[id(one)]])
        for one in right:
            here = [found.get(job) for job in own[id(one)]]
            one.fault = next((x for x in here if isinstance(x, str)), "")
            if all(isinstance(x, Timed) for x in here):
                one.ms = _mean(x.ms for x in here if isinstance(x, Timed))
        for one in right:
            whole = [x.ms for at, way, _ in own[id(one)] if isinstance(x := found.get((at, way, ())), Timed)]
            if one.ms is not None and len(whole) == len(own[id(one)]):
                one.gain = _mean(whole) / one.ms

    def _clock(self, jobs: Sequence[Job]) -> dict[Job, Timed | str]:
        """The time of each, or why there is none; where a process dies the others go on in a new one."""
        found: dict[Job, Timed | str] = {}
        left = list(dict.fromkeys(jobs))
        assert self.base is not None
        while left:
            self.says("timing")
            limit = max(self.began + self.seconds - time.monotonic(), 0.2 * self._longest)
            done, why = self.processes.one(
                worker.clock, self.target, self.base, left, limit=limit, heard=lambda: self.says("timing")
            )
            for job, timed in zip(left, done, strict=False):
                found[job] = timed if timed.right else f"wrong: error {timed.error:.1g} where it is timed"
            if why is None or why.startswith(LATE):
                break
            if len(done) < len(left):
                found[left[len(done)]] = why
            left = left[len(done) + 1 :]
        return found

    # --- the choice

    def _final(self, tried: Sequence[Tried], notes: list[str]) -> tuple[Row, ...]:
        """The best table: the shipped one, the best tile of each kernel together, or what changes all kernels."""
        best: dict[str, Tried] = {}
        for one in tried:
            if one.right and one.ms is not None and one.candidate.kernel:
                name = one.candidate.rows[0].name
                best[name] = min(best.get(name, one), one, key=lambda t: t.ms or 0.0)
        better = [t for t in best.values() if not t.shipped and (t.gain is None or t.gain > _WORTH)]
        options = [t.candidate.rows for t in tried if t.right and t.ms is not None and not t.candidate.kernel]
        together = tuple(t.candidate.rows[0] for t in better)
        if len(together) > 1:
            joint = Tried(Candidate("", together))
            self._check([joint], math.inf)
            if joint.right:
                options.append(together)
            else:
                notes.append(f"the best tiles of each kernel do not go together ({joint.fault}): one of them is taken")
                options += [(row,) for row in together]
        elif together:
            options.append(together)
        chosen = self._fastest(options, notes)
        names = frozenset[str]().union(*self.used) | {row.name for row in chosen}
        return tuple(row for row in changed(self.shipped, chosen) if row.name in names)

    def _fastest(self, options: Sequence[tuple[Row, ...]], notes: list[str]) -> tuple[Row, ...]:
        """By the geometric mean over shapes, forward and forward + backward; the base, unless there is a gain."""
        assert self.base is not None
        if not options:
            return self.base
        own = {rows: self._jobs((), _WAYS) if not rows else [(at, way, rows) for at in range(len(self.used))
               for way in _WAYS] for rows in (self.base, *options)}  # fmt: skip
        found = self._clock([job for jobs in own.values() for job in jobs])
        times = {}
        for rows, jobs in own.items():
            here = [x.ms for job in jobs if isinstance(x := found.get(job), Timed)]
            if len(here) == len(jobs):
                times[rows] = _mean(here)
        if self.base not in times:
            return self.base
        fastest = min(times, key=lambda rows: times[rows])
        gain = times[self.base] / times[fastest]
        if gain <= _WORTH:
            return self.base
        notes.append(f"all in all {gain:.2f} times as fast as the {'first right' if self.base else 'shipped'} tiles")
        return fastest


def _way(kernel: str) -> str:
    """What a kernel's tile is timed in."""
    return "fwd" if kernel == "forward" else "fwd+bwd"


def _mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def _in_turn(tried: Sequence[Tried]) -> list[Tried]:
    """The likeliest of each kernel first."""
    count: dict[str, int] = {}
    keyed = []
    for at, one in enumerate(tried):
        key = one.candidate.kernel
        count[key] = count.get(key, -1) + 1
        keyed.append((count[key], at, one))
    return [one for _, _, one in sorted(keyed, key=lambda x: x[:2])]
