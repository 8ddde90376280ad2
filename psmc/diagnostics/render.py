"""The one renderer: `file:line:column: error[CODE]: message`, the source with carets, notes, helps."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from psmc.diagnostics.core import Diagnostic
from psmc.source import SourceFile, Span

Role = Literal["place", "error", "warning", "note", "message", "gutter", "source", "primary", "secondary", "help"]
Style = Callable[[Role, str], str]  # colours a piece of text; must not change its visible width

_TAB = 4
_MAX_WIDTH = 100  # of the source column; longer lines are clipped around what is marked
_LEAD = 12  # cells kept before the first mark of a clipped line


@dataclass(frozen=True)
class _Mark:
    """One underline on one line: columns are 0-based offsets into the line's text."""

    line: int
    start: int
    end: int
    label: str
    primary: bool


def render(diagnostic: Diagnostic, *, style: Style | None = None) -> str:
    """The text of one diagnostic, without a trailing newline. Plain, unless `style` colours its pieces."""
    paint = style or _plain
    head = paint(diagnostic.severity, f"{diagnostic.severity}[{diagnostic.code}]: ")
    head += paint("message", _lines(diagnostic.message, 2))
    lines: list[str] = []
    if diagnostic.span is None:
        lines.append(head)
    else:
        lines.append(f"{paint('place', f'{_place(diagnostic.span)}:')} {head}")
        home = diagnostic.span.source
        marks = _marks(diagnostic.span, diagnostic.label, True)
        for label in diagnostic.labels:
            marks += _marks(label.span, label.text, False) if label.span.source is home else []
        lines += _snippet(home, marks, paint)
    for label in diagnostic.labels:
        if diagnostic.span is None or label.span.source is not diagnostic.span.source:
            lines.append(f"  {paint('place', f'{_place(label.span)}:')}")
            lines += _snippet(label.span.source, _marks(label.span, label.text, False), paint)
    lines += [f"  {paint('note', 'Note:')} {_lines(note, 8)}" for note in diagnostic.notes]
    lines += [f"  {paint('help', 'Help:')} {_lines(help_, 8)}" for help_ in diagnostic.helps]
    return "\n".join(lines)


def _plain(role: Role, text: str) -> str:
    del role
    return text


def _place(span: Span) -> str:
    line, column = span.source.position(span.start)
    return f"{_visible(span.source.name)}:{line}:{column}"


def _marks(span: Span, label: str, primary: bool) -> list[_Mark]:
    """One mark, or two for a span of several lines: its first line and its last, which carries the label."""
    line, column = span.source.position(span.start)
    last, end = span.source.position(max(span.start, span.end))
    if last > line and end == 1:  # the span ends with a newline
        last, end = last - 1, len(span.source.line(last - 1)) + 1
    if last == line:
        return [_Mark(line, column - 1, end - 1, label, primary)]
    text = span.source.line(last)
    indent = len(text) - len(text.lstrip())
    first = _Mark(line, column - 1, len(span.source.line(line)), "", primary)
    return [first, _Mark(last, indent, end - 1, label, primary)]


def _snippet(source: SourceFile, marks: list[_Mark], paint: Style) -> list[str]:
    """The marked lines in source order, each followed by its underlines."""
    width = max(len(str(mark.line)) for mark in marks)
    lines: list[str] = []
    for number in sorted({mark.line for mark in marks}):
        here = sorted((m for m in marks if m.line == number), key=lambda m: (m.start, not m.primary))
        text, skipped = source.line(number), 0
        main = next((m for m in here if m.primary), here[0])
        if len(text) > 10 * _MAX_WIDTH:  # only look at what can be shown
            skipped = max(0, main.start - 2 * _MAX_WIDTH)
            text = text[skipped : skipped + 4 * _MAX_WIDTH]
        cells = _cells(text)
        left, right = _window(cells, [_column(cells, m.end - skipped) for m in here], main.start - skipped)
        cut = bool(left or skipped)
        shown = "".join(shape for shape, at in cells if left <= at < right)
        clipped = ("…" if cut else "") + shown + ("…" if cells and cells[-1][1] >= right else "")
        lines.append(f"  {paint('gutter', f'{number:>{width}} |')} {paint('source', clipped)}".rstrip())
        for mark in here:
            start, end = (_column(cells, i - skipped) for i in (mark.start, max(mark.end, mark.start + 1)))
            start, end = max(start, left), min(end, right)
            if start >= end:
                continue  # clipped away
            line = " " * (start - left + cut) + paint(
                "primary" if mark.primary else "secondary",
                f"{('^' if mark.primary else '-') * (end - start)} {_visible(mark.label)}".rstrip(),
            )
            lines.append(f"  {paint('gutter', ' ' * width + ' |')} {line}".rstrip())
    return lines


def _window(cells: list[tuple[str, int]], ends: list[int], main: int) -> tuple[int, int]:
    """Which columns of a line to show: all of a short one, else those around the character `main`."""
    total = cells[-1][1] + len(cells[-1][0]) if cells else 0
    if total <= _MAX_WIDTH:
        return 0, max(total, *ends) + 1
    left = max(0, min(_column(cells, main) - _LEAD, total - _MAX_WIDTH))
    return left, left + _MAX_WIDTH


def _cells(text: str) -> list[tuple[str, int]]:
    """(what is printed, its first column) of each character: tabs expanded, control characters made visible."""
    out: list[tuple[str, int]] = []
    at = 0
    for char in text:
        shape = " " * (_TAB - at % _TAB) if char == "\t" else _visible(char)
        out.append((shape, at))
        at += len(shape) if char == "\t" else _width(char)
    return out


def _column(cells: list[tuple[str, int]], index: int) -> int:
    """Column of a character; positions outside the line count one column each."""
    if index < 0:
        return index
    if index < len(cells):
        return cells[index][1]
    if not cells:
        return index
    shape, at = cells[-1]
    return at + (len(shape) if shape.isspace() else _width(shape)) + index - len(cells)


def _width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _visible(text: Iterable[str]) -> str:
    """Text that cannot move a terminal's cursor or change its colours."""
    return "".join(char if char.isprintable() or char == " " else "\N{REPLACEMENT CHARACTER}" for char in text)


def _lines(text: str, indent: int) -> str:
    """Text of several lines, the later ones indented."""
    return ("\n" + " " * indent).join(_visible(line) for line in text.split("\n"))
