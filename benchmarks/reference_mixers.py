"""Two affine scans in plain fp32 PyTorch, written without psmc: what a model that psmc trains is compared to.

Chunks of a few tokens; inside one, products weighted by exact differences of cumulated logs, which are at most 0;
between chunks, doubling strides over their states. Slower than kernels, and as independent of them as can be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chunks_of(x: Tensor, size: int) -> Tensor:
    """[B, T, ...] to [B, chunks, size, ...], zeros behind the last token."""
    short = -x.shape[1] % size
    if short:
        x = torch.cat([x, x.new_zeros(x.shape[0], short, *x.shape[2:])], 1)
    return x.unflatten(1, (-1, size))


def states_before(decay: Tensor, state: Tensor) -> Tensor:
    """Exclusive prefixes over axis 1 of S' = decay S + state: [B, chunks, H, K, V]; decays with K or 1, and 1."""
    step = 1
    while step < state.shape[1]:
        state = torch.cat([state[:, :step], state[:, step:] + decay[:, step:] * state[:, :-step]], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    return torch.cat([torch.zeros_like(state[:, :1]), state[:, :-1]], 1)


def diagonal(q: Tensor, k: Tensor, v: Tensor, g: Tensor, size: int = 16) -> Tensor:
    """S' = diag(exp g) S + k vᵀ, o = qᵀ S / sqrt(K): q, k, g [B, T, H, K], v [B, T, H, V], fp32."""
    length, scale = q.shape[1], q.shape[-1] ** -0.5
    q, k, v, g = (chunks_of(x, size) for x in (q * scale, k, v, g))
    logs = g.cumsum(2)
    ahead = logs[:, :, :, None] - logs[:, :, None]  # [B, chunks, t, s, H, K]
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()[..., None, None]
    weights = torch.where(causal, ahead, -torch.inf).exp()
    scores = torch.einsum("bcthk,bctshk,bcshk->bcths", q, weights, k)
    inside = torch.einsum("bcths,bcshv->bcthv", scores, v)
    last = logs[:, :, -1]
    own = torch.einsum("bcshk,bcshv->bchkv", k * (last[:, :, None] - logs).exp(), v)
    before = states_before(last.exp()[..., None], own)
    return (inside + torch.einsum("bcthk,bchkv->bcthv", q * logs.exp(), before)).flatten(1, 2)[:, :length]


def scalar(q: Tensor, k: Tensor, v: Tensor, g: Tensor, size: int = 64) -> Tensor:
    """S' = exp(g) S + k vᵀ, o = qᵀ S: q, k [B, T, H, K], v [B, T, H, V], g [B, T, H], fp32."""
    length = q.shape[1]
    q, k, v, g = (chunks_of(x, size) for x in (q, k, v, g))
    logs = g.cumsum(2)
    ahead = (logs[:, :, :, None] - logs[:, :, None]).movedim(-1, 3)  # [B, chunks, t, H, s] after the next line
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()[:, None]
    weights = torch.where(causal, ahead, -torch.inf).exp()
    scores = torch.einsum("bcthk,bcshk->bcths", q, k) * weights
    inside = torch.einsum("bcths,bcshv->bcthv", scores, v)
    last = logs[:, :, -1]
    own = torch.einsum("bcshk,bcshv->bchkv", k * (last[:, :, None] - logs).exp()[..., None], v)
    before = states_before(last.exp()[..., None, None], own)
    return (inside + torch.einsum("bcthk,bchkv->bcthv", q * logs.exp()[..., None], before)).flatten(1, 2)[:, :length]


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return diagonal(q.float(), k.float(), v.float(), g.float())


def mamba2(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, skip: Tensor) -> Tensor:
    x, dt, n, c = x.float(), dt.float(), B.float(), C.float()
    heads = x.shape[2]
    n, c = (t.repeat_interleave(heads // t.shape[2], 2) for t in (n, c))
    return scalar(c, n * dt[..., None], x, dt * A) + skip[:, None] * x


SCANS = {"gla": gla, "mamba2": mamba2}


class Reference:
    """In the place of a compiled scan in a `ScanMixer`: its spec for the shapes, the function above for the numbers.
    What is inside is computed again in backward, as its products over pairs of tokens are large."""

    def __init__(self, name: str, scan: Any) -> None:
        self.spec, self.fn = scan.spec, SCANS[name]

    def __call__(self, **given: Tensor) -> Tensor:
        names = list(given)
        dtype = given[self.spec.inputs[0].name].dtype

        def run(*tensors: Tensor) -> Tensor:
            with torch.autocast(tensors[0].device.type, enabled=False):
                return self.fn(**dict(zip(names, tensors, strict=True)))

        y: Tensor = checkpoint(run, *given.values(), use_reentrant=False)
        return y.to(dtype)
