"""The oracle: what an aggregator means, run one token after the other in plain PyTorch. Slow on purpose.

Rows of a batch that skip or restart at different tokens are separate runs, so a token that does not count is really
not computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from psmc.ir import Aggregator, Block
from psmc.ir.query import level_dims, restrict
from psmc.ir.rewrite import refs
from psmc.reference.bind import Problem, bind, require, tail
from psmc.reference.evaluate import Slot, run

Tensors = dict[str, Tensor]
Extern = Callable[[Tensors, Tensors], Mapping[str, Tensor]]


def fold(
    agg: Aggregator,
    inputs: Mapping[str, Tensor],
    params: Mapping[str, Tensor] | None = None,
    *,
    initial_state: Mapping[str, Tensor] | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    extern: Extern | None = None,
) -> tuple[Tensors, Tensors]:
    """Outputs `[B, T, *lanes, *dims]` and the state after the last token, `[B, *lanes, *dims]`, by name.

    inputs         `[B, T, *lanes, *dims]` by name; on the last lane axis the shorter repeats consecutively
    params         `[*lanes, *dims]` or `[*dims]`
    initial_state  all components or any set that `combine` reads nothing else of l for (the live ones), and for each
                   tapped input its tail `<name>_tail`, the last tokens `[B, max lag, *lanes, *dims]`, oldest first
    cu_seqlens     N + 1 ascending token offsets; B is 1, and states are `[N, ...]`
    mask, reset    bool `[B, T]`
    extern         the rule of `combine extern`: it maps two dicts of `[B, *lanes, *dims]` to one

    The state has the components of the initial state if there is one, else all; and the tails. Computes in the inputs'
    dtype, at least fp32, differentiable throughout. Raises PsmcError PSM690 if the arguments do not fit the spec.
    """
    problem = bind(agg, inputs, params or {}, initial_state)
    batch, length = problem.batch, problem.length
    for name, flags in (("mask", mask), ("reset", reset)):
        fits = flags is None or (flags.dtype == torch.bool and tuple(flags.shape) == (batch, length))
        require(fits, f"'{name}' must be a bool tensor of shape [{batch}, {length}].")
    whole = slice(None)
    if cu_seqlens is not None:
        ends = [int(n) for n in cu_seqlens]
        packed = batch == 1 and len(ends) > 1 and ends[0] == 0 and ends[-1] == length and ends == sorted(ends)
        require(packed, f"'cu_seqlens' must rise from 0 to {length}, with a batch of 1.")
        parts = [(whole, slice(a, b), slice(i, i + 1)) for i, (a, b) in enumerate(pairwise(ends))]
    elif batch and (mask is not None or reset is not None):
        parts = [(slice(i, i + 1), whole, slice(i, i + 1)) for i in range(batch)]
    else:
        parts = [(whole, whole, whole)]
    for name, value in problem.initial.items():
        rows = batch if cu_seqlens is None else len(parts)
        require(len(value) == rows, f"'initial_state' of '{name}' must have {rows} rows, not {len(value)}.")

    order = -1 if reverse else 1
    outputs: list[Tensors] = []
    states: list[Tensors] = []
    for row, tokens, place in parts:
        keep, restart = ([] if f is None else f[row, tokens].flatten().tolist()[::order] for f in (mask, reset))
        here = {name: x[row, tokens] for name, x in problem.inputs.items()}
        out, state = _Run(problem, extern).sequence(
            {name: x.flip(1) if reverse else x for name, x in here.items()},
            {name: s[place] for name, s in problem.initial.items()},
            keep or None,
            restart or None,
        )
        outputs.append({name: o.flip(1) if reverse else o for name, o in out.items()})
        states.append(state)
    return _join(outputs, 0 if cu_seqlens is None else 1), _join(states, 0)


def _join(parts: list[Tensors], axis: int) -> Tensors:
    return {name: torch.cat([p[name] for p in parts], axis) for name in parts[0]}


class _Run:
    """One batch of sequences that count and restart at the same tokens."""

    def __init__(self, problem: Problem, extern: Extern | None) -> None:
        self.problem = problem
        self.agg = problem.agg
        self.extern = extern
        self.given = tuple(c.name for c in self.agg.state if c.name in problem.initial)
        self.names = self.given or tuple(c.name for c in self.agg.state)
        self.rule = self.agg.recurrence or self.agg.combine
        if isinstance(self.rule, Block):
            self.rule = restrict(self.rule, self.names)
            values = (a.value for a in (*self.rule.lets, *self.rule.results))
            read = {ref.name for ref in refs(*values) if ref.space in ("left", "prev")}
            require(read <= set(self.names), f"'initial_state' needs {sorted(read - set(self.names))} too.")
        else:
            require(extern is not None, "the rule of 'combine extern' is missing: pass extern=.")
        self.tree = self.agg.recurrence is None and self.agg.claim == "no" and self.agg.order == "tree"
        sizes = {d.name: d.size or 0 for d in self.agg.dims}
        self.levels = max((sizes[d] for d in level_dims(self.agg)), default=0)
        require(not (self.tree and problem.initial), "a tree has no one initial state: fold the whole sequence.")

    def sequence(
        self, inputs: Tensors, initial: Tensors, keep: list[bool] | None, restart: list[bool] | None
    ) -> tuple[Tensors, Tensors]:
        """inputs `[B, T, ...]`, initial `[B, ...]`; `keep` and `restart` say it for each token."""
        batch, length = next(iter(inputs.values())).shape[:2]
        keep = keep or [True] * length
        restart = restart or [False] * length
        kept = [t for t in range(length) if keep[t]]
        lagged, tails = self.taps(inputs, initial, keep, restart)
        read = {("input", name, 0): x[:, kept] for name, x in inputs.items()} | lagged
        # What a token brings: its element, or, for a recurrence, its inputs.
        leaves: Mapping[Any, Tensor] = read
        if self.agg.recurrence is None:
            leaves = self.components(run(self.agg.leaf, self.problem.env(read)), (batch, len(kept)))

        declared = Block(results=tuple(c.start for c in self.agg.state))
        start = self.components(run(declared, self.problem.env({})), (batch,))
        given = {name: initial[name] for name in self.names} if self.given else None
        state = self.begin(start, given)
        tokens = {key: leaf.unbind(1) for key, leaf in leaves.items()}
        before: list[Tensors] = []
        after: list[Tensors] = []
        counters: list[tuple[Tensors, Tensors]] = []
        for t in range(length):
            if restart[t]:
                state = self.begin(start, None)
            if keep[t]:
                before.append(state.value)
                old, state = state, state.then({key: token[len(after)] for key, token in tokens.items()})
                after.append(state.value)
                if self.levels:
                    counters.append((self.held(old), self.held(state)))

        prefixes = {
            (space, name, 0): torch.stack([value[name] for value in folds], 1)
            for space, folds in (("state", after), ("prev", before))
            for name in (self.names if kept else ())
        }
        prefixes |= {
            (space, name, 0): torch.stack([pair[side][name] for pair in counters], 1)
            for side, space in enumerate(("prev_level", "level"))
            for name in (self.names if kept and self.levels else ())
        }
        outputs: Tensors = {}
        values = run(self.agg.output, self.problem.env(read | prefixes)) if kept else {}
        for result in self.agg.output.results:
            rank = len(result.indices)
            dims = [self.problem.base.dims[i.dim] for i in result.indices]
            here = torch.zeros(batch, length, *self.problem.lanes, *dims, device=self.problem.base.device)
            here = self.problem.base.of_kind(here, result.value.kind)
            if kept:
                value = self.problem.full(values[result.name], (batch, len(kept)), result.value.kind, rank)
                here = here.index_copy(1, torch.tensor(kept, device=here.device), value)
            outputs[result.name] = here
        return outputs, {**{name: state.value[name] for name in self.names}, **tails}

    def taps(
        self, inputs: Tensors, initial: Tensors, keep: list[bool], restart: list[bool]
    ) -> tuple[dict[Slot, Tensor], Tensors]:
        """Every tapped input at every lag, at the tokens that count, `[B, kept, ...]`; and the tails after the last.
        A token that does not count is read as 0, and so is what lies before a restart."""
        lagged: dict[Slot, Tensor] = {}
        tails: Tensors = {}
        for name, longest in self.problem.lags.items():
            x = inputs[name]
            tokens = x.unbind(1)
            zero = x.new_zeros(x.shape[0], *x.shape[2:])
            past = list(initial[tail(name)].unbind(1)) if tail(name) in initial else [zero] * longest
            reads: list[list[Tensor]] = []
            for t, token in enumerate(tokens):
                if restart[t]:
                    past = [zero] * longest
                if keep[t]:
                    reads.append([past[-lag] for lag in range(1, longest + 1)])
                past = [*past[1:], token if keep[t] else zero]
            for lag in range(1, longest + 1):
                rows = [read[lag - 1] for read in reads]
                lagged["input", name, lag] = torch.stack(rows, 1) if rows else x[:, :0]
            tails[tail(name)] = torch.stack(past, 1)
        return lagged, tails

    def held(self, state: _Prefix | _Tree) -> Tensors:
        """What a counter holds at each level, `[B, *lanes, levels, *dims]`."""
        assert isinstance(state, _Tree)
        sizes = [size for size, _ in state.roots]
        require(max(sizes, default=0) < 2**self.levels, f"more than {2**self.levels - 1} tokens need more levels.")
        roots = {size.bit_length() - 1: root for size, root in state.roots}
        ranks = {c.name: len(c.dims) for c in self.agg.state}
        return {
            name: torch.stack([roots.get(k, state.start)[name] for k in range(self.levels)], value.dim() - ranks[name])
            for name, value in state.start.items()
        }

    def begin(self, start: Tensors, given: Tensors | None) -> _Prefix | _Tree:
        """Before the first token. A start that is not the identity, and that of a left fold, counts."""
        if self.tree:
            return _Tree(self, start)
        declared = self.agg.recurrence is not None or self.agg.order == "left"
        counts = given is not None or declared or any(c.initial is not None for c in self.agg.state)
        return _Prefix(self, given if given is not None else start, counts)

    def combine(self, left: Tensors, right: Mapping[Any, Tensor]) -> Tensors:
        """l ∘ r; or, for a recurrence, the state after l with a token's inputs."""
        batch = next(iter(left.values())).shape[:1]
        if not isinstance(self.rule, Block):
            assert self.extern is not None
            found, names = self.extern(left, dict(right)), [c.name for c in self.agg.state]
            whole = isinstance(found, Mapping) and found.keys() == set(names)
            require(whole, f"the rule has to return a dict of {', '.join(names)}")
            return self.components(found, batch)
        if self.agg.recurrence is not None:
            env = {("prev", name, 0): value for name, value in left.items()} | dict(right)
        else:
            env = {("left", name, 0): value for name, value in left.items()}
            env |= {("right", name, 0): value for name, value in right.items()}
        return self.components(run(self.rule, self.problem.env(env)), batch)

    def components(self, values: Mapping[str, Tensor], lead: tuple[int, ...]) -> Tensors:
        """Components in their dtypes, over all lanes."""
        parts = [c for c in self.agg.state if c.name in values]
        return {c.name: self.problem.full(values[c.name], lead, c.kind, len(c.dims)) for c in parts}


@dataclass(frozen=True)
class _Prefix:
    """The fold from the left. What does not count yet is not combined with: the first element is the first prefix."""

    run: _Run
    value: Tensors
    counts: bool

    def then(self, leaf: Mapping[Any, Tensor]) -> _Prefix:
        return _Prefix(self.run, self.run.combine(self.value, leaf) if self.counts else dict(leaf), True)


@dataclass(frozen=True)
class _Tree:
    """The online binary counter: roots of complete trees, the earliest and largest first, sizes strictly falling."""

    run: _Run
    start: Tensors
    roots: tuple[tuple[int, Tensors], ...] = ()

    def then(self, leaf: Mapping[Any, Tensor]) -> _Tree:
        roots = [*self.roots, (1, dict(leaf))]
        while len(roots) > 1 and roots[-2][0] == roots[-1][0]:
            (size, left), (_, right) = roots[-2:]
            roots[-2:] = [(2 * size, self.run.combine(left, right))]
        return _Tree(self.run, self.start, tuple(roots))

    @cached_property
    def value(self) -> Tensors:
        """combine(combine(root_high, root_mid), root_low)."""
        if not self.roots:
            return self.start
        value = self.roots[0][1]
        for _, root in self.roots[1:]:
            value = self.run.combine(value, root)
        return value
