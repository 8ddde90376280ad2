"""The tiles of a module's kernels as data: the rows of a plan's table, what their numbers mean, and the others that may
be tried instead.

A tile is a row of numbers for one kernel: block sizes, warps, stages. `candidates` is all that `psmc tune`, the tests
and the sweep of chunk tiles in benchmarks/ ever try: a handful a kernel, each a change of the shipped tile.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# plan -> its numbers in order, each with the least and the largest value; all but `stages` are powers of two
FIELDS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "chunked": {"tokens": (16, 256), "values": (16, 256), "keys": (16, 256), "warps": (1, 16), "stages": (1, 5)},
    "pointwise": {"rows": (1, 64), "lanes": (1, 512), "warps": (1, 16), "stages": (1, 16)},
    "tree": {"lanes": (32, 512)},
    "attention": {"queries": (16, 256), "keys": (16, 256), "warps": (1, 16), "stages": (1, 5)},
}  # fmt: skip

# plan -> kernel ('': any other) -> changes of the shipped tile, likeliest first: 'x=n', 'x*n', 'x/n'. Of the chunked
# plan, those that spill least where they are compiled for sm_90 with keys and values of 128.
_CHANGES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "chunked": {
        "forward": ("warps*2", "values/2", "warps*2 stages=1", "stages=1", "stages=3", "values*2 warps*2",
                    "values/2 stages=3"),
        "states": ("warps*2", "values*2 warps*2", "stages=1", "stages=3", "keys*2", "values*2",
                   "values*2 keys*2 warps*2"),
        "gradients": ("keys/2", "stages=2", "values/2", "keys/2 stages=2", "keys/2 values/2", "keys/2 warps/2"),
        "prepare": ("keys/2", "keys*2", "warps*2", "keys/2 warps/2", "keys*2 warps*2"),
        "key": ("keys/2", "values*2", "warps*2", "stages=2", "keys/2 values*2", "keys*2 warps*2"),
        "": ("warps/2", "warps*2", "stages=1", "stages=2", "values/2", "keys/2"),
    },
    "pointwise": {
        "": ("stages*2", "rows/2 stages*2", "lanes*2", "lanes*2 warps*2", "rows*2", "stages/2", "rows*2 stages/2",
             "lanes*2 rows/2"),
    },
    "tree": {"": ("lanes/2", "lanes/4", "lanes*2")},
    "attention": {
        "": ("stages=1", "stages=2", "stages=3", "warps*2", "warps/2", "queries*2 warps*2", "queries/2", "keys*2",
             "keys/2"),
    },
}  # fmt: skip
# What all kernels of a module have in common, changed for all of them at once.
_SHARED: Mapping[str, tuple[str, ...]] = {"chunked": ("tokens/2", "tokens*2")}
_CHANGE = re.compile(r"(\w+)([=*/])(\d+)")


@dataclass(frozen=True)
class Row:
    """A tile and its place: the kernel, the bytes of an operand (of attention: how it multiplies), and the largest
    block of the key, or width, that it is for (0: the plan tells none apart)."""

    kernel: str
    size: int | str
    key: int
    numbers: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.size}" + (f"/{self.key}" if self.key else "")


@dataclass(frozen=True)
class Candidate:
    """Rows that stand in for those of the same name; `kernel` '': of all kernels at once."""

    kernel: str
    rows: tuple[Row, ...]


def rows(table: Mapping[str, Mapping[Any, Any]]) -> tuple[Row, ...]:
    """Of a module's `tiles`: kernel -> size -> a tile, or ((largest key, tile), ...)."""
    return tuple(_rows(table))


def _rows(table: Mapping[str, Mapping[Any, Any]]) -> Iterator[Row]:
    for kernel, sizes in table.items():
        for size, found in sizes.items():
            if isinstance(found[0], int):
                yield Row(kernel, size, 0, tuple(found))
            else:
                yield from (Row(kernel, size, key, tuple(numbers)) for key, numbers in found)


def table(found: Sequence[Row]) -> dict[str, dict[int | str, Any]]:
    """The opposite of `rows`."""
    made: dict[str, dict[int | str, Any]] = {}
    for row in found:
        sizes = made.setdefault(row.kernel, {})
        sizes[row.size] = (*sizes.get(row.size, ()), (row.key, row.numbers)) if row.key else row.numbers
    return made


def changed(found: Sequence[Row], instead: Sequence[Row]) -> tuple[Row, ...]:
    """`found` with the rows of the same names replaced."""
    by_name = {row.name: row for row in instead}
    return tuple(by_name.get(row.name, row) for row in found)


def candidates(plan: str, shipped: Sequence[Row], used: Collection[str]) -> tuple[Candidate, ...]:
    """For the rows that a call reads, by name: the shipped tile, then changes of it; then changes for all kernels."""
    read = [row for row in shipped if row.name in used]
    made = [Candidate(row.kernel, (one,)) for row in read for one in (row, *_others(plan, row))]
    groups = dict.fromkeys((row.size, row.key) for row in read)
    for change in _SHARED.get(plan, ()):
        for group in ([x for x in shipped if (x.size, x.key) == place] for place in groups):
            shifted = [_apply(plan, row, change) for row in group]
            if all(x is not None for x in shifted):
                made.append(Candidate("", tuple(x for x in shifted if x is not None)))
    return tuple(made)


def others(plan: str, row: Row) -> tuple[Row, ...]:
    """The changes of one tile, the shipped one left out."""
    return tuple(_others(plan, row))


def _others(plan: str, row: Row) -> Iterator[Row]:
    changes = _CHANGES[plan]
    seen = {row}
    for change in changes.get(row.kernel, changes.get("", ())):
        found = _apply(plan, row, change)
        if found is not None and found not in seen:
            seen.add(found)
            yield found


def _apply(plan: str, row: Row, change: str) -> Row | None:
    """None where a number would leave its range, or a block of the key the key."""
    names = list(FIELDS[plan])
    numbers = list(row.numbers)
    for name, how, text in _CHANGE.findall(change):
        at, n = names.index(name), int(text)
        now = numbers[at]
        numbers[at] = n if how == "=" else now * n if how == "*" else now // n
        low, high = FIELDS[plan][name]
        if not low <= numbers[at] <= (min(high, row.key) if (plan, name) == ("chunked", "keys") else high):
            return None
    return replace(row, numbers=tuple(numbers))


def fault(plan: str, numbers: Mapping[str, Any]) -> str | None:
    """What is wrong with a tile of that plan given by name, if anything."""
    fields = FIELDS[plan]
    if numbers.keys() != fields.keys():
        return f"a tile of the {plan} plan has {', '.join(fields)}"
    for name, (low, high) in fields.items():
        n = numbers[name]
        if type(n) is not int or not low <= n <= high or (name != "stages" and n & (n - 1)):
            kind = "a whole number" if name == "stages" else "a power of two"
            return f"'{name}' must be {kind} from {low} to {high}, but it is {n!r}"
    return None


def disagreement(plan: str, found: Sequence[Row]) -> str | None:
    """Kernels of one plan hand each other what lies by chunks: rows for one key must agree on its tokens."""
    if plan != "chunked":
        return None
    at = list(FIELDS[plan]).index("tokens")
    first: dict[tuple[int | str, int], Row] = {}
    for row in found:
        one = first.setdefault((row.size, row.key), row)
        if one.numbers[at] != row.numbers[at]:
            return f"{one.name} has {one.numbers[at]} tokens and {row.name} {row.numbers[at]}: all must have the same"
    return None
