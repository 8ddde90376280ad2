"""The small layers of a chunked spec: what is scanned before its matrix states, and read by them as numbers a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor

from psmc.runtime.kit_bind import Call, Spec
from psmc.runtime.kit_layer import scan_tokens
from psmc.runtime.kit_op import Operator
from psmc.runtime.kit_run import Rules, as_state, start_state
from psmc.runtime.kit_scan import Values


class Scanned(NamedTuple):
    """Layers of small components: their own lift, combine and advance, of what their elements hold; operator: the same
    by kernels, if there are some, as a spec whose outputs are at_ and before_ each component."""

    components: tuple[str, ...]
    lift: Callable[..., Values]
    combine: Callable[..., Values]
    advance: Callable[..., Values]
    operator: Operator | None


class Asked(NamedTuple):
    """What a call says beside its tensors."""

    initial: Values | None
    mask: Tensor | None
    reset: Tensor | None
    cu_seqlens: Tensor | None
    sequences: int


def run_small(
    spec: Spec, rules: Rules, call: Call, layer: Scanned, x: Values, params: SimpleNamespace, given: Asked
) -> tuple[Values, Values, Values]:
    """The prefixes of every token, those before it, and the final state."""
    own = small_call(call, layer)
    if own is None or layer.operator is None:
        return _scanned(spec, rules, call, layer, x, params, given)
    found, final = layer.operator(own, {}, given.initial, given.mask, given.reset, given.cu_seqlens)
    prefix, previous = ({k: found[f"{side}_{k}"] for k in layer.components} for side in ("at", "before"))
    return prefix, previous, final


def small_steps(
    call: Call, layers: Sequence[Scanned], state: Values, slots: Tensor | None
) -> tuple[SimpleNamespace, SimpleNamespace] | None:
    """The prefixes [B, 1, *lanes] of small layers with and before one token, while `state` moves on in place; None, and
    nothing has changed, where not all have kernels."""
    own = [(layer.operator, small_call(call, layer)) for layer in layers]
    if not all(op is not None and small is not None and op.steps(small, state) for op, small in own):
        return None
    found: Values = {}
    for op, small in own:
        assert op is not None and small is not None
        outputs = op.step(small, state, slots, True)[0]
        found |= dict(zip((s.name for s in op.spec.outputs), outputs, strict=True))
    names = [k for layer in layers for k in layer.components]
    at, before = ({k: found[f"{side}_{k}"].unsqueeze(1) for k in names} for side in ("at", "before"))
    return SimpleNamespace(**at), SimpleNamespace(**before)


def small_call(call: Call, layer: Scanned) -> Call | None:
    """The call of a small layer's kernels; None: not for them."""
    if layer.operator is None:
        return None
    spec = layer.operator.spec
    inputs = {s.name: call.inputs[s.name] for s in spec.inputs}
    params = {s.name: call.params[s.name] for s in spec.params}
    front = len(call.leading)
    whole = any(call.inputs[s.name].shape[front : front + len(call.lanes)] == call.lanes for s in spec.inputs)
    own = replace(call, inputs=inputs, params=params)
    return own if whole and layer.operator.wanted(own, True, True) else None


def _scanned(
    spec: Spec, rules: Rules, call: Call, layer: Scanned, x: Values, params: SimpleNamespace, given: Asked
) -> tuple[Values, Values, Values]:
    """The same in PyTorch."""
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
    begin = None if given.initial is None else {k: given.initial[k] for k in layer.components}
    found, final = scan_tokens(
        lift, rule(layer.combine), rule(layer.advance), output, x, empty, begin, valid=given.mask, reset=given.reset,
        cu_seqlens=given.cu_seqlens, previous=True,
    )  # fmt: skip
    final = {k: as_state((final or empty)[k], slots[k], call, (given.sequences,)) for k in empty}
    parts = [{k: found[f"{side}.{k}"] for k in layer.components} for side in ("s", "prev")]
    return parts[0], parts[1], final
