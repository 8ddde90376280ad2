"""Source text and positions in it. Every span in psmc is an offset range into one `SourceFile`."""

from __future__ import annotations

import errno
import os
import stat
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

# Refused before the lexer sees them: no spec of the literature comes near either bound.
MAX_SOURCE_BYTES = 1_000_000


def read_bytes(path: Path, limit: int = MAX_SOURCE_BYTES) -> bytes:
    """A file's content, and at most one byte more of it than is allowed. A pipe or a device is refused: reading one may
    wait for ever, or never end. Raises OSError; ValueError for a name with a NUL in it."""

    def opener(name: str, flags: int) -> int:
        found = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe that nobody writes to would not open
        mode = os.fstat(found).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            os.close(found)
            raise OSError(errno.EINVAL, "is a pipe or a device, not a file", name)
        return found

    with open(path, "rb", opener=opener) as handle:
        return handle.read(limit + 1)


@dataclass(frozen=True)
class SourceFile:
    """A named text. `name` is what diagnostics print: a path, or `<notebook cell>`."""

    name: str
    text: str = field(repr=False)

    @cached_property
    def _line_starts(self) -> list[int]:
        starts = [0]
        starts.extend(i + 1 for i, ch in enumerate(self.text) if ch == "\n")
        return starts

    def position(self, offset: int) -> tuple[int, int]:
        """1-based (line, column) of an offset."""
        line = bisect_right(self._line_starts, offset)
        return line, offset - self._line_starts[line - 1] + 1

    def offset(self, line: int, column: int) -> int:
        """Offset of a 1-based line and 0-based column, clamped to the text."""
        if not 1 <= line <= len(self._line_starts):
            return len(self.text)
        return min(self._line_starts[line - 1] + column, len(self.text))

    def line(self, number: int) -> str:
        start = self._line_starts[number - 1]
        end = self.text.find("\n", start)
        return self.text[start : len(self.text) if end < 0 else end].rstrip("\r")


@dataclass(frozen=True)
class Span:
    """Half-open offset range [start, end) of one source file."""

    source: SourceFile
    start: int
    end: int

    def to(self, other: Span) -> Span:
        """The smallest span that covers both."""
        return Span(self.source, min(self.start, other.start), max(self.end, other.end))

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def __repr__(self) -> str:
        line, column = self.source.position(self.start)
        return f"{self.source.name}:{line}:{column}"
