"""Launches of Triton kernels past the binder, which takes longer than a small kernel runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_ahead import _DRY, Compilation

_WORD = range(-(2**31), 2**31)


class Kernel:
    """A function of triton.jit whose arguments are tensors (or None), then whole numbers, then constants; among the
    tensors, strides of the first ones may stand.

    triton.jit compiles anew for other constants, for tensors of another dtype, None or not at a multiple of 16 bytes,
    and for numbers that are 1, divisible by 16 or of 64 bits (unless it is told not to look), a device each. So that is
    the key of what it compiled, and a call whose key is known goes straight to the launcher, pointers as numbers.
    Triton's launch hooks are called; its settings are read when a kernel is first compiled. In the interpreter, with a
    version of triton that is not known, and on other GPUs than NVIDIA's, all calls go through triton.jit.
    """

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self._found: dict[Any, tuple[dict[Any, Any], dict[Any, Compilation]]] = {}  # compiled, being compiled

    def prime(self, device: torch.device) -> None:
        """Has triton make its memory of what it compiled for a device. Two threads at once would make two."""
        driver = _driver(type(self.fn))
        if driver is not None:
            self.fn.device_caches[driver.get_current_device() if device.index is None else device.index]

    def launch(
        self, grid: int, numbers: Sequence[float], constants: Sequence[Any], device: torch.device,
        strides: tuple[int, tuple[int, ...]] = (0, ()), **options: int,
    ) -> Launch:  # fmt: skip
        """What one shape of call fixes; the tensors, on `device`, are passed to the result. `strides`: after so many
        tensors stand these numbers. `options`: num_warps, num_stages. On the device "meta" nothing is launched, but
        compiled ahead."""
        kinds = [(type(x), x) for x in constants]
        params = getattr(self.fn, "params", None)
        if params is None:
            traits = []
        else:
            end = len(params) - len(constants)
            of = [*params[strides[0] : strides[0] + len(strides[1])], *params[end - len(numbers) : end]]
            traits = [_traits(n, p) for n, p in zip((*strides[1], *numbers), of, strict=True)]
        known, ahead = self._found.setdefault((*options.items(), *kinds, *traits), ({}, {}))
        kind: type[Launch] = Launch
        if device.type == "meta" and _DRY.device is not None:
            kind = _Ahead
            self.prime(_DRY.device)
        return kind(self.fn, grid, strides, (*numbers, *constants), device, options, known, ahead)


class Launch:
    """A kernel's launches of one shape: tensors of the same dtypes each time, None at the same places."""

    __slots__ = ("ahead", "first", "fn", "grid", "home", "known", "near", "options", "rest", "strides")

    def __init__(
        self, fn: Any, grid: int, strides: tuple[int, tuple[int, ...]], rest: tuple[Any, ...], device: torch.device,
        options: dict[str, int], known: dict[Any, Any], ahead: dict[Any, Compilation],
    ) -> None:  # fmt: skip
        self.fn, self.grid, self.rest, self.options, self.known = fn, (grid, 1, 1), rest, options, known
        self.first, self.strides = strides
        self.ahead = ahead
        self.home = device.index  # None: wherever
        self.near: dict[Any, Any] = {}  # device, which pointers are aligned -> a compiled kernel on this grid

    def __call__(self, *tensors: Tensor | None) -> None:
        """Runs on the tensors' device, in its current stream. They are as the kernel reads them: the caller has seen to
        layouts and devices; complex ones are pairs of reals."""
        driver = _driver(type(self.fn))
        if driver is None:
            self._jit(tensors)
            return
        device = driver.get_current_device()
        if device != self.home and self.home is not None:
            with torch.cuda.device(self.home):
                self(*tensors)
            return
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        bits = 0
        for p in pointers:
            if p:
                bits |= p
        aligned = _aligned(pointers) if bits & 15 else True
        run = self.near.get((device, aligned))
        if run is None:
            self._find(tensors, device, aligned)
            return
        if self.first:
            run(*self._among(pointers), *self.rest, stream=driver.get_current_stream(device))
        else:
            run(*pointers, *self.rest, stream=driver.get_current_stream(device))

    def _among(self, tensors: Sequence[Any]) -> list[Any]:
        """With the strides where they stand."""
        return [*tensors[: self.first], *self.strides, *tensors[self.first :]]

    def _find(self, tensors: Sequence[Tensor | None], device: int, aligned: Any) -> None:
        """A launch by triton.jit, which compiles if need be; what it ran is remembered."""
        key = (device, aligned, *[None if x is None else x.dtype for x in tensors])
        compiled = self.known.get(key)
        if compiled is None:
            task = self.ahead.get(key[1:])
            if task is not None:
                task.wait()
            compiled = self._jit(tensors)
            if not hasattr(compiled, "packed_metadata"):
                return
            self.known[key] = compiled
        else:
            stream = _driver(type(self.fn)).get_current_stream(device)
            pointers = [None if x is None else x.data_ptr() for x in tensors]
            compiled[self.grid](*self._among(pointers), *self.rest, stream=stream)
        self.near[device, aligned] = compiled[self.grid]

    def warm(self, *tensors: Tensor | torch.dtype | None) -> None:
        """Compiles without launching; a dtype stands for an aligned tensor."""
        if _driver(type(self.fn)) is not None:
            given = self._among([*map(_pairs, tensors)])
            _parsed(lambda: self.fn.warmup(*given, *self.rest, grid=self.grid, **self.options))

    def _jit(self, tensors: Sequence[Tensor | None]) -> Any:
        given = self._among([*map(_pairs, tensors)])
        return _parsed(lambda: self.fn[self.grid](*given, *self.rest, **self.options))


def _parsed(run: Callable[[], Any]) -> Any:
    """Runs what may compile. CPython's ast.parse counts its depth for all threads together: where others parse at the
    same time, it may miscount, and raise SystemError."""
    for _ in range(_PARSES):
        try:
            return run()
        except SystemError:
            continue
    return run()


class _Ahead(Launch):
    """Launches over tensors without memory: their kernels are compiled by threads, each once."""

    __slots__ = ()

    def __call__(self, *tensors: Tensor | None) -> None:
        aligned = _aligned([None if x is None else x.data_ptr() for x in tensors])
        key = (True if all(aligned) else aligned, *[None if x is None else x.dtype for x in tensors])
        if key not in self.ahead:
            self.ahead[key] = Compilation(lambda: self.warm(*tensors))


def _aligned(pointers: Sequence[int | None]) -> tuple[bool, ...]:
    return tuple([p is None or not p & 15 for p in pointers])


def _traits(number: float, parameter: Any) -> tuple[Any, ...]:
    """What triton.jit may compile differently for."""
    if type(number) is not int:
        return (type(number),)
    wide = number not in _WORD
    if getattr(parameter, "do_not_specialize", False):
        return wide, number >= 2**63
    return wide, number >= 2**63, number == 1, number % 16 == 0


def _pairs(x: Any) -> Any:
    """A complex tensor as pairs of reals."""
    if isinstance(x, torch.dtype):
        return torch.float32 if x == torch.complex64 else x
    return torch.view_as_real(x) if x is not None and x.is_complex() else x


_PARSES = 8  # tries
_KNOWN = ((3, 4), (3, 7))  # versions of triton, first and last, whose compiled kernels take all arguments as they are
_DIRECT: dict[type, bool] = {}  # kinds of kernel -> whether they are launched directly


def _driver(kind: type) -> Any:
    """Triton's driver, if compiled kernels of this kind are launched directly."""
    direct = _DIRECT.get(kind)
    if direct is None:
        triton = sys.modules.get("triton")
        direct = False
        if triton is not None and kind is getattr(triton, "JITFunction", None):
            version = tuple(int(part) for part in triton.__version__.split(".")[:2])
            target = triton.runtime.driver.active.get_current_target()
            direct = _KNOWN[0] <= version <= _KNOWN[1] and target.backend == "cuda"
        _DIRECT[kind] = direct
    return sys.modules["triton"].runtime.driver.active if direct else None
