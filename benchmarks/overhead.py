"""First calls, host time, recompilation: what a user waits for besides the kernels. GPU.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
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

    rows.append({"what": "host time, forward", "us": round(host_us(lambda: agg(z, x)), 1)})
    rows.append({"what": "host time, step", "us": round(host_us(lambda: agg.step(state, z[:, 0], x[:, 0])), 1)})
    rows.append({"what": "host time, step_", "us": round(host_us(lambda: agg.step_(state, z[:, 0], x[:, 0])), 1)})

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
