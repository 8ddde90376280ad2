"""Kernels that threads compile ahead of a first call: most of its time, the compiler needs no interpreter.

The call is run over tensors without memory first. What it would launch is handed to threads; a launch of the call
itself waits for its own kernel.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_THREADS = 8  # of one call


class _Dry(threading.local):
    """Of the call that this thread runs over tensors without memory: the device that it is for."""

    device: torch.device | None = None
    room: threading.Semaphore | None = None


_DRY = _Dry()


class Compilation:
    """Of one kernel, by a thread. What it raises is kept: the launch compiles again, and raises it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._done, self._process = threading.Event(), os.getpid()
        device, room = _DRY.device, _DRY.room
        assert device is not None and room is not None

        def run() -> None:
            try:
                with room:
                    if threading.main_thread().is_alive():  # else nobody is left to launch it
                        if device.type == "cuda":
                            torch.cuda.set_device(device)  # of this thread
                        work()
            except BaseException as error:
                self.error = error
            finally:
                self._done.set()

        try:
            threading.Thread(target=run, name="psmc-compile").start()
        except RuntimeError as error:  # no threads are left, or the interpreter ends
            self.error = error
            self._done.set()

    def wait(self) -> None:
        """A forked process does not have the thread."""
        if self._process == os.getpid():
            self._done.wait()


class Compiling:
    """Kernels whose first call on a GPU waits for the compiler; not in Triton's interpreter."""

    interpreted: bool

    def compiles(self, device: torch.device) -> bool:
        return device.type == "cuda" and not self.interpreted


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """Within, launches over tensors of the device "meta" are compiled by threads, for `device`."""
    _DRY.device, _DRY.room = device, threading.Semaphore(_THREADS)
    try:
        with torch.no_grad():
            yield
    finally:
        _DRY.device = _DRY.room = None


def _ghost(x: Tensor) -> Tensor:
    """Laid out like `x`, as far from a multiple of 16 bytes, and without memory."""
    offset = x.data_ptr() % 16 // x.element_size()
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return torch.empty(offset + span, dtype=x.dtype, device="meta").as_strided(x.shape, x.stride(), offset)


_COUNTS: dict[torch.device, int] = {}


def _processors(device: torch.device) -> int:
    """The GPU's number of multiprocessors; of the one that a dry call is for."""
    if device.type == "meta" and _DRY.device is not None:
        device = _DRY.device
    if device not in _COUNTS:
        _COUNTS[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _COUNTS[device]
