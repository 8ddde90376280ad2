"""The chunk kernels without the specs around them: times, part by part, and errors against a loop in fp64.

    python benchmarks/chunk_parts.py [--out FILE] [--quick]          # times
    python benchmarks/chunk_parts.py --accuracy [--quick]            # errors
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from chunk_cases import Data, kernels, table  # noqa: E402

from benchmarks.chunk_tiles import OPERAND, call_of, log_gate, normal  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    Row,
    command,
    copy_bandwidth,
    device,
    first_call,
    median_ms,
    options,
    peak_mib,
    show,
    with_gradients,
    write,
)
from psmc.runtime.kit_chunk_kernels import ChunkKernels  # noqa: E402

SHAPES = [(8, 4096, 16, 128, 128), (1, 65536, 16, 128, 128), (4, 4096, 64, 128, 128), (8, 4096, 32, 64, 64),
          (1, 8192, 96, 128, 128), (8, 2048, 32, 256, 256), (4, 4096, 16, 96, 80)]  # fmt: skip
TINY = [(1, 70, 1, 64, 64)]


def floor_ms(shape: tuple[int, ...], tensors: tuple[Tensor, ...], backward: bool, bandwidth: float) -> float:
    """Inputs once and y once; backward: those and dy once more, and every gradient."""
    b, t, h, _, v = shape
    own = sum(x.numel() * x.element_size() for x in tensors)
    y = b * t * h * v * OPERAND.itemsize
    return ((3 * own + 2 * y) if backward else own + y) / bandwidth * 1e3


def kernel_rows(shapes: list[tuple[int, ...]], bandwidth: float) -> Iterator[Row]:
    """The cut itself: y and the last state from factors, without the spec's torch code."""
    for b, t, h, k, v in shapes:
        for decay in (0, 1, 2):
            made = kernels(table())
            q, key, val = normal(b, t, h, k, seed=1), normal(b, t, h, k, seed=2), normal(b, t, h, v, seed=3)
            log = None if not decay else log_gate(b, t, h) if decay == 1 else log_gate(b, t, h, k, dtype=OPERAND)
            tensors = tuple(x for x in (q, key, val, log) if x is not None)

            def scan(q: Tensor, key: Tensor, val: Tensor, log: Tensor | None = None, made: Any = made) -> Tensor:
                return made.scan(q, key, val, log, None)[0]

            for kind in ("fwd", "fwd+bwd"):
                back = kind != "fwd"
                label = f"B{b} T{t} H{h} K{k} V{v}"
                row = {"spec": f"decay {decay}", "shape": label, "dtype": str(OPERAND)[6:], "pass": kind}
                try:
                    run = with_gradients(scan, tensors) if back else (lambda s=scan, ts=tensors: s(*ts))
                    with torch.set_grad_enabled(back):
                        row["first_call_s"] = round(first_call(run), 2)
                        row |= {"peak_mib": peak_mib(run), "ms": round(median_ms(run, rep=40), 4)}
                    row["floor_ms"] = round(floor_ms((b, t, h, k, v), tensors, back, bandwidth), 4)
                    if back:
                        names = ("states", "forward", "gradients", *(["prepare"] if decay == 2 else []))
                        given, bt = (q, key, val, log, None), 64 if k <= 128 else 32
                        parts = {n: call_of(ChunkKernels(made.table), n, given, bt) for n in names}
                        row["parts"] = {n: round(median_ms(f, rep=10), 4) for n, f in parts.items()}
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                yield row


def accuracy_rows(quick: bool = False) -> Iterator[Row]:
    """Relative errors against a sequential loop in fp64."""
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32):
        for k, v in ((128, 128), (96, 80)) if quick else ((128, 128), (64, 64), (96, 80), (256, 256)):
            for decay in (0, 1, 2):
                for hard in (False, True):
                    for shift in (0, 1) if not hard else (0,):
                        made = kernels(table())
                        row = {"dtype": str(dtype).removeprefix("torch."), "K": k, "V": v, "decay": decay, "hard": hard,
                               "shift": shift}  # fmt: skip
                        try:
                            cu = [0, 137, 300]
                            data = Data(1, 300, 2, k, v, decay, cu=cu, hard=hard, dtype=dtype, device=device())
                            row |= {n: f"{e:.1e}" for n, e in data.errors(made, shift).items()}
                        except Exception as error:
                            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                        yield row


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--accuracy", action="store_true")
    given = parser.parse_args()
    shapes = TINY if given.smoke else SHAPES[:1] if given.quick else SHAPES
    rows: list[Row] = []
    for row in accuracy_rows(given.quick) if given.accuracy else kernel_rows(shapes, copy_bandwidth()):
        rows.append(row)
        show([row])
        if given.out:
            write(given.out, rows, command())
    return 0


if __name__ == "__main__":
    sys.exit(main())
