"""A GPU that does nothing: kernels are launched into the void, from tensors in the CPU's memory.

It times what a call costs in Python, and tests which code runs on which arguments, on machines without a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from triton import compiler, knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

PROCESSORS = 132


class Launch(NamedTuple):
    """One launch: the kernel's name, its grid, what it was compiled for, and the arguments by name."""

    name: str
    grid: tuple[int, int, int]
    device: int
    stream: int
    source: Any
    arguments: dict[str, Any]


class Unwritten:
    """A compiled kernel as far as launching it goes. No code was made."""

    packed_metadata, function = (), 1

    def __init__(self, source: Any, launcher: Any) -> None:
        self.src, self.run = source, launcher

    def launch_metadata(self, grid: Any, stream: int, *args: Any) -> None:
        return None

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def runner(*args: Any, stream: int) -> None:
            metadata = self.launch_metadata(grid, stream, *args)
            enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
            self.run(*grid, stream, self.function, self.packed_metadata, metadata, enter, leave, *args)

        return runner


class NoDevice:
    """As much of triton's driver as compiling and launching ask for. `launches` is None: nothing is recorded."""

    def __init__(self, writes: bool = False) -> None:
        self.writes = writes
        self.device, self.stream, self.compiled = 0, 0, list[str]()
        self.seen: dict[int, Any] = {}  # functions of triton.jit, by id: to hash one is to parse it
        self.launches: list[Launch] | None = None
        properties = {"max_shared_mem": 232448, "multiprocessor_count": PROCESSORS}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda *args: (object(), 1, 32, 0, 1024),
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What triton calls for each launch: (grid, stream, function, metadata, hooks, arguments)."""
        names = source.fn.arg_names
        device = self.device

        def launch(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            if self.launches is not None:
                given = dict(zip(names, rest[4:], strict=True))
                self.launches.append(Launch(source.fn.__name__, (x, y, z), device, stream, source, given))

        return launch

    def compile(self, source: Any, target: Any = None, options: Any = None, **rest: Any) -> Any:
        """In place of triton's: notes the kernel, and makes no code unless `writes`."""
        self.compiled.append(source.fn.__name__)
        self.seen[id(source.fn)] = source.fn
        if self.writes:
            return compiler.compiler.compile(source, target=target, options=options, **rest)
        return Unwritten(source, self.launcher_cls(source, None))


def address(value: Any) -> int:
    """Where a pointer argument points, as the launcher reads it."""
    return value if isinstance(value, int) else value.data_ptr()


def violations(launch: Launch) -> list[str]:
    """What of a launch breaks the promises that its kernel was compiled with."""
    source, found = launch.source, []
    constants, names = source.constants, source.fn.arg_names
    attributes = {places[0]: dict(pairs) for places, pairs in source.attrs.items()}
    for place, name in enumerate(names):
        kind, value = source.signature[name], launch.arguments[name]
        if kind == "constexpr":
            if constants[(place,)] != value or type(constants[(place,)]) is not type(value):
                found.append(f"{name} is {value!r}, compiled for {constants[(place,)]!r}")
            continue
        if kind.startswith("*") and value is None:
            found.append(f"{name} is None, compiled for a pointer")
            continue
        number = address(value) if kind.startswith("*") else value
        if attributes.get(place, {}).get("tt.divisibility") == 16 and number % 16:
            found.append(f"{name} is not divisible by 16")
        if kind == "i32" and not -(2**31) <= number < 2**31:
            found.append(f"{name} does not fit {kind}")
    return found


def tables(aggregator: Any) -> list[Any]:
    """What launches an aggregator's kernels: of the plan over elements, and of that over matrices."""
    operator = aggregator.operator
    return [x for x in (operator.kernels, getattr(operator.rules, "matrices", None)) if x is not None]


def kernels(table: Any) -> list[Any]:
    """Those that a table has launched."""
    return list((vars(table).get("kernels") or vars(table).get("_kernels") or {}).values())


def compilations(aggregator: Any) -> list[Any]:
    """What threads compile or have compiled for an aggregator's kernels, ahead of their launches."""
    found = [k._found for x in tables(aggregator) for k in kernels(x)]
    return [task for variants in found for _, ahead in variants.values() for task in ahead.values()]


def forget(aggregator: Any) -> None:
    """An aggregator's memory of launches, as if it had made none."""
    for task in compilations(aggregator):
        task.wait()
    for table in tables(aggregator):
        vars(table).update(_tuned=None)  # which has the next call plan anew
        vars(table).get("_kinds", set()).clear()
        for kernel in kernels(table):
            kernel._found.clear()
            getattr(kernel.fn, "device_caches", {}).clear()  # and which compiler it has
    if aggregator.operator.quick is not None:
        aggregator.operator.quick._known.clear()


@contextmanager
def no_device(aggregator: Any = None, writes: bool = False) -> Iterator[NoDevice]:
    """Triton without a GPU; an aggregator's kernels take CPU tensors meanwhile. `writes`: they compile for sm_90.
    Nothing of it is remembered afterwards, nor anything of before inside it."""
    fake, before, compile_ = NoDevice(writes), driver._active, compiler.compile
    kept = [(x, dict(vars(x))) for x in ([] if aggregator is None else tables(aggregator))]
    driver.set_active(fake)  # type: ignore[arg-type]
    compiler.compile = fake.compile
    try:
        if aggregator is not None:
            forget(aggregator)
        for table, _ in kept:
            assert all(isinstance(x, JITFunction) for n, x in vars(table.table).items() if n.endswith("_kernel"))
            vars(table).update(interpreted=True, processors=PROCESSORS)
        yield fake
    finally:
        for task in [] if aggregator is None else compilations(aggregator):
            task.wait()
        driver._active, compiler.compile = before, compile_
        for fn in fake.seen.values():
            fn.device_caches.clear()
        for table, had in kept:
            vars(table).update({k: had.get(k) for k in ("interpreted", "processors")})
        if aggregator is not None:
            forget(aggregator)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element after a multiple of 16 bytes."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    view = room[1:].view(x.shape)
    view.copy_(x)
    assert view.data_ptr() % 16 and ctypes.sizeof(ctypes.c_void_p) == 8
    return view
