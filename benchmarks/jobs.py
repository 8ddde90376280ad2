"""Cells of a benchmark in processes of their own: an illegal access, a hang or a peer's exception costs one cell.

A cell is what one row (or a few) is measured from, as a dict that JSON can hold. Cells that share what is compiled
form a group, and a group is a process: the script itself, started with `--job`, which calls `serve`. One that dies is
started again behind the cell that killed it. Rows are merged by their key, and the result file is written after each.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, command, commit, show, write

Cell = dict[str, Any]
AGAIN = 75  # the exit code of a process whose device is lost: the cell is told, the next ones want another process
_MARK = "\x1e"  # before what a process tells the script that started it; all else it prints is for the reader
_KEY = ("table", "spec", "shape", "dtype", "pass", "data", "tile", "what", "who", "mixer", "passes")
_LIVE: set[int] = set()  # process groups that this script started
_LATE = ("not begun", "no time left", "out of time")


@dataclass(frozen=True)
class Group:
    """A process: its cells in order, the seconds that each of them may take, its variables of the environment."""

    name: str
    cells: tuple[Cell, ...]
    limit: float = 120.0
    env: Mapping[str, str] = field(default_factory=dict)


# --- in the process -------------------------------------------------------------------------------------------


def serve(job: str, handle: Callable[[Cell], Iterable[Row]]) -> None:
    """The cells of a job, one after the other; `handle` yields the rows of one as it has them."""
    for cell in json.loads(job):
        lost = False
        try:
            for row in handle(cell):
                _tell(row=row)
        except Exception as error:
            lost = "CUDA error" in str(error) or "illegal memory" in str(error) or "[CUDA]" in str(error)
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(f"{type(error).__name__}: {error}".split())[:240]
            _tell(failed=f"{text} ({Path(where.filename).name}:{where.lineno})")
        _tell(done=True)
        if lost:
            sys.stdout.flush()
            os._exit(AGAIN)
        free()


def free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tell(**what: Any) -> None:
    print(f"\n{_MARK}{json.dumps(what)}", flush=True)


# --- in the script --------------------------------------------------------------------------------------------


class Results:
    """Rows by what they are of, merged as they come, and always whole on disk."""

    def __init__(self, path: Path | None, resume: bool, order: Callable[[Row], Any] | None = None, **extra: Any):
        self.path, self.extra, self.order = path, extra, order
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.done: list[str] = []  # cells that need not run again
        self.missing: dict[str, str] = {}  # cells that do, and why
        self.late: set[str] = set()  # cells that ran out of their own time once; a second time is the last
        self.command = command()
        signal.signal(signal.SIGTERM, _end)
        if resume and path is not None and path.is_file():
            kept = json.loads(path.read_text())
            if kept["commit"] == commit():  # else they are of other code
                self.done = kept.get("cells", [])
                self.rows = {self.key(row): row for row in kept["rows"]}
                self.late = {k for k, why in kept.get("incomplete", {}).items() if why.startswith(_LATE[2])}

    @staticmethod
    def key(row: Row) -> tuple[Any, ...]:
        return tuple(str(row.get(k)) for k in _KEY)

    def add(self, row: Row) -> None:
        """Into the row of the same key: dicts are joined, all else is replaced; a figure takes an error's place."""
        held = self.rows.setdefault(self.key(row), {})
        for name, value in row.items():
            held[name] = {**held.get(name, {}), **value} if isinstance(value, dict) else value
        if "ms" in row and "error" not in row:
            held.pop("error", None)
        for who in row.get("peers", {}):
            held.get("peer_error", {}).pop(who, None)
        self.rows[self.key(row)] = {k: v for k, v in held.items() if v not in ({}, None)}

    def blame(self, row: Row) -> None:
        """An error, where there is no figure yet."""
        held = self.rows.get(self.key(row), {})
        known = held.get("peers", {})
        row = {**row, "peer_error": {k: v for k, v in row.get("peer_error", {}).items() if k not in known}}
        if "ms" in held:
            row.pop("error", None)
        self.add(row)

    def replace(self, table: str, rows: list[Row]) -> None:
        """A table that is computed from the other rows."""
        self.rows = {k: r for k, r in self.rows.items() if r.get("table") != table}
        for row in rows:
            self.add({"table": table, **row})
        self.write()

    def sorted(self) -> list[Row]:
        rows = list(self.rows.values())
        return sorted(rows, key=self.order) if self.order else rows

    def write(self) -> None:
        if self.path is not None:
            told = {"incomplete": self.missing} if self.missing else {}
            write(self.path, self.sorted(), self.command, **self.extra, **told, cells=sorted(self.done))

    def run(
        self, script: str, groups: Sequence[Group], failed: Callable[[Cell, str], list[Row]] | None = None,
        more: Sequence[str] = (), workers: int = 1, seconds: float = 1e9, quiet: bool = False,
    ) -> None:  # fmt: skip
        """Every cell that is not done yet, `workers` processes at once. `failed`: the rows of a cell that gave none."""
        end = time.monotonic() + seconds
        waiting = [(g, [c for c in g.cells if _name(g, c) not in self.done]) for g in groups]
        waiting = [(g, cells) for g, cells in waiting if cells]
        names = [g.name for g, _ in waiting]
        self.missing |= {_name(g, c): "not begun" for g, cells in waiting for c in cells}
        self.write()
        news: queue.Queue[tuple[Group, list[Cell], dict[str, Any]]] = queue.Queue()
        at, barren, live, began = dict.fromkeys(names, 0), dict.fromkeys(names, 0), 0, time.monotonic()

        def close(group: Group, cell: Cell, why: str | None) -> None:
            name = _name(group, cell)
            self.missing.pop(name, None)
            if why is not None and why.startswith(_LATE) and not (why.startswith(_LATE[2]) and name in self.late):
                self.missing[name] = why
            else:
                self.done.append(name)
            if why is not None:
                print(f"[{group.name}] {json.dumps(cell)}: {why}", flush=True)
                for row in failed(cell, why) if failed and not why.startswith(_LATE[:2]) else []:
                    self.blame(row)

        while waiting or live:
            while waiting and live < workers:
                group, cells = waiting.pop(0)
                at[group.name], live = 0, live + 1
                threading.Thread(target=_process, args=(script, group, cells, more, end, news), daemon=True).start()
            group, cells, news_of = news.get()
            if "row" in news_of:
                self.add(news_of["row"])
                if not quiet:
                    show([news_of["row"]])
            elif "failed" in news_of:
                close(group, cells[at[group.name]], news_of["failed"])
            elif "done" in news_of:
                cell = cells[at[group.name]]
                at[group.name] += 1
                if _name(group, cell) in self.missing:
                    close(group, cell, None)
            else:
                live -= 1
                left, why = cells[at[group.name] :], news_of["ended"]
                barren[group.name] = 0 if at[group.name] else barren[group.name] + 1
                if left and why is not None and why != "no time left":  # it ended at this cell
                    close(group, left.pop(0), why)
                if left and why is not None and (why == "no time left" or barren[group.name] == 2):
                    for cell in left:  # it would end again before it has begun
                        close(group, cell, why)
                elif left:
                    waiting.insert(0, (group, left))
                print(f"[{group.name}] {why or 'done'}, {time.monotonic() - began:.0f} s", flush=True)
            self.write()

    def left(self, groups: Iterable[Group]) -> list[Group]:
        """Those with cells that are not done."""
        return [g for g in groups if any(_name(g, c) not in self.done for c in g.cells)]

    @property
    def exit_code(self) -> int:
        """0 if all was tried; 3 if something ran out of time, so that a second call has work."""
        return 3 if self.missing else 0


def _end(number: int, frame: Any) -> None:
    """Whoever ends this script ends what it started."""
    for group in list(_LIVE):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    os._exit(128 + number)


def _name(group: Group, cell: Cell) -> str:
    return f"{group.name} {json.dumps(cell, sort_keys=True)}"


def _process(
    script: str, group: Group, cells: list[Cell], more: Sequence[str], end: float, news: queue.Queue[Any]
) -> None:
    """One process; ended, with all that it started, when a cell takes longer than it may."""
    if end - time.monotonic() < 2:
        news.put((group, cells, {"ended": "no time left"}))
        return
    words = [sys.executable, script, *more, "--job", json.dumps(cells)]
    late: list[str] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace",
            env={**os.environ, **group.env}, start_new_session=True,
        )  # fmt: skip

        _LIVE.add(process.pid)

        def kill(why: str) -> None:
            late.append(why)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def watch() -> threading.Timer:
            left = end - time.monotonic()
            why = "no time left" if left < group.limit else f"out of time ({group.limit:.0f} s)"
            timer = threading.Timer(max(0.1, min(left, group.limit)), kill, (why,))
            timer.start()
            return timer

        timer = watch()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_MARK):
                try:
                    told = json.loads(line[1:])
                except json.JSONDecodeError:
                    continue  # ended while it wrote
                news.put((group, cells, told))
                if "done" in told:
                    timer.cancel()
                    timer = watch()
            elif line.strip():
                print(f"[{group.name}] {line}", end="", flush=True)
        code = process.wait()
        _LIVE.discard(process.pid)
        timer.cancel()
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line.strip()]
    why: str | None = None
    if late:
        why = late[0]
    elif code not in (0, AGAIN):
        why = f"{'signal' if code < 0 else 'exit code'} {abs(code)}: {said[-1][:240] if said else 'no words'}"
    news.put((group, cells, {"ended": why}))
