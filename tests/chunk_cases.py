"""Running the chunk kernels beside a sequential loop in fp64: used by the interpreter's tests and on a GPU."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from psmc.codegen.chunk_factors import Fused
from psmc.codegen.chunk_kernels import kernel_text
from psmc.plan.chunked_kernels import ChunkTile, ChunkTiles, tiles
from psmc.runtime.kit_chunk_kernels import ChunkKernels

_FOLDER = Path(tempfile.mkdtemp(prefix="psmc_chunk_"))
_MADE: dict[str, ChunkKernels] = {}


def table(wide: bool = False, **changes: int) -> ChunkTiles:
    """The shipped sizes, or with some of them changed in every kernel."""
    rows = tiles(wide).rows
    return ChunkTiles(tuple((k, s, key, replace(tile, **changes)) for k, s, key, tile in rows))


def one_tile(wide: bool, kernel: str, tile: ChunkTile) -> ChunkTiles:
    """The shipped sizes with another tile for one kernel; its tokens a chunk are everyone's."""
    rows = tiles(wide).rows
    return ChunkTiles(
        tuple((k, s, key, tile if k == kernel else replace(t, tokens=tile.tokens)) for k, s, key, t in rows)
    )


def kernels(sizes: ChunkTiles, fused: Fused | None = None) -> ChunkKernels:
    """The printed kernels, loaded."""
    text = "from types import SimpleNamespace\n" + kernel_text(sizes, fused)
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
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `ChunkKernels.scan` means, token by token in fp64."""
    q, b, c = (x.double() for x in (q, b, c))
    batch, length = q.shape[:2]
    decay = None if log is None else log.double().exp()
    decay = decay[..., None] if decay is not None and decay.dim() == 3 else decay
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
            state = (state if decay is None else state * decay[n, t][..., None]) + b[n, t][..., None] * c[n, t][:, None]
            read.append(scale * torch.einsum("gk,gkv->gv", q[n, t], before if shift else state)[None])
        rows.append(torch.cat(read))
        ends.append(state)
    return torch.cat(rows)[None] if packed else torch.stack(rows), torch.stack(ends)


class Data:
    """Factors of one call. decay 0, 1, 2: none, a number a token, a vector over the key; `hard`: decays from 1e-3 to 50
    in one tensor (in the exponent), zeros, repeated keys; `grouped`: q and b are the same for all lanes."""

    def __init__(
        self, batch: int, length: int, lanes: int, key: int, value: int, decay: int, cu: list[int] | None = None,
        start: bool = True, hard: bool = False, grouped: bool = False, seed: int = 0,
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
        log = None
        if decay:
            shape = (batch, length, lanes, key)[: 2 + decay]
            x = normal(*shape)
            log = -torch.nn.functional.softplus(x)
            if hard:
                log = -(10 ** (torch.rand(shape, generator=made) * 4.7 - 3))
                log = torch.where(torch.rand(shape, generator=made) < 0.05, 0.0, log)
                log = torch.where(torch.rand(shape, generator=made) < 0.02, -torch.inf, log)
        rows = batch if cu is None else len(cu) - 1
        state = normal(rows, lanes, key, value) if start else None
        self.cu = None if cu is None else torch.tensor(cu, device=device)
        self.leaves = [
            None if x is None else x.to(kind).to(device).requires_grad_()
            for x, kind in ((q, dtype), (b, dtype), (c, dtype), (log, torch.float32), (state, torch.float32))
        ]
        self.weights = (
            normal(batch, length, lanes, value).to(dtype).double().to(device),
            normal(rows, lanes, key, value).double().to(device),
        )
        self.lanes, self.dtype = lanes, dtype

    def _call(self, scan, shift: int, scale: float, backward: bool = True) -> dict[str, Tensor]:
        q, b, c, log, start = self.leaves
        whole = [x.expand(-1, -1, self.lanes, -1) for x in (q, b)]
        y, end = scan(*whole, c, log, start, self.cu, shift, scale)
        if not backward:
            return {"y": y.detach(), "end": end.detach()}
        used = {n: x for n, x in zip(("q", "b", "c", "log", "start"), self.leaves, strict=True) if x is not None}
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
