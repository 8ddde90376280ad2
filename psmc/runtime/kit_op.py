"""The scan as an operator of torch: one graph node for torch.compile, with its own backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_bind import Call, Spec, bind_call
from psmc.runtime.kit_run import Rules, prepared, run_scan, spread
from psmc.runtime.kit_scan import Values

_FORWARD = (
    "(Tensor[] inputs, Tensor[] params, Tensor[] initial, Tensor? mask, Tensor? reset, Tensor? cu_seqlens, bool save)"
    " -> Tensor[]"
)
_BACKWARD = (
    "(Tensor[] grads, Tensor[] inputs, Tensor[] params, Tensor[] initial, Tensor? mask, Tensor? reset,"
    " Tensor? cu_seqlens, Tensor[] results) -> Tensor[]"
)


class Operator:
    """psmc::<name>_<digest> and its backward, registered once per process whoever imports the module how often.

    results: the outputs, then the live components of the final state, then what the kernels save for backward.
    """

    def __init__(self, spec: Spec, rules: Rules, fold: str, kernels: Any) -> None:
        self.spec, self.rules, self.fold, self.kernels = spec, rules, fold, kernels
        self.extras = tuple((s, lag) for s in spec.inputs for lag in range(1, spec.taps.get(s.name, 0) + 1))
        self.live = tuple(s for s in spec.components if s.name in spec.live)
        name = f"{spec.name}_{spec.digest}"
        if not hasattr(torch.ops.psmc, name):
            self._register(name)
        self.op = getattr(torch.ops.psmc, name).default

    def wanted(self, call: Call) -> bool:
        """Kernels where there are some for this device and dtype; one node while torch.compile traces; else autograd."""
        return self._kernels(call) or torch.compiler.is_compiling()

    def _kernels(self, call: Call) -> bool:
        on_device = call.device.type == "cuda" or (self.kernels is not None and self.kernels.interpreted)
        return self.kernels is not None and on_device and call.compute == torch.float32

    def __call__(
        self, call: Call, extra: Values, initial: Values | None, mask: Tensor | None, reset: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Values, Values]:  # fmt: skip
        """As `run_scan`; `extra` holds the taps as `name_lagK`."""
        inputs = [*call.inputs.values(), *(extra[f"{s.name}_lag{lag}"] for s, lag in self.extras)]
        params = list(call.params.values())
        begin = [] if initial is None else [initial[s.name] for s in self.live]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *params, *begin))
        results = self.op(inputs, params, begin, mask, reset, cu_seqlens, save)
        outputs = {s.name: x for s, x in zip(self.spec.outputs, results, strict=False)}
        return outputs, {s.name: x for s, x in zip(self.live, results[len(outputs) :], strict=False)}

    def _register(self, name: str) -> None:
        forward = torch.library.custom_op(f"psmc::{name}", self._forward, mutates_args=(), schema=_FORWARD)
        backward = torch.library.custom_op(f"psmc::{name}_backward", self._backward, mutates_args=(), schema=_BACKWARD)
        forward.register_fake(self._fake)
        backward.register_fake(lambda grads, inputs, params, initial, *rest: _like(inputs, params, initial))
        forward.register_autograd(self._differentiate, setup_context=self._remember)

    def _call(self, inputs: list[Tensor], params: list[Tensor]) -> Call:
        return bind_call(self.spec, [*inputs[: len(self.spec.inputs)], *params], {}, tokens=True)

    def _forward(
        self, inputs: list[Tensor], params: list[Tensor], initial: list[Tensor], mask: Tensor | None,
        reset: Tensor | None, cu_seqlens: Tensor | None, save: bool,
    ) -> list[Tensor]:  # fmt: skip
        call = self._call(inputs, params)
        if self._kernels(call):
            outputs, finals, saved = self.kernels.scan_forward(
                inputs, params, initial or None, token_code(mask, reset), cu_seqlens, save
            )
            return [*outputs, *finals, *saved]
        found, final = self._run(call, inputs, params, initial, mask, reset, cu_seqlens)
        return [x.clone() for x in (*found.values(), *final.values())]

    def _run(
        self, call: Call, inputs: list[Tensor], params: list[Tensor], initial: list[Tensor], mask: Tensor | None,
        reset: Tensor | None, cu_seqlens: Tensor | None,
    ) -> tuple[Values, Values]:  # fmt: skip
        count = len(self.spec.inputs)
        call.inputs = dict(zip(call.inputs, inputs[:count], strict=True))
        call.params = dict(zip(call.params, params, strict=True))
        x, p = prepared(self.spec, call)
        for (slot, lag), value in zip(self.extras, inputs[count:], strict=True):
            value = value.to(call.of_kind(slot.kind))
            x[f"{slot.name}_lag{lag}"] = spread(value, value.dim() - len(slot.dims), call.lanes)
        begin = {s.name: v for s, v in zip(self.live, initial, strict=True)} if initial else None
        return run_scan(self.spec, self.rules, call, self.fold, x, p, begin, mask, reset, cu_seqlens)

    def _fake(
        self, inputs: list[Tensor], params: list[Tensor], initial: list[Tensor], mask: Tensor | None,
        reset: Tensor | None, cu_seqlens: Tensor | None, save: bool,
    ) -> list[Tensor]:  # fmt: skip
        call = self._call(inputs, params)
        rows = call.leading[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1

        def shape(dims: tuple[str, ...]) -> tuple[int, ...]:
            return (*call.lanes, *(call.sizes[d] for d in dims))

        results = [
            inputs[0].new_empty((*call.leading, *shape(s.dims)), dtype=call.of_kind(s.kind, call.dtype))
            for s in self.spec.outputs
        ]
        results += [inputs[0].new_empty((rows, *shape(s.dims)), dtype=call.of_kind(s.kind)) for s in self.live]
        if save and self._kernels(call):
            slots = {s.name: s for s in self.live}
            results += [
                inputs[0].new_empty((*call.leading, *shape(slots[k].dims)), dtype=call.of_kind(slots[k].kind))
                for k in self.kernels.saved_components(call.dtype)
            ]
        return results

    def _remember(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, params, initial, mask, reset, cu_seqlens, _ = inputs
        ctx.counts = (len(tensors), len(params), len(initial))
        keep = output if self.kernels is not None else []
        ctx.save_for_backward(*tensors, *params, *initial, mask, reset, cu_seqlens, *keep)
        ctx.results = len(self.spec.outputs) + len(self.live)

    def _differentiate(self, ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        parts = []
        for count in ctx.counts:
            parts.append(saved[:count])
            saved = saved[count:]
        mask, reset, cu_seqlens, *results = saved
        used = list(grads[: ctx.results])
        call = self._call(parts[0], parts[1])
        fake = self._fake(*parts, mask, reset, cu_seqlens, False) if any(g is None for g in used) else used
        dense = [torch.zeros_like(f) if g is None else g.contiguous() for g, f in zip(used, fake, strict=True)]
        backward = getattr(torch.ops.psmc, f"{self.spec.name}_{self.spec.digest}_backward").default
        found = backward(dense, *parts, mask, reset, cu_seqlens, results if self._kernels(call) else [])
        each = iter(found)
        split = [[next(each) if _smooth(x) else (next(each), None)[1] for x in part] for part in parts]
        return (*split, None, None, None, None)

    def _backward(
        self, grads: list[Tensor], inputs: list[Tensor], params: list[Tensor], initial: list[Tensor],
        mask: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, results: list[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        call = self._call(inputs, params)
        everything = [*inputs, *params, *initial]
        outputs = len(self.spec.outputs)
        if self._kernels(call):
            found = self.kernels.scan_backward(
                grads[:outputs], grads[outputs:], inputs, params, initial or None, results[:outputs],
                results[outputs + len(self.live) :], token_code(mask, reset), cu_seqlens,
            )  # fmt: skip
            flat = [g for part, like in zip(found, (inputs, params, initial), strict=True) for g in (part or [None] * len(like))]
        else:
            with torch.enable_grad():
                leaves = [[x.detach().requires_grad_(_smooth(x)) for x in part] for part in (inputs, params, initial)]
                out, final = self._run(call, *leaves, mask, reset, cu_seqlens)
                reached = [(y, g) for y, g in zip((*out.values(), *final.values()), grads, strict=True) if y.requires_grad]
                wanted = [x for part in leaves for x in part if x.requires_grad]
                gradients = torch.autograd.grad(
                    [y for y, _ in reached], wanted, [g for _, g in reached], allow_unused=True
                ) if reached else [None] * len(wanted)  # fmt: skip
                each = iter(gradients)
                flat = [next(each) if x.requires_grad else None for part in leaves for x in part]
        return [torch.zeros_like(x) if g is None else g.clone() for g, x in zip(flat, everything, strict=True)]


def token_code(mask: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """[B, T] int8 for the kernels: 0 does not count, 1 counts, 2 a restart comes before it; None: all count.

    3 is a restart before a token that does not count.
    """
    if mask is None and reset is None:
        return None
    if reset is None:
        return mask.to(torch.int8) if mask is not None else None
    code = torch.where(reset, 2, 0) + (1 if mask is None else mask.to(torch.int8))
    return code.to(torch.int8)


def _smooth(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _like(*parts: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for part in parts for x in part]
