"""One layer of a spec as calls of the chunk kernels: its factors as they lie, its readouts, its last states."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_bind import spread
from psmc.runtime.kit_chunk_views import ChunkCall, _block, _near
from psmc.runtime.kit_op import token_code

_STEP_VALUES = 64  # columns of a state that a program moves on at once
_STEP_EACH = 64  # numbers of them in a thread


def fused_call(
    call: Any, fused: Any, reads: tuple[Any, ...], starts: tuple[Tensor | None, Tensor | None], mask: Tensor | None,
    reset: Tensor | None, cu: Tensor | None,
) -> ChunkCall:  # fmt: skip
    """What the kernels of a fused layer are called with. reads: tokens, prefixes with and before them, params, sizes;
    starts: of S and z."""
    lanes = prod(call.lanes)
    tokens, at, before = reads[:3]
    given = fused.given(*reads)

    def placed(x: Tensor, own: tuple[int, ...]) -> Tensor:
        """[B, T, lanes of its own, *own]; a single lane axis may be shorter than the call's."""
        if len(call.lanes) == 1 and x.dim() == 3 + len(own):
            return x
        x = spread(x, x.dim() - len(own), call.lanes)
        whole: Tensor = x.expand(*call.leading, *call.lanes, *own).reshape(*call.leading, lanes, *own)
        return whole

    def found(name: str, kind: str, lag: int, width: int = 1) -> Tensor:
        """A tensor over the key or value (`width` 1) or a number a token (0)."""
        if kind == "param":
            x = call.params[name]
            own = x.shape[x.dim() - width :]
            x = spread(x, x.dim() - width, call.lanes)
            whole: Tensor = x.expand(*call.lanes, *own).reshape(1, 1, lanes, *own)
            return whole
        if kind in ("at", "before"):
            return placed(getattr(at if kind == "at" else before, name), ())
        x = given[name] if kind == "factor" else getattr(tokens, f"{name}_lag{lag}") if lag else call.inputs[name]
        x = x.to(call.dtype) if (kind == "factor" or lag) and width and not name.startswith("log") else x
        if kind == "factor" and not width:
            x = x.expand(*call.leading, *call.lanes)
        return placed(x, x.shape[x.dim() - width :])

    decay = fused.decay if reset is None else max(fused.decay, 1)
    code = None if mask is None and reset is None else token_code(mask, reset)
    return ChunkCall(
        *starts, None, None, found(*fused.c), tuple(found(*k) for k in fused.keys),
        tuple(found(*v) for v in fused.values), (None,) * fused.numbers, (*call.leading, lanes), fused.shift,
        fused.scale(call.n), code, cu, call.dtype, decay, fused.over,
        tuple(found(name, kind, lag, 0) for name, kind, lag in fused.scalars),
    )  # fmt: skip


def chunk_layer(
    kernels: Any, call: Any, layer: Any, sizes: list[int], widths: list[int], found: dict[str, Tensor],
    start: Tensor | None, mask: Tensor | None, reset: Tensor | None, cu: Tensor | None,
) -> tuple[list[list[Tensor]], list[Tensor]] | None:  # fmt: skip
    """The linear readouts of a layer, [B, T, G, V] of each component, and the components' last states [N, G, K, V];
    None: not for the kernels.

    sizes: outer and key; widths: of the components over the value; found: the factors that are not plain; start: [N, G,
    K, all widths]; mask, reset: [B, T] bool. Readouts of S and of prev.S, and columns of the injection, add up, and
    components share no column: one scan for each.
    """
    outer, key = tuple(sizes[:-1]), sizes[-1]
    f = LayerFactors(call, layer, outer, found, mask, reset)
    if not simple_layer(layer, f) or not all(kernels.takes(key, w, call.device) for w in widths):
        return None
    dtypes = [call.dtype if all(p[0] in layer.shown for p in r.parts) else torch.float32 for r in layer.reads]
    columns = [f.rows(f"b{k}") for k in range(layer.columns)]
    numbers = [f.number(k) for k in range(layer.columns)]
    log, log_value = f.log(), f.log_value()
    queries = [
        [(f.rows(n), s, f.scale(n)) for n, s in ((f"q{r}", 0), (f"p{r}", 1)) if n in f] for r in range(len(dtypes))
    ]
    outputs: list[list[Tensor]] = [[] for _ in queries]
    states = []
    starts = [None] * len(widths) if start is None else torch.split(start, widths, -1)
    for j, begin in enumerate(starts):
        values = [f.rows(f"c{k}_{j}" if j else f"c{k}", layer.vectors[j]) for k in range(layer.columns)]
        final: Tensor | None = None
        for r, query in enumerate(queries):
            total: Tensor | None = None
            for q, shift, scale in query:
                q = f.fresh(q) if shift else q
                ends = []
                for k, (b, c, n) in enumerate(zip(columns, values, numbers, strict=True)):
                    first = None if k else begin
                    y, end = kernels.scan(q, b, c, log, first, cu, shift, scale, dtypes[r], n, None, log_value)
                    total = y if total is None else total + y
                    ends.append(end)
                final = sum(ends[1:], ends[0]) if final is None else final
            assert total is not None
            outputs[r].append(total)
        assert final is not None
        states.append(final)
    return outputs, states


def chunk_steps(kernels: Any, states: list[Tensor]) -> bool:
    """Whether there is a kernel for one token of S [rows, G, K, V] and z [rows, G, K, 1]."""
    key, value = states[0].shape[2], states[0].shape[3]
    if not kernels.takes(key, value, states[0].device) or any(s.dtype != torch.float32 for s in states):
        return False
    return all(_near(s.shape[1:], s.stride()[1:]) for s in states)


def step_states(layer: Any, state: Any) -> list[Tensor] | None:
    """A layer's states as [rows, G, K, V]; None if they do not lie as they should."""
    found = []
    for name, order, vector in zip(layer.components, layer.orders, layer.vectors, strict=True):
        s = state[name]
        front = s.dim() - len(order)
        if not s.is_contiguous():
            return None
        s = s.permute(*range(front), *(front + k for k in order))
        s = s.unsqueeze(-1) if vector else s
        found.append(s.flatten(1, -3) if s.dim() > 3 else s.unsqueeze(1))
    return found


def chunk_step(kernels: Any, a: ChunkCall, states: list[Tensor], slots: Tensor | None) -> Tensor:
    """One token by kernel: the output [B, 1, G, V] as S [rows, G, K, V] and z [rows, G, K, 1] move on in place, in the
    rows that `slots` [B] names."""
    out = torch.empty(*a.shape, states[0].shape[3], dtype=a.dtype, device=a.c.device)
    launch, given = step_launch(kernels, kernels.readable(a), states, slots, out)
    launch(*given)
    return out


def step_launch(
    kernels: Any, a: ChunkCall, states: list[Tensor], slots: Tensor | None, out: Tensor | None = None
) -> tuple[Any, tuple[Any, ...]]:
    """The step kernel's launch, and the tensors that it takes."""
    (batch, _, lanes), key, value = a.shape, states[0].shape[2], states[0].shape[3]
    bk, bv = _block(key), min(_block(value), _STEP_VALUES)
    blocks = 1 if len(states) == 1 else -(-value // bv)  # one program moves a normaliser on, and reads it
    z = states[1] if len(states) > 1 else None
    out = torch.empty(0, dtype=a.dtype) if out is None else out
    found: tuple[Any, tuple[Any, ...]] = kernels.launcher(
        "step", a, batch * lanes * -(-value // (bv * blocks)), (states[0], z, out, slots, *a.scalars),
        (*a.scalar_strides, *states[0].stride(), *((0, 0, 0) if z is None else z.stride()[:3]), lanes, a.scale),
        (a.decay, a.shift, key, value, bk, bv, blocks), num_warps=min(max(bk * bv // (32 * _STEP_EACH), 1), 8),
    )  # fmt: skip
    return found


def simple_layer(layer: Any, f: LayerFactors) -> bool:
    """Whether the kernels know this kind of layer."""
    other = any(name in f for name in ("decay", "decay_key", "decay_value"))
    other |= "log_value" in f and True in layer.vectors  # a sum that C = 1 makes has no value to decay over
    if other or layer.rank or not layer.reads or any(r.extra for r in layer.reads):
        return False
    return all(f.call.leading) and f.call.compute == torch.float32


class LayerFactors:
    """A layer's factors as [B, T, G, width]: plain ones in their own dtype, others in that of the outputs."""

    def __init__(
        self, call: Any, layer: Any, outer: tuple[int, ...], found: dict[str, Tensor], mask: Tensor | None,
        reset: Tensor | None,
    ) -> None:  # fmt: skip
        self.call, self.outer, self.found, self.plain = call, outer, found, layer.plain
        self.scales = layer.scales(call.n)
        self.mask, self.reset = mask, reset
        self.shape = (*call.leading, prod(call.lanes) * prod(outer))

    def __contains__(self, name: str) -> bool:
        return name in self.found or name in self.plain

    def scale(self, name: str) -> float:
        return float(self.scales.get(name, 1.0))

    def rows(self, name: str, vector: bool = False) -> Tensor:
        """`vector`: without a width of its own, which is 1 then."""
        if name in self.plain:
            x = self.call.inputs[self.plain[name]]
            x = spread(x, x.dim() - len(self.outer) - (not vector), self.call.lanes)
        else:
            x = self.found[name]
            if name[0] not in "ln":
                x = x.to(self.call.dtype)
        own = () if vector else x.shape[-1:]
        x = x.expand(*self.call.leading, *self.call.lanes, *self.outer, *own).reshape(*self.shape, *own)
        x = x.unsqueeze(-1) if vector and name[0] not in "ln" else x
        return x if self.mask is None or name[0] in "ln" else torch.where(self.mask[..., None, None], x, 0.0)

    def number(self, k: int) -> Tensor | None:
        """What multiplies b of column k, [B, T, G]."""
        return self.rows(f"n{k}", True) if f"n{k}" in self else None

    def log(self) -> Tensor | None:
        """[B, T, G] or [B, T, G, K]; 0 at tokens that do not count, -inf before a restart."""
        name = next((n for n in ("log", "log_key") if n in self), None)
        log = None if name is None else self._counted(self.rows(name, name == "log"))
        if self.reset is not None:
            if log is None:
                log = torch.zeros((), device=self.call.device).expand(self.shape)
            log = torch.where(self._over(self.reset, log), -torch.inf, log)
        return log

    def log_value(self) -> Tensor | None:
        """[B, T, G, V], 0 at tokens that do not count; restarts are in the other log."""
        return self._counted(self.rows("log_value")) if "log_value" in self else None

    def _counted(self, log: Tensor) -> Tensor:
        return log if self.mask is None else torch.where(self._over(self.mask, log), log, 0.0)

    def fresh(self, p: Tensor) -> Tensor:
        """Queries of prev.S, which is nothing at a restart."""
        return p if self.reset is None else torch.where(self.reset[..., None, None], 0.0, p)

    @staticmethod
    def _over(flag: Tensor, like: Tensor) -> Tensor:
        return flag.reshape(flag.shape + (1,) * (like.dim() - flag.dim()))
