"""Whole-number components in the kernels that masks and packing take: a loop's variables must keep their types, which
only the compiler checks (the interpreter does not)."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

from contract.texts import TEXTS  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from psmc.pipeline import read_text  # noqa: E402
from psmc.runtime.load import load_module  # noqa: E402


@pytest.mark.parametrize("kernel", ["forward", "fold", "carry"])
def test_an_int_component_with_masks(kernel: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PSMC_CACHE_DIR", str(tmp_path / "psmc"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    compilation = read_text(TEXTS["bare"])[0]
    table = load_module("bare", compilation.text).KERNELS.table
    fn = getattr(table, f"{kernel}_kernel")
    rows, chunks, lanes, warps, stages, vector = table.tiles["forward"][4]
    fixed = {"R": rows, "W": chunks, "BT": 256, "BC": lanes, "NS": stages, "V": vector, "JOINED": True}
    signature, constants = {}, {}
    for place, name in enumerate(fn.arg_names):
        if name in fixed or name[:2] in ("Q_", "D_"):
            signature[name], constants[place,] = "constexpr", fixed.get(name, 1)
        elif not name.startswith("p_"):
            signature[name] = "i32"
        elif "kind" in name:
            signature[name] = "*i8"
        else:
            signature[name] = "*i64" if name == "p_cu" or name.endswith("_c") else "*fp32"
    triton.compile(ASTSource(fn, signature, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
