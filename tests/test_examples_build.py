"""Every example's kernels, forward and backward, compile for three GPUs that are not here, within a bound on what they
spill. They are taken from calls: launched into the void, on the arguments that a user's call gives them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from contract.data import Case, make  # noqa: E402
from contract.examples import NAMES, declared, example  # noqa: E402
from triton import compiler  # noqa: E402
from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks.no_device import no_device, tables  # noqa: E402

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIZE = 64  # of every dim
SPILT, FAR_SPILT = 1024, 2048  # bytes a thread; where decays are beyond what one reference a chunk can scale, in few chunks
SHARED = 227 * 1024
# A combine and its recurrence are one algebra (the tests of plans hold them to the same structure): one of them compiles.
# The rule of transformer_psm is a module of Python's.
WRITTEN = tuple(n for n in NAMES if not n.endswith("_recurrence") and n != "transformer_psm")


@cache
def sources(name: str) -> list[tuple[Any, dict[str, Any]]]:
    """What an example's call and its backward have compiled, in bf16."""
    agg, found = example(name), []
    if not tables(agg):
        return []
    length = 20 if str(agg.plan).startswith("tree") else 130  # a level of a tree is a kernel of its own
    sizes = {d.name: d.size or SIZE for d in declared(agg).dims}
    batch = make(declared(agg), Case(length, lanes=(2,)), torch.bfloat16, sizes=sizes).lower(torch.bfloat16).require_grad()
    with no_device(agg) as device:
        compiler.compile = lambda source, target=None, options=None, **rest: (
            found.append((source, {k: options[k] for k in ("num_warps", "num_stages")})), device.compile(source, target, options, **rest))[1]  # fmt: skip
        given = agg(**batch.inputs, **batch.params)
        ends = [y for y in (given if isinstance(given, tuple) else (given,)) if y.requires_grad]
        torch.autograd.backward(ends, [torch.zeros_like(y) for y in ends])
    return found


def spilt(built: Any) -> int:
    """Bytes a thread keeps in local memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", told.stdout)[1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", WRITTEN)
def test_builds(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, options in sources(name):
        if "NATIVE" in source.fn.__globals__:  # whether the module is on an NVIDIA GPU, seen when it is loaded
            monkeypatch.setitem(source.fn.__globals__, "NATIVE", tl.constexpr(target != "gfx942"))
        fresh = ASTSource(source.fn, source.signature, source.constants, source.attrs)
        built = triton.compile(fresh, target=TARGETS[target], options=options)
        assert built.metadata.shared <= SHARED, source.fn.__name__
        if target == "sm_90":
            far = source.constants.get((source.fn.arg_names.index("FAR"),)) if "FAR" in source.fn.arg_names else False
            assert spilt(built) <= (FAR_SPILT if far else SPILT), source.fn.__name__


@pytest.mark.parametrize(("name", "least"), [("mingru", 2), ("gla", 5), ("linear_attention", 9), ("pr_lstm", 4)])
def test_what_is_compiled(name: str, least: int) -> None:
    """Of a plan each: forward and backward are among them."""
    assert len(sources(name)) >= least
