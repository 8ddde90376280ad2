"""Live state, layers' order, lanes: what needs no algebra beyond which component reads which."""

from __future__ import annotations

from collections.abc import Iterable

from psmc.derive.graph import closure
from psmc.ir import Aggregator, Assign, Block, Expr, Extern, Eye, Index, IndexValue, Reduce, Ref
from psmc.ir.query import restrict, values
from psmc.ir.rewrite import inline, refs, walk


def update(agg: Aggregator) -> Block | None:
    """The rule that makes the new state: `combine`, or the recurrence that runs in order; None if it is Python."""
    rule = agg.combine if agg.recurrence is None else agg.recurrence
    return None if isinstance(rule, Extern) or rule is None else inline(rule)


def dependence(agg: Aggregator, spaces: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Component -> components that its update reads in `spaces` ('left' and 'prev': the earlier operand; 'right')."""
    names = [c.name for c in agg.state]
    rule = update(agg)
    if rule is None:
        return {n: tuple(names) for n in names}
    found: dict[str, tuple[str, ...]] = {}
    for result in rule.results:
        read = {r.name for r in refs(result.value) if r.space in spaces}
        found[result.name] = tuple(n for n in names if n in read)
    return found


def live_state(agg: Aggregator) -> tuple[str, ...]:
    """What a prefix must carry: what `output` reads of it, closed over what the update reads of the earlier operand."""
    wanted = [r.name for r in refs(*values(agg.output)) if r.space in ("state", "prev", "level", "prev_level")]
    found = closure(wanted, dependence(agg, ("left", "prev")))
    return tuple(c.name for c in agg.state if c.name in found)


def element_state(agg: Aggregator, live: Iterable[str]) -> tuple[str, ...]:
    """What elements must carry so that they can be combined with each other: `live`, closed over both operands."""
    found = closure(live, dependence(agg, ("left", "right", "prev")))
    return tuple(c.name for c in agg.state if c.name in found)


def relevant(agg: Aggregator, element: tuple[str, ...]) -> tuple[Assign, ...]:
    """Every inlined definition a run evaluates: update and lift of `element`, and the outputs."""
    rule = update(agg)
    found = [] if rule is None else list(restrict(rule, element).results)
    if agg.recurrence is None:
        found += restrict(inline(agg.leaf), element).results
    return (*found, *inline(agg.output).results)


def bound_dims(definitions: Iterable[Assign]) -> set[str]:
    """Dims that are reduced, gathered over, compared by eye, indexed by a number, or whose positions are read."""
    found: set[str] = set()
    for definition in definitions:
        for node in walk(definition.value):
            match node:
                case Reduce(index=index) | IndexValue(index=index):
                    found.add(index.dim)
                case Eye(row=row, col=col):
                    found |= {s.dim for s in (row, col) if isinstance(s, Index)}
                case Ref(subs=subs):
                    found |= {i.dim for s in subs if isinstance(s, Expr) for i in s.free}
    return found


def lanes(agg: Aggregator, element: tuple[str, ...]) -> tuple[str, ...]:
    """Dims that every component and output has exactly once and that nothing reduces or permutes."""
    if update(agg) is None:
        return ()
    definitions = relevant(agg, element)
    tensors = {t.name: t.dims for t in (*agg.leaf_inputs, *agg.params)}
    tensors |= {c.name: c.dims for c in agg.state}
    bound = bound_dims(definitions)
    for definition in definitions:  # a literal or gathered position picks within the dim
        for ref in refs(definition.value):
            subs = ref.subs["level" in ref.space :]  # the first one of those is no dim of the tensor
            bound |= {d for d, s in zip(tensors[ref.name], subs, strict=True) if not isinstance(s, Index)}
    whole = [agg.component(n).dims for n in element]
    whole += [tuple(i.dim for i in a.indices) for a in agg.output.results]
    found = [d.name for d in agg.dims if d.name not in bound and all(w.count(d.name) == 1 for w in whole)]
    return tuple(d for d in found if all(t.count(d) <= 1 for t in tensors.values()))


def is_pointwise(definitions: Iterable[Assign]) -> bool:
    """No reduction, gather or Eye anywhere."""
    return not any(
        isinstance(node, (Reduce, Eye)) or (isinstance(node, Ref) and any(isinstance(s, Expr) for s in node.subs))
        for definition in definitions
        for node in walk(definition.value)
    )
