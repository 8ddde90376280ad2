"""Printed pointwise kernels against the oracle, in Triton's interpreter (in a process of its own: triton must be
imported with it switched on)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

else:
    from pointwise_cases import Case, example

    @pytest.mark.parametrize("name", ["linear_recurrence", "mingru", "ema", "logsumexp", "affine2x2", "cumsum"])
    def test_plain(name: str) -> None:
        Case(example(name), 1, 37).check()
