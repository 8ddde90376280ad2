"""Feasibility of linear constraints over the rationals: exact simplex with Bland's rule."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf

MAX_PIVOTS = 400


@dataclass(frozen=True)
class Constraint:
    """Σ coefficients[v]·v + constant > 0 if `strict`, else ≥ 0. Variables are opaque names."""

    coefficients: Mapping[str, Fraction]
    constant: Fraction
    strict: bool


def feasible(constraints: Sequence[Constraint], deadline: float = inf) -> bool:
    """False only if no real point satisfies all constraints. True where the search is cut short."""
    return solve(constraints, deadline) is not None


def solve(constraints: Sequence[Constraint], deadline: float = inf) -> dict[str, Fraction] | None:
    """A point that satisfies all constraints, None if there is none; {} if the search was cut short.

    maximise t subject to a·x + c - [strict] t ≥ 0, t ≤ 1; feasible iff the optimum is positive. Free variables
    are differences of two non-negative ones; rows that the origin violates get a phase-one artificial `z`.
    """
    names = sorted({v for c in constraints for v in c.coefficients})
    column = {v: k for k, v in enumerate(names)}
    n, m = len(names), len(constraints)
    # Columns: x+ (n), x- (n), t, z; basis slacks follow the rows. Each row reads: slack = const + Σ coef·nonbasic.
    width = 2 * n + 2
    rows: list[list[Fraction]] = []
    for c in constraints:
        row = [Fraction(0)] * (width + 1)
        for v, k in c.coefficients.items():
            row[column[v]] += k
            row[n + column[v]] -= k
        row[2 * n] = Fraction(-1 if c.strict else 0)
        row[2 * n + 1] = Fraction(1)
        row[width] = c.constant
        rows.append(row)
    cap = [Fraction(0)] * (width + 1)
    cap[2 * n], cap[2 * n + 1], cap[width] = Fraction(-1), Fraction(1), Fraction(1)
    rows.append(cap)
    table = _Dictionary(rows, width, deadline)
    worst = min(range(m + 1), key=lambda r: rows[r][width])
    if rows[worst][width] < 0:
        table.pivot(worst, 2 * n + 1)
        objective = [Fraction(0)] * width
        done = table.maximise({2 * n + 1: Fraction(-1)}, objective)
        if not done:
            return {}
        if table.value(2 * n + 1) > 0:
            return None
        table.expel(2 * n + 1)
    table.banned = 2 * n + 1
    if not table.maximise({2 * n: Fraction(1)}, [Fraction(0)] * width):
        return {}
    if any(c.strict for c in constraints) and table.value(2 * n) <= 0:
        return None
    return {v: table.value(k) - table.value(n + k) for v, k in column.items()}


class _Dictionary:
    """Chvátal's dictionary: basic variables as affine functions of nonbasic ones."""

    def __init__(self, rows: list[list[Fraction]], width: int, deadline: float) -> None:
        self.rows, self.width, self.deadline = rows, width, deadline
        self.nonbasic = list(range(width))  # variable in each column
        self.basic = [width + r for r in range(len(rows))]  # variable of each row
        self.banned: int | None = None
        self.pivots = 0

    def value(self, variable: int) -> Fraction:
        return self.rows[self.basic.index(variable)][self.width] if variable in self.basic else Fraction(0)

    def pivot(self, r: int, c: int) -> None:
        """Column c enters the basis, row r leaves."""
        row, by = self.rows[r], self.rows[r][c]
        # basic = const + ... + by·entering  =>  entering = (basic - const - ...)/by
        self.rows[r] = [-v / by for v in row]
        self.rows[r][c] = 1 / by
        pivot_row = self.rows[r]
        for k, other in enumerate(self.rows):
            factor = other[c]
            if k != r and factor:
                merged = [v + factor * w if w else v for v, w in zip(other, pivot_row, strict=True)]
                merged[c] = factor * pivot_row[c]
                self.rows[k] = merged
        self.basic[r], self.nonbasic[c] = self.nonbasic[c], self.basic[r]
        self.pivots += 1

    def maximise(self, goal: Mapping[int, Fraction], objective: list[Fraction]) -> bool:
        """False if cut short. The goals here are bounded, so an unbounded direction cannot occur."""
        while self.pivots < MAX_PIVOTS and time.monotonic() < self.deadline:
            objective = [Fraction(0)] * self.width
            for variable, weight in goal.items():
                if variable in self.basic:
                    row = self.rows[self.basic.index(variable)]
                    objective = [o + weight * v for o, v in zip(objective, row, strict=False)]
                else:
                    objective[self.nonbasic.index(variable)] += weight
            candidates = [(v, c) for c, v in enumerate(self.nonbasic) if objective[c] > 0 and v != self.banned]
            if not candidates:
                return True
            _, c = min(candidates)
            limits = [(-row[self.width] / row[c], self.basic[r], r) for r, row in enumerate(self.rows) if row[c] < 0]
            if not limits:
                return True
            self.pivot(min(limits)[2], c)
        return False

    def expel(self, variable: int) -> None:
        """Make a basic variable of value 0 nonbasic."""
        if variable in self.basic:
            r = self.basic.index(variable)
            columns = [c for c in range(self.width) if self.rows[r][c] and self.nonbasic[c] != variable]
            if columns:
                self.pivot(r, columns[0])
