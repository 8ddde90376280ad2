"""What every benchmark shares: timing, ceilings, result files."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


def median_ms(run: Callable[[], Any], rep: int = 60) -> float:
    """Median device time of a call after warm-up, in ms."""
    from triton.testing import do_bench

    run()
    torch.cuda.synchronize()
    return float(do_bench(run, warmup=20, rep=rep, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device copy of 2 GiB: the ceiling that bandwidth is measured against."""
    x = torch.randn(2**30, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    return x.numel() * 4 / median_ms(lambda: y.copy_(x)) * 1e3


def first_call(run: Callable[[], Any]) -> float:
    """Seconds of the first call, compilation included."""
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def with_gradients(fn: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """forward + backward of `fn` with respect to all its tensors."""
    leaves = [t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors]
    out = fn(*leaves)
    cotangent = torch.randn_like(out)
    wanted = [t for t in leaves if t.requires_grad]

    def run() -> Any:
        return torch.autograd.grad(fn(*leaves), wanted, cotangent)

    return run


def versions(*packages: str) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is measured; where there is no git, what a file COMMIT at the root says."""
    told = RESULTS.parent.parent / "COMMIT"
    if told.is_file():
        return told.read_text().strip()
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(path: Path, rows: list[dict[str, Any]], command: str, **extra: Any) -> None:
    """The result file of a topic."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"commit": commit(), "device": device, "versions": versions("fla-core", "accelerated-scan", "jax"),
              "command": command, **extra, "rows": rows}  # fmt: skip
    path.write_text(json.dumps(record, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    """One table."""
    for row in rows:
        print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
