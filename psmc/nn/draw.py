"""The tree and the counter as text, drawn from what the code does: its own schedule, and pushes of its own counter."""

from __future__ import annotations

import torch

from psmc.runtime.kit_tree import Node, counter_push, counter_start
from psmc.runtime.schedule import tree_schedule

Span = tuple[int, int]  # elements lo .. hi - 1


def draw_tree(length: int) -> str:
    """Every combine behind the exclusive prefixes of `length` elements, a batched call a level.

    `[==|--]` combines the elements under `==` with those under `--`.
    """
    schedule = tree_schedule(length)
    cell = max(3, len(str(length)) + 2)
    lines = ["element".ljust(12) + "".join(str(i).center(cell) for i in range(length))]
    for number, level in enumerate(schedule.levels, 1):
        rows: list[list[str]] = []
        ends: list[int] = []
        for left, right, out in level:
            (lo, hi), middle = schedule.spans[out], schedule.spans[right][0]
            assert schedule.spans[left][1] == middle
            bar = "[" + "=" * ((middle - lo) * cell - 2) + "|" + "-" * ((hi - middle) * cell - 1) + "]"
            at = next((n for n, end in enumerate(ends) if end <= lo), len(ends))
            if at == len(ends):
                ends.append(0)
                rows.append([])
            rows[at].append(" " * ((lo - ends[at]) * cell) + bar)
            ends[at] = hi
        for n, row in enumerate(rows):
            lines.append((f"level {number}" if n == 0 else "").ljust(12) + "".join(row))
    count = sum(len(level) for level in schedule.levels)
    return "\n".join([*(line.rstrip() for line in lines), f"{count} combines in {len(schedule.levels)} calls"])


def draw_counter(length: int) -> str:
    """What the counter holds after each of `length` elements: its roots, the cached folds, what the push combined."""
    spans: list[Span] = []
    done: list[str] = []

    def number(span: Span) -> int:
        spans.append(span)
        return len(spans) - 1

    def record(left: Node, right: Node) -> Node:
        (a, b) = (spans[int(side["id"][0])] for side in (left, right))
        done.append(f"{_shown(a)} ∘ {_shown(b)}")
        return {"id": torch.tensor([number((a[0], b[1]))])}

    rows: list[tuple[str, ...]] = [("elements", "roots", "prefixes kept", "combined by this push")]
    counter = counter_start(1)
    for n in range(1, length + 1):
        done.clear()
        _, counter = counter_push(record, counter, {"id": torch.tensor([number((n - 1, n))])})
        held: dict[str, list[Span]] = {"root": [], "fold": []}
        for key in sorted((k for k in counter if k != "position"), key=lambda k: -int(k.rpartition(".")[2])):
            held[key.split(".")[1]].append(spans[int(counter[key][0])])
        shown = ("  ".join(map(_shown, held[part])) for part in ("root", "fold"))
        rows.append((f"{n:>3} = {n:b}", *shown, ", ".join(done) or "nothing"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("   ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _shown(span: Span) -> str:
    lo, hi = span
    return str(lo) if hi - lo == 1 else f"{lo}-{hi - 1}"
