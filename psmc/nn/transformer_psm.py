"""Transformer-PSM: attention as the aggregator. Yau et al. 2025, arXiv 2506.10918, §4.

A state is what a chunk of tokens is, [c, dim]. Agg runs bidirectional layers on [left | right] and keeps the right
half; Inf runs causal layers on [prefix | chunk] and keeps the right half. Both look at 2c positions, whatever the
length of the sequence: a token costs O(c) with keys and values cached, and a stream holds O(c log(n / c)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from psmc.diagnostics import fail
from psmc.nn.attention import Trunk
from psmc.nn.scannable import ONE, PrefixScannable
from psmc.nn.state import State

MOST_LEVELS = 24  # 2^24 chunks: larger trees share the last level's embedding


class TransformerAgg(nn.Module):
    """(left, right) -> layers on [left | right], of which the right half is kept, [N, c, dim].

    causal   the layers are causal, as Inf's are
    keep     'right', or 'project': a learned map of all 2c positions to c, which starts as 'right'
    levels   adds a learned vector for the size 2^k of the right operand; elements are then dicts with its `level`
    noise    standard deviation, in training, of Gaussian noise on the results, which a norm keeps at unit scale:
             states are then told apart by a margin, which trees deeper than those trained on need
    """

    def __init__(
        self, dim: int, heads: int, layers: int, chunk: int, *, causal: bool = False, keep: str = "right",
        levels: bool = False, positions: str = "rotary", expand: float = 4.0, noise: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if keep not in ("right", "project"):
            fail("PSM652", f"keep is 'right' or 'project', not {keep!r}.")
        self.chunk, self.noise = chunk, noise
        self.trunk = Trunk(dim, heads, layers, 2 * chunk, causal=causal, positions=positions, expand=expand)
        self.levels = nn.Parameter(torch.zeros(MOST_LEVELS, dim)) if levels else None
        right = torch.cat([torch.zeros(chunk, chunk), torch.eye(chunk)], 1)
        self.mix = nn.Parameter(right) if keep == "project" else None

    def forward(self, left: Any, right: Any) -> Any:
        if self.levels is None:
            return self._mixed(left, right, None)
        level = right["level"]
        state = self._mixed(left[ONE], right[ONE], self.levels[level.clamp(max=MOST_LEVELS - 1)])
        return {ONE: state, "level": level + 1}

    def _mixed(self, left: Tensor, right: Tensor, level: Tensor | None) -> Tensor:
        both = torch.cat([left, right], 1)
        if level is not None:
            both = both + level.unsqueeze(1)
        if self.mix is None:
            state: Tensor = self.trunk(both, keep=self.chunk)
        else:
            state = torch.einsum("os,nsd->nod", self.mix.to(both.dtype), self.trunk(both))
        return state + self.noise * torch.randn_like(state) if self.training and self.noise else state


class TransformerInf(nn.Module):
    """(prefix, chunk [N, <= c, dim]) -> causal layers on [prefix | chunk], of which the right half is kept.

    The chunk stands at positions c, c + 1, ... also without a prefix. A cache is {"kv": [N, layers, 2, 2c, H, E]}.
    """

    def __init__(
        self, dim: int, heads: int, layers: int, chunk: int, *, positions: str = "rotary", expand: float = 4.0
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.trunk = Trunk(dim, heads, layers, 2 * chunk, causal=True, positions=positions, expand=expand)

    def forward(self, prefix: Any, chunk: Tensor) -> Tensor:
        if prefix is None:
            return self.trunk(chunk, start=self.chunk)  # type: ignore[no-any-return]
        both = torch.cat([_state(prefix).to(chunk.dtype), chunk], 1)
        return self.trunk(both, keep=chunk.shape[1])  # type: ignore[no-any-return]

    def begin(self, prefix: Any, seen: Tensor) -> State:
        """The cache of a chunk after `prefix`, of which the tokens `seen` [N, r, dim] are known, r from 0 on."""
        cache = self.trunk.empty_cache(seen.shape[0])
        if prefix is not None:
            self.trunk.fill(torch.cat([_state(prefix), seen.to(_state(prefix).dtype)], 1), cache)
        elif seen.shape[1]:
            self.trunk.fill(seen, cache, start=self.chunk)
        return {"kv": cache}

    def step(self, token: Tensor, cache: State, seen: Sequence[int], bare: Sequence[bool]) -> Tensor:
        """One token [N, dim], number `seen` of its chunk; `bare` rows have no prefix. The cache is written in place."""
        first = [self.chunk if b else 0 for b in bare]
        return self.trunk.token(token, cache["kv"], first, [self.chunk + s for s in seen])


class Leaves(nn.Module):
    """A chunk of embeddings as an element, of the scale that Agg's results have."""

    def __init__(self, dim: int, levels: bool) -> None:
        super().__init__()
        self.norm, self.levels = nn.LayerNorm(dim), levels

    def forward(self, chunk: Tensor) -> Any:
        state = self.norm(chunk)
        if not self.levels:
            return state
        return {ONE: state, "level": torch.zeros(len(chunk), dtype=torch.int64, device=chunk.device)}


def transformer_scannable(
    dim: int, chunk_size: int, *, heads: int, agg_layers: int, inf_layers: int, identity: str = "learned",
    plan: str = "tree", recompute: bool = False, causal_agg: bool = False, keep: str = "right", levels: bool = False,
    positions: str = "rotary", expand: float = 4.0, noise: float = 0.0,
) -> PrefixScannable:  # fmt: skip
    """The scan of a Transformer-PSM over embeddings [B, T, dim]."""
    if identity not in ("learned", "skip"):
        fail("PSM652", f"identity is 'learned' or 'skip', not {identity!r}.")
    start: Any = None
    if identity == "learned":
        start = nn.Parameter(torch.randn(chunk_size, dim))
        start = {ONE: start, "level": torch.zeros((), dtype=torch.int64)} if levels else start
    return PrefixScannable(
        Leaves(dim, levels),
        TransformerAgg(
            dim, heads, agg_layers, chunk_size, causal=causal_agg, keep=keep, levels=levels, positions=positions,
            expand=expand, noise=noise,
        ),
        TransformerInf(dim, heads, inf_layers, chunk_size, positions=positions, expand=expand),
        chunk_size, identity=start, plan=plan, recompute=recompute,
    )  # fmt: skip


def _state(prefix: Any) -> Tensor:
    state: Tensor = prefix if isinstance(prefix, Tensor) else prefix[ONE]
    return state
