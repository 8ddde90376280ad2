"""The index variables of one statement: which dim each runs over, found from how it is used.

While a statement is read, its indices are provisional `ir.Index` objects with unique names and no dim, so that macro
expansion cannot capture and dims can be unified in any order. `finish` puts the dims in.
"""

from __future__ import annotations

from dataclasses import dataclass

from psmc import ir
from psmc.diagnostics import Label, fail
from psmc.frontend import surface as sf
from psmc.ir.rewrite import transform
from psmc.source import Span


@dataclass
class _Class:
    """Indices known to run over the same dim; `why` is where that dim was first seen."""

    dim: str | None = None
    why: Span | None = None


class Indices:
    def __init__(self) -> None:
        self._bound: dict[ir.Index, sf.Name] = {}
        self._class: dict[ir.Index, _Class] = {}
        self._level: ir.Index | None = None

    def bind(self, name: sf.Name) -> ir.Index:
        """A new index variable."""
        index = ir.Index(f"{name.text}#{len(self._bound)}", "?")
        self._bound[index] = name
        self._class[index] = _Class()
        return index

    def text(self, index: ir.Index) -> str:
        """The user's name for an index."""
        return self._bound[index].text

    def span(self, index: ir.Index) -> Span:
        """Where an index was bound."""
        return self._bound[index].span

    def over(self, index: ir.Index, dim: str, span: Span) -> None:
        """The index subscripts an axis of this dim."""
        found = self._class[index]
        if found.dim is None:
            found.dim, found.why = dim, span
        elif found.dim != dim:
            labels = () if found.why is None or found.why == span else (Label(found.why, f"over '{found.dim}' here"),)
            fail(
                "PSM206",
                f"index '{self.text(index)}' runs over '{found.dim}' and over '{dim}'",
                span,
                label=f"over '{dim}' here",
                labels=labels,
                helps=("use a second index for the second dim",),
            )

    def same(self, one: ir.Index, two: ir.Index, span: Span) -> None:
        """Both indices run over one dim (`eye(i, j)`)."""
        first, second = self._class[one], self._class[two]
        if first is second:
            return
        if first.dim is not None:
            self.over(two, first.dim, span)
        elif second.dim is not None:
            self.over(one, second.dim, span)
        for index, found in self._class.items():
            if found is second:
                self._class[index] = first

    def counts_levels(self, index: ir.Index, span: Span) -> None:
        """The index is a level of a counter: all such run over one dim."""
        if self._level is not None:
            self.same(self._level, index, span)
        self._level = index

    def dim(self, index: ir.Index) -> str:
        """The dim found, or an error that says the index has none."""
        found = self._class[index].dim
        if found is None:
            name = self._bound[index]
            fail(
                "PSM207",
                f"nothing says which dim index '{name.text}' runs over",
                name.span,
                label="never subscripts a tensor of known dims",
                helps=(f"use '{name.text}' as a subscript of an input, a param or a component",),
            )
        return found

    def finished(self, index: ir.Index) -> ir.Index:
        """The index with its dim; unchanged if it has one already."""
        return index if index.dim != "?" else ir.Index(index.name, self.dim(index))

    def finish(self, root: ir.Expr) -> ir.Expr:
        """The same expression over indices with dims."""

        def sub(s: ir.Sub) -> ir.Sub:
            return self.finished(s) if isinstance(s, ir.Index) else s

        def rule(node: ir.Expr) -> ir.Expr | None:
            match node:
                case ir.IndexValue(index=index):
                    return ir.IndexValue(self.finished(index))
                case ir.Reduce(op=op, index=index, body=body):
                    return ir.Reduce(op, self.finished(index), body)
                case ir.Eye(row=row, col=col):
                    return ir.Eye(sub(row), sub(col))
                case ir.Ref(subs=subs):
                    return ir.Ref(node.space, node.name, tuple(sub(s) for s in subs), node.value_kind, node.lag)
            return None

        return transform(root, rule)
