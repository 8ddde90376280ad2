"""First call with empty caches: load, forward, backward of chunked specs in fresh processes.

    python benchmarks/cold.py --out benchmarks/results/cold.json

Seconds from the import of psmc on, torch being imported and the device awake; triton's and psmc's caches lie in an
empty folder. "warm": once more, in another process, with what the first one left there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import measure  # noqa: E402
from benchmarks.jobs import Cell, Group, Results, serve  # noqa: E402
from benchmarks.measure import Row, options  # noqa: E402

SPECS = ("gla", "mamba2", "mlstm", "rwkv6", "linear_attention", "retnet", "hgrn2", "gated_rfa")


def handle(cell: Cell) -> Iterator[Row]:
    import torch

    torch.zeros(1, device=measure.device())
    measure.wait()
    begin = time.perf_counter()
    from benchmarks.chunk_data import Shape, inputs, load

    imported = time.perf_counter()
    name = cell["spec"]
    shape = Shape(1, 40, 2, 16, 16) if cell["tiny"] else Shape(8, 4096, 16, 128, 128)
    given = {k: x.requires_grad_() for k, x in inputs(name, shape).items()}
    measure.wait()
    drawn = time.perf_counter()
    agg = load(name, Path())
    loaded = time.perf_counter()
    y = agg(**given)
    measure.wait()
    forward = time.perf_counter()
    y.sum().backward()
    measure.wait()
    end = time.perf_counter()
    spent = {"import_s": imported - begin, "load_s": loaded - drawn, "forward_s": forward - loaded,
             "backward_s": end - forward, "all_s": end - drawn + imported - begin}  # fmt: skip
    yield {"what": cell["what"], "spec": name, "shape": shape.label, "dtype": "bfloat16",
           **{k: round(s, 2) for k, s in spent.items()}}  # fmt: skip


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--specs", default=",".join(SPECS[:4]))
    given = parser.parse_args()
    if given.job:
        serve(given.job, handle)
        return 0
    names = given.specs.split(",")[: 1 if given.smoke else None]
    with tempfile.TemporaryDirectory() as folder:
        groups = []
        for name in names:
            env = {"TRITON_CACHE_DIR": f"{folder}/{name}/triton", "PSMC_CACHE_DIR": f"{folder}/{name}/psmc"}
            for what in ("cold", "warm"):
                cell = {"spec": name, "what": what, "tiny": given.smoke}
                groups.append(Group(f"{name}, {what}", (cell,), 90, env))
        results = Results(given.out, given.resume, lambda r: (names.index(r["spec"]), r["what"]))
        failed = lambda cell, why: [{k: cell[k] for k in ("what", "spec")} | {"error": why}]  # noqa: E731
        results.run(__file__, groups, failed, seconds=given.seconds)
    print(json.dumps({"not measured": results.missing}) if results.missing else "all measured")
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main())
