"""lark's tree to surface expressions, bottom up without recursion."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal, TypeVar

from lark import Token, Tree

from psmc.diagnostics import Diagnostic, Label, PsmcError
from psmc.frontend import constants
from psmc.frontend import surface as s
from psmc.frontend.names import name_problem
from psmc.frontend.tokens import MAX_NESTING, refuse_depth
from psmc.source import SourceFile, Span

MAX_TAP = 64
_MAX_REPORTED = 10
_ONCE_A_NAME = ("PSM104", "PSM503")
_BINARY = {
    "or": "or", "and": "and", "<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne",
    "+": "add", "-": "sub", "*": "mul", "/": "div", "^": "pow",
}  # fmt: skip
_UNARY: dict[str, Literal["neg", "not"]] = {"-": "neg", "not": "not"}
Subs = tuple[s.ExprNode, ...]
Node = TypeVar("Node", s.Binary, s.Unary, s.Reduction, s.Access, s.Call)


class ExpressionBuilder:
    """One method per grammar rule: (span, *children) -> surface node. Collects what it refuses."""

    def __init__(self, source: SourceFile) -> None:
        self._source = source
        self._problems: list[Diagnostic] = []
        self._depth: dict[int, tuple[int, Any]] = {}  # by id; holding the node keeps the id from being reused

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
            first = {d.message: d for d in reversed(found)}  # a bad name is reported where it stands first
            raise PsmcError(*[d for d in found if d.code not in _ONCE_A_NAME or first[d.message] is d][:_MAX_REPORTED])

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

    def _number_value(self, token: Token) -> Fraction:
        return constants.literal(str(token), self._span(token))

    def _deeper(self, node: Node, *children: s.ExprNode) -> Node:
        """Note the depth of an expression; refuse it beyond the bound that every later pass may recurse to."""
        depth = 1 + max((self._depth.get(id(c), (0,))[0] for c in children), default=0)
        if depth > MAX_NESTING:
            refuse_depth(node.span)
        self._depth[id(node)] = depth, node
        return node

    def _number(self, span: Span, token: Token) -> s.Number:
        return s.Number(self._number_value(token), span)

    def _inf(self, span: Span, token: Token) -> s.Inf:
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
            message = f"a tap looks back by a whole number of tokens, from 1 to {MAX_TAP}"
            self._refuse("PSM107", message, span, "write {-1} for the token before")
            return 1
        return int(lag)

    def _subscripts(self, span: Span, *subs: s.ExprNode) -> Subs:
        return subs

    def _arguments(self, span: Span, *args: s.ExprNode | None) -> Subs:
        return tuple(a for a in args if a is not None)

    def _access(self, span: Span, first: Token, second: Token | None, lag: int | None, subs: Subs | None) -> s.ExprNode:
        owner, name = (None, first) if second is None else (self._name(first), second)
        return self._deeper(s.Access(owner, self._name(name), subs, lag or 0, span), *(subs or ()))

    def _level(
        self, span: Span, owner: Token | None, at: Token, args: Subs, name: Token, subs: Subs | None
    ) -> s.ExprNode:
        if str(at) != "at" or (owner is not None and str(owner) != "prev") or len(args) != 1:
            message = f"'{span.text}' is no value: only at(c) and prev.at(c) stand before a component like this"
            self._refuse("PSM230", message, span, "write at(c).S[i, j], c an index over the levels")
        before = None if owner is None else self._name(owner)
        level = args[0] if args else s.Number(Fraction(0), span)
        return self._deeper(s.Access(before, self._name(name), subs, 0, span, level), level, *(subs or ()))

    def _call(self, span: Span, fn: Token, args: Subs, subs: Subs | None) -> s.ExprNode:
        if fn in ("sum", "prod"):
            message = f"'{fn}' needs the index it runs over, in square brackets"
            self._refuse("PSM111", message, self._span(fn), f"write {fn}[i] x[i]")
        name = s.Name(str(fn), self._span(fn)) if fn.type == "REDUCE" else self._name(fn)
        return self._deeper(s.Call(name, args, span, subs), *args, *(subs or ()))
