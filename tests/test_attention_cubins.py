"""The attention kernels compile for GPUs that are not here, within bounds on registers spilt and shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from attention_cases import EXAMPLE, MASKED, THREE, kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TARGETS = {
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
PRODUCTS = {"bf16": "bf16", "fp16": "tf32", "fp32": "tf32x3"}
SPILT = 64  # bytes a thread


def source(
    name: str, dtype: str, width: int, products: str, text: str, tile: tuple[int, ...] | None = None
) -> tuple[ASTSource, dict[str, int]]:
    """A kernel as the host launches it on many tokens, all strides multiples of 16 bytes."""
    table = kernels(text)[0].table
    kernel = table.keys[0] if name == "keys" else getattr(table, name)
    block = max(16, 1 << (width - 1).bit_length())
    bn, bm, warps, stages = tile or next(t for limit, t in table.tiles[name][products] if block <= limit)
    fixed = {"E": width, "V": width, "BN": bn, "BM": bm, "BE": block, "BV": block, "EVEN": 8,
             "PREC": products, "NS": stages}  # fmt: skip
    signature, constants, aligned = {}, {}, {}
    for place, arg in enumerate(kernel.arg_names):
        if arg in fixed:
            signature[arg], constants[place,] = "constexpr", fixed[arg]
        elif arg.startswith("p_"):
            signature[arg] = "*fp32" if arg in ("p_lse", "p_delta") else f"*{dtype}"
            aligned[place,] = [["tt.divisibility", 16]]
        else:
            signature[arg] = "fp32" if arg == "scale" else "i32"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned), {"num_warps": warps}


def resources(
    name: str, dtype: str, width: int, target: str = "sm_90", products: str = "", text: str = EXAMPLE,
    tile: tuple[int, ...] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Registers, bytes spilt and bytes of shared memory, and whether loads are of 16 bytes."""
    made, options = source(name, dtype, width, products or PRODUCTS[dtype], text, tile)
    built = triton.compile(made, target=TARGETS[target][0], options=options)
    found: dict[str, Any] = {"shared": built.metadata.shared}
    if target == "sm_90":
        found["wide"] = bool(re.search(r"ld\.global\S*\.v4|cp\.async\.cg", built.asm["ptx"]))
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(built.asm["ptx"])
            file.flush()
            command = [str(ptxas), "-v", "--gpu-name", f"{target}a", file.name, "-o", os.devnull]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found["registers"] = int(re.search(r"Used (\d+) registers", told)[1])
        found["spilt"] = int(re.search(r"(\d+) bytes spill stores", told)[1])
    return found


CASES = [("forward", "bf16", 128), ("forward", "fp32", 64), ("query", "bf16", 64), ("query", "fp32", 128),
         ("keys", "bf16", 128), ("keys", "fp32", 64)]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "width"), CASES)
def test_stays_in_registers(name: str, dtype: str, width: int) -> None:
    found = resources(name, dtype, width)
    assert found["shared"] <= TARGETS["sm_90"][1] and found["spilt"] <= SPILT and found["wide"], found


@pytest.mark.parametrize("text", [THREE, MASKED])
def test_other_forms(text: str) -> None:
    for name in ("forward", "keys"):
        found = resources(name, "fp32", 40, text=text, products="bf16")
        assert found["spilt"] <= SPILT and found["wide"], (name, found)


@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
@pytest.mark.parametrize("name", ["forward", "query", "keys"])
def test_other_targets(name: str, target: str) -> None:
    products = "ieee" if target == "gfx942" else "tf32x3"
    assert resources(name, "fp32", 64, target, products)["shared"] <= TARGETS[target][1]


def report() -> None:
    """Everything, as a table: python tests/test_attention_cubins.py."""
    for dtype, products in (("bf16", "bf16"), ("fp16", "tf32"), ("fp32", "tf32x3"), ("fp32", "bf16"), ("fp32", "tf32")):
        for width in (32, 64, 96, 128, 256):
            for name in ("forward", "query", "keys"):
                for target in TARGETS:
                    try:
                        found = resources(name, dtype, width, target, products)
                    except Exception as error:
                        found = {"failed": str(error)[:100]}
                    print(dtype, products, width, name, target, found, flush=True)


if __name__ == "__main__":
    sys.exit(report())
