"""Maps of a finite set: a whole-number state p[N] with values 0 .. N-1, moved by the same map everywhere.

The state p = iota holds the map itself: p[i] is where i goes. So an element is the map, elements compose by gathering,
p[i] = p_r[p_l[i]], and every automaton of N states is lifted, a permutation or not: p'[i] = x[p[i]], table[x, p[i]].
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from psmc.algebra.interval_math import contains
from psmc.derive.group import VALUE, Maps, Values
from psmc.derive.semiring import IsState, NotAffineError
from psmc.ir import Assign, Expr, Index, IndexValue, Interval, Kind, Ref, Sub
from psmc.ir.rewrite import refs, rename, replace_refs, transform, walk

Bounds = Callable[[Expr, Index, Interval], Interval]  # of an expression, where an index used as a number lies inside
_RANGE = "fix the size of its dim, and keep the value within: by min and max, or intervals on what it is made of."


def finite(update: Assign, kind: Kind, is_state: IsState, bounds: Bounds, size: int | None) -> Maps:
    """The map of one component; `size` of its dim, if fixed. Raises NotAffineError."""
    value = update.value
    if kind != "int" or len(update.indices) != 1:
        raise NotAffineError(value, "only a state 'p[N] : int' is a map of a finite set")
    (index,) = update.indices
    for ref in refs(value):
        if is_state(ref) and ref.subs != (index,):
            raise NotAffineError(ref, "a position of the state other than its own")
    names = {i.name for n in walk(value) for i in n.free} | {index.name}
    point = Index(next(f"at_{n}" for n in range(len(names) + 1) if f"at_{n}" not in names), index.dim)
    table = replace_refs(_gathers_at(value, is_state, point), lambda r: IndexValue(point) if is_state(r) else None)
    if index in table.free:
        raise NotAffineError(value, f"a map that differs between positions '{index.name}' of the state")
    inside = None if size is None else Interval(Fraction(0), Fraction(size - 1), False, False)
    if inside is not None and not contains(inside, bounds(table, point, inside)):
        raise NotAffineError(value, f"a value that is not known to be one of 0 .. {inside.hi}", _RANGE)
    if inside is None and not isinstance(value, Ref):
        raise NotAffineError(value, f"a value that is not known to be one of 0 .. {index.dim} - 1", _RANGE)
    return Maps(update.name, (index,), kind, IndexValue(index), rename(table, {point: index}), (), _rule_over(index))


def _gathers_at(root: Expr, is_state: IsState, point: Index) -> Expr:
    """x[p[i]] as x[point]."""

    def rule(node: Expr) -> Expr | None:
        if not isinstance(node, Ref) or is_state(node):
            return None
        subs: tuple[Sub, ...] = tuple(point if isinstance(s, Ref) and is_state(s) else s for s in node.subs)
        return None if subs == node.subs else Ref(node.space, node.name, subs, node.value_kind, node.lag)

    return transform(root, rule)


def _rule_over(index: Index) -> Callable[[Values, Values], dict[str, Expr]]:
    def rule(left: Values, right: Values) -> dict[str, Expr]:
        here = right[VALUE]
        assert isinstance(here, Ref)
        return {VALUE: Ref(here.space, here.name, (left[VALUE],), here.value_kind)}

    return rule
