"""Many trees: the tree plan over sequences with masks, restarts and packing."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from psmc.runtime.kit_tree import Merge, Node, counter_levels, counter_prefix, counter_rows, counter_start, tree_scan


def tree_tokens(
    combine: Merge,
    leaves: Node,
    empty: Node,
    counter: Node | None = None,
    *,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    previous: bool = False,
    recompute: bool = False,
    levels: int = 0,
) -> tuple[Node, Node | None, Node]:
    """(prefix, prefix before each token or None, counter) of sequences with masks, restarts and packing.

    valid [B, T] bool: a token that does not count is no leaf, the prefix stays as it is. reset [B, T] bool: a new tree
    starts with this token. cu_seqlens [N + 1]: N sequences in one row; the counters are theirs. Runs between restarts
    are found on the host (a sync, where the flags are on a device); those of one length and position share a scan.
    levels: beside each prefix, what the counter holds at so many levels, `<component>.root.<k>`, or `empty`.
    """
    batch, length = next(iter(leaves.values())).shape[:2]
    bounds = [b * length for b in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    count = len(bounds) - 1
    given = counter_start(count) if counter is None else counter
    positions: list[int] = [0] * count if counter is None else given["position"].tolist()
    if not batch or (valid is None and reset is None and cu_seqlens is None and len(set(positions)) == 1):
        prefix, after = tree_scan(combine, leaves, counter, empty=empty, recompute=recompute, levels=levels)
        first = {**empty, **_level_names(empty, levels)}
        if previous and counter is not None:
            first = counter_prefix(counter, leaves, empty) | counter_levels(counter, leaves, levels, empty)
        shifted = {k: torch.cat([_first(first[k], x), x], 1)[:, :length] for k, x in prefix.items()}
        return prefix, shifted if previous else None, after or given
    flags = [None if f is None else f.flatten().tolist() for f in (valid, reset)]
    runs = _runs(bounds, flags[0], flags[1])
    flat = {k: x.flatten(0, 1) for k, x in leaves.items()}
    device = next(iter(flat.values())).device
    # A table of every prefix there is: nothing, what each sequence went on from, then those of the runs.
    nothing = {k: empty[k].to(x.dtype).expand(1, *x.shape[1:]) for k, x in flat.items()}
    nothing |= _level_names(nothing, levels)
    like = {k: x.new_empty(count, 0, *x.shape[1:]) for k, x in flat.items()}
    begun = counter_prefix(given, like, empty) | counter_levels(given, like, levels, empty)
    table, size = [nothing, begun], 1 + count
    groups: dict[tuple[int, int], list[_Run]] = {}
    last = {run.sequence: run for run in runs}
    ends: dict[int, tuple[Node, int]] = {}
    for run in runs:
        position = positions[run.sequence] if run.continues else 0
        run.before = 1 + run.sequence if position else 0
        ends[run.sequence] = (given, run.sequence) if position else (counter_start(1), 0)
        if run.tokens:
            groups.setdefault((len(run.tokens), position), []).append(run)
    for (steps, position), members in groups.items():
        index = torch.tensor([run.tokens for run in members]).to(device)
        start = counter_rows([(given, run.sequence) for run in members]) if position else counter_start(len(members))
        rows = {k: x[index] for k, x in flat.items()}
        prefix, after = tree_scan(combine, rows, start, empty=empty, recompute=recompute, levels=levels)
        table.append({k: x.flatten(0, 1) for k, x in prefix.items()})
        for row, run in enumerate(members):
            run.first, size = size, size + steps
            if run is last[run.sequence]:
                ends[run.sequence] = (after or start, row)
    whole = {k: torch.cat([part[k] for part in table]) for k in nothing}
    outside = batch * length - sum(len(run.seen) for run in runs)

    def look(counts: list[list[int]]) -> Node:
        pairs = [(run, seen) for run, c in zip(runs, counts, strict=True) for seen in c]
        at = [run.before if seen == 0 else run.first + seen - 1 for run, seen in pairs] + [0] * outside
        places = torch.tensor(at, dtype=torch.int64).to(device)
        return {k: x[places].reshape(batch, length, *x.shape[1:]) for k, x in whole.items()}

    before = look([run.seen for run in runs]) if previous else None
    return look([run.after for run in runs]), before, counter_rows([ends[n] for n in range(count)])


def _level_names(empty: Node, levels: int) -> Node:
    """Nothing at any level."""
    return {f"{name}.root.{k}": x for k in range(levels) for name, x in empty.items()}


def _first(state: Tensor, like: Tensor) -> Tensor:
    """A state, or a constant [*dims], as the first of prefixes [B, T, ...]."""
    state = state.to(like.dtype).expand(like.shape[:1] + like.shape[2:])
    return state.unsqueeze(1)


class _Run:
    """Tokens between two restarts of a sequence: those that count; for every token, how many did before and with it."""

    def __init__(self, sequence: int, continues: bool) -> None:
        self.sequence = sequence
        self.continues = continues  # the sequence's first run goes on from its counter
        self.tokens: list[int] = []
        self.seen: list[int] = []
        self.after: list[int] = []
        self.before = self.first = 0  # where the prefix before the run, and the first one in it, are


def _runs(bounds: list[int], valid: list[bool] | None, reset: list[bool] | None) -> list[_Run]:
    """All runs, in the order of their tokens."""
    runs = []
    for n, (lo, hi) in enumerate(pairwise(bounds)):
        runs.append(_Run(n, continues=True))
        for t in range(lo, hi):
            if reset is not None and reset[t]:
                runs.append(_Run(n, continues=False))
            run = runs[-1]
            run.seen.append(len(run.tokens))
            if valid is None or valid[t]:
                run.tokens.append(t)
            run.after.append(len(run.tokens))
    return runs
