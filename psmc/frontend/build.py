"""lark's tree to the surface AST, bottom up without recursion. Collects what it refuses, so one run reports several mistakes."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from typing import Any, Literal, TypeVar

from lark import Token, Tree

from psmc.diagnostics import Diagnostic, Label, PsmcError, fail
from psmc.frontend import constants
from psmc.frontend import surface as s
from psmc.frontend.names import name_problem
from psmc.frontend.tokens import MAX_NESTING
from psmc.source import SourceFile, Span

MAX_TAP = 64
MAX_DIM = 1 << 20
_MAX_REPORTED = 10
_BINARY = {
    "or": "or", "and": "and", "<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne",
    "+": "add", "-": "sub", "*": "mul", "/": "div", "^": "pow",
}  # fmt: skip
_UNARY: dict[str, Literal["neg", "not"]] = {"-": "neg", "not": "not"}
_KINDS = ("real", "complex", "int")
_CLAIMS = ("yes", "assume", "no")
_ORDERS = ("tree", "left")
_ALIASES = {
    "float": "real", "double": "real", "integer": "int", "long": "int", "cfloat": "complex",
    "true": "yes", "false": "no", "maybe": "assume", "sequential": "left", "right": "left", "blelloch": "tree",
}  # fmt: skip
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


class Builder:
    """One method per grammar rule: (span, *children) -> surface node."""

    def __init__(self, source: SourceFile) -> None:
        self._source = source
        self._problems: list[Diagnostic] = []
        self._depth: dict[int, tuple[int, Any]] = {}  # by id; holding the node keeps the id from being reused

    def build(self, tree: Tree[Token]) -> Any:
        """The surface node of `tree`. Raises PsmcError with every problem found, in source order."""
        result = self._convert(tree)
        self._report()
        return result

    def declarations(self, tree: Tree[Token], role: Literal["input", "param", "state"]) -> tuple[s.Declared, ...]:
        """The nodes of a `declarations` tree."""
        result = self._in_role(role, self._convert(tree))
        self._report()
        return result

    def _convert(self, tree: Tree[Token]) -> Any:
        done: dict[int, Any] = {}
        for node in tree.iter_subtrees():
            children = [done.pop(id(c)) if isinstance(c, Tree) else c for c in node.children]
            span = Span(self._source, *((0, 0) if node.meta.empty else (node.meta.start_pos, node.meta.end_pos)))
            done[id(node)] = getattr(self, f"_{node.data}")(span, *children)
        return done[id(tree)]

    def _report(self) -> None:
        if self._problems:
            found = sorted(self._problems, key=lambda d: d.span.start if d.span else 0)
            raise PsmcError(*found[:_MAX_REPORTED])

    def _refuse(self, code: str, message: str, span: Span, *helps: str, labels: tuple[Label, ...] = ()) -> None:
        self._problems.append(Diagnostic(code, message, span, labels=labels, helps=helps))

    def _span(self, token: Token) -> Span:
        assert token.start_pos is not None and token.end_pos is not None
        return Span(self._source, token.start_pos, token.end_pos)

    def _name(self, token: Token) -> s.Name:
        name = s.Name(str(token), self._span(token))
        problem = name_problem(name.text, name.span)
        if problem:
            self._problems.append(problem)
        return name

    def _word(self, token: Token, choices: tuple[str, ...], what: str) -> Any:
        word = str(token)
        if word in choices:
            return word
        near = _ALIASES.get(word.lower()) or next(iter(get_close_matches(word.lower(), choices, 1)), None)
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        helps = (f"did you mean '{near}'?",) if near in choices else ()
        self._refuse("PSM108", f"{what} is {listed}, not '{word}'", self._span(token), *helps)
        return choices[0]

    def _number_value(self, token: Token) -> Fraction:
        return constants.literal(str(token), self._span(token))

    # --- file -------------------------------------------------------------------------------------

    def _file(self, span: Span, *items: Any) -> s.File:
        del span

        def of(kind: type[T]) -> tuple[T, ...]:
            return tuple(i for i in items if isinstance(i, kind))

        return s.File(self._source, of(s.Use), of(s.Const), of(s.Fn), of(s.Aggregator))

    def _declarations(self, span: Span, *items: Partial) -> tuple[Partial, ...]:
        del span
        return items

    def _use(self, span: Span, path: Token) -> s.Use:
        return s.Use(str(path)[1:-1], span)

    def _const(self, span: Span, name: Token, value: s.ExprNode) -> s.Const:
        return s.Const(self._name(name), value, span)

    def _parameter(self, span: Span, name: Token, dims: tuple[s.Name, ...] | None) -> tuple[s.Name, tuple[s.Name, ...]]:
        del span
        return self._name(name), dims or ()

    def _fn(self, span: Span, name: Token, *rest: Any) -> s.Fn:
        *params, indices, value = rest
        return s.Fn(self._name(name), tuple(p for p in params if p), indices or (), value, span)

    def _aggregator(self, span: Span, name: Token, doc: Token | None, *groups: Any) -> s.Aggregator:
        items = tuple(item for group in groups for item in (group if isinstance(group, tuple) else (group,)))
        self._check_sections(items)
        return s.Aggregator(self._name(name), "" if doc is None else inspect.cleandoc(str(doc)[3:-3]), items, span)

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
                self._refuse("PSM103", f"'{section}' is given twice", _head(item.span), "keep one of the two", labels=first)
            seen.setdefault(section, _head(item.span))

    # --- declarations -----------------------------------------------------------------------------

    def _dims(self, span: Span, *dims: s.Dim) -> tuple[s.Dim, ...]:
        del span
        return dims

    def _dim(self, span: Span, name: Token, size: Token | None) -> s.Dim:
        del span
        if size is None:
            return s.Dim(self._name(name))
        value = self._number_value(size)
        if value.denominator != 1 or not 1 <= value <= MAX_DIM:
            self._refuse("PSM109", f"the size of a dim is a whole number from 1 to {MAX_DIM:,}, not {size}", self._span(size))
        return s.Dim(self._name(name), int(value))

    def _declared(self, span: Span, name: Token, dims: Any, kind: Token | None, interval: Any, value: Any) -> Partial:
        word = "real" if kind is None else self._word(kind, _KINDS, "a type")
        return Partial(self._name(name), dims or (), word, interval, value, span)

    def _inputs(self, span: Span, *declared: Partial) -> tuple[s.Declared, ...]:
        del span
        return self._in_role("input", declared)

    def _params(self, span: Span, *declared: Partial) -> tuple[s.Declared, ...]:
        del span
        return self._in_role("param", declared)

    def _states(self, span: Span, *declared: Partial) -> tuple[s.Declared, ...]:
        del span
        return self._in_role("state", declared)

    def _in_role(self, role: Literal["input", "param", "state"], declared: tuple[Partial, ...]) -> tuple[s.Declared, ...]:
        for d in declared:
            if role != "state" and d.identity is not None:
                article = "an input" if role == "input" else "a param"
                self._refuse("PSM110", f"{article} has no value of its own: '= …' gives the identity of a state", d.identity.span,
                             f"delete it, or declare '{d.name.text}' as a state, a const or a let")  # fmt: skip
        return tuple(s.Declared(role, d.name, d.dims, d.kind, d.interval, d.identity, d.span) for d in declared)

    def _interval_open(self, span: Span, bracket: Token) -> bool:
        del span
        return bracket == "("

    def _interval_close(self, span: Span, bracket: Token) -> bool:
        del span
        return bracket == ")"

    def _interval(self, span: Span, lo_open: bool, lo: s.ExprNode, hi: s.ExprNode, hi_open: bool) -> s.Interval:
        try:
            low, high = constants.fold(lo), constants.fold(hi)
        except PsmcError as error:
            self._problems += error.diagnostics
            return s.Interval(None, None, True, True, span)
        infinite = (low == constants.INF, low == -constants.INF, high == constants.INF, high == -constants.INF)
        if low == constants.INF or high == -constants.INF or low > high or (low == high and (lo_open or hi_open)):
            self._refuse("PSM106", f"the interval {span.text} is empty", span, "write the smaller bound first")
        for bound, is_infinite, is_open in ((lo, infinite[1], lo_open), (hi, infinite[2], hi_open)):
            if is_infinite and not is_open:
                self._refuse("PSM106", "an infinite bound is never reached: it takes a round bracket", bound.span, "write ( or )")
        return s.Interval(
            low if isinstance(low, Fraction) else None, high if isinstance(high, Fraction) else None, lo_open, hi_open, span
        )

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
        del span
        return body

    def _assign(self, span: Span, name: Token, indices: tuple[s.Name, ...] | None, value: s.ExprNode) -> s.Assign:
        return s.Assign(self._name(name), indices or (), value, span)

    def _let(self, span: Span, name: Token, indices: tuple[s.Name, ...] | None, value: s.ExprNode) -> s.Assign:
        return s.Assign(self._name(name), indices or (), value, span, let=True)

    def _for(self, span: Span, var: Token, dim: Token, body: tuple[s.Statement, ...]) -> s.For:
        return s.For(self._name(var), self._name(dim), body, span)

    def _names(self, span: Span, *names: Token) -> tuple[s.Name, ...]:
        del span
        return tuple(self._name(n) for n in names)

    # --- expressions ------------------------------------------------------------------------------

    def _deeper(self, node: T, *children: Any) -> T:
        """Note the depth of an expression; refuse it beyond the bound that every later pass may recurse to."""
        depth = 1 + max((self._depth.get(id(c), (0,))[0] for c in children), default=0)
        if depth > MAX_NESTING:
            span: Span = node.span  # type: ignore[attr-defined]
            fail("PSM502", f"this expression is nested deeper than {MAX_NESTING}", span,
                 notes=("a chain a + b + c + … nests once per operator",),
                 helps=("name parts of it with 'let', or use a reduction such as sum[i]",))  # fmt: skip
        self._depth[id(node)] = depth, node
        return node

    def _number(self, span: Span, token: Token) -> s.Number:
        return s.Number(self._number_value(token), span)

    def _inf(self, span: Span, token: Token) -> s.Inf:
        del token
        return s.Inf(span)

    def _binary(self, span: Span, left: s.ExprNode, op: Token, right: s.ExprNode) -> s.ExprNode:
        return self._deeper(s.Binary(_BINARY[str(op)], left, right, span), left, right)

    def _unary(self, span: Span, op: Token, arg: s.ExprNode) -> s.ExprNode:
        return self._deeper(s.Unary(_UNARY[str(op)], arg, span), arg)

    def _reduction(self, span: Span, op: Token, indices: tuple[s.Name, ...], body: s.ExprNode) -> s.ExprNode:
        word: Any = str(op)
        return self._deeper(s.Reduction(word, indices, body, span), body)

    def _tap(self, span: Span, minus: Token | None, number: Token) -> int:
        lag = self._number_value(number)
        if minus is None or lag.denominator != 1 or not 1 <= lag <= MAX_TAP:
            self._refuse("PSM107", f"a tap looks back by a whole number of tokens, from 1 to {MAX_TAP}", span, "write {-1} for the token before")
            return 1
        return int(lag)

    def _subscripts(self, span: Span, *subs: s.ExprNode) -> tuple[s.ExprNode, ...]:
        del span
        return subs

    def _arguments(self, span: Span, *args: s.ExprNode | None) -> tuple[s.ExprNode, ...]:
        del span
        return tuple(a for a in args if a is not None)

    def _access(self, span: Span, first: Token, second: Token | None, lag: int | None, subs: tuple[s.ExprNode, ...] | None) -> s.ExprNode:
        owner, name = (None, self._name(first)) if second is None else (self._name(first), self._name(second))
        return self._deeper(s.Access(owner, name, subs, lag or 0, span), *(subs or ()))

    def _call(self, span: Span, fn: Token, args: tuple[s.ExprNode, ...], subs: tuple[s.ExprNode, ...] | None) -> s.ExprNode:
        if fn in ("sum", "prod"):
            self._refuse("PSM111", f"'{fn}' needs the index it runs over, in square brackets", self._span(fn), f"write {fn}[i] x[i]")
        name = s.Name(str(fn), self._span(fn)) if fn.type == "REDUCE" else self._name(fn)
        return self._deeper(s.Call(name, args, span, subs), *args, *(subs or ()))


def _head(span: Span) -> Span:
    """The first word of a section."""
    word = re.compile(r"\w+").match(span.source.text, span.start)
    return Span(span.source, span.start, word.end() if word else span.end)

