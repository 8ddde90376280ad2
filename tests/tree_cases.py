"""Modules with tree kernels beside the oracle: used by the interpreter's tests and on a GPU."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from psmc import reference
from psmc.pipeline import Compilation, read_text
from psmc.plan.tree import TreePlan

EXAMPLES = Path(__file__).parent.parent / "examples"
LANE = """
aggregator lane {
  dim D
  input x[D], g[D]
  param w[D]
  state h[D] = 0.5
  lift { h[d] = g[d] * x[d] }
  combine (l, r) { h[d] = tanh(w[d] * l.h[d]) + g_of(r.h[d]) }
  output y[d] = h[d] * g[d]
  associative: no
}""".replace("g_of(r.h[d])", "0.5 * sigmoid(r.h[d]) * l.h[d]")
# Exact in fp32: whole numbers that stay small.
WHOLE = """
aggregator whole {
  input x
  state h = 0
  lift { h = x }
  combine (l, r) { h = 3 * l.h - r.h }
  output y = h
  associative: no
}"""
# A small dense map in each lane; an output that reads inputs, taps and the prefix before; a param for all lanes.
DENSE = """
aggregator dense {
  dim D, K = 2
  input x[K, D], z[D]
  param w[K, K], u[D]
  state h[K, D] = 1, n[D] = 0
  lift { h[k, d] = x[k, d] + 0.5 * x{-1}[k, d]; n[d] = u[d] * z[d] }
  combine (l, r) {
    h[k, d] = tanh(sum[m] w[k, m] * l.h[m, d] + r.h[k, d] * (k + 1) / K)
    n[d] = l.n[d] + r.n[d] * h[0, d]
  }
  output o[k, d] = prev.h[k, d] * z[d] + h[k, d] * n[d], top[d] = max(h[0, d], h[1, d]) + u[d]
  associative: no
}"""
_FOLDER = Path(tempfile.mkdtemp(prefix="psmc_tree_"))
_MODULES: dict[str, ModuleType] = {}


def compiled(text: str, levels: int | None = None) -> Compilation:
    (found,) = read_text(text)
    assert isinstance(found.plan, TreePlan), found.plan.refused
    if levels is not None:
        found.plan = replace(found.plan, levels=levels)
    return found


def module(found: Compilation):
    """The generated module's aggregator, and its kernels."""
    text = found.text
    if text not in _MODULES:
        file = _FOLDER / f"{found.agg.name}_{len(_MODULES)}.py"
        file.write_text(text)
        made = importlib.util.spec_from_file_location(file.stem, file)
        _MODULES[text] = sys.modules[file.stem] = importlib.util.module_from_spec(made)
        made.loader.exec_module(_MODULES[text])
    here = _MODULES[text]
    return getattr(here, found.agg.name), here.KERNELS


def tensors(found: Compilation, batch: int, length: int, lanes=(), seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """Random inputs and params in fp64, by name."""
    made = torch.Generator().manual_seed(seed)
    sizes |= {d.name: d.size for d in found.agg.dims if d.size is not None}
    values = {}
    for t in (*found.agg.leaf_inputs, *found.agg.params):
        lead = (batch, length, *lanes) if t in found.agg.leaf_inputs else ()
        values[t.name] = torch.randn((*lead, *(sizes[d] for d in t.dims)), generator=made, dtype=torch.float64)
    return values


def compare(found: Compilation, values: dict[str, Tensor], tolerance: float = 2e-5, device: str = "cpu") -> None:
    """Outputs and the gradients of all inputs and params: the kernels in fp32 against the oracle in fp64."""
    agg, _ = module(found)
    wide = {k: v.clone().requires_grad_() for k, v in values.items()}
    names = {t.name for t in found.agg.params}
    expected, _ = reference.fold(
        found.agg, {k: v for k, v in wide.items() if k not in names}, {k: v for k, v in wide.items() if k in names}
    )
    narrow = {k: v.to(device, torch.float32).requires_grad_() for k, v in values.items()}
    outs = agg(*narrow.values())
    outs = outs if isinstance(outs, tuple) else (outs,)
    made = torch.Generator().manual_seed(7)
    weights = [torch.randn(y.shape, generator=made, dtype=torch.float64) for y in expected.values()]
    wanted = torch.autograd.grad(sum((y * w).sum() for y, w in zip(expected.values(), weights, strict=True)),
                                 list(wide.values()), allow_unused=True)  # fmt: skip
    got = torch.autograd.grad(sum((y * w.to(y)).sum() for y, w in zip(outs, weights, strict=True)),
                              list(narrow.values()), allow_unused=True)  # fmt: skip
    pairs = [*zip(expected, expected.values(), outs, strict=True), *zip(values, wanted, got, strict=True)]
    for name, a, b in pairs:
        if a is None or b is None:
            assert all(x is None or not x.any() for x in (a, b)), name
            continue
        scale = max(a.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            b.double().cpu(), a, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
