"""First calls, host time, recompilation: what a user waits for besides the kernels. GPU.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json
    python benchmarks/overhead.py --host        without a GPU: the same calls up to the driver's launch, by part
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CHILD = """
import time, torch
torch.zeros(1, device="cuda"); torch.cuda.synchronize()
begin = time.perf_counter()
import psmc
agg = psmc.load("examples/mingru.psm")
z, x = (torch.randn(4, 512, 256, device="cuda", requires_grad=True) for _ in range(2))
y = agg(z, x); y.sum().backward(); torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""


def host() -> None:
    """Microseconds of Python a call, the least of many runs: all but the driver's launch and CUDA's allocator."""
    import timeit

    import torch

    import psmc
    from benchmarks.no_device import no_device

    torch.set_num_threads(1)
    agg = psmc.load(ROOT / "examples" / "mingru.psm")
    z, x = (torch.randn(2, 64, 256) for _ in range(2))
    token, leaves = (z[:, 0], x[:, 0]), [t.clone().requires_grad_() for t in (z, x)]
    with no_device(agg):
        state = agg.step(None, *token)[1]
        cotangent = torch.randn_like(agg(z, x))
        fn, same = agg.operator.kernels.table.step_kernel, torch.empty(2, 256)
        given = (*token, same, state["h"], same, None, 64, 4096, 4096, 1, 1, 1, 1, 256, 4)
        parts = {
            "forward": lambda: agg(z, x),
            "forward, with gradients": lambda: agg(*leaves),
            "forward and backward": lambda: torch.autograd.grad(agg(*leaves), leaves, cotangent),
            "step": lambda: agg.step(state, *token),
            "step_": lambda: agg.step_(state, *token),
            "the step kernel, by triton.jit's own launch": lambda: fn[(2,)](*given),
            "a buffer": lambda: torch.empty((2, 256), dtype=torch.float32, device=z.device),
        }
        for what, run in parts.items():
            run()
            print(f"{what:45}{min(timeit.repeat(run, number=30, repeat=150)) / 30 * 1e6:8.1f} us", flush=True)


def chunked(name: str) -> list[tuple[str, Callable[[], object]]]:
    """A forward and a step of a matrix state, small enough that the host is what takes time."""
    import torch

    import psmc
    from benchmarks.chunk_data import PARAMS, Shape, inputs

    agg = psmc.load(ROOT / "examples" / f"{name}.psm")
    given = inputs(name, Shape(1, 64, 4, 64, 64))
    token = {k: x if k in PARAMS.get(name, ()) else x[:, 0].contiguous() for k, x in given.items()}
    order = [s.name for s in (*agg.spec.inputs, *agg.spec.params)]
    state = agg.init_state(1, (4,), "cuda", sizes=dict.fromkeys(agg.spec.dims, 64))

    def forward() -> object:
        with torch.no_grad():
            return agg(**given)

    return [("forward", forward), ("step_", lambda: agg.step_(state, *[token[n] for n in order]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--host", action="store_true", help="time the Python of a call; no GPU is needed")
    options = parser.parse_args()
    if options.host:
        host()
        return
    if options.out is None:
        parser.error("--out is needed, or --host")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        search = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        env = {**os.environ, "TRITON_CACHE_DIR": f"{folder}/triton", "PSMC_CACHE_DIR": f"{folder}/psmc"}
        env["PYTHONPATH"] = search
        for name in ("cold cache", "warm cache, second process"):
            done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=env, cwd=ROOT)
            seconds = float(done.stdout.split()[-1]) if done.returncode == 0 else None
            row = {"what": f"load + forward + backward, {name}", "s": seconds and round(seconds, 2)}
            rows.append(row if seconds is not None else {**row, "error": done.stderr[-300:]})
            print(rows[-1], flush=True)

    import random

    import torch

    import psmc
    from benchmarks.measure import write

    agg = psmc.load(ROOT / "examples" / "mingru.psm")
    z, x = (torch.randn(2, 64, 256, device="cuda") for _ in range(2))
    state = agg.step(None, z[:, 0], x[:, 0])[1]

    def host_us(run, count: int = 200) -> float:  # type: ignore[no-untyped-def]
        for _ in range(20):
            run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        spent = time.perf_counter() - begin
        torch.cuda.synchronize()
        return spent / count * 1e6

    token = z[:, 0], x[:, 0]
    rows.append({"what": "host time, forward", "us": round(host_us(lambda: agg(z, x)), 1)})
    rows.append({"what": "host time, step", "us": round(host_us(lambda: agg.step(state, *token)), 1)})
    rows.append({"what": "host time, step_", "us": round(host_us(lambda: agg.step_(state, *token)), 1)})

    for name in ("gla", "mamba2", "mlstm"):
        rows += [{"what": f"host time, {what}, {name}", "us": round(host_us(run), 1)} for what, run in chunked(name)]

    random.seed(0)
    slow = []
    for n in range(50):
        batch, length = random.randint(1, 8), random.randint(1, 3000)
        cu = None
        if n % 2:
            cuts = sorted(random.randint(0, length) for _ in range(random.randint(1, 6)))
            batch, cu = 1, torch.tensor([0, *cuts, length], device="cuda")
        z, x = (torch.randn(batch, length, 256, device="cuda", requires_grad=True) for _ in range(2))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.cuda.set_sync_debug_mode("error")
        try:
            agg(z, x, cu_seqlens=cu).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        slow.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    late = [n for n, s in enumerate(slow) if s > 0.05]
    rows.append({"what": "calls over 50 ms of 50 random (B, T, cu_seqlens)", "calls": late, "host_sync": "none"})
    for row in rows:
        print(row, flush=True)
    write(options.out, rows, "python benchmarks/overhead.py --out benchmarks/results/overhead.json")


if __name__ == "__main__":
    main()
