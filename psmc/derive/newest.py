"""Which parts of an update are another component's new value: `exp(prev.m + f - m)` reads m after this token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from psmc.ir import Assign, Expr, Eye, Index, IndexValue, Kind, Op, Reduce, Ref, Sub
from psmc.ir.rewrite import refs, transform, walk


def newest(
    updates: Mapping[str, Assign],
    kinds: Mapping[str, Kind],
    may_read: Callable[[str, str], bool] = lambda reader, read: True,
) -> dict[str, Assign]:
    """Inlined updates, with every occurrence of another component's update written as Ref('state', component, ...).

    Only updates that read the earlier state are looked for; an update that *is* another one refers to the earlier
    declared of the two. `may_read(reader, read)` restricts who may refer to whom.
    """
    names = list(updates)
    sized = [(sum(1 for _ in walk(updates[n].value)), n) for n in names if _stateful(updates[n].value)]
    patterns = [n for _, n in sorted(sized, key=lambda s: (-s[0], names.index(s[1])))]
    found: dict[str, Assign] = {}
    for name in names:
        value = updates[name].value
        for other in patterns:
            if (
                other == name
                or not may_read(name, other)
                or (value == updates[other].value and names.index(other) > names.index(name))
            ):
                continue
            value = _replaced(value, updates[other], kinds[other])
        found[name] = replace(updates[name], value=value)
    return found


def _stateful(value: Expr) -> bool:
    return not isinstance(value, Ref) and any(r.space in ("left", "prev") for r in refs(value))


def _replaced(root: Expr, update: Assign, kind: Kind) -> Expr:
    def rule(node: Expr) -> Expr | None:
        subs = match(update.value, node, update.indices)
        return None if subs is None else Ref("state", update.name, subs, kind)

    return transform(root, rule)


def match(pattern: Expr, node: Expr, variables: tuple[Index, ...]) -> tuple[Sub, ...] | None:
    """What to substitute for `variables` in `pattern` to get `node`; None if nothing does, or a variable is unused."""
    bound: dict[Index, Sub] = {}
    return (
        tuple(bound[v] for v in variables)
        if _match(pattern, node, set(variables), bound) and all(v in bound for v in variables)
        else None
    )


def _match(pattern: Expr, node: Expr, free: set[Index], bound: dict[Index, Sub]) -> bool:
    if type(pattern) is not type(node):
        return False
    if pattern is node and not (pattern.free & free):
        return True

    def sub(p: Sub, n: Sub) -> bool:
        if isinstance(p, Index):
            if p in free:
                return bound.setdefault(p, n) == n and not (isinstance(n, Index) and n.dim != p.dim)
            return p == n
        if isinstance(p, Expr):
            return isinstance(n, Expr) and _match(p, n, free, bound)
        return p == n

    match pattern, node:
        case Op(), Op():
            return pattern.op == node.op and all(
                _match(p, n, free, bound) for p, n in zip(pattern.args, node.args, strict=True)
            )
        case Ref(), Ref():
            same = (pattern.space, pattern.name, pattern.lag) == (node.space, node.name, node.lag)
            return same and all(sub(p, n) for p, n in zip(pattern.subs, node.subs, strict=True))
        case Eye(), Eye():
            return sub(pattern.row, node.row) and sub(pattern.col, node.col)
        case IndexValue(), IndexValue():
            return sub(pattern.index, node.index)
        case Reduce(), Reduce():
            if pattern.op != node.op or pattern.index.dim != node.index.dim:
                return False
            return _match(pattern.body, node.body, free | {pattern.index}, bound) and (
                bound.pop(pattern.index, node.index) == node.index
            )
    return pattern is node
