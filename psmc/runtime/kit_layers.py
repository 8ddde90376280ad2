"""A spec layer by layer: matrix states in chunks, what is small by the blocked scan, then the readout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psmc.runtime.kit_bind import Call, Spec
from psmc.runtime.kit_chunk import Factors, chunk_scan
from psmc.runtime.kit_chunk_layer import fused_call, step_states
from psmc.runtime.kit_halves import Step
from psmc.runtime.kit_layer import fill_masked
from psmc.runtime.kit_run import Rules, Tokens, as_output, as_state, prepared
from psmc.runtime.kit_scan import Values, _flag
from psmc.runtime.kit_small import Asked, Scanned, run_small, small_steps


class Reads(NamedTuple):
    """What one query reads: (name, of which component, where its axes are among outer, extra, value) for each part.
    `extra`: how many axes tell apart the vectors of a token."""

    extra: int
    parts: tuple[tuple[str, int, tuple[int, ...]], ...]


class FusedLayer(NamedTuple):
    """What the kernels compute of a layer and its readout themselves.

    keys, c, values, scalars: (name, 'input' | 'param' | 'at' | 'before' | 'factor', lag) of the tensors that they read;
    given(x, s, prev, p, n): the factors among them; numbers: how many numbers a token the readout reads. decay, over:
    as in ChunkCall. output: what the kernels give, in full.
    """

    keys: tuple[tuple[str, str, int], ...]
    c: tuple[str, str, int]
    values: tuple[tuple[str, str, int], ...]
    scalars: tuple[tuple[str, str, int], ...]
    numbers: int
    given: Callable[..., Values]
    scale: Callable[..., float]
    shift: int
    decay: int
    over: bool
    output: str


class Chunked(NamedTuple):
    """A layer S_t = D S_{t-1} + U (Wᵀ S_{t-1}) + B Cᵀ; several components that differ in C alone are one S.

    factors(x, s, prev, p, n) gives log or decay (one number a token), log_key or decay_key, log_value or decay_value,
    u0, w0, ... (w0 without u0: U is -B), b0, c0, ... (c0_1, ... of the second component) and the queries q0, p0, ...
    where there are some, [..., *outer, width], queries [..., *outer, *extra, width]; without the width: log, decay, and
    c of a vector.
    orders: where outer, key and value stand among a component's dims; vectors: the components without a value.
    plain: factors that are an input as it lies, by its name, not among those that `factors` gives; scales(n) gives the
    numbers that multiply some of them. b0 is to be multiplied by n0 [..., *outer], where it is there. shown: linear
    parts that are outputs as they stand. fused: what kernels compute of it, if all of it is of that kind.
    """

    components: tuple[str, ...]
    factors: Callable[..., Values]
    rank: int
    columns: int
    reads: tuple[Reads, ...]
    orders: tuple[tuple[int, ...], ...]
    outer: int
    vectors: tuple[bool, ...]
    plain: Mapping[str, str]
    scales: Callable[..., dict[str, float]]
    shown: tuple[str, ...]
    fused: FusedLayer | None

    @property
    def vector(self) -> bool:
        return all(self.vectors)


def run_layers(
    spec: Spec, rules: Rules, call: Call, x: Values, p: Values, initial: Values | None, mask: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Values, Values]:  # fmt: skip
    """As `run_scan`, for a spec whose rules have `layers` and `readout`."""
    x = fill_masked(x, mask)
    params, n, leading = SimpleNamespace(**p), call.n, call.leading
    rows = leading[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    given = Asked(initial, mask, reset, cu_seqlens, rows)
    slots = {s.name: s for s in spec.components}
    after: Values = {}
    before: Values = {}
    final: Values = {}
    tokens = Tokens(x)
    answer: Values | None = None
    for layer in rules.layers:
        if isinstance(layer, Scanned):
            prefix, previous, end = run_small(spec, rules, call, layer, x, params, given)
            after |= fill_masked(prefix, mask)  # what is read of padding may be infinite and must not meet a gradient
            before |= fill_masked(previous, mask)
        else:
            reads = tokens, SimpleNamespace(**after), SimpleNamespace(**before), params, n
            done = _fused(spec, call, layer, reads, given, getattr(rules, "matrices", None))
            if done is None:
                outputs, end = _chunked(spec, call, layer, reads, given, getattr(rules, "matrices", None))
                after |= fill_masked(outputs, mask)
            else:
                answer, end = done
        final |= end
    if answer is None:
        answer = rules.readout(SimpleNamespace(**after), SimpleNamespace(**before), tokens, params, n)
    outputs = {s.name: as_output(answer[s.name], s, call, leading) for s in spec.outputs}
    if mask is not None:
        outputs = {k: torch.where(_flag(mask, o), o, torch.zeros_like(o)) for k, o in outputs.items()}
    return outputs, {k: as_state(final[k], slots[k], call, (rows,)) for k in spec.live}


def step_layers(spec: Spec, rules: Rules, call: Call, state: Values, slots: Tensor | None) -> Values | None:
    """One token by kernel: outputs [B, *lanes, *dims], while `state` moves on in place, in the rows that `slots` names.

    None, and nothing has changed, where there is no kernel for it or a gradient is wanted.
    """
    wanted = torch.is_grad_enabled() and any(
        x.requires_grad for x in (*call.inputs.values(), *call.params.values(), *state.values())
    )
    *scanned, layer = rules.layers
    if wanted or spec.taps or isinstance(layer, Scanned) or layer.fused is None or call.compute != torch.float32:
        return None
    if not all(isinstance(x, Scanned) for x in scanned):
        return None
    states = step_states(layer, state)
    if states is None or not rules.matrices.steps(states):
        return None
    prefixes = small_steps(call, scanned, state, slots)
    if prefixes is None:
        return None
    now = replace(call, inputs={k: x.unsqueeze(1) for k, x in call.inputs.items()}, leading=(*call.leading, 1))
    x, p = prepared(spec, now, {}, True)
    reads = Tokens(x), *prefixes, SimpleNamespace(**p), call.n
    fused = layer.fused
    a = fused_call(now, fused, reads, (None, None), None, None, None)
    out = rules.matrices.step(a, states, slots)
    y = out.unflatten(2, call.lanes) if call.lanes else out.squeeze(2)
    return {fused.output: as_output(y, spec.outputs[0], now, now.leading).squeeze(1)}


def _sizes(spec: Spec, call: Call, layer: Chunked) -> tuple[list[list[int]], list[int], torch.dtype]:
    """(outer, key and value of each component, the widths of their values, the dtype of the states)."""
    slots = [next(s for s in spec.components if s.name == name) for name in layer.components]
    ordered = [[call.sizes[s.dims[k]] for k in order] for s, order in zip(slots, layer.orders, strict=True)]
    widths = [1 if vector else sizes[-1] for vector, sizes in zip(layer.vectors, ordered, strict=True)]
    return ordered, widths, call.of_kind(slots[0].kind)


def _fused(
    spec: Spec, call: Call, layer: Chunked, reads: tuple[Any, ...], given: Asked, kernels: Any
) -> tuple[Values, Values] | None:
    """(the outputs, the final states); None: not by fused kernels."""
    if kernels is None or layer.fused is None or not all(call.leading) or call.compute != torch.float32:
        return None
    ordered, widths, dtype = _sizes(spec, call, layer)
    if not kernels.takes(ordered[0][0], widths[0], call.device):
        return None
    begin = None
    if given.initial is not None:
        begin = _matrix_start(call, layer, ordered, widths, given, prod(call.lanes), dtype)
    parts = (None, None) if begin is None else (begin[..., : widths[0]], begin[..., -1] if len(widths) > 1 else None)
    flags = given.mask, given.reset, given.cu_seqlens
    fused = layer.fused
    out, state, z = kernels.call(fused_call(call, fused, reads, parts, *flags))
    states = [state] if z is None else [state, z.unsqueeze(-1)]
    final = _matrix_states(call, layer, ordered, states)
    return {fused.output: out.unflatten(2, call.lanes) if call.lanes else out.squeeze(2)}, final


def _chunked(
    spec: Spec, call: Call, layer: Chunked, reads_of: tuple[Any, ...], given: Asked, kernels: Any
) -> tuple[Values, Values]:
    """The layer's linear readouts by name, and its final states [N, *lanes, *dims]."""
    found, tokens = layer.factors(*reads_of), reads_of[0]
    ordered, widths, dtype = _sizes(spec, call, layer)
    outer, key = ordered[0][: layer.outer], ordered[0][layer.outer]
    batch, length = call.leading
    lanes = prod(call.lanes) * prod(outer)
    start = _matrix_start(call, layer, ordered, widths, given, lanes, dtype)
    if kernels is not None and not dtype.is_complex:
        begin = None if given.initial is None else start
        flags = given.mask, given.reset, given.cu_seqlens
        done = kernels.layer(call, layer, [*outer, key], widths, found, begin, *flags)
        if done is not None:
            single = [()] * len(layer.reads)
            return _linear_parts(call, layer, single, done[0], outer), _matrix_states(call, layer, ordered, done[1])
    scales = layer.scales(call.n)
    plain = {k: getattr(tokens, x) for k, x in layer.plain.items()}
    found = {**found, **{k: x * scales[k] if k in scales else x for k, x in plain.items()}}
    for k in range(layer.columns):
        if f"n{k}" in found:
            found[f"b{k}"] = found[f"b{k}"] * found[f"n{k}"].unsqueeze(-1)
    if len(layer.components) > 1:
        found = {**found, **{f"c{k}": _side_by_side(found, f"c{k}", layer.vectors) for k in range(layer.columns)}}

    def rows(name: str, extra: int = 0) -> Tensor:
        """[B, T, G, *extra, width]: lanes and outer dims as one axis."""
        value = found[name].to(dtype)
        if name in ("log", "decay") or (layer.vector and name[0] == "c"):
            value = value.unsqueeze(-1)
        own = value.shape[value.dim() - 1 - extra :]
        return value.expand(batch, length, *call.lanes, *outer, *own).reshape(batch, length, lanes, *own)

    def columns(letter: str, count: int) -> tuple[Tensor, ...]:
        return tuple(rows(f"{letter}{k}") for k in range(count))

    def queries(letter: str) -> list[list[Tensor]]:
        """The vectors of each query; none if it does not read there."""
        return [
            list(rows(f"{letter}{k}", r.extra).flatten(3, -2).unbind(3) if r.extra else (rows(f"{letter}{k}"),))
            if f"{letter}{k}" in found
            else []
            for k, r in enumerate(layer.reads)
        ]

    def step(*names: str) -> Step | None:
        name = next((k for k in names if k in found), None)
        return None if name is None else Step(rows(name), name.startswith("log"))

    q, p = queries("q"), queries("p")
    factors = Factors(
        step("log", "log_key", "decay", "decay_key"), step("log_value", "decay_value"),
        columns("u", layer.rank if "u0" in found else 0),
        columns("w", layer.rank), columns("b", layer.columns), columns("c", layer.columns),
        tuple(x for xs in q for x in xs), tuple(x for xs in p for x in xs),
    )  # fmt: skip
    after, prior, state = chunk_scan(factors, start, given.mask, given.reset, given.cu_seqlens)
    from_q, from_p = iter(after), iter(prior)
    reads, several = [], []
    for k, (of_q, of_p, r) in enumerate(zip(q, p, layer.reads, strict=True)):
        sides = [torch.stack([next(it) for _ in vs], 3) for it, vs in ((from_q, of_q), (from_p, of_p)) if vs]
        total = sides[0] if len(sides) == 1 else sides[0] + sides[1]
        query = found.get(f"q{k}", found.get(f"p{k}"))
        assert query is not None
        several.append(tuple(query.shape[query.dim() - 1 - r.extra : -1]))
        reads.append(torch.split(total if r.extra else total.squeeze(3), widths, -1))
    states = torch.split(state, widths, -1)
    return _linear_parts(call, layer, several, reads, outer), _matrix_states(call, layer, ordered, states)


def _side_by_side(found: Values, name: str, vectors: tuple[bool, ...]) -> Tensor:
    """C of all components as one, [..., widths together]."""
    parts = [found[name if not j else f"{name}_{j}"] for j in range(len(vectors))]
    parts = [x.unsqueeze(-1) if vector else x for x, vector in zip(parts, vectors, strict=True)]
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return torch.cat([x.expand(*lead, x.shape[-1]) for x in parts], -1)


def _matrix_start(
    call: Call, layer: Chunked, ordered: list[list[int]], widths: list[int], given: Asked, lanes: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[N, G, K, V] before the first tokens."""
    key = ordered[0][layer.outer]
    if given.initial is None:
        return torch.zeros(given.sequences, lanes, key, sum(widths), dtype=dtype, device=call.device)
    parts = []
    for name, order, width in zip(layer.components, layer.orders, widths, strict=True):
        x = given.initial[name]
        front = x.dim() - len(order)
        x = x.permute(*range(front), *(front + k for k in order))
        parts.append(x.reshape(given.sequences, lanes, key, width))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(dtype)


def _linear_parts(
    call: Call, layer: Chunked, several: Sequence[tuple[int, ...]], reads: Sequence[Sequence[Tensor]], outer: list[int]
) -> Values:
    """The linear parts by name; reads: [B, T, G, (vectors,) V] of each component; several: how many vectors."""
    y: Values = {}
    front = 2 + len(call.lanes)
    for r, extra, each in zip(layer.reads, several, reads, strict=True):
        for name, component, axes in r.parts:
            part = each[component]
            part = part.reshape(*call.leading, *call.lanes, *outer, *extra, part.shape[-1])
            part = part[..., 0] if layer.vectors[component] else part
            y[name] = part.permute(*range(front), *(front + a for a in axes))
    return y


def _matrix_states(call: Call, layer: Chunked, ordered: list[list[int]], states: Sequence[Tensor]) -> Values:
    """[N, G, K, V] as the components' own tensors."""
    final: Values = {}
    front = 1 + len(call.lanes)
    for name, order, sizes, x in zip(layer.components, layer.orders, ordered, states, strict=True):
        x = x.reshape(x.shape[0], *call.lanes, *sizes)
        final[name] = x.permute(*range(front), *(front + order.index(k) for k in range(len(order))))
    return final
