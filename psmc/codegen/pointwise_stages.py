"""The forward scan of a pointwise spec in stages: cheap scans in turn instead of one costly one.

A combine such as log-sum-exp's takes two exponentials, and a parallel scan combines each element more than once. But
given the maxima m_{t-1} and m_t, the rest is affine: s_t = exp(m_{t-1} - m_t) s_{t-1} + exp(x_t - m_t). So components
are scanned in the order of their dependence, and a later stage sees earlier prefixes as values of its token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from psmc.codegen.triton_expr import Key, LaneFunction, print_function
from psmc.derive.graph import layers
from psmc.derive.names import declared_names, fresh_name
from psmc.derive.simplify import ONE, ZERO, make, simplify_block, total
from psmc.derive.step import step
from psmc.ir import Aggregator, Assign, Block, Expr, Kind, Op, Ref
from psmc.ir.query import restrict
from psmc.ir.rewrite import inline, refs, walk
from psmc.structure.live import dependence, element_state

# What a combine may do and still cost no more than moving its operands.
_LIGHT = {"add", "sub", "mul", "neg", "max", "min", "abs", "stop", "real", "conj", "where",
          "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One scan. `names`: what it scans, `live` among them what it carries; `combine`, `advance` as of a whole spec.

    `affine`: from a token and earlier components before it (prev) to `names`, the coefficients and the rest of
    s_t = A s_{t-1} + b, b under the component's own name; None: `names` are the lifted components.
    """

    names: tuple[str, ...]
    live: tuple[str, ...]
    kinds: Mapping[str, Kind]
    combine: LaneFunction
    advance: LaneFunction
    affine: LaneFunction | None = None

    @property
    def label(self) -> str:
        return self.combine.name.removeprefix("lane_combine")


def whole(agg: Aggregator, live: Sequence[str], label: str = "") -> Stage:
    """All of `live` in one scan, by the spec's own combine."""
    assert isinstance(agg.combine, Block)
    names = element_state(agg, live)
    kinds = {c.name: c.kind for c in agg.state if c.name in names}
    rule = Block(results=inline(restrict(agg.combine, names)).results) if label else restrict(agg.combine, names)
    return _stage(names, tuple(live), kinds, rule, label)


def stages(agg: Aggregator, live: Sequence[str], tokens: Sequence[Key]) -> tuple[Stage, ...]:
    """The cheapest order of scans: one, unless its combine is costly and later components are affine."""
    assert isinstance(agg.combine, Block)
    single = whole(agg, live)
    order = layers(live, dependence(agg, ("left", "prev")))
    costly = any(isinstance(n, Op) and n.op not in _LIGHT for a in inline(agg.combine).results for n in walk(a.value))
    if not costly or len(order) == 1:
        return (single,)
    update = simplify_block(inline(step(agg, live)))
    found: list[Stage] = []
    for group in order:
        stage = _affine(agg, update, group, [s for f in found for s in f.live], tokens) if found else None
        if stage is None:
            label = "_" + "_".join(group)
            stage = whole(agg, tuple(c for c in live if c in group), label)
            if set(stage.names) & (set(live) - set(group)):
                return (single,)
        found.append(stage)
    return tuple(found)


def _affine(
    agg: Aggregator, update: Block, group: Sequence[str], before: Sequence[str], tokens: Sequence[Key]
) -> Stage | None:
    parts = {c: affine_parts(update.result(c).value, group) for c in group}
    if any(p is None for p in parts.values()) or any(agg.component(c).kind != "real" for c in group):
        return None
    taken = declared_names(agg)
    slopes = {(b, c): p[0][b] for c, p in parts.items() if p is not None for b in group if b in p[0]}
    reach = set(slopes) | {(c, c) for c in group}
    for mid in group:
        reach |= {(b, c) for b in group for c in group if (b, mid) in reach and (mid, c) in reach}
    lone = {c for c in group if not any(b != c and {(b, c), (c, b)} <= reach for b in group)}
    pairs = [(b, c) for b in group for c in group if (b, c) in reach]
    names = {
        p: fresh_name(f"A_{p[1]}_{p[0]}", taken)
        for p in pairs
        if not (p[0] == p[1] and p[0] in lone and slopes.get(p) == ONE)
    }

    def entry(side: str, b: str, c: str) -> Expr:
        if (b, c) in names:
            return Ref(side, names[b, c], ())  # type: ignore[arg-type]
        return ONE if b == c else ZERO

    rule: list[Assign] = []
    for (b, c), name in names.items():
        rule.append(Assign(name, (), total([make("mul", entry("right", m, c), entry("left", b, m)) for m in group])))
    for c in group:
        old = [make("mul", entry("right", b, c), Ref("left", b, ())) for b in group]
        rule.append(Assign(c, (), total([*old, Ref("right", c, ())])))
    lift = [Assign(name, (), slopes.get(pair, ZERO)) for pair, name in names.items()]
    lift += [Assign(c, (), p[1]) for c, p in parts.items() if p is not None]
    scanned = (*names.values(), *group)
    kinds: dict[str, Kind] = dict.fromkeys(scanned, "real")
    stage = _stage(scanned, tuple(group), kinds, Block(results=tuple(rule)), "_" + "_".join(group))
    order: list[Key] = [*tokens, *(("prev", c, 0) for c in before)]
    return replace(stage, affine=print_function(f"lane_affine{stage.label}", Block(results=tuple(lift)), order, kinds))


def _stage(
    names: tuple[str, ...], live: tuple[str, ...], kinds: Mapping[str, Kind], rule: Block, label: str
) -> Stage:
    sides: list[Key] = [(side, c, 0) for side in ("left", "right") for c in names]
    return Stage(
        names,
        live,
        kinds,
        print_function(f"lane_combine{label}", rule, sides, kinds, whole=True),
        print_function(f"lane_advance{label}", restrict(rule, live), sides, kinds),
    )


def affine_parts(root: Expr, names: Sequence[str]) -> tuple[dict[str, Expr], Expr] | None:
    """`root` as Σ coefficient · prev[name] + rest, neither reading prev of `names`; None if it has no such form."""
    done: dict[Expr, tuple[dict[str, Expr], Expr] | None] = {}
    for node in walk(root):
        done[node] = _parts(node, done, names)
    return done[root]


_Parts = tuple[dict[str, Expr], Expr]


def _parts(node: Expr, done: Mapping[Expr, _Parts | None], names: Sequence[str]) -> _Parts | None:
    if isinstance(node, Ref) and node.space == "prev" and node.name in names:
        return {node.name: ONE}, ZERO
    if not any(r.space == "prev" and r.name in names for r in refs(node)):
        return {}, node
    if not isinstance(node, Op):
        return None
    args = [done[a] for a in node.args]
    if any(a is None for a in args):
        return None
    known = [a for a in args if a is not None]
    match node.op:
        case "add" | "sub":
            return _each(known, lambda a, b: make(node.op, a, b))
        case "neg":
            return _each(known, lambda a: make("neg", a))
        case "mul" if not known[0][0] or not known[1][0]:
            left_free = not known[0][0]
            factor = node.args[0] if left_free else node.args[1]
            moved = known[1] if left_free else known[0]
            return _each([moved], lambda a: make("mul", factor, a) if left_free else make("mul", a, factor))
        case "div" if not known[1][0]:
            return _each(known[:1], lambda a: make("div", a, node.args[1]))
        case "where" if not known[0][0]:
            return _each(known[1:], lambda a, b: make("where", node.args[0], a, b))
    return None


def _each(parts: Sequence[_Parts], rule) -> _Parts:  # type: ignore[no-untyped-def]
    names = dict.fromkeys(name for coefficients, _ in parts for name in coefficients)
    return {n: rule(*(c.get(n, ZERO) for c, _ in parts)) for n in names}, rule(*(rest for _, rest in parts))
