"""`psmc check` says the same where neither torch nor triton is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def check(*files: str, block: bool) -> tuple[int, dict[str, list[dict[str, object]]], str]:
    """`psmc check --json`, with torch and triton importable or not."""
    blocked = "sys.modules.update(dict.fromkeys(('torch', 'triton', 'numpy'), None))\n" if block else ""
    code = f"import sys\n{blocked}from psmc.cli import app\nsys.exit(app.run(['check', '--json', *sys.argv[1:]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    data = json.loads(done.stdout)
    for row in data["results"]:
        row.pop("seconds")
    return done.returncode, data, done.stderr


@pytest.mark.parametrize("folder", ["examples", "examples/wrong"])
def test_same_verdicts_without_torch(folder: str) -> None:
    with_torch, without = check(folder, block=False), check(folder, block=True)
    assert with_torch == without
    assert with_torch[0] == (1 if folder.endswith("wrong") else 0)
    assert len(with_torch[1]["results"]) == len(list((ROOT / folder).glob("*.psm")))


def test_torch_is_imported_for_a_counterexample_only() -> None:
    code = "import sys\nfrom psmc.cli import app\napp.run(sys.argv[1:])\nprint('torch' in sys.modules)"
    for file, wanted in (("examples/gla.psm", "False"), ("examples/wrong/leaky.psm", "True")):
        done = subprocess.run(
            [sys.executable, "-c", code, "check", file], capture_output=True, text=True, cwd=ROOT, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == wanted
