"""What a search says of each tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from psmc.plan.tiles import Candidate, Row


@dataclass
class Tried:
    """One candidate. `error` and `where`: what came nearest to its limit in the checks, or past it; `ms`: the median of
    a call, forward for the kernel of that name and forward + backward for all others, over several shapes their
    geometric mean; `fault`: why it cannot be chosen."""

    candidate: Candidate
    shipped: bool = False
    error: float | None = None
    where: str = ""
    ms: float | None = None
    gain: float | None = None  # how often it fits into the shipped tile's time
    fault: str = ""
    chosen: bool = False

    @property
    def right(self) -> bool:
        return self.error is not None and not self.fault

    @property
    def verdict(self) -> str:
        if self.fault:
            return self.fault
        known = (("chosen", self.chosen), ("shipped", self.shipped), ("not timed", self.ms is None))
        return ", ".join(word for word, holds in known if holds)


@dataclass
class Result:
    """`rows`: the tiles that a tuned file holds; none where some kernel has no tile that is right. `notes`: what is to
    be said besides."""

    device: str
    triton: str
    tried: tuple[Tried, ...]
    rows: tuple[Row, ...] = ()
    notes: list[str] = field(default_factory=list)


def numbers_of(candidate: Candidate, fields: Sequence[str]) -> str:
    """A candidate's tile in a table: all numbers of one kernel, or what all kernels are given."""
    if candidate.kernel:
        return " ".join(f"{n}" for n in candidate.rows[0].numbers)
    return f"{fields[0]} {candidate.rows[0].numbers[0]}"
