"""Launches past the binder: a kernel runs only on arguments that it was compiled for. No GPU is needed: kernels are
launched into the void, where a recorder holds each launch against what its kernel was compiled for."""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

import psmc  # noqa: E402
from benchmarks.no_device import misaligned, no_device, violations  # noqa: E402
from psmc.runtime import kit_calls  # noqa: E402

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = """
import triton

@triton.jit(do_not_specialize=["T"])
def small_kernel(p, q, T, N, scale, FLAG: triton.language.constexpr):
    x = triton.language.load(p) * scale + T + N
    if q is not None:
        x += triton.language.load(q)
    triton.language.store(p, x)
"""


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    before = {k: os.environ.get(k) for k in ("TRITON_CACHE_DIR", "PSMC_CACHE_DIR")}
    os.environ.update({k: str(tmp_path_factory.mktemp(k)) for k in before})
    yield
    for k, v in before.items():
        os.environ.pop(k) if v is None else os.environ.update({k: v})


@pytest.fixture
def small(tmp_path) -> kit_calls.Kernel:
    file = tmp_path / "small.py"
    file.write_text(SMALL)
    found = importlib.util.spec_from_file_location("small", file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return kit_calls.Kernel(module.small_kernel)


def checked(device) -> list[str]:
    assert device.launches
    return [f"{launch.name}: {broken}" for launch in device.launches for broken in violations(launch)]


def test_the_recorder_sees_a_wrong_launch(small) -> None:
    x = torch.zeros(8)
    with no_device() as device:
        device.launches = []
        launch = small.launch(1, (5, 1, 0.5), (True,), x.device)
        launch(x, None)
        launch.near = {(0, aligned): run for _, run in launch.near.items() for aligned in (True, (False, True))}
        launch(misaligned(x), None)
    assert checked(device) == ["small_kernel: p is not divisible by 16"]


def test_what_a_kernel_is_compiled_for(small) -> None:
    """Each change that triton compiles anew for, twice: the second time nothing is compiled, and the launch is right."""
    x, y = torch.zeros(8), torch.zeros(8, dtype=torch.float16)
    calls = [
        ((x, None), (5, 1, 0.5), (True,)),
        ((misaligned(x), None), (5, 1, 0.5), (True,)),
        ((x, y), (5, 1, 0.5), (True,)),
        ((x, misaligned(y)), (5, 1, 0.5), (True,)),
        ((y, None), (5, 1, 0.5), (True,)),
        ((x, None), (5, 2, 0.5), (True,)),
        ((x, None), (5, 16, 0.5), (True,)),
        ((x, None), (5, 2**31, 0.5), (True,)),
        ((x, None), (2**31, 3, 0.5), (True,)),
        ((x, None), (5, 1, 0.5), (False,)),
    ]
    with no_device() as device:
        device.launches = []
        for n, (tensors, numbers, constants) in enumerate(calls, 1):
            small.launch(1, numbers, constants, x.device)(*tensors)
            assert len(device.compiled) == n, "a case of its own"
        for tensors, numbers, constants in calls[::-1]:
            small.launch(3, numbers, constants, x.device)(*tensors)
        same = small.launch(1, (1, 3, 0.5), (True,), x.device)
        same(x, None)  # T is not looked at: 1 is any number, and 3 is neither 1 nor divisible by 16, as 2
        small.launch(1, (32, 5, 2.0), (True,), x.device)(x, None)
    assert len(device.compiled) == len(calls)
    assert checked(device) == []
    assert [a.grid for a in device.launches[: 2 * len(calls)]] == [(1, 1, 1)] * len(calls) + [(3, 1, 1)] * len(calls)


def test_devices_and_streams(small) -> None:
    x = torch.zeros(8)
    with no_device() as device:
        device.launches = []
        launch = small.launch(1, (5, 3, 0.5), (True,), x.device)
        for where, stream in ((0, 7), (0, 8), (1, 9), (0, 7), (1, 10)):
            device.device, device.stream = where, stream
            launch(x, None)
    assert [(a.device, a.stream) for a in device.launches] == [(0, 7), (0, 8), (1, 9), (0, 7), (1, 10)]


def test_other_versions_of_triton_use_its_own_launcher(small, monkeypatch) -> None:
    x = torch.zeros(8)
    monkeypatch.setattr(kit_calls, "_DIRECT", {})
    monkeypatch.setattr(triton, "__version__", "9.1.0")
    with no_device() as device:
        device.launches = []
        launch = small.launch(2, (5, 3, 0.5), (True,), x.device)
        launch(x, None)
        launch(misaligned(x), None)
    assert not launch.near and not launch.known
    assert all(isinstance(a.arguments["p"], torch.Tensor) for a in device.launches)
    assert checked(device) == []


def aggregator(name: str):
    return psmc.load(EXAMPLES / f"{name}.psm")


@pytest.mark.parametrize("name", ["linear_recurrence", "lru"])
def test_calls_of_an_aggregator(name: str) -> None:
    """Shapes, layouts and arguments of all sorts, each twice."""
    agg = aggregator(name)
    kinds = {s.name: torch.complex64 if s.kind == "complex" else torch.float32 for s in agg.spec.inputs}
    with no_device(agg) as device:
        device.launches = []
        for batch, length, lanes in ((1, 1, 16), (2, 64, 64), (1, 5, 3), (1, 4096, 16)):
            inputs = [torch.zeros(batch, length, lanes, dtype=kind) for kind in kinds.values()]
            params = [torch.zeros(lanes) for _ in agg.spec.params]
            for made in (inputs, [misaligned(x) for x in inputs]):
                _, state = agg(*made, *params, return_state=True)
                for _ in range(2):
                    agg(*made, *params, initial_state=state)
                    agg(*made, *params, mask=torch.ones(batch, length, dtype=torch.bool))
                    if batch == 1:
                        agg(*made, *params, cu_seqlens=torch.tensor([0, length // 2, length]))
                        agg(*made, *params, cu_seqlens=torch.tensor([0, length // 2, length], dtype=torch.int32))
                    tokens = [x[:, 0] for x in made]
                    agg.step(state, *tokens, *params)
                    agg.step_(state, *tokens, *params)
                    agg.step_(state, *tokens, *params, slots=torch.arange(batch))
                watched = [x.clone().requires_grad_() for x in made]
                out = agg(*watched, *params)
                torch.autograd.grad(out, watched, torch.zeros_like(out))
                torch.autograd.grad(agg(*watched, *params), watched, misaligned(torch.zeros_like(out)))
    assert checked(device) == []


def test_no_compilation_once_shapes_vary() -> None:
    """Two calls, one of them packed; then whatever B, T and cu_seqlens are, nothing compiles."""
    agg = aggregator("linear_recurrence")
    random.seed(3)
    with no_device(agg) as device:
        device.launches = []
        for n in range(24):
            batch, length = random.randint(1, 8), random.randint(1, 3000)
            cu = None
            if n % 2:
                cuts = sorted(random.randint(0, length) for _ in range(random.randint(1, 6)))
                batch, cu = 1, torch.tensor([0, *cuts, length])
            tensors = [torch.zeros(batch, length, 256, requires_grad=True) for _ in range(2)]
            out = agg(*tensors, cu_seqlens=cu)
            torch.autograd.grad(out, tensors, torch.zeros_like(out))
            if n == 1:
                before = list(device.compiled)
    launched = {launch.name for launch in device.launches}
    assert {"fold_kernel", "carry_kernel", "backward_fold_kernel", "backward_carry_kernel"} <= launched
    assert device.compiled == before and sorted(before) == sorted(launched)
    assert checked(device) == []


def test_a_known_step_is_one_launch() -> None:
    agg = aggregator("mingru")
    with no_device(agg) as device:
        z, x = torch.zeros(2, 2, 64, 48).unbind(0)
        state = agg.step(None, z[:, 0], x[:, 0])[1]
        agg.step(state, z[:, 0], x[:, 0])
        device.launches = []
        y, after = agg.step(state, z[:, 1], x[:, 1])
        assert len(device.launches) == 1 and after["h"] is not state["h"] and y.shape == (2, 48)
        (launch,) = device.launches
        assert launch.arguments["p_z"] == z[:, 1].data_ptr(), "a row of a sequence is read where it lies"
        assert launch.arguments["N_z"] * launch.arguments["V"] == 64 * 48
        assert launch.arguments["p_next_h"] == after["h"].data_ptr() != launch.arguments["p_state_h"]
        agg.step_(state, z[:, 1], x[:, 1])
        agg.step_(state, z[:, 1], x[:, 1])
        assert device.launches[-1].arguments["p_next_h"] == state["h"].data_ptr()


def test_a_step_is_checked_where_something_is_new() -> None:
    agg = aggregator("mingru")
    with no_device(agg):
        z, x = torch.zeros(2, 3, 48), torch.zeros(2, 3, 48)
        state = agg.step(None, z[:, 0], x[:, 0])[1]
        agg.step(state, z[:, 0], x[:, 0])
        for bad in ({}, {"h": state["h"][:1]}, {"h": state["h"], "g": state["h"]}, {"h": state["h"].to("meta")}):
            with pytest.raises(ValueError, match="PSM605"):
                agg.step(bad, z[:, 0], x[:, 0])
        with pytest.raises(ValueError, match="PSM602"):
            agg.step(state, z[:, 0], x[:, 0].long())
        with pytest.raises(ValueError, match="PSM605"):
            agg.step_(state, z[:, 0], x[:, 0], slots=torch.zeros(2, dtype=torch.int64, device="meta"))
        watched = z[:, 0].clone().requires_grad_()
        assert agg.step(state, watched, x[:, 0])[0].requires_grad
