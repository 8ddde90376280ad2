"""What bf16 costs the chunk kernels, without a GPU: they run in Triton's interpreter, with bf16 as a GPU computes it.

    TRITON_INTERPRET=1 python benchmarks/rounding.py --out benchmarks/results/rounding.json

Errors are relative (2-norm), against the oracle in fp64 on exact tensors. least: of that oracle on tensors rounded to
bf16, its results rounded, too. A row has the output, and the gradient whose error is the largest multiple of its least.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import measure
from benchmarks.accuracy import called, derived, errors, lower, oracle, short
from benchmarks.chunk_data import PARAMS, Shape, inputs, load
from benchmarks.interpreted_bf16 import bf16

SPECS = ("linear_attention", "retnet", "mamba2", "gla", "hgrn2", "rwkv6", "gated_rfa", "mlstm", "value_gate",
         "grid_gate", "two_writes")  # fmt: skip
KINDS = ("iid", "gates")
WHOLE, TINY = Shape(1, 192, 1, 64, 64, "float32"), Shape(1, 20, 1, 16, 16, "float32")


def costs(name: str, kind: str, shape: Shape) -> dict[str, tuple[float, float]]:
    """By tensor, the output and each gradient: the kernels' error, and the least."""
    fixed = PARAMS.get(name, ())
    with tempfile.TemporaryDirectory() as folder:
        agg = load(name, Path(folder))
        exact = {k: x.float() for k, x in inputs(name, shape, kind).items()}
        rounded = lower(exact, fixed, torch.bfloat16)
        with torch.no_grad():
            form = agg.reference(
                {k: x for k, x in exact.items() if k not in fixed}, {k: exact[k] for k in fixed}
            )[0][agg.spec.outputs[0].name].shape  # fmt: skip
        weight = torch.randn(form, generator=torch.Generator().manual_seed(9))
        right, weight = oracle(agg, fixed, exact, weight), weight.bfloat16().float()
        best = lower(oracle(agg, fixed, {k: x.float() for k, x in rounded.items()}, weight), fixed, torch.bfloat16)
        with bf16():
            found = derived(functools.partial(called, agg), rounded, weight)
    ours, least = errors(found, right), errors(best, right)
    return {k: (ours[k], least[k]) for k in ours}


def main() -> int:
    given = measure.options(__doc__).parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1: triton must be imported with its interpreter on")
    torch.set_num_threads(1)
    rows: list[measure.Row] = []
    for name in SPECS[: 1 if given.smoke else None]:
        for kind in KINDS:
            if kind == "gates" and name in ("linear_attention", "retnet"):
                continue  # no gate comes with the tokens
            found = costs(name, kind, TINY if given.smoke else WHOLE)
            output, least = found.pop("output")
            worst = max(found, key=lambda k: found[k][0] / max(found[k][1], 1e-9))
            rows.append({
                "spec": name, "data": kind, "output": short(output), "least": short(least), "worst gradient": worst,
                "error": short(found[worst][0]), "its least": short(found[worst][1]),
                "times": float(f"{found[worst][0] / max(found[worst][1], 1e-9):.2f}"),
            })  # fmt: skip
            print(rows[-1], flush=True)
    if given.out is not None:
        measure.write(given.out, rows, f"TRITON_INTERPRET=1 {measure.command()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
