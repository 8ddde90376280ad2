"""Calls of the attention kernels: softmax over several sets of tokens at once, with its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from psmc.runtime.kit_calls import Kernel

_PRODUCTS = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}
_LOG2_E = 1.4426950408889634
_WIDEST = 256  # a program holds whole rows
_SHAPES_OF_CALLS = 1024  # shapes of calls that are remembered
_ATTEND = "(Tensor[] operands, float scale, str products) -> (Tensor, Tensor)"
_ATTEND_BACK = "(Tensor grad, Tensor[] operands, Tensor out, Tensor lse, float scale, str products) -> Tensor[]"


class AttentionKernels:
    """The kernels of one form of attention. `table`: the kernels, one for the keys of each set, `tiles`, `digest`."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.interpreted: bool = table.interpreted
        self._forward, self._query = Kernel(table.forward), Kernel(table.query)
        self._keys = [Kernel(k) for k in table.keys]
        self._plans: dict[Any, Any] = {}
        name = f"attention_{table.digest}"
        if not hasattr(torch.ops.psmc, name):
            self._register(name)
        self.op = getattr(torch.ops.psmc, name).default

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the kernels run on these operands."""
        first = tensors[0]
        if first.device.type != "cuda" and not self.interpreted:
            return False
        return all(x.dtype in _PRODUCTS and 0 < x.shape[-1] <= _WIDEST for x in tensors)

    def __call__(
        self, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float = 1.0,
        given: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """softmax(scale query keysᵀ) values, [*lead, N, V], of query [*lead, N, E], keys [*lead, M, E] and values
        [*lead, M, V] of each set; leading axes broadcast. Differentiable once, in all operands.

        given: the dtype of a call's inputs; products are as precise as the least precise of it and the operands. The
        output is in the dtype that query and values promote to.
        """
        operands = [query, *(x for pair in zip(keys, values, strict=True) for x in pair)]
        lead = torch.broadcast_shapes(*(x.shape[:-2] for x in operands))
        operands = [x if x.shape[:-2] == lead else x.expand(*lead, *x.shape[-2:]) for x in operands]
        products = _products({given, *(x.dtype for x in operands)})
        if torch.compiler.is_compiling():
            out: Tensor = self.op(operands, scale, products)[0]
            return out
        found: Tensor = _Attend.apply(self, scale, products, *operands)  # type: ignore[no-untyped-call]
        return found

    # --- launches

    def forward(self, operands: Sequence[Tensor], scale: float, products: str) -> tuple[Tensor, Tensor]:
        """The output, and log2 of the sum of each token's weights, [*lead, N] in fp32."""
        query, value = operands[0], operands[2]
        out = query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=torch.promote_types(query.dtype, value.dtype))
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        if out.numel():
            views = _operand_views(operands)
            self._launch("forward", self._forward, views, range(len(operands)), scale, products)(
                *views.tensors, out, lse
            )
        return out, lse

    def backward(
        self, grad: Tensor, operands: Sequence[Tensor], out: Tensor, lse: Tensor, scale: float, products: str,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Gradients of the operands, each in its own full shape; None for a set of which none is wanted."""
        if not out.numel():
            return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in operands]
        views = _operand_views(operands)
        grad, delta = grad.contiguous(), torch.empty_like(lse)
        found: list[Tensor | None] = [None] * len(operands)
        found[0] = dq = _gradient_like(operands[0])
        launch = self._launch("query", self._query, views, range(len(operands)), scale, products)
        launch(*views.tensors, out, lse, grad, dq, delta)
        for at, kernel in enumerate(self._keys):
            k, v = 2 * at + 1, 2 * at + 2
            if not (wanted[k] or wanted[v]):
                continue
            found[k], found[v] = dk, dv = _gradient_like(operands[k]), _gradient_like(operands[v])
            if dk.shape[-2]:
                launch = self._launch(f"keys {at}", kernel, views, (0, k, v), scale, products)
                launch(*(views.tensors[i] for i in (0, k, v)), lse, grad, delta, dk, dv)
        return found

    def _launch(
        self, name: str, kernel: Kernel, views: _Views, at: Sequence[int], scale: float, products: str
    ) -> Any:
        """A kernel on the operands `at`, with a program for each block of queries, or of keys for "keys 0", ...."""
        query, keys, value = views.tensors[0], [views.tensors[i] for i in at[1::2]], views.tensors[at[2]]
        tokens, many = query.shape[-2], [x.shape[-2] for x in keys]
        numbers = (tokens, *many, *views.sizes[1:], *(n for i in at for n in views.strides[i]), scale * _LOG2_E)
        widths = query.shape[-1], value.shape[-1]
        dtypes = tuple([views.tensors[i].dtype for i in at])
        key = (name, numbers, widths, views.sizes, views.even, products, dtypes, query.device)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _SHAPES_OF_CALLS:
                self._plans.clear()
            be, bv = map(_padded, widths)
            rows = self.table.tiles[name.split()[0]][products]
            bn, bm, warps, stages = next(tile for limit, tile in rows if max(be, bv) <= limit)
            bn, bm = min(bn, _padded(tokens)), min(bm, _padded(max(many)))
            blocks = -(-many[0] // bm) if name.startswith("keys") else -(-tokens // bn)
            plan = self._plans[key] = kernel.launch(
                math.prod(views.sizes) * blocks, numbers, (*widths, bn, bm, be, bv, views.even, products, stages),
                query.device, num_warps=warps,
            )  # fmt: skip
        return plan

    # --- one node of a compiled graph

    def _register(self, name: str) -> None:
        def run(operands: list[Tensor], scale: float, products: str) -> tuple[Tensor, Tensor]:
            return self.forward(operands, scale, products)

        def transpose(
            grad: Tensor, operands: list[Tensor], out: Tensor, lse: Tensor, scale: float, products: str
        ) -> list[Tensor]:
            found = self.backward(grad, operands, out, lse, scale, products, [True] * len(operands))
            return [x for x in found if x is not None]

        def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            ctx.fixed = inputs[1:]
            ctx.save_for_backward(*inputs[0], *output)

        def differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
            *operands, out, lse = ctx.saved_tensors
            return backward_op(grad, operands, out, lse, *ctx.fixed), None, None

        forward = torch.library.custom_op(f"psmc::{name}", run, mutates_args=(), schema=_ATTEND)
        backward = torch.library.custom_op(f"psmc::{name}_backward", transpose, mutates_args=(), schema=_ATTEND_BACK)
        backward_op = getattr(torch.ops.psmc, f"{name}_backward").default
        forward.register_fake(
            lambda operands, scale, products: (
                operands[0].new_empty(
                    (*operands[0].shape[:-1], operands[2].shape[-1]),
                    dtype=torch.promote_types(operands[0].dtype, operands[2].dtype),
                ),
                operands[0].new_empty(operands[0].shape[:-1], dtype=torch.float32),
            )
        )
        backward.register_fake(lambda grad, operands, *rest: [_gradient_like(x) for x in operands])
        forward.register_autograd(differentiate, setup_context=remember)


class _Attend(torch.autograd.Function):
    """The kernels under autograd, outside of compiled graphs."""

    @staticmethod
    def forward(ctx: Any, kernels: AttentionKernels, scale: float, products: str, *operands: Tensor) -> Tensor:
        out, lse = kernels.forward(operands, scale, products)
        ctx.kernels, ctx.fixed = kernels, (scale, products)
        ctx.save_for_backward(*operands, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *operands, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *ctx.kernels.backward(grad, operands, out, lse, *ctx.fixed, wanted)


class _Views(NamedTuple):
    """Operands as the kernels read them: sizes X, Y, Z of the leading axes, and for each operand its strides over them
    and over its tokens. `even`: all strides are multiples of it, up to 8 numbers."""

    tensors: list[Tensor]
    sizes: tuple[int, int, int]
    strides: list[tuple[int, int, int, int]]
    even: int


def _products(dtypes: set[torch.dtype | None]) -> str:
    """The precision of products of operands of these dtypes."""
    narrow = next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), torch.float32)
    return "ieee" if torch.version.hip and narrow != torch.bfloat16 else _PRODUCTS[narrow]


def _operand_views(operands: Sequence[Tensor]) -> _Views:
    """The leading axes as three: axes that follow each other in memory in all operands are one. Copied is what has a
    last axis with gaps, or if there are more axes than three."""
    tensors = [a if a.shape[-1] == 1 or a.stride(-1) == 1 else a.contiguous() for a in operands]
    groups = _lead_groups(tensors)
    if len(groups) > 3:
        tensors = [a.contiguous() for a in tensors]
        groups = _lead_groups(tensors)
    groups = [(1, [0] * len(tensors))] * (3 - len(groups)) + groups
    (x, over_x), (y, over_y), (z, over_z) = groups
    strides = [(over_x[n], over_y[n], over_z[n], _token_stride(a)) for n, a in enumerate(tensors)]
    even = math.gcd(8, *(n for row in strides for n in row))
    return _Views(tensors, (x, y, z), strides, even)


def _lead_groups(tensors: Sequence[Tensor]) -> list[tuple[int, list[int]]]:
    """(size, stride of each tensor) of the leading axes, as few as there can be."""
    groups: list[tuple[int, list[int]]] = []
    for axis, size in enumerate(tensors[0].shape[:-2]):
        strides = [x.stride(axis) for x in tensors]
        if size == 1:
            continue
        if groups and all(outer == inner * size for outer, inner in zip(groups[-1][1], strides, strict=True)):
            groups[-1] = (groups[-1][0] * size, strides)
        else:
            groups.append((size, strides))
    return groups


def _token_stride(x: Tensor) -> int:
    return x.stride(-2) if x.shape[-2] > 1 else 0


def _gradient_like(x: Tensor) -> Tensor:
    """A gradient, contiguous."""
    return x.new_empty(x.shape)


def _padded(size: int) -> int:
    """A power of two that holds it, 16 or more."""
    return max(16, 1 << (max(size, 1) - 1).bit_length())
