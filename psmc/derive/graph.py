"""Small graph algorithms with a deterministic answer: reachability, layers, minimum vertex cover."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

N = TypeVar("N", bound=Hashable)


def closure(start: Iterable[N], edges: Mapping[N, Iterable[N]]) -> set[N]:
    """Everything reachable from `start`, itself included."""
    seen: set[N] = set()
    stack = list(start)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(edges.get(node, ()))
    return seen


def layers(nodes: Sequence[N], edges: Mapping[N, Iterable[N]]) -> list[tuple[N, ...]]:
    """Strongly connected components, what they depend on first. `edges[n]` are the nodes n depends on.

    Ties follow the order of `nodes`, and so do the members of a component.
    """
    kept = set(nodes)
    reach = {n: closure((m for m in edges.get(n, ()) if m in kept), edges) & kept for n in nodes}
    groups: list[tuple[N, ...]] = []
    placed: set[N] = set()
    for n in nodes:
        if n not in placed:
            group = tuple(m for m in nodes if m == n or (m in reach[n] and n in reach[m]))
            groups.append(group)
            placed.update(group)
    done: list[tuple[N, ...]] = []
    ready: set[N] = set()
    while groups:
        index = next(i for i, g in enumerate(groups) if reach[g[0]] <= ready | set(g))
        ready.update(groups[index])
        done.append(groups.pop(index))
    return done


def vertex_cover(pairs: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """A minimum vertex cover (left, right) of a bipartite graph, by König's theorem; right vertices are preferred."""
    edges = sorted(set(pairs))
    by_right: dict[int, list[int]] = {}
    for left, right in edges:
        by_right.setdefault(right, []).append(left)
    partner: dict[int, int] = {}  # left -> right

    def augment(right: int, seen: set[int]) -> bool:
        for left in by_right[right]:
            if left not in seen:
                seen.add(left)
                if left not in partner or augment(partner[left], seen):
                    partner[left] = right
                    return True
        return False

    for right in sorted(by_right):
        augment(right, set())
    # From unmatched right vertices along alternating paths: the right ones reached stay out of the cover, the left
    # ones reached are in it. Starting on the right is what prefers right vertices.
    unmatched = set(by_right) - set(partner.values())
    cover_left: set[int] = set()
    cover_right = set(by_right) - unmatched
    stack = sorted(unmatched)
    while stack:
        for left in by_right[stack.pop()]:
            if left not in cover_left:
                cover_left.add(left)
                cover_right.discard(partner[left])
                stack.append(partner[left])
    return sorted(cover_left), sorted(cover_right)
