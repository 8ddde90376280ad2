"""Every printed tree kernel compiles for sm_90 (no GPU is needed for it), and keeps its values in registers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

from tree_cases import DENSE, EXAMPLES, LANE, compiled, module  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SPILL = 64  # bytes of a thread's stack
SLOW = pytest.mark.skipif("PSMC_SLOW" not in os.environ, reason="half a minute each; PSMC_SLOW=1 runs them")


def usage(kernel, width: int, dtype: str, whole: bool, folder: Path) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, with everything there is: a stage above and one below."""
    constants = {"BC": width, "WHOLE": whole}
    signature, fixed, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants or name[:2] in ("Q_", "D_"):
            signature[name], fixed[place,] = "constexpr", constants.get(name, 1)
        elif name.startswith("p_"):
            buffers = ("p_nodes", "p_roots", "p_prefix", "p_above", "p_sums", "p_carries", "p_ends", "p_d_")
            signature[name] = "*fp32" if name.startswith(buffers) else f"*{dtype}"
            attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, fixed, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": max(1, width // 32)})
    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    text = subprocess.run([DUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], max(found["STACK"], found["LOCAL"])


@pytest.mark.parametrize(
    ("spec", "kernel", "dtype"),
    [
        (LANE, "roots", "bf16"),
        (LANE, "prefix", "bf16"),
        (LANE, "upper_roots", "fp32"),
        (LANE, "upper_prefix", "fp32"),
        (LANE, "backward", "bf16"),
        (DENSE, "prefix", "fp32"),
        (DENSE, "backward", "fp32"),
        ("pr_lstm", "prefix", "fp32"),
        pytest.param("pr_lstm", "backward", "fp32", marks=SLOW),
        pytest.param("pr_lstm", "upper_backward", "fp32", marks=SLOW),
    ],
)
def test_stays_in_registers(spec: str, kernel: str, dtype: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    text = (EXAMPLES / f"{spec}.psm").read_text() if spec.isidentifier() else spec
    _, kernels = module(compiled(text))
    table = kernels.table
    registers, spilled = usage(getattr(table, f"{kernel}_kernel"), table.tiles["forward"][4][0], dtype, True, tmp_path)
    assert registers > 0 and spilled <= SPILL, (registers, spilled)
