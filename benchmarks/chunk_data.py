"""Specs on a matrix state: the tensors that each is called with, easy or hard, by the names of its spec.

`inputs(name, shape, kind)` gives [B, T, H, *dims] for inputs and [H, *dims] for params. A kind of data:

iid         normal q, k, v; mild gates
cosine N    keys of one head have N / 10 as their mean cosine
repeated    four keys a head, again and again
gates       decays of 1e-3 to 50 in the exponent, in one tensor
zeros       the same, and one in twenty forgets everything: a log of -inf where the spec takes logs
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import psmc
from benchmarks.measure import EXAMPLES, device

Tensors = dict[str, Tensor]
KINDS = ("iid", "cosine 5", "cosine 9", "repeated", "gates", "zeros")
GATED = ("gates", "zeros")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

SIGNED = """# Linear attention whose decay is any number.
aggregator signed_decay {
  dim K, V
  input q[K], k[K], v[V], a[K]
  state d[K] = 1, S[K, V] = 0
  lift {
    d[i] = a[i]
    S[i, j] = k[i] * v[j]
  }
  combine (l, r) {
    d[i] = l.d[i] * r.d[i]
    S[i, j] = r.d[i] * l.S[i, j] + r.S[i, j]
  }
  output o[j] = sum[i] q[i] * S[i, j] / sqrt(K)
  associative: yes
}
"""


@dataclass(frozen=True)
class Shape:
    """Sizes of a call; sequences > 0: so many of them packed into one row of T tokens."""

    batch: int
    length: int
    heads: int
    key: int
    value: int
    dtype: str = "bfloat16"
    sequences: int = 0

    @property
    def label(self) -> str:
        packed = f" in {self.sequences} sequences" if self.sequences else ""
        return f"B{self.batch} T{self.length}{packed} H{self.heads} K{self.key} V{self.value}"

    def cu_seqlens(self) -> Tensor | None:
        """Offsets of sequences of unequal lengths."""
        if not self.sequences:
            return None
        made = torch.Generator().manual_seed(3)
        weights = torch.rand(self.sequences, generator=made) + 0.2
        cuts = (weights.cumsum(0) / weights.sum() * self.length).round().long()
        return torch.cat([torch.zeros(1, dtype=torch.long), cuts]).to(device())


class Draw:
    """Tensors of one kind, from seeds of their own, in fp32."""

    def __init__(self, shape: Shape, kind: str) -> None:
        self.shape, self.kind, self.seed = shape, kind, 0
        self.tokens = (shape.batch, shape.length, shape.heads)

    def normal(self, *size: int) -> Tensor:
        self.seed += 1
        made = torch.Generator(device=device()).manual_seed(self.seed)
        return torch.randn(size, device=device(), generator=made)

    def uniform(self, *size: int) -> Tensor:
        self.seed += 1
        made = torch.Generator(device=device()).manual_seed(self.seed)
        return torch.rand(size, device=device(), generator=made)

    def query(self) -> Tensor:
        return self.normal(*self.tokens, self.shape.key)

    def key(self) -> Tensor:
        """Of length about 1."""
        s = self.shape
        k = self.normal(*self.tokens, s.key)
        if self.kind.startswith("cosine"):
            share = int(self.kind.split()[1]) / 10
            k = math.sqrt(share) * self.normal(1, 1, s.heads, s.key) + math.sqrt(1 - share) * k
        elif self.kind == "repeated":
            few = self.normal(s.batch, 4, s.heads, s.key)
            k = few[:, torch.arange(s.length, device=k.device) * 7 // 3 % 4]
        return k / s.key**0.5

    def value(self) -> Tensor:
        return self.normal(*self.tokens, self.shape.value)

    def rate(self, *size: int) -> Tensor:
        """-log of a decay, > 0; inf for some, where the kind has zeros."""
        if self.kind not in GATED:
            return torch.nn.functional.softplus(-self.normal(*size) - 3)
        x = 10 ** (self.uniform(*size) * math.log10(50 / 1e-3) - 3)
        return torch.where(self.uniform(*size) < 0.05, math.inf, x) if self.kind == "zeros" else x

    def logit(self, *size: int) -> Tensor:
        """What a sigmoid makes a decay of; one that is 0 in fp32 for what has no logit."""
        x = self.rate(*size).clamp(max=200)
        return -x - torch.log(-torch.expm1(-x))

    def log(self, *size: int) -> Tensor:
        return -self.rate(*size)


def linear_attention(d: Draw) -> Tensors:
    return {"q": d.query(), "k": d.key(), "v": d.value()}


def retnet(d: Draw) -> Tensors:
    heads = d.shape.heads
    usual = 1 - 2.0 ** (-5 - torch.arange(heads, device=device(), dtype=torch.float32))
    gamma = torch.exp(-d.rate(heads).clamp(max=50)) if d.kind in GATED else usual
    return {"q": d.query(), "k": d.key(), "v": d.value(), "gamma": gamma}


def mamba2(d: Draw) -> Tensors:
    c, n, x, s = d.query(), d.key(), d.value(), d.shape
    dt, a = torch.nn.functional.softplus(d.normal(*d.tokens) - 2), -d.uniform(s.heads) - 0.5
    if d.kind in GATED:
        dt, a = d.rate(*d.tokens).clamp(max=200), -torch.ones(s.heads, device=device())
    return {"x": x, "dt": dt, "B": n, "C": c, "A": a, "skip": d.uniform(s.heads)}


def gla(d: Draw) -> Tensors:
    return {"q": d.query(), "k": d.key(), "v": d.value(), "g": d.log(*d.tokens, d.shape.key)}


def hgrn2(d: Draw) -> Tensors:
    return {"q": d.query(), "v": d.value(), "g": d.log(*d.tokens, d.shape.key)}


def rwkv6(d: Draw) -> Tensors:
    w = d.rate(*d.tokens, d.shape.key).clamp(max=200).log()
    return {"r": d.query(), "k": d.key(), "v": d.value(), "w": w, "u": d.normal(d.shape.heads, d.shape.key)}


def gated_rfa(d: Draw) -> Tensors:
    return {"q": d.query().abs(), "k": d.key().abs(), "v": d.value(), "gate": d.logit(*d.tokens)}


def mlstm(d: Draw) -> Tensors:
    gates = {"igate": d.normal(*d.tokens), "fgate": d.logit(*d.tokens)}
    return {"q": d.query(), "k": d.key(), "v": d.value(), **gates}


def value_gate(d: Draw) -> Tensors:
    return {"q": d.query(), "k": d.key(), "v": d.value(), "g": d.log(*d.tokens, d.shape.value)}


def two_writes(d: Draw) -> Tensors:
    return {"q": d.query(), "k": d.key(), "v": d.value(), "h": d.key(), "w": d.value(), "f": d.logit(*d.tokens)}


def grid_gate(d: Draw) -> Tensors:
    s = d.shape
    gates = {"g": d.log(*d.tokens, s.key), "h": d.log(*d.tokens, s.value)}
    return {"q": d.query(), "k": d.key(), "v": d.value(), **gates, "u": d.normal(s.heads, s.key)}


def gated_deltanet(d: Draw) -> Tensors:
    k = torch.nn.functional.normalize(d.key(), dim=-1)
    gates = {"beta": d.uniform(*d.tokens), "g": d.log(*d.tokens)}
    return {"q": d.query(), "k": k, "v": d.value(), **gates}


def signed_decay(d: Draw) -> Tensors:
    """Decays in (-1, 1); the sign is kept through the kinds with gates, and zeros are zeros."""
    size = (*d.tokens, d.shape.key)
    sign = torch.where(d.uniform(*size) < 0.5, -1.0, 1.0)
    return {"q": d.query(), "k": d.key(), "v": d.value(), "a": sign * torch.exp(-d.rate(*size))}


SPECS: dict[str, Callable[[Draw], Tensors]] = {
    f.__name__: f for f in (linear_attention, retnet, mamba2, gla, hgrn2, rwkv6, gated_rfa, mlstm, value_gate,
                            two_writes, grid_gate, gated_deltanet, signed_decay)
}  # fmt: skip
CHUNKED = tuple(SPECS)[:11]
PARAMS = {"retnet": ("gamma",), "mamba2": ("A", "skip"), "rwkv6": ("u",), "grid_gate": ("u",)}


def inputs(name: str, shape: Shape, kind: str = "iid") -> Tensors:
    """What the spec is called with: inputs in the shape's dtype, params in fp32."""
    made, fixed = SPECS[name](Draw(shape, kind)), PARAMS.get(name, ())
    return {k: x if k in fixed else x.to(DTYPES[shape.dtype]) for k, x in made.items()}


def load(name: str, folder: Path) -> Any:
    """The compiled spec; `folder` is for the text of what is no example."""
    if name == "signed_decay":
        path = folder / "signed_decay.psm"
        path.write_text(SIGNED)
        return psmc.load(path)
    return psmc.load(EXAMPLES / f"{name}.psm")
