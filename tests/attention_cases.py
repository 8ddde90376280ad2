"""Attention kernels, loaded, beside torch's attention in fp64: used by the interpreter's tests and on a GPU."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from psmc.codegen.attention_code import print_attention
from psmc.pipeline import read_text

_FOLDER = Path(tempfile.mkdtemp(prefix="psmc_attention_"))
_MADE: dict[str, ModuleType] = {}
EXAMPLE = (Path(__file__).parent.parent / "examples" / "attention_combine.psm").read_text()
# Three sets of two sizes; keys from one component, values from another; a scale for each head that is learned.
THREE = """
aggregator three {
  dim H, N, M, E, V
  input x[H, N, E], y[H, N, V]
  param s[H], kept[H, M, E], held[H, M, V], mix[V, E]
  state k[H, N, E] = 0, v[H, N, V] = 0
  lift { k[h, n, e] = x[h, n, e]; v[h, n, d] = y[h, n, d] }
  combine (l, r) {
    let a[h, n, m] = s[h] * sum[e] r.k[h, n, e] * l.k[h, m, e]
    let b[h, n, m] = s[h] * sum[e] r.k[h, n, e] * r.k[h, m, e]
    let c[h, n, m] = s[h] * sum[e] r.k[h, n, e] * kept[h, m, e]
    let t[h, n] = max(max(max[m] a[h, n, m], max[m] b[h, n, m]), max[m] c[h, n, m])
    v[h, n, d] = (sum[m] exp(a[h, n, m] - t[h, n]) * l.v[h, m, d] + sum[m] exp(b[h, n, m] - t[h, n]) * r.v[h, m, d]
        + sum[m] exp(c[h, n, m] - t[h, n]) * held[h, m, d])
      / (sum[m] exp(a[h, n, m] - t[h, n]) + sum[m] exp(b[h, n, m] - t[h, n]) + sum[m] exp(c[h, n, m] - t[h, n]))
    k[h, n, e] = tanh(r.k[h, n, e] + sum[d] v[h, n, d] * mix[d, e])
  }
  associative: no
}"""
# The right element's tokens see each other causally, and of the left one those in a window.
MASKED = """
aggregator masked {
  dim N, E, W = 3
  input x[N, E]
  param w[E, E]
  state h[N, E] = 0
  lift { h[n, e] = x[n, e] }
  combine (l, r) {
    let q[n, e] = sum[c] r.h[n, c] * w[c, e]
    let far[n, m] = where(n + N - m < N + W and m <= n, (sum[e] q[n, e] * l.h[m, e]) / 2, -inf)
    let near[n, m] = (sum[e] q[n, e] * r.h[m, e]) / 2
    let top[n] = max(max[m] far[n, m], max[m] where(m > n, -inf, near[n, m]))
    h[n, e] = r.h[n, e]
      + (sum[m] exp(far[n, m] - top[n]) * l.h[m, e] + sum[m] where(m > n, 0, exp(near[n, m] - top[n])) * r.h[m, e])
      / (sum[m] exp(far[n, m] - top[n]) + sum[m] where(m > n, 0, exp(near[n, m] - top[n])))
  }
  associative: no
}"""
# Heads, a projection after, a gate; two attentions, of which one sees the left side alone.
LAYER = """
aggregator layer {
  dim H = 2, N, D, E
  input x[N, D]
  param q[H, D, E], k[H, D, E], v[H, D, E], out[H, E, D], gate[D]
  state h[N, D] = 0
  lift { h[n, d] = x[n, d] }
  combine (l, r) {
    let ask[a, n, e] = sum[d] r.h[n, d] * q[a, d, e]
    let far[a, n, m] = (sum[e] ask[a, n, e] * sum[d] l.h[m, d] * k[a, d, e]) / sqrt(E)
    let near[a, n, m] = (sum[e] ask[a, n, e] * sum[d] r.h[m, d] * k[a, d, e]) / sqrt(E)
    let both[a, n, e] = (sum[m] exp(far[a, n, m]) * sum[d] l.h[m, d] * v[a, d, e]
        + sum[m] exp(near[a, n, m]) * sum[d] r.h[m, d] * v[a, d, e])
      / (sum[m] exp(far[a, n, m]) + sum[m] exp(near[a, n, m]))
    let back[n, m] = sum[d] l.h[m, d] * r.h[n, d] * gate[d]
    let old[n, d] = (sum[m] exp(back[n, m]) * l.h[m, d]) / sum[m] exp(back[n, m])
    h[n, d] = sigmoid(gate[d]) * r.h[n, d] + sum[a] sum[e] both[a, n, e] * out[a, e, d] + 0.1 * old[n, d]
  }
  associative: no
}"""


def kernels(text: str = EXAMPLE) -> list:
    """The kernels of a spec's attentions, `AttentionKernels` each."""
    (found,) = read_text(text)
    code = print_attention(found.agg)
    if code not in _MADE:
        head = "from __future__ import annotations\nimport math, os, sys, threading, torch\n"
        head += "from collections.abc import Callable, Iterator, Sequence\nfrom contextlib import contextmanager\n"
        head += "from types import SimpleNamespace\nfrom typing import Any, NamedTuple\nfrom torch import Tensor\n"
        head += "from torch.autograd.function import once_differentiable\n"
        file = _FOLDER / f"attention_{len(_MADE)}.py"
        file.write_text(head + code)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        _MADE[code] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_MADE[code])
    module = _MADE[code]
    return [getattr(module, name) for name in sorted(vars(module)) if name.startswith("ATTENTION_") and name[10:].isdigit()]


def plain(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    """The same in fp64, scores and all."""
    k, v = torch.cat([*keys], -2).double(), torch.cat([*values], -2).double()
    return torch.softmax(scale * (query.double() @ k.transpose(-1, -2)), -1) @ v


def draw(
    lead: tuple[int, ...], tokens: int, sets: tuple[int, ...], key: int, value: int, dtype: torch.dtype = torch.float32,
    device: str = "cpu", seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    """query, keys of each set, values of each set."""
    made = torch.Generator().manual_seed(seed)
    shapes = [(*lead, tokens, key), *((*lead, m, key) for m in sets), *((*lead, m, value) for m in sets)]
    return [torch.randn(s, generator=made).to(device, dtype).requires_grad_() for s in shapes]


def compare(one, tensors: list[Tensor], scale: float | None = None, given: torch.dtype | None = None) -> list[float]:
    """Largest error of the output and of each gradient, against the largest value of each."""
    count = len(tensors) // 2
    scale = 1 / math.sqrt(tensors[0].shape[-1]) if scale is None else scale
    out = one(tensors[0], tensors[1 : count + 1], tensors[count + 1 :], scale, given)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = plain(wide[0], wide[1 : count + 1], wide[count + 1 :], scale)
    assert out.shape == expected.shape
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    found = torch.autograd.grad((out * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected * weights.double()).sum(), wide)
    pairs = zip((out, *found), (expected, *wanted), strict=True)
    return [((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in pairs if b.numel()]
