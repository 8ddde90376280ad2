"""Running the chunk kernels beside a sequential loop in fp64: used by the interpreter's tests and on a GPU."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import psmc
from psmc.codegen.chunk_factors import Fused
from psmc.codegen.chunk_kernels import kernel_text, plain
from psmc.plan.chunked_kernels import ChunkTile, ChunkTiles, tiles
from psmc.runtime.kit_chunk_kernels import ChunkKernels

_FOLDER = Path(tempfile.mkdtemp(prefix="psmc_chunk_"))
_MADE: dict[str, ChunkKernels] = {}
SMALL = {"tokens": 32, "values": 16, "keys": 16}  # odd sizes take several blocks


def table(valued: bool = False, **changes: int) -> ChunkTiles:
    """The shipped sizes, or with some of them changed in every kernel."""
    rows = tiles(valued).rows
    return ChunkTiles(tuple((k, s, key, replace(tile, **changes)) for k, s, key, tile in rows))


def one_tile(kernel: str, tile: ChunkTile) -> ChunkTiles:
    """The shipped sizes with another tile for one kernel; its tokens a chunk are everyone's."""
    rows = tiles().rows
    return ChunkTiles(
        tuple((k, s, key, tile if k == kernel else replace(t, tokens=tile.tokens)) for k, s, key, t in rows)
    )


def kernels(sizes: ChunkTiles, fused: Fused | None = None, valued: bool = False) -> ChunkKernels:
    """The printed kernels, loaded; without `fused` those that fuse nothing, `valued`: with a decay over the value."""
    text = "from types import SimpleNamespace\n" + kernel_text(sizes, fused or plain(valued))
    if text not in _MADE:
        file = _FOLDER / f"chunk_{len(_MADE)}.py"
        file.write_text(text)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _MADE[text] = ChunkKernels(module.CHUNK_KERNELS)
    return _MADE[text]


def sequential(
    q: Tensor, b: Tensor, c: Tensor, log: Tensor | None, start: Tensor | None, cu: Tensor | None, shift: int,
    scale: float, log_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `ChunkKernels.scan` means, token by token in fp64."""
    q, b, c = (x.double() for x in (q, b, c))
    batch, length = q.shape[:2]
    decay = None if log is None else log.double().exp()
    decay = decay[..., None] if decay is not None and decay.dim() == 3 else decay
    over = None if log_value is None else log_value.double().exp()
    packed = cu is not None
    spans = [(n, 0, length) for n in range(batch)]
    if packed:
        spans = [(0, *cu[n : n + 2].tolist()) for n in range(len(cu) - 1)]
    rows, ends = [], []
    for i, (n, first, last) in enumerate(spans):
        state = torch.zeros(q.shape[2], q.shape[3], c.shape[3], dtype=torch.float64, device=q.device)
        state = state if start is None else start[i].double()
        read = [torch.zeros(0, q.shape[2], c.shape[3], dtype=torch.float64, device=q.device)]
        for t in range(first, last):
            before = state
            state = state if decay is None else state * decay[n, t][..., None]
            state = state if over is None else state * over[n, t][:, None]
            state = state + b[n, t][..., None] * c[n, t][:, None]
            read.append(scale * torch.einsum("gk,gkv->gv", q[n, t], before if shift else state)[None])
        rows.append(torch.cat(read))
        ends.append(state)
    return torch.cat(rows)[None] if packed else torch.stack(rows), torch.stack(ends)


class Data:
    """Factors of one call. decay 0, 1, 2: none, a number a token, a vector over the key; `over`: one over the value, too;
    `hard`: decays from 1e-3 to 50 in one tensor (in the exponent), zeros, repeated keys; `grouped`: q and b are the same
    for all lanes."""

    def __init__(
        self, batch: int, length: int, lanes: int, key: int, value: int, decay: int, cu: list[int] | None = None,
        start: bool = True, hard: bool = False, grouped: bool = False, seed: int = 0, over: bool = False,
        dtype: torch.dtype = torch.float32, device: str = "cpu",
    ) -> None:  # fmt: skip
        made = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made)

        own = 1 if grouped else lanes
        q, b, c = normal(batch, length, own, key), normal(batch, length, own, key), normal(batch, length, lanes, value)
        if hard:
            b = b[:, :1] + 0.2 * b
        q, b = q / key**0.5, b / key**0.5

        def logs(*shape: int) -> Tensor:
            log = -torch.nn.functional.softplus(normal(*shape))
            if hard:
                log = -(10 ** (torch.rand(shape, generator=made) * 4.7 - 3))
                log = torch.where(torch.rand(shape, generator=made) < 0.05, 0.0, log)
                log = torch.where(torch.rand(shape, generator=made) < 0.02, -torch.inf, log)
            return log

        log = logs(*(batch, length, lanes, key)[: 2 + decay]) if decay else None
        log_value = logs(batch, length, lanes, value) if over else None
        rows = batch if cu is None else len(cu) - 1
        state = normal(rows, lanes, key, value) if start else None
        self.cu = None if cu is None else torch.tensor(cu, device=device)
        self.leaves = [
            None if x is None else x.to(kind).to(device).requires_grad_()
            for x, kind in ((q, dtype), (b, dtype), (c, dtype), (log, torch.float32), (state, torch.float32), (log_value, torch.float32))
        ]
        self.weights = (
            normal(batch, length, lanes, value).to(dtype).double().to(device),
            normal(rows, lanes, key, value).double().to(device),
        )
        self.lanes, self.dtype = lanes, dtype

    def _call(self, scan, shift: int, scale: float, backward: bool = True) -> dict[str, Tensor]:
        q, b, c, log, start, log_value = self.leaves
        whole = [x.expand(-1, -1, self.lanes, -1) for x in (q, b)]
        y, end = scan(*whole, c, log, start, self.cu, shift, scale, log_value=log_value)
        if not backward:
            return {"y": y.detach(), "end": end.detach()}
        used = {n: x for n, x in zip(("q", "b", "c", "log", "start", "log_value"), self.leaves, strict=True) if x is not None}
        total = (y.double() * self.weights[0]).sum() + (end * self.weights[1]).sum()
        grads = torch.autograd.grad(total, list(used.values()))
        return {"y": y.detach(), "end": end.detach(), **dict(zip(used, grads, strict=True))}

    def errors(self, made: ChunkKernels, shift: int = 0, scale: float = 0.5, backward: bool = True) -> dict[str, float]:
        """Relative errors (2-norm) of outputs, last state and gradients."""
        ours, right = (self._call(scan, shift, scale, backward) for scan in (made.scan, sequential))
        found = {}
        for name, x in right.items():
            assert ours[name].shape == x.shape, name
            x, y = x.double(), ours[name].double()
            found[name] = float((y - x).norm() / x.norm()) if bool(y.isfinite().all()) else float("nan")
        return found


def check(errors: dict[str, float], bound: float = 3e-6) -> None:
    assert max(errors.values()) <= bound, errors  # also fails on nan


def inputs(agg: psmc.Aggregator, length: int, packed: bool, seed: int = 0):
    """Tensors by name for K 16, V 24 and two lanes; a state of its own for every sequence."""
    made = torch.Generator().manual_seed(seed)
    spec = agg.spec
    sizes = dict(zip(spec.dims, (16, 24), strict=True))
    x = {}
    for slot in (*spec.inputs, *spec.params):
        lead = (1 if packed else 2, length, 2) if slot in spec.inputs else (2,)
        x[slot.name] = torch.randn(*lead, *(sizes[d] for d in slot.dims), generator=made)
    for name in {"g", "A", *({"h"} if "g" in x else ())} & x.keys():
        x[name] = -x[name].abs()
    for name in {"dt"} & x.keys():
        x[name] = x[name].abs()
    for name in {"gamma"} & x.keys():
        x[name] = torch.sigmoid(x[name])
    for name in {"B", "C"} & x.keys():  # one group of heads
        x[name] = x[name][:, :, :1].clone()
    state = {k: 0.5 * torch.randn(v.shape, generator=made) for k, v in agg.init_state(2, 2, sizes=sizes).items()}
    return x, {k: v.abs() if k == "z" else v for k, v in state.items()}

def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[object]:
    """What each call of a method returned."""
    method, returned = getattr(owner, name), []

    def call(*args: object) -> object:
        returned.append(method(*args))
        return returned[-1]

    monkeypatch.setattr(owner, name, call)
    return returned


def check_whole_spec(agg: psmc.Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generated module with its kernels against the same module without them, which others hold to the oracle:
    masks, restarts, packing, states in and out, all gradients."""
    kept = agg.rules.matrices
    launched = counted(monkeypatch, kept, "forward"), counted(monkeypatch, kept, "backward")
    for packed, flagged in ((False, False), (True, True)):
        x, state = inputs(agg, 21, packed)
        made = torch.Generator().manual_seed(5)
        call = {"cu_seqlens": torch.tensor([0, 8, 21])} if packed else {}
        shape = (1, 21) if packed else (2, 21)
        if flagged:
            call |= {
                "mask": torch.rand(shape, generator=made) < 0.8,
                "reset": torch.rand(shape, generator=made) < 0.2,
            }
        found = []
        for dtype, kernels_too in ((torch.float32, True), (torch.float64, False)):
            leaves = {k: v.to(dtype).requires_grad_() for k, v in x.items()}
            begin = {k: v.to(dtype).requires_grad_() for k, v in state.items()}
            if not kernels_too:
                del agg.rules.matrices
            try:
                out, end = agg(**leaves, initial_state=begin, return_state=True, **call)
            finally:
                agg.rules.matrices = kept
            total = sum((v * (1 + torch.arange(v.numel()).view(v.shape) % 3)).sum() for v in (out, *end.values()))
            tensors = {**leaves, **{f"state {k}": v for k, v in begin.items()}}
            grads = torch.autograd.grad(total, list(tensors.values()))
            found.append({"out": out, **end, **dict(zip(tensors, grads, strict=True))})
        errors = {k: float((found[0][k] - v).detach().norm() / v.detach().norm()) for k, v in found[1].items()}
        check(errors, 2e-5)
    assert all(n and None not in n for n in launched)


def check_steps(agg: psmc.Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, in place, in rows named by slots."""
    x, state = inputs(agg, 5, False)
    params = {s.name: x.pop(s.name) for s in agg.spec.params}
    out, end = agg(**x, **params, initial_state=state, return_state=True)
    rows = {k: torch.zeros(4, *v.shape[1:]).index_copy(0, torch.tensor([3, 1]), v) for k, v in state.items()}
    before = {k: v.clone() for k, v in rows.items()}
    launched = counted(monkeypatch, agg.rules.matrices, "step")
    for t in range(5):
        y = agg.step_(rows, **{k: v[:, t] for k, v in x.items()}, **params, slots=torch.tensor([3, 1]))
        assert torch.allclose(y, out[:, t], atol=1e-4, rtol=1e-4)
    for k, v in end.items():
        assert torch.allclose(rows[k][[3, 1]], v, atol=1e-4, rtol=1e-4)
        assert torch.equal(rows[k][[0, 2]], before[k][[0, 2]])
    again, after = agg.step(end, **{k: v[:, 0] for k, v in x.items()}, **params)
    assert torch.equal(agg.step(end, **{k: v[:, 0] for k, v in x.items()}, **params)[0], again)
    assert set(after) == set(end)
    assert len(launched) == 7 and None not in launched
