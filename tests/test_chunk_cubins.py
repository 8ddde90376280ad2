"""The shipped chunk kernels compile for GPUs that are not here, within bounds on registers spilt and shared memory."""

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

from chunk_cases import kernels, table  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SHARED = 227 * 1024  # of one block on sm_90
TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NAMES = {2: "bf16", 4: "fp32"}


def source(
    kernel: str, size: int, decay: int, key: int, value: int, shift: int = 0
) -> tuple[ASTSource, dict[str, int]]:
    """A kernel as the host launches it on contiguous factors of `size` bytes."""
    made = kernels(table(decay == 2))
    function = getattr(made.table, kernel)
    bk = max(16, 1 << (key - 1).bit_length())
    tokens, bv, bks, warps, stages = next(t for limit, t in made.table.tiles[kernel][size] if bk <= limit)
    factor, state = NAMES[size], NAMES[size]
    types = dict.fromkeys(("p_q", "p_b", "p_c", "p_x", "p_z", "p_dy", "p_y", "p_dq", "p_db", "p_dc"), factor)
    types |= {"p_start": "fp32", "p_final": "fp32", "p_end": "fp32", "p_states": state, "p_costates": state}
    if decay or kernel in ("pairs", "inner"):
        types |= {"p_log": factor if decay == 2 else "fp32", "p_dlog": "fp32"}
    if decay == 2:
        types["p_pairs"] = state
    if kernel == "forward":
        del types["p_states"]
    fixed = {
        "DECAY": decay, "SHIFT": shift, "PREC": {2: "bf16", 4: "tf32x3"}[size], "K": key, "V": value, "BT": tokens,
        "BK": min(bk, bks) if kernel == "states" else bk, "BV": max(16, min(bv, 1 << (value - 1).bit_length())),
        "NS": stages, "BACK": True, "BC": 16,
    }  # fmt: skip
    if kernel == "inner":
        fixed["BV"] = max(16, 1 << (value - 1).bit_length())
    signature, constants, aligned = {}, {}, {}
    for n, name in enumerate(function.arg_names):
        if name in fixed or (name.startswith("p_") and name not in types):
            signature[name], constants[n,] = "constexpr", fixed.get(name)
            continue
        signature[name] = "*" + types[name] if name in types else "fp32" if name == "scale" else "i32"
        if name not in ("T", "S", "SEG", "scale"):
            aligned[n,] = [["tt.divisibility", 16]]
    options = {"num_warps": warps, "num_stages": stages}
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned), options


def resources(kernel: str, size: int, decay: int, key: int, value: int, target: str = "sm_90") -> dict[str, Any]:
    """Registers, bytes spilt and bytes of shared memory."""
    built = triton.compile(*_arguments(source(kernel, size, decay, key, value), target))
    found = {"shared": built.metadata.shared}
    if target == "sm_90":
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(built.asm["ptx"])
            file.flush()
            command = [str(ptxas), "-v", "--gpu-name", f"{target}a", file.name, "-o", os.devnull]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found["registers"] = int(re.search(r"Used (\d+) registers", told)[1])
        found["spilt"] = int(re.search(r"(\d+) bytes spill stores", told)[1])
    return found


def _arguments(made: tuple[ASTSource, dict[str, int]], target: str) -> tuple[ASTSource, GPUTarget, dict[str, int]]:
    return made[0], TARGETS[target], made[1]


@pytest.mark.parametrize(
    ("kernel", "decay"), [("forward", 1), ("states", 1), ("gradients", 1), ("pairs", 2), ("states", 2)]
)
def test_resources(kernel: str, decay: int) -> None:
    found = resources(kernel, 2, decay, 128, 128)
    assert found["shared"] <= SHARED
    assert found["spilt"] <= 256, found


@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
def test_other_targets(target: str) -> None:
    assert resources("states", 2, 1, 64, 64, target)["shared"] <= SHARED


def report() -> None:
    """Everything, as a table: python tests/test_chunk_cubins.py."""
    for size, key, value in ((2, 128, 128), (2, 64, 64), (2, 256, 256), (4, 64, 64), (4, 128, 128), (2, 96, 80)):
        for decay in (0, 1, 2):
            for kernel in ("forward", "states", "gradients", *(("pairs", "inner") if decay == 2 else ())):
                try:
                    found = resources(kernel, size, decay, key, value)
                except Exception as error:
                    found = {"failed": str(error)[:100]}
                print(NAMES[size], f"K {key} V {value} decay {decay}", kernel, found, flush=True)


if __name__ == "__main__":
    sys.exit(report())
