"""Kernels that threads compile ahead of a first call are those that it launches: no call compiles one again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import psmc  # noqa: E402
from benchmarks.chunk_data import Shape, inputs  # noqa: E402
from benchmarks.no_device import NoDevice, compilations, misaligned, no_device, tables  # noqa: E402

EXAMPLES = Path(__file__).parent.parent / "examples"


def ahead(agg: Any, device: NoDevice) -> list[str]:
    """What threads have compiled, once they are done; nothing else has been compiled."""
    tasks = compilations(agg)
    for task in tasks:
        task.wait()
    assert [task.error for task in tasks] == [None] * len(tasks)
    assert len(device.compiled) == len(tasks) > 0
    return sorted(device.compiled)


def held(agg: Any, wanted: bool, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], **options: Any) -> list[str]:
    """The kernels of a first call, all of which threads compile, and all of which are launched."""
    for x in (*given.values(), *(options.get("initial_state") or {}).values()):
        x.requires_grad_(wanted and x.is_floating_point())
    with no_device(agg) as device:
        for table in tables(agg):
            monkeypatch.setattr(table, "compiles", lambda device: True)
        device.launches = []
        out = agg(**given, **options)
        done = ahead(agg, device)
        if wanted:
            out = out[0] if isinstance(out, tuple) else out
            out.abs().sum().backward()
        assert ahead(agg, device) == done
        assert {x.name for x in device.launches} == set(done)
        monkeypatch.undo()
    return done


@pytest.mark.parametrize("name", ["mamba2", "gla", "linear_attention", "grid_gate", "mlstm"])
@pytest.mark.parametrize("wanted", [False, True])
def test_matrix_states(name: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    agg = psmc.load(EXAMPLES / f"{name}.psm")
    given = {k: x.float() for k, x in inputs(name, Shape(2, 70, 4, 32, 32)).items()}
    assert ("chunk_values_kernel" in held(agg, wanted, monkeypatch, given)) == wanted


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", ["mingru", "softmax_average", "lru"])
@pytest.mark.parametrize("case", ["usual", "split", "packed", "begun", "misaligned", "masked"])
def test_pointwise(name: str, case: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    agg = psmc.load(EXAMPLES / f"{name}.psm")
    batch, length = (1, 4096) if case == "split" else (1, 64) if case == "packed" else (2, 64)
    options: dict[str, Any] = {}
    if case == "packed":
        options["cu_seqlens"] = torch.tensor([0, 20, 64])
    if case == "masked":
        options["mask"] = torch.rand(batch, length) < 0.5

    def drawn(slot: Any, lead: tuple[int, ...]) -> Any:
        x = torch.randn(*lead, 48, dtype=torch.complex64 if slot.kind == "complex" else torch.float32)
        return misaligned(x) if case == "misaligned" else x

    given = {s.name: drawn(s, (batch, length)) for s in agg.spec.inputs}
    given |= {s.name: drawn(s, ()) for s in agg.spec.params}
    if case == "begun":
        options["initial_state"] = {k: x.clone() for k, x in agg.init_state(batch, (48,)).items()}
    done = held(agg, wanted, monkeypatch, given, **options)
    assert ("backward_kernel" in done) == wanted
    assert ("fold_kernel" in done) == (case == "split")
    assert ("backward_fold_kernel" in done) == (case == "split" and wanted)


def test_a_compiler_that_fails_does_so_where_the_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    agg = psmc.load(EXAMPLES / "mingru.psm")
    with no_device(agg) as device:
        monkeypatch.setattr(agg.operator.kernels, "compiles", lambda device: True)
        from triton import compiler

        def fails(*args: Any, **options: Any) -> None:
            raise RuntimeError("no such compiler")

        monkeypatch.setattr(compiler, "compile", fails)
        with pytest.raises(RuntimeError, match="no such compiler"):
            agg(torch.randn(2, 8, 16), torch.randn(2, 8, 16))
        assert not device.compiled
        monkeypatch.undo()
