"""Whole-number components in the kernels that masks, packing and reads of prev take: a loop's variables must keep their
types, which only the compiler checks (the interpreter does not)."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

from contract.texts import TEXTS  # noqa: E402
from pointwise_cases import COUNTED, kernels, spec  # noqa: E402
from test_pointwise_cubins import KERNELS, compiled  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("kernel", ["forward", "fold", "carry"])
def test_an_int_component_with_masks(kernel: str) -> None:
    table = kernels(spec(TEXTS["bare"])).table
    compiled(getattr(table, f"{kernel}_kernel"), table.tiles["forward"][4], "fp32", True, ("c",))


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "kind"])
def test_an_int_component_in_staged_scans(kernel: str, everything: bool) -> None:
    """Log-sum-exp is scanned in stages; the count beside it is read before its token."""
    table = kernels(spec(COUNTED)).table
    tile = table.tiles["backward" if "backward" in kernel else "forward"][4]
    compiled(getattr(table, f"{kernel}_kernel"), tile, "fp32", everything, ("n", "seen"))
