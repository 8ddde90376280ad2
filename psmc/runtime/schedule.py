"""The tree plan's schedule as data: for drawings, counts, and kernels that run it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from psmc.runtime.kit_tree import Node, tree_scan


class TreeSchedule(NamedTuple):
    """`levels`: (left, right, result) node numbers of each batched combine; `prefixes`: the node of each prefix (-1:
    nothing); `spans`: the tokens [lo, hi) that a node covers."""

    levels: tuple[tuple[tuple[int, int, int], ...], ...]
    prefixes: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def tree_schedule(length: int, position: int = 0, *, exclusive: bool = True) -> TreeSchedule:
    """What `tree_scan` does with `length` leaves after `position` others, as its own run on node numbers tells it."""
    bits = [k for k in range(position.bit_length()) if position >> k & 1]
    levels: list[tuple[tuple[int, int, int], ...]] = []
    ids: dict[int, tuple[int, int]] = {}

    def number(lo: int, hi: int) -> int:
        ids[len(ids)] = (lo, hi)
        return len(ids) - 1

    def record(l: Node, r: Node) -> Node:  # noqa: E741
        pairs = list(zip(l["id"].tolist(), r["id"].tolist(), strict=True))
        out = [number(ids[left][0], ids[right][1]) for left, right in pairs]
        levels.append(tuple((*pair, o) for pair, o in zip(pairs, out, strict=True)))
        return {"id": torch.tensor(out)}

    counter = {"position": torch.tensor([position])}
    for k in bits:
        stop = position >> k << k
        counter[f"id.root.{k}"] = torch.tensor([number(stop - (1 << k), stop)])
        counter[f"id.fold.{k}"] = torch.tensor([number(0, stop)])
    leaves = {"id": torch.tensor([[number(i, i + 1) for i in range(position, position + length)]], dtype=torch.int64)}
    nothing = {"id": torch.tensor(-1)}
    prefix, _ = tree_scan(record, leaves, counter, empty=nothing, exclusive=exclusive, keep=not exclusive)
    return TreeSchedule(tuple(levels), tuple(prefix["id"][0].tolist()), tuple(ids.values()))
