"""What one lane of a tree computes, forwards and backwards, as scalar functions in Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from psmc.codegen.triton_expr import Key, LaneFunction, print_function, reads
from psmc.derive.names import declared_names, fresh_name
from psmc.derive.simplify import ZERO
from psmc.derive.unroll import Unrolled
from psmc.derive.vjp import vjp
from psmc.ir import Aggregator, Assign, Block, Ref


@dataclass(frozen=True)
class TreeLane:
    """`names`: the scalars of an element; `given`: the cotangent of an output's scalar; `moved`: that of a component's.

    lift          inputs, params -> an element              lift_back     its cotangent -> shares g_*
    merge         left, right, params -> an element         merge_back    its cotangent -> l_*, r_* and shares g_*
    readout       inputs, params, state, prev -> outputs    readout_back  those of outputs -> s_*, p_* and shares g_*

    `shares`: what these return for an input or a param -> whose share it is.
    """

    names: tuple[str, ...]
    given: Mapping[str, Key]
    moved: Mapping[str, Key]
    shares: Mapping[str, Key]
    lift: LaneFunction
    merge: LaneFunction
    readout: LaneFunction
    lift_back: LaneFunction
    merge_back: LaneFunction
    readout_back: LaneFunction

    @property
    def previous(self) -> bool:
        """Whether an output reads the prefix before its token."""
        return any(k[0] == "prev" for k in self.readout.arguments)


def tree_lane(agg: Aggregator, found: Unrolled) -> TreeLane:
    taken = declared_names(agg) | {s for x in found.scalars.values() for s in x}
    names = tuple(a.name for a in found.combine.results)
    tokens = _tokens(agg, found)
    outputs = found.output.results
    given: dict[str, Key] = {a.name: ("input", fresh_name(f"d_{a.name}", taken), 0) for a in outputs}
    moved: dict[str, Key] = {c: ("input", fresh_name(f"grad_{c}", taken), 0) for c in names}
    kinds = {s: t.kind for t in (*agg.leaf_inputs, *agg.params) for s in found.scalars[t.name]}
    smooth = [k for k in tokens if kinds[k[1]] == "real"]
    params = [k for k in smooth if k[0] == "param"]
    shares = {f"g_{s}" + (f"_lag{lag}" if lag else ""): (space, s, lag) for space, s, lag in smooth}
    named = {key: name for name, key in shares.items()}
    sides: dict[str, list[Key]] = {
        space: [(space, c, 0) for c in names] for space in ("left", "right", "state", "prev")
    }
    lam = [*moved.values()]

    def back(block: Block, cotangents: Sequence[Key], wanted: Mapping[str, Key]) -> Block:
        values = [a.value for a in block.results]
        ct = [_ref(k) for k in cotangents]
        found = vjp(values, ct, [_ref(k) for k in wanted.values()])
        pairs = zip(wanted, found, strict=True)
        return Block(results=tuple(Assign(n, (), v) for n, v in pairs if v is not None and v != ZERO))

    through = {f"{s[0]}_{c}": (s, c, 0) for s in ("left", "right") for c in names}
    read = {f"{s[0]}_{c}": (s, c, 0) for s in ("state", "prev") for c in names}
    by_param = {named[k]: k for k in params}
    by_token = {named[k]: k for k in smooth}
    lifted, merged = found.leaf, found.combine
    merge_back = back(merged, lam, {**through, **by_param})
    lift_back = back(lifted, lam, by_token)
    readout_back = back(found.output, [given[a.name] for a in outputs], {**read, **by_token})
    real = dict.fromkeys((*names, *through, *read, *shares), "real")

    def show(name: str, block: Block, order: Sequence[Key]) -> LaneFunction:
        return print_function(name, block, order, real)  # type: ignore[arg-type]

    pair = [*sides["left"], *sides["right"]]
    state = [*sides["state"], *sides["prev"]]
    stored = {r.name for b in (merge_back, lift_back, readout_back) for r in b.results}
    return TreeLane(
        names,
        given,
        moved,
        {name: key for name, key in shares.items() if name in stored},
        show("lane_lift", lifted, tokens),
        show("lane_merge", merged, [*pair, *params]),
        show("lane_readout", found.output, [*tokens, *state]),
        show("lane_lift_back", lift_back, [*tokens, *lam]),
        show("lane_merge_back", merge_back, [*pair, *params, *lam]),
        show("lane_readout_back", readout_back, [*tokens, *state, *given.values()]),
    )


def _tokens(agg: Aggregator, found: Unrolled) -> list[Key]:
    """Inputs at the lags that are read, then params."""
    used = reads(found.leaf) | reads(found.output) | reads(found.combine)
    inputs: list[Key] = [("input", s, lag) for t in agg.leaf_inputs for lag in range(65) for s in found.scalars[t.name]]
    params: list[Key] = [("param", s, 0) for t in agg.params for s in found.scalars[t.name]]
    return [k for k in (*inputs, *params) if k in used]


def _ref(key: Key) -> Ref:
    return Ref(key[0], key[1], (), "real", key[2])  # type: ignore[arg-type]
