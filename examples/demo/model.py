"""A small byte-level language model whose only mixing over time is a compiled scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = list[dict[str, Tensor]]


class Mixer(nn.Module):
    """Gates and candidates from the token, the scan over time, an output gate: width -> width.

    `scan` is an aggregator of two inputs per lane, (gate, candidate), as `mingru.psm` compiles to.
    """

    def __init__(self, scan: Any, width: int, lanes: int) -> None:
        super().__init__()
        self.scan, self.lanes = scan, lanes
        self.into = nn.Linear(width, 3 * lanes)
        self.out = nn.Linear(lanes, width)
        with torch.no_grad():  # memories from a few tokens to a few hundred
            self.into.bias[:lanes] = -torch.linspace(0.0, 5.0, lanes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width], all tokens at once."""
        z, h, gate = self.into(x).split(self.lanes, -1)
        return self.out(self.scan(z, h) * F.silu(gate))

    def step(self, x: Tensor, state: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, width], one token."""
        z, h, gate = self.into(x).split(self.lanes, -1)
        y, state = self.scan.step(state, z, h)
        return self.out(y * F.silu(gate)), state


class Block(nn.Module):
    def __init__(self, scan: Any, width: int) -> None:
        super().__init__()
        self.mix_norm, self.mix = nn.LayerNorm(width), Mixer(scan, width, 2 * width)
        self.ff_norm = nn.LayerNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.mix_norm(x))
        return x + self.ff(self.ff_norm(x))

    def step(self, x: Tensor, state: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        y, state = self.mix.step(self.mix_norm(x), state)
        x = x + y
        return x + self.ff(self.ff_norm(x)), state


class ByteModel(nn.Module):
    """Logits over the next byte, from bytes [B, T]; `step` gives the same from one byte [B] and a state."""

    def __init__(self, scan: Any, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(scan, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def step(self, token: Tensor, state: State | None) -> tuple[Tensor, State]:
        x = self.embed(token)
        after: State = []
        for n, block in enumerate(self.blocks):
            x, s = block.step(x, None if state is None else state[n])
            after.append(s)
        return self.head(self.norm(x)), after
