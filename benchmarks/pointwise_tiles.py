"""Tiles of the pointwise kernels, checked against each other, then timed: the anchors of `psmc.plan.pointwise`.

    python benchmarks/pointwise_tiles.py --out benchmarks/results/pointwise_tiles.json

The kernels alone, without autograd: forward as in inference, backward from saved states. A tile is rows a chunk,
chunks, lanes, warps, stages, lanes a load.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import psmc  # noqa: E402
from benchmarks.measure import copy_bandwidth, median_ms, write  # noqa: E402

Tile = tuple[int, int, int, int, int, int]
SHAPE = (8, 8192, 2048)
TILES: dict[tuple[str, torch.dtype, str], list[Tile]] = {
    ("linear_recurrence", torch.float32, "fwd"): [
        (8, 8, 32, 2, 3, 4), (8, 4, 32, 1, 3, 4), (4, 8, 32, 1, 3, 4), (4, 8, 64, 2, 3, 4), (8, 4, 64, 2, 3, 4),
    ],
    ("linear_recurrence", torch.float32, "bwd"): [
        (8, 8, 32, 2, 3, 4), (8, 4, 32, 1, 3, 4), (4, 8, 32, 1, 3, 4), (4, 8, 64, 2, 3, 4),
    ],
    ("linear_recurrence", torch.bfloat16, "fwd"): [
        (4, 16, 64, 4, 3, 8), (8, 8, 64, 2, 3, 8), (8, 8, 32, 2, 3, 4), (8, 8, 32, 1, 3, 8), (8, 4, 64, 2, 3, 4),
        (8, 16, 32, 4, 3, 4), (4, 16, 32, 2, 3, 8),
    ],
    ("linear_recurrence", torch.bfloat16, "bwd"): [
        (4, 16, 64, 4, 3, 8), (8, 8, 64, 2, 3, 8), (8, 8, 32, 2, 3, 4), (8, 8, 32, 1, 3, 8), (8, 4, 64, 2, 3, 4),
        (4, 16, 32, 2, 3, 8), (4, 8, 64, 2, 3, 8),
    ],
    ("logsumexp", torch.float32, "fwd"): [
        (8, 8, 32, 2, 3, 4), (8, 4, 32, 1, 3, 4), (4, 16, 32, 4, 3, 4), (4, 8, 32, 2, 3, 4), (16, 4, 32, 2, 3, 4),
        (8, 8, 32, 4, 3, 2),
    ],
    ("logsumexp", torch.float32, "bwd"): [
        (4, 8, 32, 2, 3, 4), (8, 4, 32, 1, 3, 4), (2, 16, 32, 4, 3, 4), (4, 8, 32, 4, 3, 2),
    ],
}  # fmt: skip


def tensors(spec: str, dtype: torch.dtype) -> list[Tensor]:
    made = torch.Generator("cuda").manual_seed(0)
    b = torch.randn(SHAPE, device="cuda", generator=made).to(dtype)
    if spec == "logsumexp":
        return [b]
    return [(torch.rand(SHAPE, device="cuda", generator=made) * 0.2 + 0.8).to(dtype), b]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    copy = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for (spec, dtype, direction), tiles in TILES.items():
        kernels = psmc.load(ROOT / "examples" / f"{spec}.psm").module.KERNELS
        x = tensors(spec, dtype)
        outputs, finals, saved = kernels.scan_forward(x, [], None, None, None, True)
        grads = [torch.randn_like(y) for y in outputs]
        ends = [torch.zeros_like(f) for f in finals]
        way = {"fwd": "forward", "bwd": "backward"}[direction]
        streams = len(x) + 1 if direction == "fwd" else 2 * len(x) + 1
        floor = streams * x[0].numel() * x[0].element_size() / copy * 1e3
        wanted: list[Tensor] | None = None
        for tile in tiles:
            kernels.table.tiles[way] = {4: tile, 2: tile}

            def run(save: bool = False) -> list[Tensor]:
                if direction == "fwd":  # noqa: B023
                    return list(kernels.scan_forward(x, [], None, None, None, save)[0])  # noqa: B023
                found = kernels.scan_backward(grads, ends, x, [], None, outputs, saved, None, None)  # noqa: B023
                return list(found[0])

            found = run()
            wanted = wanted or [t.clone() for t in found]
            pairs = ((a.float(), b.float()) for a, b in zip(found, wanted, strict=True))
            error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
            row = {"spec": spec, "shape": "B8 T8192 C2048", "dtype": str(dtype)[6:], "pass": direction,
                   "tile": ", ".join(map(str, tile)), "ms": round(median_ms(run), 4), "floor_ms": round(floor, 4),
                   "floor": "bytes"}  # fmt: skip
            rows.append(row if error < 1e-3 else {**row, "error": f"differs by {error:.0e}"})
            print(rows[-1], flush=True)
    command = "python benchmarks/pointwise_tiles.py --out benchmarks/results/pointwise_tiles.json"
    write(options.out, rows, command, copy_gb_s=round(copy / 1e9))


if __name__ == "__main__":
    main()
