"""One token of a scan, forwards and backwards, from its combine.

With s_t = F(s_{t-1}, x_t) and o_t = R(s_t, s_{t-1}, x_t), and λ_t the cotangent of s_t from everything after token t,

    Λ_t     = λ_t + (∂R/∂s_t)ᵀ do_t
    λ_{t-1} = (∂F/∂s_{t-1})ᵀ Λ_t + (∂R/∂s_{t-1})ᵀ do_t
    dx_t    = (∂F/∂x_t)ᵀ Λ_t     + (∂R/∂x_t)ᵀ do_t

`step` is F, `step_backward` all three lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from psmc.derive.names import declared_names, fresh_name
from psmc.derive.simplify import ZERO, make, plus
from psmc.derive.vjp import vjp
from psmc.ir import Aggregator, Assign, Block, Expr, Index, Kind, Op, Reduce, Ref
from psmc.ir.canonical import Names, canonical_assign, prune
from psmc.ir.query import restrict
from psmc.ir.rewrite import inline, instantiate, map_values, refs, replace_refs, walk


@dataclass(frozen=True)
class StepBackward:
    """The transpose of one token's update and readout.

    `block` reads Ref('prev', c), Ref('state', c), inputs, params, and cotangents as lets that the caller provides:
    `outputs[o]` of each differentiable output and `state[c]` of each live component (λ_t, without this token's
    readout). Its results are λ_{t-1} as `prev[c]` (every differentiable live component), this token's share of each
    input as `inputs[x]`, of an input read `lag` tokens earlier as `taps[x, lag]`, and of each param as `params[p]`.
    A tensor that is in no mapping has gradient zero. Gradients have their tensor's dims, summed over all others.
    """

    block: Block
    outputs: Mapping[str, str]
    state: Mapping[str, str]
    prev: Mapping[str, str]
    inputs: Mapping[str, str]
    taps: Mapping[tuple[str, int], str]
    params: Mapping[str, str]


def step(agg: Aggregator, live: Sequence[str]) -> Block:
    """One token: the live components after it, from Ref('prev', c) of the live ones, inputs and params.

    A combine's left operand becomes the state before the token and its right one the lifted token. Lets are kept,
    renamed where lift and combine use the same name; those that no live component needs are dropped.
    """
    if agg.recurrence is not None:
        return restrict(agg.recurrence, tuple(live))
    assert isinstance(agg.combine, Block), "step: an extern combine has no expressions"
    taken = declared_names(agg)
    leaf = _rename_lets(agg.leaf, taken)
    combine = _rename_lets(restrict(agg.combine, tuple(live)), taken)
    values = {a.name: a for a in leaf.results}
    lets = {
        a.name: replace(a, name=fresh_name(f"x_{a.name}", taken))
        for a in leaf.results
        if isinstance(a.value, Op | Reduce)
    }

    def rule(ref: Ref) -> Expr | None:
        if ref.space == "left":
            assert ref.name in live, f"step: '{ref.name}' is read of the left operand but not live"
            return Ref("prev", ref.name, ref.subs, ref.value_kind)
        if ref.space == "right" and ref.name in lets:
            return Ref("let", lets[ref.name].name, ref.subs, ref.value_kind)
        return instantiate(values[ref.name], ref.subs) if ref.space == "right" else None

    body = map_values(combine, lambda e: replace_refs(e, rule))
    return prune(replace(body, lets=(*leaf.lets, *lets.values(), *body.lets)))


def step_backward(agg: Aggregator, live: Sequence[str], first: bool = False) -> StepBackward:
    """The transpose of `step` and of the readout, in one block; see `StepBackward`.

    first   the token starts a sequence without an initial state: the state after it is the lifted token itself, so
            nothing but the readout's Ref('prev') (the identity element then) stands before it, and `prev` is empty
    """
    update = inline(restrict(agg.leaf, tuple(live)) if first else step(agg, live))
    readout = inline(agg.output)
    taken = declared_names(agg) | {a.name for b in (update, readout) for a in (*b.lets, *b.results)}
    smooth = [c for c in agg.state if c.name in live and c.kind in ("real", "complex")]
    outputs = {a.name: fresh_name(f"d_{a.name}", taken) for a in readout.results if _smooth(a.value.kind)}
    state = {c.name: fresh_name(f"d_{c.name}", taken) for c in smooth}
    tokens = _token_refs(agg, [a.value for a in (*update.results, *readout.results)])
    before = [] if first else [Ref("prev", c.name, c.identity.indices, c.kind) for c in smooth]
    after = [Ref("state", c.name, c.identity.indices, c.kind) for c in smooth]

    read = [a for a in readout.results if a.name in outputs]
    direct = vjp([a.value for a in read], [_let(outputs[a.name], a) for a in read], [*after, *before, *tokens])
    lets: list[Assign] = []
    moved: list[Expr] = []  # Λ_t
    for component, share in zip(smooth, direct, strict=False):
        cotangent = _let(state[component.name], component.identity, component.kind)
        if share is not None:
            whole = make("add", cotangent, share)
            lets.append(Assign(fresh_name(f"d_new_{component.name}", taken), component.identity.indices, whole))
            cotangent = _let(lets[-1].name, component.identity, component.kind)
        moved.append(cotangent)
    rows = [_aligned(update.result(c.name), c.identity.indices) for c in smooth]
    through = vjp(rows, moved, [*before, *tokens])
    shares = [plus(a, b) for a, b in zip(direct[len(after) :], through, strict=True)]

    prev: dict[str, str] = {}
    inputs: dict[str, str] = {}
    taps: dict[tuple[str, int], str] = {}
    params: dict[str, str] = {}
    results: list[Assign] = []
    for ref, grad in zip([*before, *tokens], shares, strict=True):
        if grad is None and ref.space != "prev":
            continue
        base = {"prev": "g_prev_", "param": "g_param_"}.get(ref.space, "g_") + ref.name
        name = fresh_name(f"{base}_lag{ref.lag}" if ref.lag else base, taken)
        results.append(Assign(name, _indices(ref), ZERO if grad is None else grad))
        if ref.lag:
            taps[ref.name, ref.lag] = name
        else:
            {"prev": prev, "param": params}.get(ref.space, inputs)[ref.name] = name
    block = unshadowed(prune(Block(tuple(lets), tuple(results))), taken)
    return StepBackward(block, outputs, state, prev, inputs, taps, params)


def _rename_lets(block: Block, taken: set[str]) -> Block:
    names = {let.name: fresh_name(let.name, taken) for let in block.lets}

    def rule(ref: Ref) -> Expr | None:
        return Ref("let", names[ref.name], ref.subs, ref.value_kind) if ref.space == "let" else None

    if all(old == new for old, new in names.items()):
        return block
    renamed = map_values(block, lambda e: replace_refs(e, rule))
    return replace(renamed, lets=tuple(replace(a, name=names[a.name]) for a in renamed.lets))


def unshadowed(block: Block, taken: Iterable[str]) -> Block:
    """The block with canonical index names where it has reductions: a cotangent may sum over an index that the
    expression it multiplies binds again, which is well defined but is not how specs are written."""
    if not any(isinstance(n, Reduce) for n in walk(*(a.value for a in (*block.lets, *block.results)))):
        return block
    names = Names(taken)

    def assign(a: Assign) -> Assign:
        return canonical_assign(a, names)

    return Block(tuple(map(assign, block.lets)), tuple(map(assign, block.results)))


# --- small things ------------------------------------------------------------------------------------


def _smooth(kind: Kind) -> bool:
    return kind in ("real", "complex")


def _let(name: str, like: Assign, kind: Kind | None = None) -> Ref:
    return Ref("let", name, like.indices, kind or like.value.kind)


def _aligned(assign: Assign, indices: tuple[Index, ...]) -> Expr:
    return instantiate(assign, indices)


def _indices(ref: Ref) -> tuple[Index, ...]:
    return tuple(s for s in ref.subs if isinstance(s, Index))


def _token_refs(agg: Aggregator, values: Sequence[Expr]) -> list[Ref]:
    """One Ref at plain indices for each differentiable input (and lag) and param that is read, as declared."""
    seen = {(r.space, r.name, r.lag) for r in refs(*values)}
    names = Names(declared_names(agg))
    out: list[Ref] = []
    for space, tensors in (("input", agg.leaf_inputs), ("param", agg.params)):
        for tensor in tensors:
            subs = tuple(Index(names[n], dim) for n, dim in enumerate(tensor.dims))
            for _, _, lag in sorted(key for key in seen if key[:2] == (space, tensor.name)):
                if _smooth(tensor.kind):
                    out.append(Ref(space, tensor.name, subs, tensor.kind, lag))  # type: ignore[arg-type]
    return out
