"""A spec layer by layer: matrix states in chunks, what is pointwise by the blocked scan, then the readout."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from psmc.runtime.kit_bind import Call, Spec
from psmc.runtime.kit_chunk import Factors, chunk_scan
from psmc.runtime.kit_layer import fill_masked, scan_tokens
from psmc.runtime.kit_run import Rules, as_output, as_state, start_state
from psmc.runtime.kit_scan import Values


class Scanned(NamedTuple):
    """A layer of small components: its own lift, combine and advance, of what its elements hold."""

    components: tuple[str, ...]
    lift: Callable[..., Values]
    combine: Callable[..., Values]
    advance: Callable[..., Values]


class Chunked(NamedTuple):
    """A layer S_t = D S_{t-1} + U (Wᵀ S_{t-1}) + B Cᵀ.

    factors(x, s, prev, p, n) gives log (or log_key) and log_value, u0, w0, ..., b0, c0, ... and the queries q0, p0, ...
    where there are some, [..., *outer, width]; log, and c of a vector component, which has no value dim, [..., *outer].
    `reads` names the linear parts y in their order; `order`: where outer, key and value stand among the dims.
    """

    component: str
    factors: Callable[..., Values]
    rank: int
    columns: int
    reads: tuple[str, ...]
    order: tuple[int, ...]
    outer: int
    vector: bool


def run_layers(
    spec: Spec, rules: Rules, call: Call, x: Values, p: Values, initial: Values | None, mask: Tensor | None,
    reset: Tensor | None,
) -> tuple[Values, Values]:  # fmt: skip
    """As `run_scan`, for a spec whose rules have `layers` and `readout`."""
    x = fill_masked(x, mask)
    params, n, leading = SimpleNamespace(**p), call.n, call.leading
    slots = {s.name: s for s in spec.components}
    after: Values = {}
    before: Values = {}
    final: Values = {}
    tokens = SimpleNamespace(**x)
    for layer in rules.layers:
        if isinstance(layer, Scanned):
            prefix, previous, end = _scanned(spec, rules, call, layer, x, params, initial, mask, reset)
            after |= fill_masked(prefix, mask)  # what is read of padding may be infinite and must not meet a gradient
            before |= fill_masked(previous, mask)
            final |= end
            continue
        found = layer.factors(tokens, SimpleNamespace(**after), SimpleNamespace(**before), params, n)
        kernels = getattr(rules, "matrices", None)
        outputs, state = _chunked(spec, call, layer, found, initial, mask, reset, kernels)
        after |= fill_masked(outputs, mask)
        final[layer.component] = state
    answer = rules.readout(SimpleNamespace(**after), SimpleNamespace(**before), tokens, params, n)
    outputs = {s.name: as_output(answer[s.name], s, call, leading) for s in spec.outputs}
    if mask is not None:
        outputs = {
            k: torch.where(_over(mask, o), o, torch.zeros((), dtype=o.dtype, device=o.device))
            for k, o in outputs.items()
        }
    return outputs, {k: as_state(final[k], slots[k], call, leading[:1]) for k in spec.live}


def _scanned(
    spec: Spec, rules: Rules, call: Call, layer: Scanned, x: Values, params: SimpleNamespace, initial: Values | None,
    mask: Tensor | None, reset: Tensor | None,
) -> tuple[Values, Values, Values]:  # fmt: skip
    slots = {s.name: s for s in spec.components}
    n = call.n

    def lift(tokens: Values) -> Values:
        leading = next(iter(tokens.values())).shape[:2]
        return {
            k: as_state(v, slots[k], call, leading) for k, v in layer.lift(SimpleNamespace(**tokens), params, n).items()
        }

    def rule(function: Callable[..., Values]) -> Callable[[Values, Values], Values]:
        def apply(l: Values, r: Values) -> Values:  # noqa: E741
            return function(SimpleNamespace(**l), SimpleNamespace(**r), params, n)

        return apply

    def output(prefix: Values, previous: Values | None, tokens: Values) -> Values:
        return {**{f"s.{k}": v for k, v in prefix.items()}, **{f"prev.{k}": v for k, v in (previous or {}).items()}}

    empty = start_state(spec, rules, call, layer.components)
    begin = None if initial is None else {k: initial[k] for k in layer.components}
    found, final = scan_tokens(
        lift, rule(layer.combine), rule(layer.advance), output, x, empty, begin, valid=mask, reset=reset, previous=True
    )
    if not final:
        final = {k: as_state(v, slots[k], call, call.leading[:1]) for k, v in empty.items()}
    parts = [{k: found[f"{side}.{k}"] for k in layer.components} for side in ("s", "prev")]
    return parts[0], parts[1], final


def _chunked(
    spec: Spec,
    call: Call,
    layer: Chunked,
    found: Values,
    initial: Values | None,
    mask: Tensor | None,
    reset: Tensor | None,
    kernels: Any,
) -> tuple[Values, Tensor]:
    """The layer's linear readouts by name and its final state [B, *lanes, *dims]."""
    slot = next(s for s in spec.components if s.name == layer.component)
    sizes = [call.sizes[slot.dims[k]] for k in layer.order]
    outer = sizes[: layer.outer]
    batch, length = call.leading
    lanes = prod(call.lanes) * prod(outer)

    def rows(name: str) -> Any:
        """[B, G, T, width]: lanes and outer dims as one axis, before time."""
        if name not in found:
            return None
        value = found[name].to(call.compute)
        if name == "log" or (layer.vector and name[0] == "c"):
            value = value.unsqueeze(-1)
        value = value.expand(batch, length, *call.lanes, *outer, value.shape[-1])
        return value.reshape(batch, length, lanes, value.shape[-1]).transpose(1, 2)

    def columns(letter: str, count: int) -> tuple[Tensor, ...]:
        return tuple(rows(f"{letter}{k}") for k in range(count))

    key, value = sizes[layer.outer], 1 if layer.vector else sizes[-1]
    if initial is None:
        start = torch.zeros(batch, lanes, key, value, dtype=call.compute, device=call.device)
    else:
        rank = len(slot.dims)
        given = initial[layer.component]
        front = list(range(given.dim() - rank))
        given = given.permute(*front, *(given.dim() - rank + k for k in layer.order))
        start = given.reshape(batch, lanes, key, value)
    done = None if kernels is None else kernels.layer(call, layer, sizes, found, start, mask, reset)
    if done is not None:
        outputs, state = done
    else:
        queries = tuple((rows(f"q{k}"), rows(f"p{k}")) for k in range(len(layer.reads)))
        factors = Factors(
            rows("log" if "log" in found else "log_key"), rows("log_value"),
            columns("u", layer.rank), columns("w", layer.rank), columns("b", layer.columns),
            columns("c", layer.columns), queries,
        )  # fmt: skip
        across, state = chunk_scan(
            factors, start, None if mask is None else mask[:, None], None if reset is None else reset[:, None]
        )
        outputs = [o.transpose(1, 2) for o in across]
    y = {}
    for name, o in zip(layer.reads, outputs, strict=True):
        whole = o.reshape(batch, length, *call.lanes, *outer, value)
        y[name] = whole[..., 0] if layer.vector else whole
    state = state.reshape(batch, *call.lanes, *sizes[: len(layer.order)] if not layer.vector else (*outer, key))
    front = list(range(1 + len(call.lanes)))
    back = [layer.order.index(k) + len(front) for k in range(len(slot.dims))]
    return y, state.permute(*front, *back)


def _over(flag: Tensor, like: Tensor) -> Tensor:
    return flag.reshape(flag.shape + (1,) * (like.dim() - flag.dim()))
