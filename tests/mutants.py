"""Mechanical changes of a spec: of one node of its combine rule, of one component's rule, of one identity element."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from psmc.ir import Aggregator, Assign, Block, Component, Const, Expr, Infinity, Op, Reduce, Ref
from psmc.ir.rewrite import children, inline, transform, with_children

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
        for kind, value in (*of_component(result, agg), *changed(result.value)):
            if value.free <= set(result.indices):
                results = [*rule.results[:n], Assign(result.name, result.indices, value), *rule.results[n + 1 :]]
                yield kind, replace(agg, combine=Block(results=tuple(results)))
    for n, component in enumerate(agg.state):
        for value in other_identities(component):
            new = replace(component, identity=replace(component.identity, value=value))
            yield "identity", replace(agg, state=(*agg.state[:n], new, *agg.state[n + 1 :]))


def of_component(result: Assign, agg: Aggregator) -> Iterator[tuple[str, Expr]]:
    """Operands of a whole component exchanged; what came before not carried on."""
    swapped = transform(result.value, lambda n: other_side(n) if isinstance(n, Ref) else None)
    yield "operands swapped", swapped
    kind = agg.component(result.name).kind
    yield "not carried on", Ref("right", result.name, result.indices, kind)


def other_side(ref: Ref) -> Ref:
    side = {"left": "right", "right": "left"}.get(ref.space, ref.space)
    return Ref(side, ref.name, ref.subs, ref.value_kind)  # type: ignore[arg-type]


def other_identities(component: Component) -> Iterator[Expr]:
    now = component.identity.value
    wrong: list[Expr] = [Const(Fraction(0)), Const(Fraction(1)), Const(Fraction(1, 2))]
    wrong += [Infinity(True)] if component.kind == "real" else []
    for value in wrong:
        if value != now and (component.kind != "int" or value.kind == "int"):
            yield value


def changed(expr: Expr) -> Iterator[tuple[str, Expr]]:
    """All trees with one occurrence changed."""
    yield from here(expr)
    below = list(children(expr))
    for k, child in enumerate(below):
        for kind, new in changed(child):
            parts = iter([*below[:k], new, *below[k + 1 :]])
            try:
                yield kind, with_children(expr, lambda _, parts=parts: next(parts))  # type: ignore[misc]
            except TypeError:  # the kinds no longer fit
                continue


def here(expr: Expr) -> Iterator[tuple[str, Expr]]:
    match expr:
        case Ref(space="left" | "right"):
            yield "other operand", other_side(expr)
            if expr.value_kind != "int":
                yield "sign", Op("neg", (expr,))
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
