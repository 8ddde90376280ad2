"""Places in Python source: spans of the code that is running, of the decorated class and of the decorator's strings."""

from __future__ import annotations

import ast
import linecache
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from threading import Lock
from types import CodeType, FrameType, FunctionType, TracebackType

from psmc.source import MAX_SOURCE_BYTES, SourceFile, Span

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Frames of these files are ours: a place is where the user's own code called them.
_OURS = frozenset(
    os.path.join(_ROOT, *parts)
    for parts in (
        ("frontend", "pysource.py"),
        ("frontend", "arrays.py"),
        ("frontend", "symbolic.py"),
        ("frontend", "trace.py"),
        ("frontend", "writer.py"),
        ("frontend", "decorator.py"),
        ("lang.py",),
        ("pipeline.py",),
        ("__init__.py",),
    )
)
_NO_SOURCE = "(source not available)"
_parsing = Lock()  # CPython 3.11's ast.parse counts its recursion in one place for all threads
# By file name: linecache's list of lines and the text made of it. The same list means an unchanged file.
_known: dict[str, tuple[list[str], SourceFile]] = {}


def refresh(filename: str) -> None:
    """Drop the text of a file that changed on disk since it was read. Notebook cells are kept by their front end."""
    linecache.checkcache(filename)


def source_of(filename: str) -> SourceFile:
    """The text of a Python file or notebook cell, the same object as long as the text is the same."""
    lines = linecache.getlines(filename)
    found = _known.get(filename)
    if found is None or found[0] is not lines:
        found = lines, SourceFile(_shown(filename), "".join(lines) or _NO_SOURCE)
        _known[filename] = found
    return found[1]


def _shown(filename: str) -> str:
    """Relative where that is shorter, as compilers print it."""
    if not os.path.isabs(filename):
        return filename
    try:
        relative = os.path.relpath(filename)
    except ValueError:  # another drive
        return filename
    return filename if relative.startswith(os.pardir) else relative


def here() -> Span:
    """The expression of the user's code that is running now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in _OURS:
        frame = frame.f_back
    return Span(SourceFile("<python>", _NO_SOURCE), 0, 0) if frame is None else _at(frame.f_code, frame.f_lasti)


def of_traceback(trace: TracebackType | None, outer: FunctionType) -> Span:
    """The innermost place of a traceback in the file of `outer`; `outer`'s own place if there is none."""
    found = of_function(outer)
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename == outer.__code__.co_filename:
            found = _at(code, trace.tb_lasti)
        trace = trace.tb_next
    return found


def is_ours(trace: TracebackType | None) -> bool:
    """Was it raised by psmc's own code, other than the functions users call?"""
    innermost = None
    while trace is not None:
        innermost, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    return innermost in _OURS and not innermost.endswith("lang.py")


def _at(code: CodeType, instruction: int) -> Span:
    source = source_of(code.co_filename)
    line, end_line, column, end_column = next(islice(code.co_positions(), instruction // 2, None), (None,) * 4)
    if source.text == _NO_SOURCE or line is None:
        return Span(source, 0, len(source.text))
    if end_line is None or column is None or end_column is None:
        return _line(source, line)
    return Span(source, _offset(source, line, column), _offset(source, end_line, end_column))


def _line(source: SourceFile, line: int) -> Span:
    text = source.line(line) if line <= source.text.count("\n") + 1 else ""
    start = source.offset(line, len(text) - len(text.lstrip()))
    return Span(source, start, source.offset(line, len(text.rstrip())))


def _offset(source: SourceFile, line: int, byte: int) -> int:
    """Offset of a 1-based line and a column in UTF-8 bytes, as Python counts them."""
    if not 1 <= line <= source.text.count("\n") + 1:
        return len(source.text)
    return source.offset(line, len(source.line(line).encode()[:byte].decode(errors="ignore")))


def of_function(fn: FunctionType) -> Span:
    """The line of its `def` (or of the lambda)."""
    source = source_of(fn.__code__.co_filename)
    if source.text == _NO_SOURCE:
        return Span(source, 0, len(source.text))
    first = fn.__code__.co_firstlineno
    last = source.text.count("\n") + 1
    lines = range(first, min(first + 20, last + 1))
    line = next((n for n in lines if source.line(n).lstrip().startswith(("def ", "async def "))), first)
    return _line(source, line)


@dataclass(frozen=True)
class Decoration:
    """The source of one decorated class: the class line, and the decorator call's keyword arguments by name."""

    source: SourceFile
    span: Span
    arguments: dict[str, ast.expr]

    def argument(self, name: str) -> Span:
        """Where a keyword argument is written; the class line if it is not."""
        node = self.arguments.get(name)
        return self.span if node is None else _node(self.source, node)

    def string(self, name: str, value: str, owner: str) -> Span:
        """Where the characters of a string argument are. A computed one, or one with escapes, is a text of its own."""
        node = self.arguments.get(name)
        if isinstance(node, ast.Constant) and len(self.source.text) < MAX_SOURCE_BYTES:
            span = _node(self.source, node)
            at = span.text.find(value)
            if at >= 0 and node.value == value:
                return Span(self.source, span.start + at, span.start + at + len(value))
        return Span(SourceFile(f"<{name} of {owner}>", value), 0, len(value))


def decoration(cls: type, functions: list[FunctionType]) -> Decoration:
    """Find the class statement: by one of its methods, else by the code that runs the decorator."""
    for fn in functions:
        refresh(fn.__code__.co_filename)
    nearby = of_function(functions[0]) if functions else here()
    source = nearby.source
    tree = _tree(source)
    if tree is None:
        return Decoration(source, nearby, {})
    line = source.position(nearby.start)[0]
    inside: ast.ClassDef | None = None
    for node in ast.walk(tree):  # outer classes come first: the last match is the innermost
        if (
            isinstance(node, ast.ClassDef)
            and node.name == cls.__name__
            and _lines(node) <= line <= (node.end_lineno or 0)
        ):
            inside = node
    if inside is None:
        return Decoration(source, nearby, {})
    start = _offset(source, inside.lineno, inside.col_offset)
    span = Span(source, start, start + len(f"class {inside.name}"))
    return Decoration(source, span, dict(_keywords(inside)))


@lru_cache(maxsize=32)
def _tree(source: SourceFile) -> ast.Module | None:
    """None for text that is not a Python module (a notebook's magics, a deeper nesting than the parser takes)."""
    with _parsing:
        try:
            return ast.parse(source.text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _lines(node: ast.ClassDef) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _keywords(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call):
            yield from ((k.arg, k.value) for k in decorator.keywords if k.arg is not None)


def _node(source: SourceFile, node: ast.expr) -> Span:
    start = _offset(source, node.lineno, node.col_offset)
    return Span(source, start, _offset(source, node.end_lineno or node.lineno, node.end_col_offset or 0))
