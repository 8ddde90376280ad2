"""Softmax attention as a combine: fused kernels against torch's call on concatenated keys, in the tree and alone.

    python benchmarks/attention.py --out benchmarks/results/attention.json

Rows as everywhere: `floor_ms` counts inputs and outputs once, and for a backward their cotangents and gradients too.
`spec` attention_combine is the whole tree, shapes "B8 T64 N64 D64" (T chunks of N tokens), whose peer is the same
module with torch's call at each level; "two sets" is one combine's attention, "L4096 H8 N64 E64", whose peer copies
the two sets together and calls torch's flash attention. --smoke runs small ones, on a CPU: it measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import psmc
from benchmarks.measure import copy_bandwidth, first_call, median_ms, show, with_gradients, write
from benchmarks.tree import clock, moved, peak_mib

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "attention_combine.psm"
TREES = ((8, 64, 64, 64), (8, 256, 64, 256), (32, 64, 32, 128))
LEVELS = ((4096, 8, 64, 64), (1024, 12, 128, 64), (256, 8, 256, 128))
NEAR = {torch.float32: 1e-3, torch.bfloat16: 6e-2}


def without_kernels(agg: Any) -> Callable[..., Tensor]:
    """The same aggregator with torch's call in place of its kernels."""
    module = agg.rules.combine.__globals__

    def run(*tensors: Tensor) -> Tensor:
        kernels = module["ATTENTION_0"]
        module["ATTENTION_0"] = None
        try:
            out: Tensor = agg(*tensors)
        finally:
            module["ATTENTION_0"] = kernels
        return out

    return run


def tree(agg: Any, shape: Sequence[int], dtype: torch.dtype, device: str) -> tuple[Any, Any, list[Tensor]]:
    """(the fused tree, torch's, tensors)."""
    batch, length, tokens, width = shape
    made = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, tokens, width, generator=made)
    params = [torch.randn(width, width, generator=made) / width**0.5 for _ in range(3)]
    return agg, without_kernels(agg), [t.to(device, dtype) for t in (x, *params)]


def level(agg: Any, shape: Sequence[int], dtype: torch.dtype, device: str) -> tuple[Any, Any, list[Tensor]]:
    """One attention, query [L, H, N, E] to the keys and values of two sets of as many tokens."""
    made = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=made).to(device, dtype) for _ in range(5)]
    fused, plain = agg.rules.combine.__globals__["ATTENTION_0"], agg.rules.combine.__globals__["_attention"]
    scale = shape[-1] ** -0.5

    def kernels(q: Tensor, k: Tensor, m: Tensor, v: Tensor, w: Tensor) -> Tensor:
        if not fused.takes([q]):
            return plain(None, None, q, [k, m], [v, w], scale)
        return fused(q, [k, m], [v, w], scale)

    def flash(q: Tensor, k: Tensor, m: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, torch.cat([k, m], -2), torch.cat([v, w], -2), scale=scale)

    return kernels, flash, tensors


def measure(
    trees: Sequence[Sequence[int]], levels: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], device: str
) -> list[dict[str, Any]]:
    agg = psmc.load(EXAMPLE)
    on_gpu = device == "cuda"
    timed = median_ms if on_gpu else clock
    bandwidth = copy_bandwidth() if on_gpu else None
    cases = [("attention_combine", tree, "B{} T{} N{} D{}", "tree of torch's calls", s) for s in trees]
    cases += [("two sets", level, "L{} H{} N{} E{}", "concatenated, flash", s) for s in levels]
    rows = []
    for spec, make, named, peer, shape in cases:
        for dtype in dtypes:
            mine, theirs, tensors = make(agg, shape, dtype, device)
            with torch.no_grad():
                a, b = mine(*tensors).float(), theirs(*tensors).float()
            near = ((a - b).abs().max() / b.abs().max()).item()
            assert near < NEAR[dtype], f"{spec} {shape}: the two differ by {near}"
            for name in ("fwd", "fwd+bwd"):
                back = name == "fwd+bwd"
                runs = [with_gradients(f, tensors) if back else partial(f, *tensors) for f in (mine, theirs)]
                row: dict[str, Any] = {
                    "spec": spec, "shape": named.format(*shape), "dtype": str(dtype)[6:], "pass": name,
                    "first_call_s": round(first_call(runs[0]), 2) if on_gpu else None,
                    "ms": timed(runs[0]), "peers": {peer: timed(runs[1])},
                }  # fmt: skip
                if bandwidth is not None:
                    floor = moved(mine, tensors, back) / bandwidth * 1e3
                    row |= {"floor_ms": floor, "floor": "bytes", "peak_mib": peak_mib(runs[0]),
                            "peer_peak_mib": {peer: peak_mib(runs[1])}}  # fmt: skip
                rows.append({k: v for k, v in row.items() if v is not None})
    return rows


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args(arguments)
    if given.smoke:
        rows = measure([(1, 3, 2, 4)], [(2, 1, 3, 8)], [torch.float32], "cpu")
    else:
        rows = measure(TREES, LEVELS, (torch.bfloat16, torch.float32), "cuda")
    show(rows)
    if given.out is not None:
        write(given.out, rows, "python benchmarks/attention.py")
    return rows


if __name__ == "__main__":
    main()
