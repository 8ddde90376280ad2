"""Kernels that threads compile ahead of a first call are those that it launches: no call compiles one again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import psmc  # noqa: E402
from benchmarks.chunk_data import Shape, inputs  # noqa: E402
from benchmarks.no_device import no_device  # noqa: E402

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["mamba2", "gla", "linear_attention", "grid_gate"])
@pytest.mark.parametrize("wanted", [False, True])
def test_nothing_is_compiled_again(name: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    agg = psmc.load(EXAMPLES / f"{name}.psm")
    kernels = agg.rules.matrices
    given = {k: x.float().requires_grad_(wanted) for k, x in inputs(name, Shape(2, 70, 4, 32, 32)).items()}
    call = kernels.call
    with no_device(agg) as device:

        def warm(a: object) -> object:
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "_kinds", set())
                kernels._warm(a, wanted)
            for tasks in kernels._warming.values():
                assert [task.exception() for task in tasks] == [None] * len(tasks)
            ahead = list(device.compiled)
            found = call(a)
            assert device.compiled == ahead and ahead
            return found

        monkeypatch.setattr(kernels, "call", warm)
        out = agg(**given)
        if wanted:
            ahead = list(device.compiled)
            out.sum().backward()
            assert not device.compiled[len(ahead) :] and "chunk_values_kernel" in ahead
