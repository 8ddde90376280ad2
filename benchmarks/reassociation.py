"""What another order of combines costs: every associative example in fp32 and bf16, on a CPU.

    python benchmarks/reassociation.py --out benchmarks/results/reassociation.json [--tokens 256] [--seeds 2]

A proof is over the reals; floats reassociate. Errors are relative to the largest value of the fp64 oracle on the same
rounded inputs, the worst over outputs, draws (mild; and hard: keys that repeat, gates from 1e-3 to 50) and seeds:

    fold     the sequential fold in that dtype: what no order can be blamed for
    scan     the parallel call
    tree     elements combined in balanced halves
    apart    how far the parallel call and the steps of decoding are from one another

States are fp32 throughout, so that in bf16 most of each figure is the rounding of what goes in and out.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import show, write

import psmc
from psmc.duality import Row, Setting, duality
from psmc.pipeline import read

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DTYPES = ("fp32", "bf16")


def associative(names: list[str]) -> list[tuple[str, Any]]:
    """The compiled examples whose order is free, by file name."""
    paths = [p for p in sorted(EXAMPLES.glob("*.psm")) if not names or p.stem in names]
    return [(p.stem, psmc.load(p)) for p in paths if all(c.declared.claim != "no" for c in read(p))]


def measured(agg: Any, setting: Setting, seeds: int) -> list[Row]:
    return [row for seed in range(seeds) for row in duality(agg, replace(setting, seed=seed))]


def summary(spec: str, plan: str, rows: list[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {"spec": spec, "plan": plan}
    for dtype in DTYPES:
        mine = [r for r in rows if r.dtype == dtype]
        found[f"{dtype} fold"] = max(r.fold for r in mine if r.path == "scan")
        for path in ("scan", "tree"):
            found[f"{dtype} {path}"] = max((r.outputs for r in mine if r.path == path), default=0.0)
        found[f"{dtype} apart"] = max(r.reassociation or 0.0 for r in mine)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--spec", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(dtypes=DTYPES, lengths=(options.tokens,), batch=1, lanes=(2,))
    rows = []
    for spec, agg in associative(options.spec):
        rows.append(summary(spec, agg.plan.name, measured(agg, setting, options.seeds)))
        show(rows[-1:])
    if options.out:
        write(options.out, rows, " ".join(["python benchmarks/reassociation.py", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
