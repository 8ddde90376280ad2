"""What one lane of a pointwise spec computes, forwards and backwards, as scalar functions in Triton.

All lanes do the same, so indices go; complex tensors become two scalars each. With λ_t the cotangent of s_t from later
tokens and Λ_t the whole one,

    Λ_t     = λ_t + (∂R/∂s_t)ᵀ do_t                              `direct` is the second term
    λ_{t-1} = (∂F/∂s_{t-1})ᵀ Λ_t + (∂R/∂s_{t-1})ᵀ do_t           `back` is these two
    dx_t    = (∂F/∂x_t)ᵀ Λ_t     + (∂R/∂x_t)ᵀ do_t

Segments of time are folded to elements of the scan that `derive.adjoint` describes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from psmc.codegen.pointwise_rule import Rule, rule
from psmc.codegen.triton_expr import Key, LaneFunction, number, print_function, reads
from psmc.derive.adjoint import Adjoint, adjoint
from psmc.derive.names import declared_names, fresh_name
from psmc.derive.realify import realify
from psmc.derive.simplify import ZERO, make, plus, simplify_block
from psmc.derive.step import step
from psmc.derive.vjp import vjp
from psmc.ir import Aggregator, Assign, Block, Const, DimValue, Expr, Kind, Ref
from psmc.ir.query import restrict
from psmc.ir.rewrite import inline, map_values, refs, transform


@dataclass(frozen=True)
class Lane:
    """`agg`: the spec over real scalars; `parts`: a declared complex tensor's two scalars. Functions:

    lift       inputs, params -> the components of `element`
    step       inputs, params, prev -> the live components after the token
    readout    inputs, params, state, prev -> outputs
    fold       left (of `element`), inputs, params -> the element combined with the lifted token
    """

    agg: Aggregator
    parts: Mapping[str, tuple[str, str]]
    live: tuple[str, ...]
    element: tuple[str, ...]
    starts: Mapping[str, str]
    counts: bool  # the declared start is combined with the first token
    lift: LaneFunction
    step: LaneFunction
    readout: LaneFunction
    fold: LaneFunction
    rule: Rule
    back: Backward | None

    def kind(self, component: str) -> Kind:
        return self.agg.component(component).kind

    def scalars(self, name: str) -> tuple[str, ...]:
        """The scalars of a declared tensor."""
        return self.parts.get(name, (name,))


@dataclass(frozen=True)
class Backward:
    """direct, back   as above; `back` returns λ under the names of `names`, then a share for each input and param
    entry      a token -> how λ before it comes from λ after it: J and the rest, the components of `element`
    compose    entries of later tokens and of one -> theirs;  pull: its λ part

    `cotangents`: output -> the key of its cotangent; `moved`: live component -> its key as Λ; `element`: what a fold
    scans, J entries first, with `identity` as numbers; `shares`: what `back` returns -> whose share it is.
    `first`: the key of the flag 'the state after this token is its lifted element', if `back` must be told."""

    cotangents: Mapping[str, Key]
    moved: Mapping[str, Key]
    element: tuple[str, ...]
    identity: Mapping[str, str]
    direct: LaneFunction
    back: LaneFunction
    entry: LaneFunction
    compose: LaneFunction
    pull: LaneFunction
    shares: Mapping[str, Key]
    first: Key | None
    names: Mapping[str, str]  # live component -> its entry of `element`
    states: bool  # values of the state are read, `fold_states`: by `entry`
    fold_states: bool


def lane(agg: Aggregator, live: Sequence[str]) -> Lane:
    """`agg` must be licensed (plan.pointwise)."""
    real, parts = realify(agg)
    real = _scalar(real)
    carried = tuple(s for c in live for s in parts.get(c, (c,)))
    one = rule(real, carried)
    kinds = {c.name: c.kind for c in real.state}
    tokens = _tokens(real)
    before: list[Key] = [("prev", c, 0) for c in carried]
    after: list[Key] = [("state", c, 0) for c in carried]
    lefts: list[Key] = [("left", c, 0) for c in one.names]
    update = simplify_block(inline(step(real, carried)))
    return Lane(
        agg=real,
        parts=parts,
        live=carried,
        element=one.names,
        starts={c.name: number(c.start.value).removesuffix(".0" if c.kind == "int" else "") for c in real.state},
        counts=any(c.initial is not None for c in real.state),
        lift=print_function("lane_lift", restrict(real.leaf, one.names), tokens, kinds),
        step=print_function("lane_step", update, [*tokens, *before], kinds),
        readout=print_function("lane_readout", real.output, [*tokens, *after, *before]),
        fold=print_function("lane_fold", _fold(real, one.names), [*tokens, *lefts], kinds),
        rule=one,
        back=_backward(real, carried, tokens) if any(kinds[c] == "real" for c in carried) else None,
    )


def _fold(agg: Aggregator, names: tuple[str, ...]) -> Block:
    """combine's right operand a lifted token."""
    assert isinstance(agg.combine, Block)
    leaf = inline(restrict(agg.leaf, names))

    def lifted(node: Expr) -> Expr | None:
        return leaf.result(node.name).value if isinstance(node, Ref) and node.space == "right" else None

    rows = inline(restrict(agg.combine, names)).results
    return simplify_block(Block(results=tuple(replace(a, value=transform(a.value, lifted)) for a in rows)))


def _scalar(agg: Aggregator) -> Aggregator:
    """Every tensor a scalar: what is pointwise does the same in each lane."""
    sizes = {d.name: d.size for d in agg.dims}

    def rule(node: Expr) -> Expr | None:
        if isinstance(node, Ref):
            return Ref(node.space, node.name, (), node.value_kind, node.lag)
        if isinstance(node, DimValue):
            return Const(Fraction(sizes[node.dim] or 0))
        return None

    def block(body: Block) -> Block:
        bare = map_values(body, lambda e: transform(e, rule))
        return Block(tuple(map(_bare, bare.lets)), tuple(map(_bare, bare.results)))

    assert isinstance(agg.combine, Block)
    return replace(
        agg,
        dims=(),
        inputs=tuple(replace(t, dims=()) for t in agg.inputs),
        params=tuple(replace(t, dims=()) for t in agg.params),
        state=tuple(
            replace(c, dims=(), identity=_bare(c.identity), initial=None if c.initial is None else _bare(c.initial))
            for c in agg.state
        ),
        lift=None if agg.lift is None else block(agg.lift),
        combine=block(agg.combine),
        readout=block(agg.readout),
    )


def _bare(a: Assign) -> Assign:
    return replace(a, indices=())


def _tokens(agg: Aggregator) -> list[Key]:
    """Inputs at the lags that are read, then params."""
    found = reads(agg.leaf) | reads(agg.output)
    inputs: list[Key] = [("input", t.name, lag) for t in agg.leaf_inputs for lag in range(65)]
    params: list[Key] = [("param", t.name, 0) for t in agg.params]
    return [k for k in (*inputs, *params) if k in found]


def _backward(agg: Aggregator, live: tuple[str, ...], tokens: list[Key]) -> Backward:
    taken = declared_names(agg)
    update, leaf, readout = inline(step(agg, live)), inline(agg.leaf), inline(agg.output)
    smooth = [c for c in live if agg.component(c).kind == "real"]
    outputs = [a for a in readout.results if a.value.kind == "real"]
    cotangents: dict[str, Key] = {a.name: ("input", fresh_name(f"d_{a.name}", taken), 0) for a in outputs}
    moved: dict[str, Key] = {c: ("input", fresh_name(f"grad_{c}", taken), 0) for c in smooth}
    flag: Key = ("input", fresh_name("first", taken), 0)
    kinds = {t.name: t.kind for t in (*agg.leaf_inputs, *agg.params)}
    wanted = [k for k in tokens if kinds[k[1]] == "real"]
    token_refs = [_ref(k) for k in wanted]
    after: list[Key] = [("state", c, 0) for c in live]
    before: list[Key] = [("prev", c, 0) for c in live]

    found = adjoint(agg, live)
    entry = _entry(found, cotangents)
    linear = not any(r.space == "prev" for a in entry for r in refs(a.value) if a.name in found.jacobian.values())
    smooth_after, smooth_before = [_ref(("state", c, 0)) for c in smooth], [_ref(("prev", c, 0)) for c in smooth]
    ct = [_ref(cotangents[a.name]) for a in outputs]
    shares = vjp([a.value for a in outputs], ct, [*smooth_after, *smooth_before, *token_refs])
    by_state, by_prev = shares[: len(smooth)], shares[len(smooth) : 2 * len(smooth)]
    by_token = shares[2 * len(smooth) :]
    lam = [_ref(moved[c]) for c in smooth]
    through = vjp([update.result(c).value for c in smooth], lam, [*smooth_before, *token_refs])
    lifted = vjp([leaf.result(c).value for c in smooth], lam, token_refs)
    names = {c: found.cotangent[c] for c in smooth}

    def block(values: Iterable[tuple[str, Expr | None]]) -> Block:
        return Block(results=tuple(Assign(n, (), v) for n, v in values if v is not None and v != ZERO))

    special = not linear and not any(c.initial is not None for c in agg.state)
    gradient: list[tuple[str, Expr]] = [
        (names[c], plus(a, b) or ZERO) for c, a, b in zip(smooth, through[: len(smooth)], by_prev, strict=True)
    ]
    owners: dict[str, Key] = {}
    for key, at_first, later, direct in zip(wanted, lifted, through[len(smooth) :], by_token, strict=True):
        moved_share = later
        if special and at_first != later:
            moved_share = make("where", _ref(flag, "bool"), at_first or ZERO, later or ZERO)
        name = fresh_name("g_" + key[1] + (f"_lag{key[2]}" if key[2] else ""), taken)
        owners[name] = key
        gradient.append((name, plus(moved_share, direct) or ZERO))
    direct_block = block((names[c], v) for c, v in zip(smooth, by_state, strict=True))
    back_block = Block(results=tuple(Assign(n, (), v) for n, v in gradient))
    entry_block = Block(results=entry)
    assert isinstance(found.aggregator.combine, Block)
    element = tuple(c.name for c in found.aggregator.state)
    order = [*tokens, *after, *before, *cotangents.values(), *moved.values(), flag]
    pair: list[Key] = [(side, c, 0) for side in ("left", "right") for c in element]
    read = reads(direct_block) | reads(back_block)
    states = any(k[0] in ("state", "prev") for k in read)
    fold_states = any(k[0] in ("state", "prev") for k in reads(entry_block))
    real: dict[str, Kind] = dict.fromkeys((*element, *owners), "real")
    return Backward(
        cotangents=cotangents,
        moved=moved,
        element=element,
        identity={c.name: number(c.identity.value) for c in found.aggregator.state},
        direct=print_function("lane_direct", direct_block, order, real),
        back=print_function("lane_back", back_block, order, real),
        entry=print_function("lane_entry", entry_block, order, real),
        compose=print_function("lane_compose", found.aggregator.combine, pair, real, whole=True),
        pull=print_function("lane_pull", restrict(found.aggregator.combine, tuple(names.values())), pair, real),
        shares=owners,
        first=flag if flag in read else None,
        names=names,
        states=states,
        fold_states=fold_states,
    )


def _entry(found: Adjoint, cotangents: Mapping[str, Key]) -> tuple[Assign, ...]:
    """The adjoint's lifted token over what the spec's own functions read."""
    back: dict[str, Key] = {n: ("prev", c, 0) for c, n in found.prev.items()}
    back |= {n: ("state", c, 0) for c, n in found.state.items()}
    back |= {n: ("input", x, lag) for (x, lag), n in found.inputs.items()}
    back |= {n: cotangents[o] for o, n in found.outputs.items()}

    def own(node: Expr) -> Expr | None:
        return _ref(back[node.name], node.value_kind) if isinstance(node, Ref) and node.space == "input" else None

    leaf = inline(found.aggregator.leaf)
    return tuple(replace(a, value=transform(a.value, own)) for a in leaf.results)


def _ref(key: Key, kind: Kind = "real") -> Ref:
    return Ref(key[0], key[1], (), kind, key[2])  # type: ignore[arg-type]
