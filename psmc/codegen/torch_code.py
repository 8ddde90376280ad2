"""The mathematics of a spec as the source of plain torch functions, for the generated module.

    lift(x, p, n)  combine(l, r, p, n)  advance(l, r, p, n)  output(s, prev, x, p, n)  identity(n, like)  start(n, like)

x, p, l, r, s and prev are namespaces of tensors `[..., *dims]` whose leading axes broadcast; n holds the sizes of the
dims. Each returns a dict of tensors: trailing axes in full, leading ones as far as what was read has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from psmc.codegen.attention_code import print_attention
from psmc.codegen.linearise import Axes, Step, fresh, linearise
from psmc.codegen.torch_expr import ExprPrinter, lagged, slot
from psmc.codegen.torch_ops import ATOM, HELPERS, SUM
from psmc.codegen.torch_value import Like, Printed
from psmc.derive.names import declared_names, fresh_name
from psmc.ir import Aggregator, Assign, Block, Expr, IndexValue, Kind, Op, Ref
from psmc.ir.canonical import ONE
from psmc.ir.query import level_dims, restrict, taps
from psmc.ir.rewrite import inline, map_values, refs, transform
from psmc.structure.attention import Attention, attentions

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LINE = 100  # characters of a right-hand side
RESERVED = frozenset(
    {"torch", "math", "max", "min", "abs", "int", "complex", "like", "prev", "at", "prev_at", *"xplrsn"}
)


@dataclass(frozen=True)
class Signature:
    """A function's parameters, and the tensors that it can be sure to have, best first."""

    name: str
    parameters: str
    tensors: tuple[Like, ...]


@dataclass(frozen=True)
class Source:
    """One function's text and the pasted functions that it calls."""

    text: str
    helpers: frozenset[str] = frozenset()


def print_lift(agg: Aggregator) -> Source:
    """Inputs and params to an element with all components."""
    return print_block(agg, agg.leaf, Signature("lift", "x, p, n", inputs_like(agg)))


def print_combine(agg: Aggregator) -> Source:
    """Two elements to an element; of all components."""
    assert isinstance(agg.combine, Block)
    return print_rule(agg, agg.combine, Signature("combine", "l, r, p, n", _components(agg, "r")))


def print_advance(agg: Aggregator, live: tuple[str, ...]) -> Source:
    """`combine` on the live components; `l` has only those."""
    assert isinstance(agg.combine, Block)
    block = restrict(agg.combine, live)
    read = {r.name for a in (*block.lets, *block.results) for r in refs(a.value) if r.space == "left"}
    assert read <= set(live), f"{agg.name}: {sorted(read - set(live))} are read of l but not live"
    return print_rule(agg, block, Signature("advance", "l, r, p, n", _components(agg, "r")))


def print_recurrence(agg: Aggregator) -> Source:
    """The state before a token to the one after, for a recurrence that is run as it stands."""
    assert agg.recurrence is not None
    return print_block(agg, agg.recurrence, Signature("recurrence", "prev, x, p, n", _components(agg, "prev")))


def print_output(agg: Aggregator) -> Source:
    """The state after (s) and before (prev) a token, its inputs and the params to the outputs; where they are read, the
    roots of a counter after (at) and before (prev_at) it, [..., levels, *dims]."""
    levels = ", at, prev_at" if level_dims(agg) else ""
    return print_block(agg, agg.output, Signature("output", f"s, prev, x, p, n{levels}", inputs_like(agg)))


def print_identity(agg: Aggregator) -> Source:
    """The identity element, `[*dims]` each; `like` gives the device and the real dtype."""
    return _constants(agg, "identity", tuple(c.identity for c in agg.state))


def print_start(agg: Aggregator) -> Source:
    """Where decoding starts: the identity unless the spec says otherwise."""
    return _constants(agg, "start", tuple(c.start for c in agg.state))


def function_sources(agg: Aggregator, live: tuple[str, ...]) -> list[Source]:
    """All functions of an aggregator. A rule from Python has no combine and advance, a recurrence that is run as it
    stands has `recurrence` instead of these and lift; `start` is there where it is not the identity."""
    sources = [print_recurrence(agg)] if agg.recurrence is not None else [print_lift(agg)]
    if isinstance(agg.combine, Block):
        sources += [print_combine(agg), print_advance(agg, live)]
    sources += [print_output(agg), print_identity(agg)]
    if any(c.initial is not None for c in agg.state):
        sources.append(print_start(agg))
    return sources


def print_functions(agg: Aggregator, live: tuple[str, ...]) -> str:
    """The same as text, after the helpers that they call. It needs `import math` and `import torch`."""
    return "\n\n".join(filter(None, (join(function_sources(agg, live)), print_attention(agg, fused=False))))


def join(sources: Sequence[Source]) -> str:
    """Helpers first, then the functions."""
    used = frozenset().union(*(s.helpers for s in sources))
    return "\n\n".join([*(text for name, text in HELPERS.items() if name in used), *(s.text for s in sources)])


def print_rule(agg: Aggregator, block: Block, signature: Signature) -> Source:
    """A combine. What of it is softmax attention is one call on operands that a function of their own computes."""
    found = attentions(inline(block))
    if not found:
        return print_block(agg, block, signature)
    taken = declared_names(agg)
    given: dict[Expr, Ref] = {}
    operands: list[Assign] = []
    sources: list[Source] = []
    calls = []
    whole_rule = attentions(inline(agg.combine)) if isinstance(agg.combine, Block) else ()
    for part in found:
        at = next(n for n, a in enumerate(whole_rule) if part.places[0] in a.places)
        name = fresh_name("attended", taken)
        given |= {node: Ref("input", name, indices) for node, indices in part.places}
        query, scale = _scaled(part, signature)
        groups = []
        for base, group in (("query", (query,)), ("keys", part.keys), ("values", part.values)):
            named = [replace(a, name=fresh_name(base, taken)) for a in group]
            operands += named
            groups.append(", ".join(f'a["{a.name}"]' for a in named))
        passed = f"ATTENTION_{at}, n, {groups[0]}, [{groups[1]}], [{groups[2]}]{scale}"
        if any(m is not None for m in part.masks):
            masks = replace(signature, name=f"{signature.name}_seen_{at}")
            sources.append(print_block(agg, Block(results=_masks(part)), masks))
            passed += f", masks=lambda: {masks.name}({masks.parameters})"
        call = f"    {name} = _attention({passed})"
        calls.append(call if len(call) <= _LINE else f"    {name} = _attention(\n        {passed}\n    )")
    parts = replace(signature, name=f"{signature.name}_operands")
    first = print_block(agg, Block(results=tuple(operands)), parts)
    whole = map_values(inline(block), lambda e: transform(e, given.get))
    text = print_block(agg, whole, signature)
    head, body = text.text.split("\n", 1)
    for ref in given.values():  # what a combine reads of no namespace
        body = re.sub(rf"\bx\.{ref.name}\b", ref.name, body)
    like = _like(Block(results=tuple(operands)), signature).text
    operated = [f"    with _as_precise(ATTENTION_{at}, n, {like}):", f"        a = {parts.name}({parts.parameters})"]
    lines = [head, *operated, *calls, body]
    sources = [first, *sources, Source("\n".join(lines), text.helpers | {"_as_precise", "_attention"})]
    return Source("\n\n".join(s.text for s in sources), frozenset().union(*(s.helpers for s in sources)))


def _scaled(part: Attention, signature: Signature) -> tuple[Assign, str]:
    """The query, and the argument that is its factor of numbers alone, if there is one."""
    if part.scale is ONE:
        return part.query, ""
    like = _like(Block(results=(part.query,)), signature)
    shown = ExprPrinter(like, {}, lambda _: None, set()).show(part.scale, ())
    if shown.axes is not None:
        return replace(part.query, value=Op("mul", (part.query.value, part.scale))), ""
    return part.query, f", scale={shown.text}"


def _masks(part: Attention) -> tuple[Assign, ...]:
    """Of each set, true everywhere if it has none."""
    found = []
    for at, (mask, keys) in enumerate(zip(part.masks, part.keys, strict=True)):
        token = keys.indices[-2]
        everywhere = Op("eq", (IndexValue(token), IndexValue(token)))
        value = everywhere if mask is None else mask.value
        found.append(Assign(f"set_{at}", (part.query.indices[-2], token), value))
    return tuple(found)


def print_block(agg: Aggregator, block: Block, signature: Signature) -> Source:
    """A block as one function."""
    program = linearise(block, RESERVED | HELPERS.keys())
    kinds = _kinds(agg, block, signature.name)
    held = {step: kinds[result] for result, step in reversed(program.results)}
    helpers: set[str] = set()
    local: dict[str, Printed] = {}
    printer = ExprPrinter(_like(block, signature), local, program.definition, helpers)
    lines: list[str] = []
    for step in _split(program.steps, printer):
        assert _IDENTIFIER.fullmatch(step.name), step.name
        value = printer.show(step.value, step.axes)
        kind = held.get(step.name, value.kind)
        if value.axes is None and kind == "complex":
            value = replace(value, kind=kind)
        if step.axes or step.name in held:
            value = _whole(printer, value, step.axes)
        value = _of_kind(printer, value, kind)
        plain = isinstance(step.value, Ref) and value.text == slot(step.value)
        local[step.name] = Printed(value.text if plain else step.name, ATOM, value.axes, value.kind)
        if not plain:
            lines.append(f"{step.name} = {value.text}")
    returned = ", ".join(f'"{result}": {local[step].text}' for result, step in program.results)
    lines.append(f"return {{{returned}}}")
    body = "".join(f"    {line}\n" for line in lines)
    return Source(f"def {signature.name}({signature.parameters}):\n{body}", frozenset(helpers))


def _split(steps: Iterable[Step], printer: ExprPrinter) -> Iterator[Step]:
    """The same steps, parts of those that make too long a line before them. Each must be printed before the next."""
    taken = {s.name for s in steps} | RESERVED | HELPERS.keys()
    waiting = list(steps)[::-1]
    while waiting:
        step = waiting.pop()
        part = printer.part(step.value, step.axes, _LINE)
        if part is None:
            yield step
            continue
        name = fresh("", taken)
        taken.add(name)
        axes = tuple(sorted(part.free, key=printer.order.__getitem__))
        ref = Ref("let", name, axes, part.kind)
        whole = transform(step.value, lambda n, part=part, ref=ref: ref if n is part else None)  # type: ignore[misc]
        waiting += [replace(step, value=whole), Step(name, axes, part)]


def _whole(printer: ExprPrinter, value: Printed, axes: Axes) -> Printed:
    """A tensor with exactly these trailing axes, in full."""
    dims = [f"n.{i.dim}" for i in axes]
    if value.axes is None:
        shape = f"({dims[0]},)" if len(dims) == 1 else f"({', '.join(dims)})"
        full = printer.like.full(shape, value)
        return Printed(full.text, ATOM, axes, full.kind)
    aligned = printer.align(value, axes)
    if set(value.axes) == set(axes):
        return aligned
    printer.helpers.add("_expand")
    return Printed(f"_expand({aligned.text}, {', '.join(dims)})", ATOM, axes, value.kind)


def _of_kind(printer: ExprPrinter, value: Printed, kind: Kind) -> Printed:
    if value.kind == kind:
        return value
    if kind == "complex":
        return Printed(f"{value.within(SUM)} + 0j", SUM, value.axes, kind)
    dtype = {"int": "torch.int64", "bool": "torch.bool", "real": printer.like.dtype}[kind]
    return Printed(f"{value.within(ATOM)}.to({dtype})", ATOM, value.axes, kind)


def _kinds(agg: Aggregator, block: Block, function: str) -> dict[str, Kind]:
    """The element type of each result: the component's, or what an output's expression has."""
    declared: dict[str, Kind] = {} if function == "output" else {c.name: c.kind for c in agg.state}
    return {r.name: declared.get(r.name, r.value.kind) for r in block.results}


def _like(block: Block, signature: Signature) -> Like:
    """A real tensor if there is one, rather one that the block reads."""
    preference = {"real": 0, "complex": 1, "int": 2}
    read = (r for a in (*block.lets, *block.results) for r in refs(a.value) if r.space != "let")
    return min((*(Like(slot(r), r.value_kind) for r in read), *signature.tensors), key=lambda t: preference[t.kind])


def inputs_like(agg: Aggregator) -> tuple[Like, ...]:
    """A spec's inputs, as tensors that new ones may be made like."""
    return tuple(Like(f"x.{t.name}", t.kind) for t in agg.leaf_inputs)


def _components(agg: Aggregator, space: str) -> tuple[Like, ...]:
    return tuple(Like(f"{space}.{c.name}", c.kind) for c in agg.state)


def _constants(agg: Aggregator, name: str, values: tuple[Assign, ...]) -> Source:
    block = Block(results=values)
    return print_block(agg, block, Signature(name, "n, like", (Like("like", "real"),)))


__all__ = [
    "Signature", "Source", "function_sources", "join", "lagged", "print_advance", "print_block", "print_combine",
    "print_functions", "print_identity", "print_lift", "print_output", "print_recurrence", "print_start", "taps",
]  # fmt: skip
