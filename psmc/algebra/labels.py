"""Canonical order of bound indices: colour refinement, then a bounded search over what it leaves undecided."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from psmc.algebra.terms import Names, Node, show
from psmc.ir import Index

# Leaves of the search that are looked at; past it the order is still deterministic, only perhaps not canonical
# (two equal monomials may then look different, which can cost a proof but never make one).
MAX_LEAVES = 720

Part = tuple[Node, str]  # something that mentions bound indices, and a suffix (its power)


def canonical_order(
    bound: Sequence[Index], parts: Sequence[Part], height: int, tick: Callable[[], None]
) -> tuple[Index, ...]:
    """The order of `bound` that makes the text of `parts` least. `tick` is called at each step of the search."""
    if len(bound) <= 1:
        return tuple(bound)
    touching = {b: [p for p in parts if b in p[0].free] for b in bound}
    best: tuple[str, tuple[Index, ...]] | None = None
    leaves = 0

    def search(colours: dict[Index, int]) -> None:
        nonlocal best, leaves
        tick()
        colours = _refine(colours, touching)
        groups: dict[int, list[Index]] = {}
        for index in bound:
            groups.setdefault(colours[index], []).append(index)
        tied = [g for _, g in sorted(groups.items()) if len(g) > 1]
        if not tied:
            order = tuple(sorted(bound, key=colours.__getitem__))
            names = {b: f"{height}.{k}" for k, b in enumerate(order)}
            text = _join(parts, names)
            leaves += 1
            if best is None or text < best[0]:
                best = (text, order)
            return
        for index in tied[0]:
            if leaves >= MAX_LEAVES:
                return
            # Individualise one of the tied indices: it comes before the rest of its group.
            search({i: 2 * c + (1 if c == colours[index] and i != index else 0) for i, c in colours.items()})

    dims = sorted({b.dim for b in bound})
    search({b: dims.index(b.dim) for b in bound})
    assert best is not None
    return best[1]


def _refine(colours: dict[Index, int], touching: dict[Index, list[Part]]) -> dict[Index, int]:
    while True:
        names = {j: f"<{d}>" for j, d in colours.items()}
        keys = {i: (c, _join(touching[i], {**names, i: "*"})) for i, c in colours.items()}
        rank = {k: n for n, k in enumerate(sorted(set(keys.values())))}
        refined = {i: rank[k] for i, k in keys.items()}
        if len(rank) == len(set(colours.values())):
            return refined
        colours = refined


def _join(parts: Sequence[Part], names: Names) -> str:
    return "*".join(sorted(show(node, names) + suffix for node, suffix in parts))
