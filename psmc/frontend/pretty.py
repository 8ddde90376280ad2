"""`psmc fmt`: the canonical layout of a user's own text. Comments and docstrings stay, parentheses become minimal.

The text becomes a list of units: what stands on a line of its own. Comments are then given to units by position:
one that follows code on its line trails that unit, any other leads the next.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from lark import Token

from psmc.frontend import psm
from psmc.frontend import surface as s
from psmc.frontend.pretty_expr import names, operands, text
from psmc.frontend.pretty_lines import INDENT, WIDTH, Unit, attach, emit, fill
from psmc.source import SourceFile, Span

TopLevel = s.Use | s.Const | s.Fn | s.Aggregator


def format_source(source: SourceFile) -> str:
    """Canonical text of a .psm file: idempotent, and the same AST. Raises PsmcError if the file does not parse."""
    file = psm.parse(source)
    tokens = psm.tokens(source)
    layout = _Layout([t for t in tokens.code if t.type != "SEMICOLON"], tokens.comments)
    items: list[TopLevel] = [*file.uses, *file.consts, *file.fns, *file.aggregators]
    for item in sorted(items, key=lambda i: i.span.start):
        layout.top_level(item)
    tail = attach(layout.units, tokens.comments)
    return emit(source, layout.units, tail)


class _Layout:
    """Surface nodes to units, in source order."""

    def __init__(self, code: list[Token], comments: tuple[Span, ...]) -> None:
        self.units: list[Unit] = []
        self._code = code
        self._starts = [t.start_pos or 0 for t in code]
        self._comments = [c.start for c in comments]

    def top_level(self, item: TopLevel) -> None:
        first = len(self.units)
        match item:
            case s.Use(path=path, span=span):
                self._add(span, 0, f'use "{path}"')
            case s.Aggregator():
                self._aggregator(item)
            case _:
                self._item(item, 0)
        self.units[first].top = isinstance(item, s.Aggregator)

    def _add(self, span: Span, depth: int, line: str) -> None:
        self.units.append(Unit(span.start, span.end, depth, line))

    def _braces(self, span: Span, depth: int, head: str) -> Unit:
        """The opening unit; the caller adds the body, then `_close`."""
        opening = self._opening(span)
        unit = Unit(span.start, opening.end_pos or 0, depth, head + " {", opens=True)
        self.units.append(unit)
        return unit

    def _opening(self, span: Span) -> Token:
        """The first '{' from the beginning of a section on."""
        at = self._at(span.start)
        while self._code[at] != "{":
            at += 1
        return self._code[at]

    def _close(self, span: Span, depth: int) -> None:
        self.units.append(Unit(span.end - 1, span.end, depth, "}", closes=True))

    def _at(self, offset: int) -> int:
        return bisect_right(self._starts, offset) - 1

    def _aggregator(self, item: s.Aggregator) -> None:
        opening = self._braces(item.span, 0, f"aggregator {item.name.text}")
        doc = self._code[self._at(opening.end - 1) + 1]
        if doc.type == "DOC" and item.doc:
            lines = item.doc.split("\n")
            printed = "\n".join([lines[0], *(INDENT + line if line.strip() else "" for line in lines[1:])])
            self.units.append(Unit(doc.start_pos or 0, doc.end_pos or 0, 1, f'"""{printed}"""'))
        clause: list[s.Dim] | list[s.Declared] = []
        for index, child in enumerate(item.items):
            if isinstance(child, s.Dim | s.Declared):
                clause.append(child)  # type: ignore[arg-type]
                following = item.items[index + 1] if index + 1 < len(item.items) else None
                if not (isinstance(following, s.Dim | s.Declared) and self._continues(following)):
                    self._clause(clause)
                    clause = []
            else:
                self._item(child, 1)
        self._close(item.span, 0)

    def _continues(self, item: s.Dim | s.Declared) -> bool:
        """Does `item` follow a comma, with no comment in between?"""
        here = self._at(item.name.span.start)
        before = self._code[here - 1]
        last = self._code[here - 2]
        return before.type == "COMMA" and not self._commented(last.end_pos or 0, item.name.span.start)

    def _commented(self, start: int, end: int) -> bool:
        """Does a comment begin in source.text[start:end]?"""
        return bisect_left(self._comments, start) < bisect_left(self._comments, end)

    def _clause(self, clause: list[s.Dim] | list[s.Declared]) -> None:
        """`input a, b`, as several clauses where one is too long."""
        first = clause[0]
        word = "dim" if isinstance(first, s.Dim) else first.role
        start = self._at(first.name.span.start) - 1
        begin = self._starts[start] if self._code[start].type != "COMMA" else first.name.span.start
        line = ""
        for item in clause:
            printed = _declared(item)
            if line and len(INDENT) + len(line) + 2 + len(printed) > WIDTH:
                self.units.append(Unit(begin, item.name.span.start - 1, 1, line))
                begin, line = item.name.span.start, ""
            line = f"{line}, {printed}" if line else f"{word} {printed}"
        last = clause[-1]
        end = last.span.end if isinstance(last, s.Declared) else self._dim_end(last)
        self.units.append(Unit(begin, end, 1, line))

    def _dim_end(self, dim: s.Dim) -> int:
        here = self._at(dim.name.span.start)
        return (self._code[here + 2 if dim.size is not None else here].end_pos) or 0

    def _item(self, item: s.Item, depth: int) -> None:
        match item:
            case s.Const(name=name, value=value, span=span):
                self._definition(span, depth, f"const {name.text} = ", value)
            case s.Fn(name=name, params=params, indices=indices, value=value, span=span):
                listed = ", ".join(p.text + names(dims) for p, dims in params)
                self._definition(span, depth, f"fn {name.text}({listed}){names(indices)} = ", value)
            case s.Assign():
                self._assign(item, depth)
            case s.Lift(body=body, span=span):
                self._block(span, depth, "lift", body)
            case s.Recurrence(body=body, span=span):
                self._block(span, depth, "recurrence", body)
            case s.Combine(left=left, right=right, body=body, span=span):
                self._block(span, depth, f"combine ({left.text}, {right.text})", body)
            case s.CombineExtern(span=span):
                self._add(span, depth, "combine extern")
            case s.Output():
                self._output(item, depth)
            case s.Claim(value=value, span=span):
                self._add(span, depth, f"associative: {value}")
            case s.Order(value=order, span=span):
                self._add(span, depth, f"order: {order}")

    def _block(self, span: Span, depth: int, head: str, body: tuple[s.Statement, ...]) -> None:
        if self._one_line(span, depth, head, body):
            return
        self._braces(span, depth, head)
        for statement in body:
            if isinstance(statement, s.For):
                var, dim = statement.var.text, statement.dim.text
                self._block(statement.span, depth + 1, f"for {var} in {dim}", statement.body)
            else:
                self._assign(statement, depth + 1)
        self._close(span, depth)

    def _one_line(self, span: Span, depth: int, head: str, body: tuple[s.Statement, ...]) -> bool:
        """A block of one statement that was written on one line stays there, if it fits."""
        opening = self._opening(span)
        if len(body) != 1 or isinstance(body[0], s.For) or "\n" in span.source.text[opening.start_pos : span.end]:
            return False
        line = f"{head} {{ {_target(body[0])}{text(body[0].value)} }}"
        if len(INDENT) * depth + len(line) > WIDTH:
            return False
        self._add(span, depth, line)
        return True

    def _assign(self, item: s.Assign, depth: int, before: str = "", after: str = "", start: int | None = None) -> None:
        head = before + _target(item)
        span = item.span if start is None else Span(item.span.source, start, item.span.end)
        self._definition(span, depth, head, item.value, after)

    def _output(self, item: s.Output, depth: int) -> None:
        line = "output " + ", ".join(f"{a.target.text}{names(a.indices)} = {text(a.value)}" for a in item.body)
        commented = self._commented(item.body[0].span.end, item.span.end)
        if len(item.body) == 1 or (len(INDENT) * depth + len(line) <= WIDTH and not commented):
            if len(item.body) == 1:
                self._assign(item.body[0], depth, "output ", start=item.span.start)
            else:
                self._add(item.span, depth, line)
            return
        for number, value in enumerate(item.body):
            comma = "," if number + 1 < len(item.body) else ""
            if number == 0:
                self._assign(value, depth, "output ", comma, item.span.start)
            else:
                self._assign(value, depth + 2, after=comma)

    def _definition(self, span: Span, depth: int, head: str, value: s.ExprNode, after: str = "") -> None:
        """`head value`; a line that is too long is broken before the operators of its loosest chain."""
        line = head + text(value) + after
        parts = operands(value)
        if len(INDENT) * depth + len(line) > WIDTH and len(parts) > 1:
            pad = INDENT * (depth + 2)
            line = head + fill(parts, len(INDENT) * depth + len(head), pad) + after
        self._add(span, depth, line)


def _target(item: s.Assign) -> str:
    return f"{'let ' if item.let else ''}{item.target.text}{names(item.indices)} = "


def _declared(item: s.Dim | s.Declared) -> str:
    if isinstance(item, s.Dim):
        return item.name.text + (f" = {item.size}" if item.size is not None else "")
    out = item.name.text + names(item.dims)
    if item.kind != "real":
        out += f" : {item.kind}"
    if item.interval is not None:
        out += f" in {_interval(item.interval)}"
    return out if item.identity is None else f"{out} = {text(item.identity)}"


def _interval(interval: s.Interval) -> str:
    """As it was written, with canonical spaces: the AST holds only the values of the bounds."""
    source = SourceFile(interval.span.source.name, interval.span.text)
    out = ""
    previous = "("
    for token in psm.tokens(source).code:
        gap = token.type in ("PLUS", "MINUS") and previous not in "([,+-*/^"
        after = previous == ","
        out += f" {token} " if gap else f" {token}" if after else str(token)
        previous = str(token)
    return out
