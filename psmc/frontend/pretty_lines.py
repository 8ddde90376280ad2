"""Lines of a formatted file: where comments go, blank lines, alignment, breaks of long lines."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from psmc.source import SourceFile, Span

WIDTH = 100
INDENT = "  "


@dataclass
class Unit:
    """`start` and `end` are source offsets. A closing unit's leading comments belong to the block it closes."""

    start: int
    end: int
    depth: int
    text: str
    opens: bool = False
    closes: bool = False
    top: bool = False
    leading: list[Span] = field(default_factory=list)
    trailing: list[Span] = field(default_factory=list)


def fill(parts: list[tuple[str, str]], used: int, pad: str) -> str:
    """Operands in lines of at most WIDTH columns, as far as each fits."""
    out, column = parts[0][1], used + len(parts[0][1])
    for op, operand in parts[1:]:
        piece = f"{op} {operand}"
        if column + 1 + len(piece) > WIDTH:
            out, column = f"{out}\n{pad}{piece}", len(pad) + len(piece)
        else:
            out, column = f"{out} {piece}", column + 1 + len(piece)
    return out


def attach(units: list[Unit], comments: tuple[Span, ...]) -> list[Span]:
    """Give every comment to a unit; returns those after the last one."""
    starts = [u.start for u in units]
    tail: list[Span] = []
    for comment in comments:
        index = bisect_right(starts, comment.start) - 1
        if index >= 0:
            unit = units[index]
            if comment.start < unit.end:  # inside a statement: move it above
                unit.leading.append(comment)
                continue
            if "\n" not in comment.source.text[unit.end : comment.start]:
                unit.trailing.append(comment)
                continue
        if index + 1 < len(units):
            units[index + 1].leading.append(comment)
        else:
            tail.append(comment)
    return tail


def emit(source: SourceFile, units: list[Unit], tail: list[Span]) -> str:
    lines: list[tuple[str, str]] = []  # code, trailing comment

    def line_of(offset: int) -> int:
        return source.position(offset)[0]

    last = 0  # source line of what was printed last; 0 right after an opening brace
    for unit in units:
        forced = unit.top and bool(lines)
        pad = INDENT * unit.depth
        for comment in unit.leading:
            _blank(lines, forced or (last and line_of(comment.start) > last + 1))
            lines.append((pad + (INDENT if unit.closes else "") + _comment(comment), ""))
            last, forced = line_of(comment.start), False
        _blank(lines, forced or (last and not unit.closes and line_of(unit.start) > last + 1))
        head, *rest = f"{pad}{unit.text}".split("\n")
        trailing = "  ".join(_comment(c) for c in unit.trailing)
        if rest:
            lines.append((head, ""))
            lines.extend((line, "") for line in rest[:-1])
            lines.append((rest[-1], trailing))
        else:
            lines.append((head, trailing))
        last = 0 if unit.opens else line_of(max(unit.end - 1, unit.start))
    for comment in tail:
        _blank(lines, last and line_of(comment.start) > last + 1)
        lines.append((_comment(comment), ""))
        last = line_of(comment.start)
    return "".join(line + "\n" for line in _align(lines))


def _blank(lines: list[tuple[str, str]], wanted: bool | int) -> None:
    if wanted and lines and lines[-1] != ("", ""):
        lines.append(("", ""))


def _comment(span: Span) -> str:
    return span.text.rstrip()


def _align(lines: list[tuple[str, str]]) -> list[str]:
    """Trailing comments of neighbouring lines start in one column."""
    out: list[str] = []
    start = 0
    while start < len(lines):
        end = start
        while end < len(lines) and lines[end][1]:
            end += 1
        column = max((len(code) for code, _ in lines[start:end]), default=0) + 2
        out += [f"{code:<{column}}{comment}" for code, comment in lines[start:end]]
        if end < len(lines):
            out.append(lines[end][0])
        start = end + 1
    return out
