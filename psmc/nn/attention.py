"""Transformer layers over a window: pre-norm, scaled dot-product attention, keys and values kept for decoding.

Rotary positions (Su et al. 2021, arXiv 2104.09864) are the default: they have no parameters, need no largest length,
and only distances enter. In the windows [left | right] of a prefix-scannable model, whose length is fixed, learned
positions say as much; they are an option of `Trunk`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psmc.diagnostics import fail
from psmc.nn.state import State

Turn = tuple[Tensor, Tensor]  # cos and sin [..., E / 2] of rotary positions


def turns(positions: Tensor, width: int, base: float = 10000.0) -> Turn:
    """Cos and sin of the angles of positions [...] for heads of `width`, [..., width / 2]."""
    half = width // 2
    rates = base ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.to(torch.float32).unsqueeze(-1) * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Rotary positions on x [..., E], E even; what `turn` holds broadcasts over x's axes but the last."""
    cos, sin = turn[0].to(x.dtype), turn[1].to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Places:
    """Where one token of each stream stands, and which places of a cache it sees: `first` to `at`, both included."""

    def __init__(self, first: Sequence[int], at: Sequence[int], device: torch.device) -> None:
        self.at, self.low, self.high = list(at), min(first), max(at) + 1
        self.even = len(set(first)) == 1 and len(set(at)) == 1
        self.mask: Tensor | None = None
        if self.even:  # no copy from the host, which would wait
            self.index = torch.full((1,), self.at[0], device=device)
        else:
            self.index, begin = (torch.tensor(x, device=device) for x in (self.at, list(first)))
            slots = torch.arange(self.low, self.high, device=device)
            seen = (slots >= begin[:, None]) & (slots <= self.index[:, None])
            self.mask = seen[:, None, None]

    def write(self, cache: Tensor, value: Tensor) -> None:
        """value [B, ...] at its place of the cache [B, S, ...]."""
        if self.even:
            cache[:, self.at[0]] = value
        else:
            cache[torch.arange(len(self.at), device=cache.device), self.index] = value

    def turn(self, width: int) -> Turn:
        """Of positions [B or 1, 1, 1]."""
        return turns(self.index[:, None, None], width)


class Attention(nn.Module):
    """Multi-head softmax attention, [B, T, dim] -> [B, T, dim]; causal ones also token by token, as a mixer."""

    def __init__(self, dim: int, heads: int, *, causal: bool = True, rotary: bool = True) -> None:
        super().__init__()
        if heads < 1 or dim % heads or (rotary and dim // heads % 2):
            fail(
                "PSM651", f"attention of width {dim} cannot have {heads} heads.",
                helps=("dim / heads must be a whole number" + (", and even (rotary positions)." if rotary else "."),),
            )  # fmt: skip
        self.dim, self.heads, self.width, self.causal, self.rotary = dim, heads, dim // heads, causal, rotary
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, T, E] of x [B, T, dim]."""
        each = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = each[:2] if turn is None else rotate(each[:2], turn)
        return q, k, each[2]

    def turn(self, length: int, device: torch.device, start: int = 0) -> Turn | None:
        return turns(torch.arange(start, start + length, device=device), self.width) if self.rotary else None

    def attend(self, x: Tensor, turn: Turn | None, keep: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(outputs of the last `keep` positions, keys, values)."""
        length = x.shape[1]
        keep = length if keep is None else keep
        q, k, v = self.project(x, turn)
        if not self.causal:
            q = q[:, :, length - keep :]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)[:, :, -keep:]
        return self.out(y.transpose(1, 2).flatten(2)), k, v

    def attend_token(self, x: Tensor, keys: Tensor, values: Tensor, places: Places, turn: Turn | None) -> Tensor:
        """One token [B, dim] at its places of the caches [B, S, H, E], which are written."""
        q, k, v = self.project(x.unsqueeze(1), turn)
        places.write(keys, k.squeeze(2).to(keys.dtype))
        places.write(values, v.squeeze(2).to(values.dtype))
        k, v = (c[:, places.low : places.high].transpose(1, 2).to(q.dtype) for c in (keys, values))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=places.mask)
        return self.out(y.transpose(1, 2).flatten(1))  # type: ignore[no-any-return]

    # --- as a mixer -----------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.turn(x.shape[1], x.device))[0]

    def init_state(self, batch: int) -> State:
        w = self.qkv.weight
        empty = w.new_zeros(batch, 0, self.heads, self.dim // self.heads)
        return {"k": empty, "v": empty, "position": torch.zeros(batch, dtype=torch.int64)}

    def prefill(self, x: Tensor) -> tuple[Tensor, State]:
        """All tokens at once, and the cache after them."""
        y, k, v = self.attend(x, self.turn(x.shape[1], x.device))
        position = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64)
        return y, {"k": k.transpose(1, 2), "v": v.transpose(1, 2), "position": position}

    def step(self, x: Tensor, state: State, in_place: bool = False) -> tuple[Tensor, State]:
        """One token [B, dim]. A full cache grows by a quarter: on average a token copies a few others, not all."""
        at: list[int] = state["position"].tolist()
        room = state["k"].shape[1]
        if max(at) >= room:
            more = max(32, room // 4)
            keys, values = (F.pad(state[n], (0, 0, 0, 0, 0, more)) for n in "kv")
        else:
            keys, values = (state[n] if in_place else state[n].clone() for n in "kv")
        places = Places([0] * len(at), at, x.device)
        y = self.attend_token(x, keys, values, places, places.turn(self.width) if self.rotary else None)
        return y, {"k": keys, "v": values, "position": state["position"] + 1}


def hidden_width(dim: int, expand: float) -> int:
    """Of an MLP: expand * dim, in whole tiles of matrix units."""
    return max(1, round(expand * dim / 16)) * 16


class Layer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, dim: int, heads: int, *, causal: bool, rotary: bool = True, expand: float = 4.0) -> None:
        super().__init__()
        hidden = hidden_width(dim, expand)
        self.norm, self.attention = nn.LayerNorm(dim), Attention(dim, heads, causal=causal, rotary=rotary)
        self.mlp_norm = nn.LayerNorm(dim)
        self.wide, self.narrow = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def run(self, x: Tensor, turn: Turn | None, keep: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        y, k, v = self.attention.attend(self.norm(x), turn, keep)
        x = x[:, x.shape[1] - y.shape[1] :] + y
        return x + self.narrow(F.gelu(self.wide(self.mlp_norm(x)))), k, v

    def run_token(self, x: Tensor, keys: Tensor, values: Tensor, places: Places, turn: Turn | None) -> Tensor:
        x = x + self.attention.attend_token(self.norm(x), keys, values, places, turn)
        return x + self.narrow(F.gelu(self.wide(self.mlp_norm(x))))  # type: ignore[no-any-return]


class Trunk(nn.Module):
    """Layers over windows of at most `window` positions, and a norm behind them: outputs are of one scale however often
    they go through it."""

    def __init__(
        self, dim: int, heads: int, layers: int, window: int, *, causal: bool, positions: str = "rotary",
        expand: float = 4.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if positions not in ("rotary", "learned"):
            fail("PSM651", f"positions are 'rotary' or 'learned', not {positions!r}.")
        self.window = window
        self.layers = nn.ModuleList(
            Layer(dim, heads, causal=causal, rotary=positions == "rotary", expand=expand) for _ in range(layers)
        )
        self.places = nn.Parameter(torch.randn(window, dim) * 0.1) if positions == "learned" else None
        self.norm = nn.LayerNorm(dim)
        with torch.no_grad():  # the residual stream starts with the variance of its input, whatever the depth
            for layer in self.stack():
                layer.attention.out.weight.mul_((2 * layers) ** -0.5)
                layer.narrow.weight.mul_((2 * layers) ** -0.5)

    def stack(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def _placed(self, x: Tensor, start: int) -> tuple[Tensor, Turn | None]:
        if self.places is not None:
            return x + self.places[start : start + x.shape[1]], None
        return x, self.stack()[0].attention.turn(x.shape[1], x.device, start)

    def forward(self, x: Tensor, keep: int | None = None, start: int = 0) -> Tensor:
        """[N, L, dim] -> the last `keep` positions, [N, keep, dim]; the last layer computes no others."""
        x, turn = self._placed(x, start)
        for n, layer in enumerate(self.stack()):
            x = layer.run(x, turn, keep if n == len(self.layers) - 1 else None)[0]
        return self.norm(x if keep is None else x[:, -keep:])  # type: ignore[no-any-return]

    def fill(self, x: Tensor, cache: Tensor, start: int = 0) -> None:
        """Writes the keys and values of x [N, L, dim] into [N, layers, 2, window, H, E]; computes nothing else."""
        x, turn = self._placed(x, start)
        stop, layers = start + x.shape[1], self.stack()
        for n, layer in enumerate(layers):
            if n < len(layers) - 1:
                x, k, v = layer.run(x, turn)
            else:
                _, k, v = layer.attention.project(layer.norm(x), turn)
            cache[:, n, 0, start:stop], cache[:, n, 1, start:stop] = k.transpose(1, 2), v.transpose(1, 2)

    def empty_cache(self, batch: int) -> Tensor:
        attention = self.stack()[0].attention
        shape = (batch, len(self.layers), 2, self.window, attention.heads, attention.dim // attention.heads)
        return attention.qkv.weight.new_zeros(shape)

    def token(self, x: Tensor, cache: Tensor, first: Sequence[int], at: Sequence[int]) -> Tensor:
        """One position [N, dim] at places `at`, seeing first .. at; the cache is written in place."""
        layers, places = self.stack(), Places(first, at, x.device)
        if self.places is not None:
            x = x + self.places[places.index]
        turn = places.turn(layers[0].attention.width) if self.places is None else None
        for n, layer in enumerate(layers):
            x = layer.run_token(x, cache[:, n, 0], cache[:, n, 1], places, turn)
        return self.norm(x)  # type: ignore[no-any-return]
