"""The usual mistakes, undone one at a time: a repair is offered only if it proves.

Tried in order: a component that forgets its left operand is carried on; one that forgets its right operand takes it in;
operands of one component swapped; a rescale by a running maximum, or by a component's decay, put in; one operand of one
term exchanged; one sign. Then components that are missing (psmc/algebra/missing.py). For an identity element: another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from itertools import chain, islice

from psmc.algebra.laws import flat_combine
from psmc.algebra.missing import declared, factors_of, missing
from psmc.algebra.prover import prove, survives
from psmc.algebra.verdict import Proof, Proved, Refuted
from psmc.ir import Aggregator, Assign, Block, Component, Const, Expr, Eye, Index, Infinity, Op, Reduce, Ref
from psmc.ir.rewrite import children, fresh, refs, rename, transform, with_children
from psmc.ir.text import show_assign, show_expr

MAX_FLIPS = 60


@dataclass(frozen=True)
class Repair:
    """A changed spec that proves. `text` is the statement or declaration to write; `why` says what was missing."""

    agg: Aggregator
    text: str
    why: str


def repair(agg: Aggregator, proof: Proof, budget: float = 5.0) -> Repair | None:
    """The first usual repair of a refuted claim that makes both laws provable, if there is one."""
    if not isinstance(agg.combine, Block):
        return None
    deadline = time.monotonic() + budget
    if isinstance(proof.associativity, Refuted):
        candidates: Iterator[Repair] = rules(agg)
    elif isinstance(proof.identity, Refuted):
        candidates = chain(identities(agg, proof.identity.counterexample.component), rules(agg))
    else:
        return None
    for candidate in candidates:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        if survives(candidate.agg):
            again = prove(candidate.agg, left, associativity=True)
            if isinstance(again.associativity, Proved) and isinstance(again.identity, Proved):
                return candidate
    return None


def rules(agg: Aggregator) -> Iterator[Repair]:
    """Changed combine rules, likeliest first."""
    rule = flat_combine(agg)
    # What reads fewest components comes first: a transition is repaired before what it acts on.
    order = sorted(rule.results, key=lambda r: len({ref.name for ref in refs(r.value)}))

    def changed(result: Assign, value: Expr, why: str) -> Repair:
        return _changed(agg, rule, {result.name: value}, why)

    for result in order:
        if not any(r.space == "left" and r.name == result.name for r in refs(result.value)):
            for value in _carried(agg.component(result.name)):
                yield changed(result, value, f"'{result.name}' of the left element is never carried on")
        elif not any(r.space == "right" and r.name == result.name for r in refs(result.value)):
            value = Op("add", (result.value, _operands(agg.component(result.name))[1]))
            yield changed(result, _at(agg, result, value), f"'{result.name}' of the right element is never taken in")
    for result in order:
        yield changed(result, _swapped(result.value), f"the operands of '{result.name}' are in the wrong order")
    for scale in rule.results:
        values = _rescaled(rule, scale)
        if values:
            names = ", ".join(f"'{n}'" for n in values)
            yield _changed(agg, rule, values, f"the old scale of {names} is forgotten", scale)
    for result in order:
        for name, value in _decayed(agg, result):
            yield changed(result, value, f"'{result.name}' of the left element is not scaled by '{name}'")
    for result in order:
        for value in islice(_flipped(result.value), MAX_FLIPS):
            yield changed(result, value, f"'{result.name}' reads the wrong operand in one place")
    for result in order:
        for value in islice(_signs(result.value), MAX_FLIPS):
            yield changed(result, value, f"'{result.name}' has a wrong sign")
    for added in missing(agg, rule):
        yield Repair(*added)


def _changed(
    agg: Aggregator, rule: Block, values: Mapping[str, Expr], why: str, named: Assign | None = None
) -> Repair:  # fmt: skip
    """The spec with other values of some components; in the text, the value of `named` reads as its name, where that
    was assigned before."""
    earlier = named is not None and all(_begins(agg, named.name) < _begins(agg, n) for n in values)

    def short(node: Expr) -> Expr | None:
        return Ref("let", named.name, named.indices) if named is not None and earlier and node == named.value else None

    results = tuple(replace(r, value=values.get(r.name, r.value)) for r in rule.results)
    text = "; ".join(show_assign(replace(r, value=transform(r.value, short))) for r in results if r.name in values)
    return Repair(replace(agg, combine=Block(results=results)), text, why)


def _begins(agg: Aggregator, name: str) -> int:
    """Where a component's statement stands in the combine; an unknown place is taken for a good one."""
    span = agg.where(f"combine {name}")
    position = [r.name for r in flat_combine(agg).results].index(name)
    return position if span is None else span.start


def identities(agg: Aggregator, name: str) -> Iterator[Repair]:
    """Other identity elements of one component: of matrices, those over (+, *), (max, +), (min, +) and (max, min)."""
    component = agg.component(name)
    zero, one, low, high = Const(Fraction(0)), Const(Fraction(1)), Infinity(True), Infinity(False)
    choices: dict[Expr, str] = {value: show_expr(value) for value in (zero, one, low, high)}
    indices = component.identity.indices
    if len(indices) == 2 and indices[0].dim == indices[1].dim:
        eye = Eye(*indices)
        choices[eye] = "eye"
        for on, off in ((zero, low), (zero, high), (high, low)):
            shown = f"where(eye == 1, {show_expr(on)}, {show_expr(off)})"
            choices[Op("where", (Op("eq", (eye, one)), on, off))] = shown
    for value, shown in choices.items():
        new = replace(component, identity=replace(component.identity, value=value))
        state = tuple(new if c.name == name else c for c in agg.state)
        text = f"{declared(component)} = {shown}"
        yield Repair(replace(agg, state=state), text, f"{shown} is the identity of '{name}'")


def _operands(component: Component) -> tuple[Ref, Ref]:
    indices = component.identity.indices
    return Ref("left", component.name, indices, component.kind), Ref("right", component.name, indices, component.kind)


def _carried(component: Component) -> Iterator[Expr]:
    """The monoids that a component's identity element suggests, then the others."""
    left, right = _operands(component)
    identity = component.identity.value
    if isinstance(identity, Eye) and len(component.dims) == 2:
        row, col = component.identity.indices
        mid = fresh(Index("p", row.dim), (row.name, col.name))
        for forwards in (False, True):
            reads = [(row, mid), (mid, col)] if forwards else [(mid, col), (row, mid)]
            first, second = Ref("left", component.name, reads[0]), Ref("right", component.name, reads[1])
            yield Reduce("sum", mid, Op("mul", (first, second) if forwards else (second, first)))
    if identity == Const(Fraction(1)):
        yield Op("mul", (left, right))
    if identity == Const(Fraction(0)):
        yield Op("add", (left, right))
    if isinstance(identity, Infinity):
        yield Op("max" if identity.negative else "min", (left, right))


def _swapped(value: Expr) -> Expr:
    return transform(value, lambda n: _other_side(n) if isinstance(n, Ref) else None)


def _other_side(ref: Ref) -> Ref:
    match ref.space:
        case "left":
            return Ref("right", ref.name, ref.subs, ref.value_kind)
        case "right":
            return Ref("left", ref.name, ref.subs, ref.value_kind)
    return ref


def _at(agg: Aggregator, result: Assign, value: Expr) -> Expr:
    """`value` with the identity's indices as the result's."""
    old = agg.component(result.name).identity.indices
    return rename(value, dict(zip(old, result.indices, strict=True)))


def _decayed(agg: Aggregator, result: Assign) -> Iterator[tuple[str, Expr]]:
    """Every read of the left element's own component times another component of the right one."""
    for other in agg.state:
        if other.name == result.name or not set(other.dims) <= {i.dim for i in result.indices}:
            continue
        indices = tuple(next(i for i in result.indices if i.dim == d) for d in other.dims)
        factor = Ref("right", other.name, indices, other.kind)

        def scaled(node: Expr, factor: Expr = factor) -> Expr | None:
            own = isinstance(node, Ref) and node.space == "left" and node.name == result.name
            return Op("mul", (factor, node)) if own else None

        value = transform(result.value, scaled)
        if value != result.value:
            yield other.name, value


def _signs(expr: Expr) -> Iterator[Expr]:
    """All trees with one sign turned."""
    if isinstance(expr, Op) and expr.op == "neg":
        yield expr.args[0]
    if isinstance(expr, Op) and expr.op in ("add", "sub"):
        yield Op("sub" if expr.op == "add" else "add", expr.args)
    yield from _one_part(expr, _signs)


def _rescaled(rule: Block, scale: Assign) -> dict[str, Expr]:
    """With m = max(x, y): reads of the left element times exp(x - m), of the right times exp(y - m), if not so yet."""
    new = scale.value
    if not (isinstance(new, Op) and new.op == "max"):
        return {}
    pairs = zip(("left", "right"), new.args, strict=True)
    factors = {side: Op("exp", (Op("sub", (arg, new)),)) for side, arg in pairs}

    def scaled(node: Expr) -> Expr:
        own = factors_of(node)
        out: list[Expr] = []
        for factor in own:
            if isinstance(factor, Ref):
                scale = factors.get(factor.space) if factor.name in names else None
                out += [factor] if scale is None or scale in own else [factor, scale]
            else:
                out.append(factor if factor in factors.values() else with_children(factor, scaled))
        return node if out == own else reduce(lambda x, y: Op("mul", (x, y)), out)

    read = {ref.name for ref in refs(new)}
    names = {r.name for r in rule.results if r.name not in read and set(scale.indices) <= set(r.indices)}
    values = {r.name: scaled(r.value) for r in rule.results if r.name in names}
    return {r.name: values[r.name] for r in rule.results if r.name in values and values[r.name] != r.value}


def _flipped(expr: Expr) -> Iterator[Expr]:
    """All trees with one reference to an operand turned to the other operand."""
    if isinstance(expr, Ref) and expr.space in ("left", "right"):
        yield _other_side(expr)
        return
    yield from _one_part(expr, _flipped)


def _one_part(expr: Expr, change: Callable[[Expr], Iterator[Expr]]) -> Iterator[Expr]:
    """All trees with one direct part changed."""
    parts = children(expr)
    for k, part in enumerate(parts):
        for new in change(part):
            try:
                yield with_children(expr, _in_turn([*parts[:k], new, *parts[k + 1 :]]))
            except TypeError:  # the kinds no longer fit
                continue


def _in_turn(values: list[Expr]) -> Callable[[Expr], Expr]:
    rest = iter(values)
    return lambda _: next(rest)
