"""Mechanical single-node changes of a combine rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from psmc.ir import Aggregator, Assign, Block, Const, Expr, Op, Reduce, Ref
from psmc.ir.rewrite import inline, with_children

OTHER_OP = {
    "add": ("sub", "mul"),
    "sub": ("add",),
    "mul": ("add",),
    "div": ("mul",),
    "max": ("min", "add"),
    "min": ("max",),
    "gt": ("ge", "lt"),
    "eq": ("ne",),
    "exp": ("neg",),
    "abs": ("neg",),
    "sqrt": ("neg",),
    "log": ("neg",),
}
OTHER_REDUCTION = {"sum": ("max",), "max": ("sum",), "prod": ("sum",)}


def mutants(agg: Aggregator) -> Iterator[tuple[str, Aggregator]]:
    """(kind of change, changed aggregator), in a fixed order."""
    assert isinstance(agg.combine, Block)
    rule = inline(agg.combine)
    for n, result in enumerate(rule.results):
        for kind, value in changed(result.value):
            if value.free <= set(result.indices):
                results = [*rule.results[:n], Assign(result.name, result.indices, value), *rule.results[n + 1 :]]
                yield kind, replace(agg, combine=Block(results=tuple(results)))


def changed(expr: Expr) -> Iterator[tuple[str, Expr]]:
    """All trees with one occurrence changed."""
    yield from here(expr)
    children = list(_children(expr))
    for k, child in enumerate(children):
        for kind, new in changed(child):
            parts = iter([*children[:k], new, *children[k + 1 :]])
            try:
                yield kind, with_children(expr, lambda _, parts=parts: next(parts))  # type: ignore[misc]
            except TypeError:  # the kinds no longer fit
                continue


def _children(expr: Expr) -> tuple[Expr, ...]:
    from psmc.ir.rewrite import children

    return children(expr)


def here(expr: Expr) -> Iterator[tuple[str, Expr]]:
    match expr:
        case Ref(space="left" | "right"):
            side = "right" if expr.space == "left" else "left"
            yield "other operand", Ref(side, expr.name, expr.subs, expr.value_kind)
            if len(expr.subs) == 2 and expr.subs[0] != expr.subs[1]:
                yield "index order", Ref(expr.space, expr.name, expr.subs[::-1], expr.value_kind)
        case Const(value=value):
            yield "constant", Const(value + 1)
            yield "constant", Const(value * Fraction(1, 2))
        case Reduce(op=op, index=index, body=body):
            for other in OTHER_REDUCTION[op]:
                yield "reduction", Reduce(other, index, body)
        case Op(op=op, args=args):
            for other in OTHER_OP.get(op, ()):
                try:
                    yield "operator", Op(other, args)
                except TypeError:
                    continue
            if op in ("add", "sub", "mul", "div", "max", "min"):
                yield "dropped operand", args[0]
                yield "dropped operand", args[1]
            if op == "where":
                yield "branches swapped", Op("where", (args[0], args[2], args[1]))
            if op == "exp":
                yield "rescale forgotten", Const(Fraction(1))
