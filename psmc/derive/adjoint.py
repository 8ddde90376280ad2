"""The adjoint recurrence of a scan, as a scan: an aggregator that runs from the last token to the first.

With s_t = F(s_{t-1}, x_t), o_t = R(s_t, s_{t-1}, x_t), and λ_t the cotangent of s_t from everything after token t,

    λ_{t-1} = J_tᵀ λ_t + g_t      J_t = ∂F/∂s_{t-1}      g_t = J_tᵀ (∂R/∂s_t)ᵀ do_t + (∂R/∂s_{t-1})ᵀ do_t

is affine in λ with per-token coefficients, whatever F is. For one component it is the familiar a_t λ_t + g_t. In
general only those entries of J are carried that are structurally non-zero in some product; the cross terms between
components are among them. `step.step_backward` turns each λ_t into the gradients of token t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from psmc.derive.names import declared_names, fresh_name
from psmc.derive.simplify import ONE, ZERO, make, sum_over, total
from psmc.derive.step import step, unshadowed
from psmc.derive.vjp import vjp
from psmc.ir import Aggregator, Assign, Block, Component, Expr, Index, Reduce, Ref, Space, Tensor
from psmc.ir.canonical import Names
from psmc.ir.rewrite import inline, instantiate, refs, replace_refs, walk


@dataclass(frozen=True)
class Adjoint:
    """The recurrence of λ as an aggregator, to be run from the last token to the first.

    Its inputs are per-token tensors: `prev[c]` and `state[c]` (live components before and after the token),
    `inputs[x, lag]` (what the spec reads as x that many tokens earlier) and `outputs[o]` (the cotangent of an
    output); only what is needed is there. Its params are the spec's. The component `cotangent[c]` of the prefix after
    token t is λ_{t-1}; started from λ_T, the cotangent of the final state. `jacobian[b, c]` carries the product of
    ∂s_t[c]/∂s_{t-1}[b]; pairs that are 0 in every product, and diagonal ones that are 1, have no component.
    """

    aggregator: Aggregator
    prev: Mapping[str, str]
    state: Mapping[str, str]
    inputs: Mapping[tuple[str, int], str]
    outputs: Mapping[str, str]
    cotangent: Mapping[str, str]
    jacobian: Mapping[tuple[str, str], str]


def adjoint(agg: Aggregator, live: Sequence[str]) -> Adjoint:
    """The adjoint recurrence of a lane-wise real spec: combine is the composition of affine maps.

    Lane-wise: a live component reads the live components at its own indices only (it may have more dims than what it
    reads). Asserts that it is so, and that there is no complex component (`realify` comes first).
    """
    return _AdjointBuilder(agg, live).build()


class _AdjointBuilder:
    def __init__(self, agg: Aggregator, live: Sequence[str]) -> None:
        self.agg = agg
        self.components = [c for c in agg.state if c.name in live and c.kind == "real"]
        assert all(c.kind != "complex" for c in agg.state), "adjoint: realify first"
        self.taken = declared_names(agg)
        names = Names(self.taken)
        self.lane = {d.name: Index(names[n], d.name) for n, d in enumerate(agg.dims)}
        self.axes = {c.name: tuple(self.lane[d] for d in c.dims) for c in self.components}
        assert all(len(set(axes)) == len(axes) for axes in self.axes.values()), "adjoint: a dim occurs twice"
        update = inline(step(agg, live))
        self.update = {n: instantiate(update.result(n), axes) for n, axes in self.axes.items()}
        self._check_lanes()
        self.readout = inline(agg.output)
        self.order = [c.name for c in self.components]
        self.slopes = self._slopes()
        self.reach = self._reach()

    def _check_lanes(self) -> None:
        for c, value in self.update.items():
            for node in walk(value):
                read = refs(node) if isinstance(node, Reduce) else [node] if isinstance(node, Ref) else []
                before = [r for r in read if r.space == "prev" and r.name in self.axes]
                elsewhere = isinstance(node, Reduce) or any(r.subs != self.axes[r.name] for r in before)
                assert not before or not elsewhere, f"adjoint: '{c}' is not lane-wise"

    def _slopes(self) -> dict[tuple[str, str], Expr]:
        """(b, c) -> ∂s_t[c]/∂s_{t-1}[b] where it is not structurally zero."""
        before = [Ref("prev", b, self.axes[b]) for b in self.order]
        slopes: dict[tuple[str, str], Expr] = {}
        for c in self.order:
            axes = self.axes[c]
            for b, slope in zip(self.order, vjp([self.update[c]], [ONE], before, keep=axes), strict=True):
                if slope is not None and slope != ZERO:
                    assert slope.free | set(self.axes[b]) <= set(axes), f"adjoint: '{c}' is not lane-wise in '{b}'"
                    slopes[b, c] = slope
        return slopes

    def _reach(self) -> set[tuple[str, str]]:
        """Pairs that are non-zero in some product of Jacobians, the diagonal included."""
        reach = set(self.slopes) | {(c, c) for c in self.order}
        for mid in self.order:
            reach |= {(b, c) for b in self.order for c in self.order if (b, mid) in reach and (mid, c) in reach}
        return reach

    def _stays_one(self, c: str) -> bool:
        """A diagonal entry that is 1 in every product: 1 at each token, and no other path leads back to c."""
        cycle = any(b != c and (b, c) in self.reach and (c, b) in self.reach for b in self.order)
        return self.slopes.get((c, c)) == ONE and not cycle

    def build(self) -> Adjoint:
        pairs = [(b, c) for b in self.order for c in self.order if (b, c) in self.reach]
        jacobian = {
            (b, c): fresh_name(f"J_{b}_{c}", self.taken) for b, c in pairs if b != c or not self._stays_one(c)
        }
        cotangent = {c: fresh_name(f"adj_{c}", self.taken) for c in self.order}
        one_step = self._shift(jacobian, cotangent)
        state = [self._component(jacobian[p], p[1], ONE if p[0] == p[1] else ZERO) for p in pairs if p in jacobian]
        state += [self._component(cotangent[c], c, ZERO) for c in self.order]
        inputs = _Inputs(self.agg, self.taken)
        lift = Block(results=tuple(replace(a, value=inputs.rewrite(a.value)) for a in one_step))
        readout = [Assign(fresh_name(f"g_{c}", self.taken), axes, Ref("state", cotangent[c], axes))
                   for c, axes in self.axes.items()]  # fmt: skip
        params = {r.name for a in lift.results for r in refs(a.value) if r.space == "param"}
        aggregator = Aggregator(
            name=fresh_name(f"{self.agg.name}_adjoint", self.taken),
            dims=self.agg.dims,
            inputs=inputs.tensors(),
            params=tuple(p for p in self.agg.params if p.name in params),
            state=tuple(state),
            lift=lift,
            combine=Block(results=self._compose(pairs, jacobian, cotangent)),
            recurrence=None,
            readout=Block(results=tuple(readout)),
            claim="yes",
        )
        return Adjoint(
            aggregator=_positional(aggregator),
            prev=inputs.of("prev"),
            state=inputs.of("state"),
            inputs=inputs.tokens(),
            outputs=inputs.of("let"),
            cotangent=cotangent,
            jacobian=jacobian,
        )

    def _component(self, name: str, like: str, identity: Expr) -> Component:
        axes = self.axes[like]
        return Component(name, tuple(i.dim for i in axes), "real", None, Assign(name, axes, identity))

    def _shift(self, jacobian: Mapping[tuple[str, str], str], cotangent: Mapping[str, str]) -> list[Assign]:
        """One token's affine map λ_t ↦ Jᵀ λ_t + g: its entries, then g = Jᵀ (∂R/∂s_t)ᵀ do + (∂R/∂s_{t-1})ᵀ do."""
        out = [Assign(n, self.axes[c], self.slopes.get((b, c), ZERO)) for (b, c), n in jacobian.items()]
        before = [Ref("prev", c, self.axes[c]) for c in self.order]
        after = [Ref("state", c, self.axes[c]) for c in self.order]
        read = [a for a in self.readout.results if a.value.kind == "real"]
        direct = vjp([a.value for a in read], [Ref("let", a.name, a.indices) for a in read], [*after, *before])
        moved = [ZERO if share is None else share for share in direct[: len(after)]]
        through = vjp([self.update[c] for c in self.order], moved, before)
        for c, a, b in zip(self.order, through, direct[len(after) :], strict=True):
            out.append(Assign(cotangent[c], self.axes[c], total([share for share in (a, b) if share is not None])))
        return out

    def _compose(
        self,
        pairs: Sequence[tuple[str, str]],
        jacobian: Mapping[tuple[str, str], str],
        cotangent: Mapping[str, str],
    ) -> tuple[Assign, ...]:
        """(J, g) of the token (right) after (J, g) of all later tokens (left)."""

        def entry(space: Space, b: str, c: str) -> Expr:
            name = jacobian.get((b, c))
            if name is None:
                return ONE if b == c else ZERO
            return Ref(space, name, self.axes[c])

        out: list[Assign] = []
        for b, c in pairs:
            if (b, c) in jacobian:
                terms = [make("mul", entry("right", b, mid), entry("left", mid, c)) for mid in self.order]
                out.append(Assign(jacobian[b, c], self.axes[c], total(terms)))
        for b in self.order:
            shares = [
                sum_over(
                    tuple(set(self.axes[c]) - set(self.axes[b])),
                    make("mul", entry("right", b, c), Ref("left", cotangent[c], self.axes[c])),
                )
                for c in self.order
                if (b, c) in self.reach
            ]
            new = Ref("right", cotangent[b], self.axes[b])
            out.append(Assign(cotangent[b], self.axes[b], total([*shares, new])))
        return tuple(out)


def _positional(agg: Aggregator) -> Aggregator:
    """Indices named by position, as in every spec, where they were named by dim."""
    taken = declared_names(agg)
    names = Names(taken)

    def assign(a: Assign) -> Assign:
        indices = tuple(Index(names[n], i.dim) for n, i in enumerate(a.indices))
        return Assign(a.name, indices, instantiate(a, indices))

    def block(b: Block) -> Block:
        return unshadowed(Block(results=tuple(assign(a) for a in b.results)), taken)

    assert isinstance(agg.combine, Block)
    return replace(
        agg,
        state=tuple(replace(c, identity=assign(c.identity)) for c in agg.state),
        lift=block(agg.leaf),
        combine=block(agg.combine),
        readout=block(agg.readout),
    )


class _Inputs:
    """Turns what one token's backward reads into inputs of the adjoint: prefixes, taps and output cotangents too."""

    def __init__(self, agg: Aggregator, taken: set[str]) -> None:
        self.agg, self.taken = agg, taken
        self.names: dict[tuple[str, str, int], str] = {}
        self.found: dict[tuple[str, str, int], Tensor] = {}

    def rewrite(self, value: Expr) -> Expr:
        def rule(ref: Ref) -> Expr | None:
            if ref.space == "param":
                return None
            key = (ref.space, ref.name, ref.lag)
            if key not in self.names:
                self._declare(ref, key)
            return Ref("input", self.names[key], ref.subs, ref.value_kind)

        return replace_refs(value, rule)

    def _declare(self, ref: Ref, key: tuple[str, str, int]) -> None:
        if ref.space == "input":
            tensor = next(t for t in self.agg.leaf_inputs if t.name == ref.name)
            name = fresh_name(f"{ref.name}_lag{ref.lag}", self.taken) if ref.lag else ref.name
            self.found[key] = replace(tensor, name=name, interval=None if ref.lag else tensor.interval)
        elif ref.space == "let":
            dims = tuple(i.dim for i in self.agg.output.result(ref.name).indices)
            self.found[key] = Tensor(fresh_name(f"d_{ref.name}", self.taken), dims)
        else:
            component = self.agg.component(ref.name)
            name = fresh_name(f"{ref.space}_{ref.name}", self.taken)
            self.found[key] = Tensor(name, component.dims, component.kind)
        self.names[key] = self.found[key].name

    def _sorted(self) -> list[tuple[str, str, int]]:
        spaces = ("prev", "state", "input", "let")
        return sorted(self.found, key=lambda key: (spaces.index(key[0]), key[1:]))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.found[key] for key in self._sorted())

    def of(self, space: Space) -> dict[str, str]:
        """Original name -> input name, of what was read from one space."""
        return {key[1]: self.names[key] for key in self._sorted() if key[0] == space}

    def tokens(self) -> dict[tuple[str, int], str]:
        """(input, lag) -> input name."""
        return {key[1:]: self.names[key] for key in self._sorted() if key[0] == "input"}
