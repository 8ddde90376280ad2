"""The two sides of each law, as IR: combine substituted into itself.

Operands are Refs of space 'state' whose names carry the operand: `a.S`. No name of a spec has a dot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from psmc.ir import Aggregator, Assign, Block, Expr, Ref
from psmc.ir.rewrite import inline, substitute

Element = Mapping[str, Assign]  # component -> its value


def operand(agg: Aggregator, name: str) -> Element:
    """An arbitrary element: every component an opaque tensor `name.component`."""
    return {
        c.name: Assign(c.name, c.identity.indices, Ref("state", f"{name}.{c.name}", c.identity.indices, c.kind))
        for c in agg.state
    }


def identity(agg: Aggregator) -> Element:
    return {c.name: c.identity for c in agg.state}


def flat_combine(agg: Aggregator) -> Block:
    assert isinstance(agg.combine, Block)
    return inline(agg.combine)


def combined(rule: Block, left: Element, right: Element) -> Element:
    """left ∘ right."""
    env = {("left", n): a for n, a in left.items()} | {("right", n): a for n, a in right.items()}
    return {r.name: replace(r, value=substitute(r.value, env)) for r in rule.results}


def sides(x: Element, y: Element) -> dict[str, tuple[Expr, Expr]]:
    """Component -> (left value, right value) at the same indices."""
    from psmc.ir.rewrite import instantiate

    return {n: (x[n].value, instantiate(y[n], x[n].indices)) for n in x}


def associativity(agg: Aggregator) -> dict[str, tuple[Expr, Expr]]:
    rule = flat_combine(agg)
    a, b, c = (operand(agg, n) for n in "abc")
    return sides(combined(rule, combined(rule, a, b), c), combined(rule, a, combined(rule, b, c)))


def identities(agg: Aggregator) -> dict[str, dict[str, tuple[Expr, Expr]]]:
    """'left identity': e∘x = x; 'right identity': x∘e = x; 'idempotent': e∘e = e."""
    rule = flat_combine(agg)
    e, x = identity(agg), operand(agg, "x")
    return {
        "left identity": sides(combined(rule, e, x), x),
        "right identity": sides(combined(rule, x, e), x),
        "idempotent": sides(combined(rule, e, e), e),
    }
