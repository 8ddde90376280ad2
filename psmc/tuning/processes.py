"""Work in processes of their own: a fault on the device ends one piece of it, and no other."""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any

from psmc.tuning import worker

LATE = "not done"  # begins why there is no more
Outcome = tuple[list[Any], str | None]  # what was found, and why there is no more


class Processes:
    """Forks of a process that has imported torch and never used a GPU, so that each starts at once and afresh."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([worker.__name__])

    def each(
        self, work: Callable[..., Iterator[Any]], pieces: Sequence[tuple[Any, ...]], jobs: int, deadline: float,
        limit: float, heard: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Outcome]]:  # fmt: skip
        """`work` on each of the pieces, `jobs` at a time, in the order in which they end. None is begun after the
        deadline (of time.monotonic), none lasts longer than `limit` seconds; `heard` is called at each find."""
        waiting = list(enumerate(pieces))
        running: dict[Any, tuple[int, Any, float, list[Any]]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs and time.monotonic() < deadline:
                    at, piece = waiting.pop(0)
                    receive, process = self._start(work, piece)
                    running[receive] = at, process, time.monotonic() + limit, []
                if not running:
                    return
                latest = min(end for _, _, end, _ in running.values())
                for receive in wait(list(running), max(0.0, latest - time.monotonic())):
                    at, process, _, found = running[receive]
                    kind, what = _received(receive)
                    if kind == "found":
                        found.append(what)
                        heard()
                        continue
                    del running[receive]
                    process.join()
                    yield at, (found, {"done": None, "failed": what}.get(kind, _ended(process)))
                for receive, (at, process, end, found) in list(running.items()):
                    if time.monotonic() >= end:
                        del running[receive]
                        process.kill()
                        process.join()
                        yield at, (found, f"{LATE} after {limit:.0f} s")
        finally:
            for _, process, _, _ in running.values():
                process.kill()

    def one(
        self, work: Callable[..., Iterator[Any]], *piece: Any, limit: float, heard: Callable[[], None] = lambda: None
    ) -> Outcome:
        """The same of a single piece."""
        ((_, outcome),) = self.each(work, [piece], 1, math.inf, limit, heard)
        return outcome

    def _start(self, work: Callable[..., Iterator[Any]], piece: tuple[Any, ...]) -> tuple[Any, Any]:
        receive, send = self.context.Pipe(duplex=False)
        process = self.context.Process(target=worker.run, args=(work, send, *piece), daemon=True)
        process.start()
        send.close()  # the process has its own: when it ends, so does the pipe
        return receive, process


def _received(receive: Any) -> tuple[str, Any]:
    """What was sent; ('gone', None) where the other side ended without a word."""
    try:
        kind, what = receive.recv()
    except (EOFError, OSError):
        return "gone", None
    return kind, what


def _ended(process: Any) -> str:
    code: int | None = process.exitcode
    return f"died: {signal.Signals(-code).name}" if code is not None and code < 0 else f"died: exit code {code}"
