"""Every printed pointwise kernel compiles for sm_90 (no GPU is needed for it), and keeps its values in registers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

from pointwise_cases import example, kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KERNELS = ("forward", "fold", "carry", "backward", "backward_fold", "backward_carry", "step", "kind")
SPILL = 64  # bytes of a thread's stack
FP32 = re.compile(r"initial|final|saved|carry|fold_|state|next")
POINTERS = {"p_kind": "*i8", "p_code": "*i8", "p_fold_kind": "*i8", "p_fold_cut": "*i8", "p_cut": "*i8", "p_cu": "*i64",
            "p_slots": "*i64"}  # fmt: skip
PLAIN = ("p_kind", "p_cut", "p_fold_kind", "p_fold_cut", "initial", "p_slots")


def compiled(kernel, tile: tuple[int, ...], dtype: str, everything: bool, ints: tuple[str, ...] = ()):
    """`everything`: with masks, packed sequences, segments and an initial state; else the plain case. `ints`: names of
    whole-number components and outputs."""
    rows, lanes, warps, stages = tile
    constants = {"R": rows, "W": 32, "BT": 256, "BC": lanes, "NS": stages, "V": lanes // (32 * warps), "K": 16}
    constants |= {"JOINED": everything, "C": 2050 if everything else 2048}
    if "W" in kernel.arg_names:  # as `PointwiseKernels._join` calls it
        constants |= {"R": 8, "W": 64, "BC": 4}
        warps = 8
    signature, fixed, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants or name[:2] in ("Q_", "D_"):
            signature[name], fixed[place,] = "constexpr", constants.get(name, 1)
        elif not name.startswith("p_"):
            assert name.isupper() or name.startswith("N_"), f"{name}: a number or a constant?"
            signature[name] = "i32"
        elif not everything and any(word in name for word in PLAIN):
            signature[name], fixed[place,] = "constexpr", None
        else:
            whole = name.rsplit("_", 1)[-1] in ints
            signature[name] = "*i64" if whole else POINTERS.get(name, "*fp32" if FP32.search(name) else f"*{dtype}")
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def usage(binary, folder: Path) -> SimpleNamespace:
    """Registers, bytes of stack and of local memory of a thread."""
    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    text = subprocess.run([DUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return SimpleNamespace(registers=found["REG"], spilled=max(found["STACK"], found["LOCAL"]))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_kernels_with_everything_on(kernel: str, tmp_path) -> None:
    table = kernels(example("logsumexp")).table
    tile = table.tiles["backward" if "backward" in kernel else "forward"][4]
    assert usage(compiled(getattr(table, f"{kernel}_kernel"), tile, "fp32", True), tmp_path).registers > 0


@pytest.mark.parametrize("size, dtype", [(4, "fp32"), (2, "bf16")])
@pytest.mark.parametrize("name", ["linear_recurrence", "softmax_average"])
def test_tiles_stay_in_registers(name: str, size: int, dtype: str, tmp_path) -> None:
    table = kernels(example(name)).table
    for way, kernel in (("forward", table.forward_kernel), ("backward", table.backward_kernel)):
        found = usage(compiled(kernel, table.tiles[way][size], dtype, False), tmp_path)
        assert found.spilled <= SPILL, (way, found)
