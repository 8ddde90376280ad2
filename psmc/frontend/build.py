"""lark's tree to the surface AST: files, aggregators, declarations, sections and statements."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from typing import Any, Literal, TypeVar

from lark import Token, Tree

from psmc.diagnostics import Label, PsmcError
from psmc.frontend import surface as s
from psmc.frontend.build_expr import ExpressionBuilder
from psmc.frontend.constants import INF, fold
from psmc.source import Span

MAX_DIM = 1 << 20
_KINDS = ("real", "complex", "int")
_CLAIMS = ("yes", "assume", "no")
_ORDERS = ("tree", "left")
_ALIASES = {
    "float": "real", "double": "real", "integer": "int", "long": "int", "cfloat": "complex",
    "true": "yes", "false": "no", "maybe": "assume", "sequential": "left", "right": "left", "blelloch": "tree",
}  # fmt: skip
Role = Literal["input", "param", "state"]
T = TypeVar("T")


@dataclass(frozen=True)
class Partial:
    """A declaration before its section says which role it has."""

    name: s.Name
    dims: tuple[s.Name, ...]
    kind: Literal["real", "complex", "int"]
    interval: s.Interval | None
    identity: s.ExprNode | None
    span: Span


class Builder(ExpressionBuilder):
    """One method per grammar rule: (span, *children) -> surface node. Reports several mistakes at once."""

    def build(self, tree: Tree[Token]) -> Any:
        """The surface node of `tree`. Raises PsmcError with every problem found, in source order."""
        result = self._convert(tree)
        self._report()
        return result

    def declarations(self, tree: Tree[Token], role: Role) -> tuple[s.Declared, ...]:
        """The nodes of a `declarations` tree."""
        result = self._in_role(role, self._convert(tree))
        self._report()
        return result

    def _word(self, token: Token, choices: tuple[str, ...], what: str) -> Any:
        word = str(token)
        if word in choices:
            return word
        near = _ALIASES.get(word.lower()) or next(iter(get_close_matches(word.lower(), choices, 1)), None)
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        helps = (f"did you mean '{near}'?",) if near in choices else ()
        self._refuse("PSM108", f"{what} is {listed}, not '{word}'", self._span(token), *helps)
        return choices[0]

    # --- file -------------------------------------------------------------------------------------

    def _file(self, span: Span, *items: Any) -> s.File:

        def of(kind: type[T]) -> tuple[T, ...]:
            return tuple(i for i in items if isinstance(i, kind))

        return s.File(self._source, of(s.Use), of(s.Const), of(s.Fn), of(s.Aggregator))

    def _declarations(self, span: Span, *items: Partial) -> tuple[Partial, ...]:
        return items

    def _use(self, span: Span, path: Token) -> s.Use:
        return s.Use(str(path)[1:-1], span)

    def _const(self, span: Span, name: Token, value: s.ExprNode) -> s.Const:
        return s.Const(self._name(name), value, span)

    def _parameter(self, span: Span, name: Token, dims: tuple[s.Name, ...] | None) -> tuple[s.Name, tuple[s.Name, ...]]:
        return self._name(name), dims or ()

    def _fn(self, span: Span, name: Token, *rest: Any) -> s.Fn:
        *params, indices, value = rest
        return s.Fn(self._name(name), tuple(p for p in params if p), indices or (), value, span)

    def _aggregator(self, span: Span, name: Token, doc: Token | None, *groups: Any) -> s.Aggregator:
        items = tuple(item for group in groups for item in (group if isinstance(group, tuple) else (group,)))
        self._check_sections(items)
        return s.Aggregator(
            self._name(name), "" if doc is None else inspect.cleandoc(str(doc)[3:-3].replace("\r\n", "\n")), items, span
        )

    def _check_sections(self, items: tuple[s.Item, ...]) -> None:
        seen: dict[str, Span] = {}
        for item in items:
            match item:
                case s.Combine() | s.CombineExtern():
                    section = "combine"
                case s.Lift() | s.Recurrence() | s.Order():
                    section = type(item).__name__.lower()
                case s.Claim():
                    section = "associative"
                case _:
                    continue
            if section in seen:
                first = (Label(seen[section], "the first one"),)
                message = f"'{section}' is given twice"
                self._refuse("PSM103", message, _head(item.span), "keep one of the two", labels=first)
            seen.setdefault(section, _head(item.span))

    # --- declarations -----------------------------------------------------------------------------

    def _dims(self, span: Span, *dims: s.Dim) -> tuple[s.Dim, ...]:
        return dims

    def _dim(self, span: Span, name: Token, size: Token | None) -> s.Dim:
        if size is None:
            return s.Dim(self._name(name))
        value = self._number_value(size)
        if value.denominator != 1 or not 1 <= value <= MAX_DIM:
            message = f"the size of a dim is a whole number from 1 to {MAX_DIM:,}, not {size}"
            self._refuse("PSM109", message, self._span(size), "leave the size out to take it from the inputs")
        return s.Dim(self._name(name), int(value))

    def _declared(self, span: Span, name: Token, dims: Any, kind: Token | None, interval: Any, value: Any) -> Partial:
        word: Any = "real" if kind is None else self._word(kind, _KINDS, "a type")
        return Partial(self._name(name), dims or (), word, interval, value, span)

    def _inputs(self, span: Span, *declared: Partial) -> tuple[s.Declared, ...]:
        return self._in_role("input", declared)

    def _params(self, span: Span, *declared: Partial) -> tuple[s.Declared, ...]:
        return self._in_role("param", declared)

    def _states(self, span: Span, *declared: Partial) -> tuple[s.Declared, ...]:
        return self._in_role("state", declared)

    def _in_role(self, role: Role, declared: tuple[Partial, ...]) -> tuple[s.Declared, ...]:
        for d in declared:
            if role != "state" and d.identity is not None:
                article = "an input" if role == "input" else "a param"
                message = f"{article} has no value of its own: '= …' gives the identity of a state"
                help_ = f"delete it, or declare '{d.name.text}' as a state, a const or a let"
                self._refuse("PSM110", message, d.identity.span, help_)
        return tuple(s.Declared(role, d.name, d.dims, d.kind, d.interval, d.identity, d.span) for d in declared)

    def _interval_open(self, span: Span, bracket: Token) -> bool:
        return str(bracket) == "("

    def _interval_close(self, span: Span, bracket: Token) -> bool:
        return str(bracket) == ")"

    def _interval(self, span: Span, lo_open: bool, lo: s.ExprNode, hi: s.ExprNode, hi_open: bool) -> s.Interval:
        try:
            low, high = fold(lo), fold(hi)
        except PsmcError as error:
            self._problems += error.diagnostics
            return s.Interval(None, None, True, True, span)
        if low > high or (low == high and (lo_open or hi_open)) or low == INF or high == -INF:
            self._refuse("PSM106", f"the interval {span.text} is empty", span, "write the smaller bound first")
        elif (low == -INF and not lo_open) or (high == INF and not hi_open):
            message = "an infinite bound is never reached: it takes a round bracket"
            self._refuse("PSM106", message, (lo if low == -INF and not lo_open else hi).span, "write ( or )")
        lower = low if isinstance(low, Fraction) else None
        upper = high if isinstance(high, Fraction) else None
        return s.Interval(lower, upper, lo_open, hi_open, span)

    # --- sections and statements ------------------------------------------------------------------

    def _lift(self, span: Span, body: tuple[s.Statement, ...]) -> s.Lift:
        return s.Lift(body, span)

    def _combine(self, span: Span, left: Token, right: Token, body: tuple[s.Statement, ...]) -> s.Combine:
        return s.Combine(self._name(left), self._name(right), body, span)

    def _combine_extern(self, span: Span) -> s.CombineExtern:
        return s.CombineExtern(span)

    def _recurrence(self, span: Span, body: tuple[s.Statement, ...]) -> s.Recurrence:
        return s.Recurrence(body, span)

    def _output(self, span: Span, *body: s.Assign) -> s.Output:
        return s.Output(body, span)

    def _claim(self, span: Span, word: Token) -> s.Claim:
        return s.Claim(self._word(word, _CLAIMS, "'associative'"), span)

    def _order(self, span: Span, word: Token) -> s.Order:
        return s.Order(self._word(word, _ORDERS, "'order'"), span)

    def _block(self, span: Span, *body: s.Statement) -> tuple[s.Statement, ...]:
        return body

    def _assign(self, span: Span, name: Token, indices: tuple[s.Name, ...] | None, value: s.ExprNode) -> s.Assign:
        return s.Assign(self._name(name), indices or (), value, span)

    def _let(self, span: Span, name: Token, indices: tuple[s.Name, ...] | None, value: s.ExprNode) -> s.Assign:
        return s.Assign(self._name(name), indices or (), value, span, let=True)

    def _for(self, span: Span, var: Token, dim: Token, body: tuple[s.Statement, ...]) -> s.For:
        return s.For(self._name(var), self._name(dim), body, span)

    def _names(self, span: Span, *names: Token) -> tuple[s.Name, ...]:
        return tuple(self._name(n) for n in names)


def _head(span: Span) -> Span:
    """The first word of a section."""
    word = re.compile(r"\w+").match(span.source.text, span.start)
    return Span(span.source, span.start, word.end() if word else span.end)
