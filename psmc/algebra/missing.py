"""Components that a rule needs and does not have: a decay that was written as a constant, the count behind a mean.

s = γ * l.s + r.s          is not associative; with a = l.a * r.a, s = r.a * l.s + r.s it is
s = (l.s + r.s) / 2        is a mean of means; with n = l.n + r.n, the weighted mean
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import reduce

from psmc.ir import Aggregator, Assign, Block, Component, Const, Expr, Interval, Op, Ref
from psmc.ir.rewrite import refs
from psmc.ir.text import show_assign, show_expr, show_interval

_COUNT = Interval(Fraction(0), None, True, True)


def missing(agg: Aggregator, rule: Block) -> Iterator[tuple[Aggregator, str, str]]:
    """(spec with one more component, text to write, why). A new component's leaves need a lift to be said in."""
    if agg.lift is None:
        return
    for result in rule.results:
        decay = _constant_decay(result)
        if decay is not None:
            yield _with_decay(agg, rule, result, *decay)
        if _is_mean(result):
            yield _with_count(agg, rule, result)


def declared(component: Component) -> str:
    """A component as `state` declares it, up to its identity."""
    dims = f"[{', '.join(component.dims)}]" if component.dims else ""
    kind = f" : {component.kind}" if component.kind != "real" else ""
    interval = f" in {show_interval(component.interval)}" if component.interval is not None else ""
    return f"{component.name}{dims}{kind}{interval}"


def _constant_decay(result: Assign) -> tuple[Expr, Ref] | None:
    """(c, l.s) if the value is c * l.s + r.s, and c reads neither element."""
    value = result.value
    if not (isinstance(value, Op) and value.op == "add"):
        return None
    for one, other in (value.args, value.args[::-1]):
        if not _own(other, "right", result):
            continue
        factors = factors_of(one)
        own = [f for f in factors if _own(f, "left", result)]
        rest = [f for f in factors if f not in own]
        if len(own) == 1 and rest and not any(r.space in ("left", "right") for r in refs(*rest)):
            assert isinstance(own[0], Ref)
            return reduce(lambda x, y: Op("mul", (x, y)), rest), own[0]
    return None


def _own(node: Expr, side: str, result: Assign) -> bool:
    return isinstance(node, Ref) and (node.space, node.name, node.subs) == (side, result.name, result.indices)


def factors_of(node: Expr) -> list[Expr]:
    """The factors of a product, as it is written; of anything else, itself."""
    return [f for a in node.args for f in factors_of(a)] if isinstance(node, Op) and node.op == "mul" else [node]


def _is_mean(result: Assign) -> bool:
    value = result.value
    if not isinstance(value, Op) or value.op not in ("div", "mul"):
        return False
    half = Const(Fraction(2 if value.op == "div" else 1) / (1 if value.op == "div" else 2))
    pairs = [value.args] if value.op == "div" else [value.args, value.args[::-1]]
    return any(
        by == half and isinstance(whole, Op) and whole.op == "add"
        and {a.space for a in whole.args if isinstance(a, Ref) and (a.name, a.subs) == (result.name, result.indices)}
        == {"left", "right"}
        for whole, by in pairs
    )  # fmt: skip


def _with_decay(agg: Aggregator, rule: Block, result: Assign, decay: Expr, left: Ref) -> tuple[Aggregator, str, str]:
    indices = tuple(i for i in result.indices if i in decay.free)
    name = _fresh(agg, "decay")
    own, before = (Ref(side, name, indices) for side in ("right", "left"))
    value = Op("add", (Op("mul", (own, left)), Ref("right", result.name, result.indices, left.value_kind)))
    component = Component(
        name, tuple(i.dim for i in indices), "real", None, Assign(name, indices, Const(Fraction(1)))
    )  # fmt: skip
    why = f"the decay of '{result.name}' compounds, and has to be carried along"
    new = {name: Assign(name, indices, Op("mul", (before, own))), result.name: replace(result, value=value)}
    return _with(agg, rule, component, Assign(name, indices, decay), new, why)


def _with_count(agg: Aggregator, rule: Block, result: Assign) -> tuple[Aggregator, str, str]:
    name = _fresh(agg, "count")
    here, there = Ref("left", name, ()), Ref("right", name, ())
    l, r = (Ref(side, result.name, result.indices) for side in ("left", "right"))  # noqa: E741
    both = Op("add", (here, there))
    value = Op("div", (Op("add", (Op("mul", (here, l)), Op("mul", (there, r)))), both))
    component = Component(name, (), "real", _COUNT, Assign(name, (), Const(Fraction(0))))
    why = "a mean of means needs the count of each"
    new = {name: Assign(name, (), both), result.name: replace(result, value=value)}
    return _with(agg, rule, component, Assign(name, (), Const(Fraction(1))), new, why)


def _with(
    agg: Aggregator, rule: Block, component: Component, leaf: Assign, new: dict[str, Assign], why: str
) -> tuple[Aggregator, str, str]:  # fmt: skip
    assert agg.lift is not None
    results = (new[component.name], *(new.get(r.name, r) for r in rule.results))
    text = (
        f"state {declared(component)} = {show_expr(component.identity.value)}  "
        f"lift {{ {show_assign(leaf)} }}  "
        f"combine (l, r) {{ {'; '.join(show_assign(a) for a in new.values())} }}"
    )
    changed = replace(
        agg, state=(component, *agg.state), lift=replace(agg.lift, results=(leaf, *agg.lift.results)),
        combine=Block(results=results),
    )  # fmt: skip
    return changed, text, why


def _fresh(agg: Aggregator, base: str) -> str:
    tensors = [t.name for ts in (agg.inputs, agg.params) for t in ts]
    taken = {*tensors, *(c.name for c in agg.state), *(d.name for d in agg.dims)}
    number, name = 1, base
    while name in taken:
        number, name = number + 1, f"{base}_{number + 1}"
    return name
