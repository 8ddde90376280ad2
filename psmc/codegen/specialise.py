"""The runtime's text as one spec needs it: what the spec decides is decided, and what nobody calls is left out."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

_ENDS = (ast.Return, ast.Raise)


def answered(text: str, false: frozenset[str]) -> str:
    """The same program where the expressions `false` (as ast.unparse writes them) are never true."""
    if not any(condition.replace("'", '"') in text for condition in false):
        return text
    while (found := _statements(text, false) or _expression(text, false)) is not None:
        text = found
    return text


def _statements(text: str, false: frozenset[str]) -> str | None:
    """Without the outermost `if`s whose answer is known; None if there is none."""
    lines = text.splitlines(keepends=True)
    edits: list[tuple[int, int, list[str]]] = []
    reached = 0
    for block, at, node in sorted(_ifs(ast.parse(text)), key=lambda found: found[2].lineno):
        known = _truth(node.test, false) if node.lineno > reached else None
        done = None if known is None else _without_if(lines, block, at, node, known)
        if done is not None:
            edits.append(done)
            reached = done[1]
    for first, last, instead in reversed(edits):
        lines[first:last] = instead
    return "".join(lines) if edits else None


def _expression(text: str, false: frozenset[str]) -> str | None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.IfExp) and (known := _truth(node.test, false)) is not None:
            return _chosen(text.splitlines(keepends=True), node, node.body if known else node.orelse)
    return None


def _ifs(tree: ast.AST) -> Iterator[tuple[list[ast.stmt], int, ast.If]]:
    for block in _blocks(tree):
        yield from ((block, at, node) for at, node in enumerate(block) if isinstance(node, ast.If))


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block:
                yield block


def _truth(test: ast.expr, false: frozenset[str]) -> bool | None:
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _truth(operand, false)
            return None if inner is None else not inner
        case ast.BoolOp(op=op, values=values):
            found = [_truth(v, false) for v in values]
            decides = isinstance(op, ast.Or)
            if decides in found:
                return decides
            return None if None in found else not decides
    return False if ast.unparse(test) in false else None


def _without_if(
    lines: list[str], block: Sequence[ast.stmt], at: int, node: ast.If, known: bool
) -> tuple[int, int, list[str]] | None:
    """Which lines are replaced, by what: the branch that is taken; None where that would leave nothing."""
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    chained = lines[first].lstrip().startswith("elif")
    if known:
        if chained:
            return None
        body = [line.removeprefix("    ") for line in lines[node.body[0].lineno - 1 : node.body[-1].end_lineno]]
        if isinstance(node.body[-1], _ENDS):  # nothing after it runs
            last = block[-1].end_lineno or last
        return first, last, body
    if not node.orelse:
        return None if len(block) == 1 and not chained else (first, last, [])
    begin = node.orelse[0].lineno - 1
    if isinstance(node.orelse[0], ast.If) and lines[begin].lstrip().startswith("elif"):
        return first, begin + 1, [lines[begin] if chained else lines[begin].replace("elif", "if", 1)]
    if chained:
        begin -= 1
        while not lines[begin].lstrip().startswith("else:"):
            begin -= 1
        return first, begin, []
    return first, last, [line.removeprefix("    ") for line in lines[begin:last]]


def _chosen(lines: list[str], node: ast.IfExp, branch: ast.expr) -> str:
    text = "".join(lines)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = text.encode()

    def span(x: ast.expr) -> tuple[int, int]:
        assert x.end_lineno is not None and x.end_col_offset is not None
        return starts[x.lineno - 1] + x.col_offset, starts[x.end_lineno - 1] + x.end_col_offset

    (begin, end), (low, high) = span(node), span(branch)
    return (data[:begin] + data[low:high] + data[end:]).decode()


@dataclass(frozen=True)
class Part:
    """A top-level statement with what stands before it: the names that it defines, and those that it reads."""

    file: str
    text: str
    defines: frozenset[str]
    reads: frozenset[str]


def names_read(tree: ast.AST) -> frozenset[str]:
    return frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name))


def reachable(parts: Sequence[Part], roots: Iterable[str]) -> list[Part]:
    """The parts that define the roots, or what such a part reads; of their classes, no private method is left that
    nobody calls."""
    while True:
        wanted, kept = set(roots), set[int]()
        while True:
            more = {n for n, p in enumerate(parts) if n not in kept and p.defines & wanted}
            if not more:
                break
            kept |= more
            wanted |= {name for n in more for name in parts[n].reads}
        found = [p for n, p in enumerate(parts) if n in kept]
        called = frozenset(name for p in found for name in _attributes(p.text))
        parts = [_without_methods(p, called) for p in found]
        if parts == found:
            return found


@cache
def _attributes(text: str) -> frozenset[str]:
    return frozenset(a.attr for a in ast.walk(ast.parse(text)) if isinstance(a, ast.Attribute))


def _without_methods(part: Part, called: frozenset[str]) -> Part:
    if "class " not in part.text:
        return part
    (node,) = ast.parse(part.text).body
    if not isinstance(node, ast.ClassDef):
        return part
    lines, last = part.text.splitlines(keepends=True), 0
    kept: list[str] = []
    for member in node.body:
        end = member.end_lineno or member.lineno
        name = member.name if isinstance(member, ast.FunctionDef) else ""
        if not name.startswith("_") or name.startswith("__") or name in called:
            kept += lines[last:end]
        last = end
    text = "".join(kept)
    return part if text == part.text else replace(part, text=text, reads=names_read(ast.parse(text)))
