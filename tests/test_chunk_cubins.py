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

from chunk_cases import kernels, one_tile, table  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from psmc.codegen.chunk_factors import Fused, fuse  # noqa: E402
from psmc.pipeline import read  # noqa: E402
from psmc.plan.chunked_kernels import ChunkTile, tiles  # noqa: E402
from psmc.plan.tiles import candidates  # noqa: E402

SHARED = 227 * 1024  # of one block on sm_90
TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NAMES = {2: "bf16", 4: "fp32"}


def source(
    kernel: str, size: int, decay: int, key: int, value: int, spec: str | None = None, tile: ChunkTile | None = None,
    over: bool = False, far: bool = False,
) -> tuple[ASTSource, dict[str, int]]:  # fmt: skip
    """A kernel as the host launches it on contiguous tensors of `size` bytes; of a spec's own kernels, if there is one;
    with another tile than the shipped one, if there is one. over: the decay is over the value, too; far: of decays beyond
    what one reference a chunk can scale."""
    fused = None if spec is None else fused_spec(spec)
    shift = 0 if fused is None else fused.shift
    over = over if fused is None else fused.log_value is not None
    made = kernels(table(over) if tile is None else one_tile(kernel, tile), fused, over)
    function = getattr(made.table, kernel)
    bk = max(16, 1 << (key - 1).bit_length())
    tiled = {"normed": "gradients", "shares": "forward", "norms": "forward", "step": "forward", "prepare_value": "prepare",
             "sums": "states", "numbers": "states", "logs": "prepare", "logs_value": "prepare", "products": "prepare",
             "pairs": "key"}.get(kernel, kernel)  # fmt: skip
    tokens, bv, bks, warps, stages = next(t for limit, t in made.table.tiles[tiled][size] if bk <= limit)
    operand = NAMES[size]
    absent = {"p_code", "p_cu", "p_chunks", "p_owner", "p_slots", "p_y"}
    absent |= {"p_down", "p_vdown"} if size == 2 else set()
    absent |= set() if made.table.norm else {"p_zstates", "p_zcostates", "p_dw", "p_z"}
    absent |= set() if made.table.width else {"p_sums"}
    absent |= set() if made.table.seen else {"p_seen"}
    if decay < 2:
        absent |= {"p_k2"} | (set() if kernel == "prepare_value" else {"p_qs", "p_bs"})
        absent |= set() if over else {"p_pairs"}
    absent |= {"p_total"} if decay == 0 and kernel != "prepare_value" else set()
    absent |= set() if decay == 1 else {"p_log", "p_dlog"}
    if not over:
        absent |= {"p_near"} if kernel == "values" else set()
        absent |= {"p_dys", "p_cs", "p_vpairs", "p_vtotal", "p_vdecay", "p_vup", "p_vdown"}
    if fused is None:
        absent |= {"p_n", "p_dn"} | ({"p_dk2"} if decay < 2 else set())
    elif not any(a.name == "n" for a in fused.numbers):
        absent |= {"p_n", "p_dn"}
    absent -= {"p_k2", "p_dk2"} if fused is not None else set()
    if fused is not None and fused.scalars and kernel != "sums":  # numbers that another kernel computed, or this one
        absent |= {"p_log"}
        absent |= {n for n in function.arg_names if kernel == "step" and re.fullmatch(r"p_(n|s\d)", n)}
    if decay == 2 and kernel in ("forward", "states"):  # q and b lie scaled
        absent |= {n for n in function.arg_names if re.fullmatch(r"p_k\d", n)}
    whole = {"p_up", "p_down", "p_vup", "p_vdown", "p_log", "p_n", "p_total", "p_vtotal", "p_sums", "p_dw", "p_start", "p_final", "p_end", "p_decay", "p_vdecay",
             "p_dlog", "p_dn", "p_s", "p_z", "p_zstates", "p_zcostates", "p_shares", "p_norms", "p_last"}  # fmt: skip
    side, whole_v = value if kernel.endswith("_value") else key, max(16, 1 << (value - 1).bit_length())
    whole_k = whole_v if kernel.endswith("_value") else bk
    fixed = {
        "DECAY": decay, "OVER_V": over, "SHIFT": shift, "PREC": {2: "bf16", 4: "tf32x3"}[size], "K": side, "V": value,
        "BT": tokens, "BK": bk if kernel in ("forward", "step", "shares") else min(whole_k, bks), "BV": min(bv, whole_v),
        "NS": stages, "FAR": far, "BACK": True, "BG": 16, "BC": 32, "NK": 1, "NB": 1,
    }  # fmt: skip
    if kernel == "step":
        fixed["BV"] = min(64, whole_v)
        warps = 4
    signature, constants, aligned = {}, {}, {}
    for n, name in enumerate(function.arg_names):
        if name in fixed or name in absent or name.endswith("_r"):
            signature[name], constants[n,] = "constexpr", 1 if name.endswith("_r") else fixed.get(name)
            continue
        if name.startswith("p_"):
            number = name in whole or re.fullmatch(r"p_(d?s\d|g\w+)", name) is not None
            signature[name] = "*" + ("i8" if name == "p_near" else "fp32" if number else operand)
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if name not in ("T", "S", "SEG", "SHARE", "scale"):
            aligned[n,] = [["tt.divisibility", 16]]
    options = {"num_warps": warps, "num_stages": stages}
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned), options


def fused_spec(name: str) -> Fused:
    (made,) = read(Path(__file__).parent.parent / "examples" / f"{name}.psm")
    found = fuse(made.agg, made.structure)
    assert found is not None
    return found


def resources(
    kernel: str, size: int, decay: int, key: int, value: int, target: str = "sm_90", spec: str | None = None,
    tile: ChunkTile | None = None, over: bool = False, far: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Registers, bytes spilt and bytes of shared memory."""
    built = triton.compile(*_arguments(source(kernel, size, decay, key, value, spec, tile, over, far), target))
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


SPILLS = 704  # bytes of registers a kernel may spill
FAR_SPILLS = 2048  # for decays beyond what one reference a chunk can scale: few chunks take that way


@pytest.mark.parametrize(
    ("kernel", "decay"),
    [("sums", 1), ("forward", 1), ("states", 1), ("gradients", 1), ("logs", 2), ("prepare", 2), ("states", 2),
     ("pairs", 2), ("key", 2), ("values", 2)]
)  # fmt: skip
def test_resources(kernel: str, decay: int) -> None:
    found = resources(kernel, 2, decay, 128, 128)
    assert found["shared"] <= SHARED
    assert found["spilt"] <= SPILLS, found


@pytest.mark.parametrize(
    ("kernel", "spec", "decay"),
    [("forward", "value_gate", 0), ("prepare_value", "value_gate", 0), ("values", "value_gate", 0),
     ("products", "value_gate", 0), ("forward", "grid_gate", 2), ("key", "grid_gate", 2),
     ("values", "grid_gate", 2), ("step", "grid_gate", 2)],
)  # fmt: skip
def test_resources_over_the_value(kernel: str, spec: str, decay: int) -> None:
    found = resources(kernel, 2, decay, 128, 128, spec=spec)
    assert found["shared"] <= SHARED
    assert found["spilt"] <= SPILLS, found


@pytest.mark.parametrize(("kernel", "spec"), [("sums", "mlstm"), ("numbers", "mlstm"), ("step", "mamba2"), ("step", "mlstm")])
def test_resources_of_numbers(kernel: str, spec: str) -> None:
    found = resources(kernel, 2, 1, 128, 128, spec=spec)
    assert found["shared"] <= SHARED
    assert found["spilt"] <= SPILLS, found


@pytest.mark.parametrize(("kernel", "spec"), [("key", "gla"), ("key", "grid_gate"), ("values", "grid_gate")])
def test_resources_of_far_decays(kernel: str, spec: str) -> None:
    found = resources(kernel, 2, 2, 128, 128, spec=spec, far=True)
    assert found["shared"] <= SHARED
    assert found["spilt"] <= FAR_SPILLS, found


@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
def test_other_targets(target: str) -> None:
    assert resources("states", 2, 1, 64, 64, target)["shared"] <= SHARED
    assert resources("forward", 2, 0, 64, 64, target, over=True)["shared"] <= SHARED


def report() -> None:
    """Everything, as a table: python tests/test_chunk_cubins.py."""
    for size, key, value in ((2, 128, 128), (2, 64, 64), (2, 256, 256), (4, 64, 64), (4, 128, 128), (2, 96, 80)):
        for decay, over in ((0, False), (1, False), (2, False), (0, True), (2, True)):
            made = ("logs_value", "prepare_value", "values") if over else ("values",)
            own = ("gradients",), ("sums", "gradients"), ("logs", "prepare", "pairs", "key")
            for kernel in (*own[decay], "forward", "states", *made):
                try:
                    found = resources(kernel, size, decay, key, value, over=over)
                except Exception as error:
                    found = {"failed": str(error)[:100]}
                shown = f"K {key} V {value} decay {decay}{' and over the value' if over else ''}"
                print(NAMES[size], shown, kernel, found, flush=True)
    for decay in (1, 2):  # what psmc tune may try
        shipped = tiles().data
        names = [f"{k}/2/128" for k in ("forward", "states", *(("prepare", "key") if decay == 2 else ("gradients",)))]
        for row in (r for c in candidates("chunked", shipped, names) for r in c.rows if r.name in names):
            try:
                found = resources(row.kernel, 2, decay, 128, 128, tile=ChunkTile(*row.numbers))
            except Exception as error:
                found = {"failed": str(error)[:100]}
            print("bf16", f"K 128 V 128 decay {decay}", row.kernel, row.numbers, found, flush=True)


if __name__ == "__main__":
    sys.exit(report())
