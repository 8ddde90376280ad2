"""The tree plan: one fixed parenthesisation for rules that are not associative, in parallel and token by token.

Tokens are the leaves of complete binary trees, aligned at powers of two. After n tokens there is one tree root for
each set bit of n, and the prefix is their fold, earliest and largest first:

    P(6) = combine(tree(0..4), tree(4..6))      P(7) = combine(P(6), leaf 6)      P(8) = tree(0..8)

so P(i) = combine(P(i - 2^k), tree(i - 2^k .. i)), where 2^k is the lowest set bit of i, and nothing is combined where i
is a power of two. `tree_scan` evaluates this for all i at once (Blelloch 1990: the trees level by level, upwards; the
prefixes downwards), `counter_push` for the next i, as a binary counter does (Yau et al. 2025, arXiv 2506.10918): a push
costs its carries and one combine more, less than two on average, as the folds over the higher roots are kept.

A node is a flat dict of tensors, all components. `combine(l, r)` sees one batch axis: [N, *lanes, *dims] each.
A counter is a flat dict, too: `position` [B] int64, the number of tokens seen (best left on the CPU: it steers the
host), and for each set bit k of a position `<component>.root.<k>` and `<component>.fold.<k>` [B, ...]: the root of that
size and the fold of the roots from the largest down to it. Rows whose bit is not set hold nothing of meaning there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Node = dict[str, Tensor]
Merge = Callable[[Node, Node], Node]


class LevelError(ValueError):
    """A counter has more levels than are read."""


def tree_scan(
    combine: Merge,
    leaves: Node,
    counter: Node | None = None,
    *,
    empty: Node | None = None,
    exclusive: bool = False,
    keep: bool = True,
    recompute: bool = False,
    levels: int = 0,
) -> tuple[Node, Node | None]:
    """The prefixes [B, T, ...] of leaves [B, T, ...], and the counter after them; one combine a level.

    counter     where to go on; all its streams must be at one position (`tree_tokens` has no such limit)
    exclusive   the prefixes before each leaf; the first is `empty` (broadcast) if nothing came before
    keep        False: no counter is returned; exclusive prefixes of 2^m leaves then take 2 (2^m - 1 - m) combines
                in 2 (m - 1) levels, which is the least
    recompute   keep the operands of each level for backward, not what `combine` computes on the way
    levels      beside the prefixes, `<component>.root.<k>`: what the counter holds at level k < levels, or `empty`
    """
    batch, length = next(iter(leaves.values())).shape[:2]
    position = 0 if counter is None else _common_position(counter)
    counter = counter_start(batch) if counter is None else counter
    used = leaves if keep or not exclusive else {k: x[:, :-1] for k, x in leaves.items()}
    if recompute:
        rule = combine

        def combine(l: Node, r: Node) -> Node:  # noqa: E741
            again: Node = checkpoint(rule, l, r, use_reentrant=False)
            return again

    roots = {k: _slot(counter, leaves, "root", k) for k in _bits(position)}
    folds = {k: _slot(counter, leaves, "fold", k) for k in _bits(position)}
    nodes = _trees(combine, used, roots, position)
    prefix = _prefixes(combine, nodes, folds, position)
    after = _counter_after(counter, nodes, prefix, position) if keep else None
    if levels:
        assert empty is not None and not exclusive, "levels are read beside inclusive prefixes"
        for k, level in enumerate(_roots(nodes, roots, position, length, levels, empty)):
            prefix |= {f"{name}.root.{k}": x for name, x in level.items()}
    if exclusive and length:
        first = counter_prefix(counter, leaves, empty)
        prefix = {k: torch.cat([first[k].unsqueeze(1), p[:, : length - 1]], 1) for k, p in prefix.items()}
    return prefix, after


def tree_roots(combine: Merge, leaves: Node, counter: Node | None = None, *, empty: Node) -> list[Node]:
    """What the counter holds after each leaf, level by level: [B, T, ...], the root of 2^k tokens or `empty`."""
    batch, length = next(iter(leaves.values())).shape[:2]
    position = 0 if counter is None else _common_position(counter)
    counter = counter_start(batch) if counter is None else counter
    roots = {k: _slot(counter, leaves, "root", k) for k in _bits(position)}
    nodes = _trees(combine, leaves, roots, position)
    return _roots(nodes, roots, position, length, (position + length).bit_length(), empty)


def _roots(
    nodes: list[Node], roots: dict[int, Node], position: int, length: int, levels: int, empty: Node
) -> list[Node]:
    """Level by level, after each of `length` leaves."""
    if (position + length).bit_length() > levels:
        raise LevelError(f"{position + length} tokens have {(position + length).bit_length()} levels, not {levels}")
    found = []
    for k in range(levels):
        leaves = nodes[0]
        known = nodes[k] if k < len(nodes) else {name: x[:, :0] for name, x in leaves.items()}
        nothing = {n: empty[n].to(x.dtype).expand(x.shape[:1] + x.shape[2:]) for n, x in leaves.items()}
        before = roots.get(k, nothing)
        tokens = range(position + 1, position + length + 1)
        index = torch.tensor([(t >> k) - (position >> k) if t >> k & 1 else -1 for t in tokens], dtype=torch.int64)
        level = {}
        for name, x in known.items():
            at = index.to(x.device)
            rows = torch.cat([before[name].unsqueeze(1), x], 1).index_select(1, at.clamp(min=0))
            level[name] = torch.where((at >= 0).view(-1, *[1] * (rows.dim() - 2)), rows, empty[name].to(x.dtype))
        found.append(level)
    return found


def counter_levels(counter: Node, like: Node, levels: int, empty: Node) -> Node:
    """`<component>.root.<k>` of each stream, [B, ...], for k < levels: the root of 2^k tokens, or `empty`."""
    positions: list[int] = counter["position"].tolist()
    most = max(positions, default=0)
    if levels and most.bit_length() > levels:
        raise LevelError(f"{most} tokens have {most.bit_length()} levels, not {levels}")
    found: Node = {}
    for k in range(levels):
        rows = [b for b, p in enumerate(positions) if p >> k & 1]
        level = {n: empty[n].to(x.dtype).expand(x.shape[:1] + x.shape[2:]) for n, x in like.items()}
        level = _put(level, rows, _take(_slot(counter, like, "root", k), rows)) if rows else level
        found |= {f"{name}.root.{k}": x for name, x in level.items()}
    return found


def counter_start(batch: int) -> Node:
    """The counter of `batch` streams that have seen nothing."""
    return {"position": torch.zeros(batch, dtype=torch.int64)}


def counter_push(combine: Merge, counter: Node, leaf: Node) -> tuple[Node, Node]:
    """One token a stream, [B, ...]: (the prefix after it, the counter after it). Functional and differentiable.

    The streams may be at different positions; a combine is called once for each level that carries in some stream, on
    those streams alone, and once for the folds.
    """
    positions: list[int] = counter["position"].tolist()
    carries = [(~p & p + 1).bit_length() - 1 for p in positions]  # trailing ones
    root = leaf
    for k in range(max(carries, default=0)):
        rows = [b for b, c in enumerate(carries) if c > k]
        merged = combine(_take(_slot(counter, leaf, "root", k), rows), _take(root, rows))
        root = _put(root, rows, merged)
    above = [_lowest(p >> c << c) for p, c in zip(positions, carries, strict=True)]  # the next root, if any
    rows = [b for b, k in enumerate(above) if k is not None]
    fold = root
    if rows:
        levels = sorted({k for k in above if k is not None})
        left = root
        for k in levels:
            at = [b for b in rows if above[b] == k]
            left = _put(left, at, _take(_slot(counter, leaf, "fold", k), at))
        fold = _put(root, rows, combine(_take(left, rows), _take(root, rows)))
    after = {"position": counter["position"] + 1}
    for k in sorted({k for p in positions for k in _bits(p + 1)}):
        rows = [b for b, c in enumerate(carries) if c == k]
        for part, value in (("root", root), ("fold", fold)):
            old = _slot(counter, leaf, part, k) if f"{next(iter(leaf))}.{part}.{k}" in counter else _zeros(leaf)
            for name, x in _put(old, rows, _take(value, rows)).items():
                after[f"{name}.{part}.{k}"] = x
    return fold, after


def counter_prefix(counter: Node, like: Node, empty: Node | None = None) -> Node:
    """The prefix of each stream so far, [B, ...]; `empty` where nothing was seen. `like`: names, [B, T, ...] each."""
    positions: list[int] = counter["position"].tolist()
    if empty is None and not all(positions):
        raise ValueError("a stream that has seen nothing has no prefix: pass `empty`")
    found = {n: x.new_zeros(()) if empty is None else empty[n].to(x.dtype) for n, x in like.items()}
    prefix = {n: v.expand(x.shape[:1] + x.shape[2:]) for (n, x), v in zip(like.items(), found.values(), strict=True)}
    for k in sorted({k for k in map(_lowest, positions) if k is not None}):
        rows = [b for b, p in enumerate(positions) if _lowest(p) == k]
        prefix = _put(prefix, rows, _take(_slot(counter, like, "fold", k), rows))
    return prefix


def counter_bytes(counter: Node) -> int:
    """What a counter holds, in bytes; tensors that are the same memory count once."""
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in counter.values()}.values())


def counter_rows(parts: list[tuple[Node, int]]) -> Node:
    """A counter of chosen streams: row `b` of counter `c` for each (c, b)."""
    position = torch.stack([c["position"].cpu()[b] for c, b in parts])  # some may have moved to a device
    bits = {k for p in position.tolist() for k in _bits(p)}
    found = {key: x[0] for c, _ in parts for key, x in c.items() if key != "position"}
    chosen = {"position": position}
    for key, x in sorted(found.items(), key=lambda item: item[0]):
        if int(key.rpartition(".")[2]) in bits:
            chosen[key] = torch.stack([c[key][b] if key in c else torch.zeros_like(x) for c, b in parts])
    return chosen


# --- one tree ----------------------------------------------------------------------------------


def _trees(combine: Merge, leaves: Node, roots: dict[int, Node], position: int) -> list[Node]:
    """Upwards: level k holds the trees of 2^k tokens that end after `position`, [B, count, ...]. The left half of one
    that straddles `position` is the counter's root of the level below."""
    nodes = [leaves]
    while True:
        k, below = len(nodes) - 1, nodes[-1]
        if position >> k & 1:
            below = {name: torch.cat([roots[k][name].unsqueeze(1), x], 1) for name, x in below.items()}
        pairs = next(iter(below.values())).shape[1] // 2
        if pairs == 0:
            return nodes
        halves = {name: torch.unflatten(x[:, : 2 * pairs], 1, (pairs, 2)).unbind(2) for name, x in below.items()}
        left, right = ({name: pair[side] for name, pair in halves.items()} for side in (0, 1))
        nodes.append(_level(combine, left, right))


def _prefixes(combine: Merge, nodes: list[Node], folds: dict[int, Node], position: int) -> Node:
    """Downwards: level k has the prefixes at all multiples of 2^k after `position`. The even ones are the level above;
    an odd one is the even one before it, or the counter's fold, combined with the tree between."""
    even = {name: x[:, :0] for name, x in nodes[0].items()}
    for k in reversed(range(len(nodes))):
        first = position >> k
        known = next(iter(even.values())).shape[1]
        trees = {name: x[:, first % 2 :: 2] for name, x in nodes[k].items()}
        count = next(iter(trees.values())).shape[1]
        if first % 2:
            odd = _level(combine, {name: x[:, :count] for name, x in even.items()}, trees) if count else trees
            even = {name: _alternate(even[name], odd[name]) for name in even}
            continue
        start = _lowest(first)
        if count == 0:
            odd = trees
        elif start is None:  # the first tree starts at token 0 and is its own prefix
            left, right = ({n: x[:, lo : lo + count - 1] for n, x in y.items()} for y, lo in ((even, 0), (trees, 1)))
            rest = [_level(combine, left, right)] if count > 1 else []
            odd = {name: torch.cat([x[:, :1], *(r[name] for r in rest)], 1) for name, x in trees.items()}
        else:
            fold = folds[k + start]
            left = {n: torch.cat([fold[n].unsqueeze(1), x[:, : count - 1]], 1) for n, x in even.items()}
            odd = _level(combine, left, trees)
        even = {name: _alternate(odd[name], even[name]) for name in even}
        assert next(iter(even.values())).shape[1] == known + count
    return even


def _counter_after(counter: Node, nodes: list[Node], prefix: Node, position: int) -> Node:
    """The counter at the end: roots and folds are among the trees and prefixes, or the old ones."""
    length = next(iter(prefix.values())).shape[1]
    end = position + length
    after = {"position": counter["position"] + length}
    for k in _bits(end):
        new_tree, new_fold = (end >> k) - (position >> k) - 1, (end >> k << k) - position - 1
        for name, x in prefix.items():
            for part, source, at in (("root", nodes, new_tree), ("fold", None, new_fold)):
                key = f"{name}.{part}.{k}"
                after[key] = counter[key] if at < 0 else (source[k][name] if source else x)[:, at]
    return after


def _level(combine: Merge, left: Node, right: Node) -> Node:
    """One combine for all pairs [B, count, ...] of a level, as one batch."""
    l, r = ({name: x.flatten(0, 1) for name, x in side.items()} for side in (left, right))  # noqa: E741
    return {name: x.expand(r[name].shape).reshape(right[name].shape) for name, x in combine(l, r).items()}


def _alternate(first: Tensor, second: Tensor) -> Tensor:
    """first 0, second 0, first 1, ... along axis 1; `first` may be one longer."""
    short = second.shape[1]
    both = torch.stack([first[:, :short], second], 2).flatten(1, 2)
    return both if first.shape[1] == short else torch.cat([both, first[:, short:]], 1)


# --- counters -----------------------------------------------------------------------------------


def _bits(position: int) -> list[int]:
    """The set bits."""
    return [k for k in range(position.bit_length()) if position >> k & 1]


def _lowest(position: int) -> int | None:
    """The lowest set bit."""
    return (position & -position).bit_length() - 1 if position else None


def _common_position(counter: Node) -> int:
    positions = set(counter["position"].tolist())
    if len(positions) > 1:
        raise ValueError(f"the streams are at different positions: {sorted(positions)}")
    return int(positions.pop()) if positions else 0


def _slot(counter: Node, names: Node, part: str, level: int) -> Node:
    return {name: counter[f"{name}.{part}.{level}"] for name in names}


def _zeros(node: Node) -> Node:
    return {k: torch.zeros_like(x) for k, x in node.items()}


def _take(node: Node, rows: list[int]) -> Node:
    """Some rows; all of them at no cost."""
    batch = next(iter(node.values())).shape[0]
    if len(rows) == batch:
        return node
    return {k: x.index_select(0, torch.tensor(rows, dtype=torch.int64).to(x.device)) for k, x in node.items()}


def _put(node: Node, rows: list[int], values: Node) -> Node:
    """`node` with some rows replaced, out of place."""
    batch = next(iter(node.values())).shape[0]
    if len(rows) == batch:
        return {k: values[k].expand(x.shape) for k, x in node.items()}
    if not rows:
        return node
    out = {}
    for k, x in node.items():
        value = values[k].expand(len(rows), *x.shape[1:])
        out[k] = x.index_copy(0, torch.tensor(rows, dtype=torch.int64).to(x.device), value)
    return out
