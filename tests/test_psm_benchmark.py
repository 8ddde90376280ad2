"""The benchmark of prefix-scannable models runs from end to end, in a size that measures nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "psm.json"
    command = [sys.executable, "benchmarks/psm.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    rows = found["rows"]
    assert found["quick"] and {r["topic"] for r in rows} == {"training", "combine", "latency"}
    plans = {r["plan"]: r for r in rows if r["topic"] == "combine"}
    assert plans["tree"]["combines"] == plans["loop, folds kept"]["combines"] == 8, "2 (n - 1 - m) for n = 8"
    assert plans["loop, folds again"]["combines"] == 4 + 5, "carries, and roots less one at each"
    states = {r["model"]: r["state bytes"] for r in rows if r["topic"] == "latency" and r["before"] == 70}
    assert len(states) == 7 and all(states.values())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_loops_are_the_tree() -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.psm import PLANS

    leaves = {"element": torch.randn(2, 23, 3, dtype=torch.float64)}

    def merge(left, right):  # type: ignore[no-untyped-def]
        return {"element": torch.sin(left["element"] + 2 * right["element"])}

    tree = PLANS["tree"](merge, leaves)["element"]
    for name, plan in PLANS.items():
        torch.testing.assert_close(plan(merge, leaves)["element"], tree, rtol=1e-12, atol=1e-12, msg=name)
