"""What every benchmark shares: options, timing, ceilings, result files.

On a machine without a GPU everything runs the same, timed by the wall clock: that is what `--smoke` is for, which makes
sizes tiny and figures meaningless.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


# --- options --------------------------------------------------------------------------------------------------


def options(doc: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark that the campaign can run."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="result file, written after every row; without, only a table")
    made.add_argument("--seconds", type=float, default=1e9, help="time for all of it; what does not fit is left out")
    made.add_argument("--resume", action="store_true", help="keep the rows of --out, and run only what it lacks")
    made.add_argument("--smoke", action="store_true", help="tiny sizes, any machine: shows that it runs, no more")
    made.add_argument("--job", help=argparse.SUPPRESS)  # a part of the work, in a process of its own
    return made


def command(skip: Sequence[str] = ("--resume", "--smoke"), values: Sequence[str] = ("--seconds",)) -> str:
    """The command line that repeats a run: without what only says how long it may take, and with a short --out."""
    words, rest = [], iter(sys.argv[1:])
    for word in rest:
        if word in values:
            next(rest, None)
        elif word == "--out":
            words += [word, f"benchmarks/results/{Path(next(rest, '')).name}"]
        elif word not in skip:
            words.append(word)
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


# --- time and memory ------------------------------------------------------------------------------------------


@cache
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def median_ms(run: Callable[[], Any], rep: int = 60, warmup: int = 20) -> float:
    """Median device time of a call after warm-up, in ms; on a CPU of three calls by the wall clock."""
    run()
    wait()
    if device() == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=warmup, rep=rep, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def first_call(run: Callable[[], Any]) -> float:
    """Seconds of the first call, compilation included."""
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def peak_mib(run: Callable[[], Any]) -> float | None:
    """MiB that a call needs beyond what is held before it; None on a CPU."""
    if device() != "cuda":
        run()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - base) / 2**20, 1)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device copy of 2 GiB: the ceiling that bandwidth is measured against."""
    x = torch.ones(2**30 if device() == "cuda" else 2**20, dtype=torch.bfloat16, device=device())
    y = torch.empty_like(x)
    return x.numel() * 4 / median_ms(lambda: y.copy_(x)) * 1e3


def matmul_flops(dtype: torch.dtype) -> float:
    """Operations a second of a square product of 8192. fp32: a third of tf32's, as three products make one of fp32."""
    size = 8192 if device() == "cuda" else 256
    x = torch.ones(size, size, dtype=dtype, device=device())
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        found = 2 * size**3 / median_ms(lambda: x @ x) * 1e3
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return found / 3 if dtype == torch.float32 else found


def with_gradients(fn: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """forward + backward of `fn` with respect to all its tensors."""
    leaves = [t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors]
    out = fn(*leaves)
    cotangent = torch.randn_like(out)
    wanted = [t for t in leaves if t.requires_grad]

    def run() -> Any:
        return torch.autograd.grad(fn(*leaves), wanted, cotangent)

    return run


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, 2-norms in fp64 (complex128); nan if anything is not finite."""
    kind = torch.complex128 if wanted.is_complex() else torch.float64
    x, y = found.detach().to(kind), wanted.detach().to(kind).to(found.device)
    size = float(y.norm())
    if not bool(x.isfinite().all()):
        return float("nan")
    return float((x - y).norm()) / size if size else float(x.norm())


# --- results --------------------------------------------------------------------------------------------------


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
        words = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=RESULTS.parent)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(path: Path, rows: list[Row], command: str, **extra: Any) -> None:
    """The result file of a topic; there is never half of one."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    record = {"commit": commit(), "device": name, "versions": versions("fla-core", "accelerated-scan", "jax"),
              "command": command, **extra, "rows": rows}  # fmt: skip
    save(path, record)


def save(path: Path, record: Mapping[str, Any]) -> None:
    """JSON, written beside the file and then put in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(draft, path)


def show(rows: Iterable[Row]) -> None:
    """One line a row."""
    for row in rows:
        print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
