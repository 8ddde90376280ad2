"""Questions about the IR that several layers ask."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from psmc.ir.nodes import Aggregator, Block, Expr, Index, Op, Ref
from psmc.ir.rewrite import refs

Terms = tuple[tuple[int, Expr], ...]


def values(block: Block) -> list[Expr]:
    """What the block's lets and then its results are defined as."""
    return [a.value for a in (*block.lets, *block.results)]


def taps(agg: Aggregator) -> dict[str, int]:
    """The largest lag at which each tapped input is read, by name, in declaration order."""
    blocks = [agg.leaf if agg.recurrence is None else agg.recurrence, agg.output]
    lags: dict[str, int] = {}
    for block in blocks:
        for ref in refs(*(a.value for a in (*block.lets, *block.results))):
            if ref.space == "input" and ref.lag > 0:
                lags[ref.name] = max(ref.lag, lags.get(ref.name, 0))
    return {t.name: lags[t.name] for t in agg.leaf_inputs if t.name in lags}


def level_dims(agg: Aggregator) -> tuple[str, ...]:
    """The dims that at(c).S and prev.at(c).S count levels with, in order of appearance."""
    found = (r for a in (*agg.output.lets, *agg.output.results) for r in refs(a.value) if "level" in r.space)
    return tuple(dict.fromkeys(r.subs[0].dim for r in found if isinstance(r.subs[0], Index)))


def signed_terms(root: Expr, definition: Callable[[Ref], Expr | None] = lambda _: None) -> Terms:
    """`root` as a sum: (+1 or -1, term) from left to right, seen through add, sub, neg and lets that are such sums.

    `definition` gives a let's value at a reference's subscripts, None for what must not be looked into.
    """
    out: list[tuple[int, Expr]] = []
    stack: list[tuple[int, Expr]] = [(1, root)]
    while stack:
        sign, node = stack.pop()
        seen = definition(node) if isinstance(node, Ref) and node.space == "let" else node
        match seen:
            case Op(op="add", args=(a, b)):
                stack += [(sign, b), (sign, a)]
            case Op(op="sub", args=(a, b)):
                stack += [(-sign, b), (sign, a)]
            case Op(op="neg", args=(a,)):
                stack.append((-sign, a))
            case Ref(space="let") if seen is not node:
                stack.append((sign, seen))
            case _:
                out.append((sign, node))
    return tuple(out)


def needs_safe_exp(terms: Terms) -> bool:
    """Whether exp of this sum may meet -inf - -inf: it has a negated term that is no constant.

    Such an exponential is 0 with gradient 0 wherever one of its terms (sign included) is -inf.
    """
    return len(terms) > 1 and any(sign < 0 and any(True for _ in refs(term)) for sign, term in terms)


def nearest_float(value: Fraction) -> float:
    """The nearest double; an infinity beyond the largest."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def restrict(block: Block, names: tuple[str, ...]) -> Block:
    """The named results only, in the block's order, and the lets that they need."""
    results = tuple(r for r in block.results if r.name in names)
    wanted = {ref.name for r in results for ref in refs(r.value) if ref.space == "let"}
    kept = []
    for let in reversed(block.lets):
        if let.name in wanted:
            kept.append(let)
            wanted |= {ref.name for ref in refs(let.value) if ref.space == "let"}
    return Block(tuple(reversed(kept)), results)
