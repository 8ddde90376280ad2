"""Surface expressions to IR expressions over provisional indices: names, subscripts, kinds, reductions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NoReturn, Protocol

from psmc import ir
from psmc.diagnostics import Label, fail
from psmc.frontend import surface as sf
from psmc.frontend.budget import Budget
from psmc.frontend.indices import Indices
from psmc.frontend.misuse import check_arguments, kind_advice, kind_text, kinds_refused, wrong_rank
from psmc.frontend.scope import Fn, Handle, Library, Meaning, Namespace, callable_ops, suggest
from psmc.ir.canonical import fold
from psmc.ir.ops import OPS
from psmc.source import Span

_ARGUMENTS = {"clamp": ("x", "lo", "hi"), "where": ("condition", "a", "b"), "complex": ("re", "im")}

Env = Mapping[str, ir.Sub]  # index variables in scope; a loop variable is an int


class Scope(Protocol):
    """What the names of one block, fn body or constant mean."""

    @property
    def library(self) -> Library:
        """The consts and fns that are visible."""
        ...

    def read(self, node: sf.Access) -> Meaning:
        """The tensor or the number that a name stands for; fails if there is none or it cannot be read here."""
        ...

    def knows(self, name: str) -> bool:
        """Is this plain name declared, readable here or not?"""
        ...

    def namespace(self) -> Namespace:
        """Names that index variables must not take."""
        ...

    def size(self, dim: str) -> int | None:
        """The size of a dim that the spec fixes."""
        ...


@dataclass(frozen=True)
class Elaborator:
    """Expressions of one statement. `stack` holds the fns being expanded."""

    scope: Scope
    indices: Indices
    budget: Budget
    stack: tuple[Fn, ...] = ()

    def expr(self, node: sf.ExprNode, env: Env, depth: int = 0) -> ir.Expr:
        """The IR of one expression. Raises PsmcError 2xx."""
        self.budget.spend(depth, node.span)
        match node:
            case sf.Number(value=value):
                return ir.Const(value)
            case sf.Inf():
                return ir.Infinity()
            case sf.Access():
                return self._access(node, env, depth)
            case sf.Unary(op=op, arg=arg):
                return self._op(op, (self.expr(arg, env, depth + 1),), node.span)
            case sf.Binary(op=op, left=left, right=right):
                return self._op(op, (self.expr(left, env, depth + 1), self.expr(right, env, depth + 1)), node.span)
            case sf.Reduction():
                return self._reduction(node, env, depth)
            case sf.Call():
                return self._call(node, env, depth)

    # --- names and subscripts ---------------------------------------------------------------------

    def _access(self, node: sf.Access, env: Env, depth: int) -> ir.Expr:
        if node.level is not None:
            return self._level(node, node.level, env, depth)
        if node.owner is None and node.name.text in env:
            if node.subs is not None or node.lag:
                fail("PSM203", f"index '{node.name.text}' is a number and takes no subscripts", node.span)
            return number(env[node.name.text])
        meaning = self.scope.read(node)
        if isinstance(meaning, ir.Expr):
            if node.subs is not None:
                fail("PSM203", f"'{node.name.text}' is a number and takes no subscripts", node.span)
            return meaning
        written = node.subs or ()
        if len(written) != len(meaning.dims):
            wrong_rank(node, meaning, len(written), bool(node.subs))
        subs: list[ir.Sub] = []
        for sub, dim in zip(written, meaning.dims, strict=True):
            subs.append(self.sub(sub, dim, env, depth + 1))
        return meaning.at(tuple(subs))

    def _level(self, node: sf.Access, level: sf.ExprNode, env: Env, depth: int) -> ir.Expr:
        """at(c).S[i, j]: a component of the root that the counter holds at a level."""
        known = getattr(self.scope, "level", None)
        if known is None:
            fail("PSM230", "only an output reads the counter level by level", node.span)
        handle: Handle = known(node)
        index = self.sub(level, None, env, depth + 1)
        if not isinstance(index, ir.Index):
            fail(
                "PSM230",
                "a level is an index variable, over a dim of fixed size",
                level.span,
                helps=("write sum[c] … at(c).S[i, j]; for one level alone, where(c == 0, …, 0)",),
            )
        self.indices.counts_levels(index, level.span)
        written = node.subs or ()
        if len(written) != len(handle.dims):
            wrong_rank(node, handle, len(written), bool(node.subs))
        pairs = zip(written, handle.dims, strict=True)
        return handle.at((index, *(self.sub(sub, dim, env, depth + 1) for sub, dim in pairs)))

    def sub(self, node: sf.ExprNode, dim: str | None, env: Env, depth: int) -> ir.Sub:
        """One subscript: an index variable, a literal position or a gather. `dim` None: not known from here."""
        if isinstance(node, sf.Access) and node.owner is None and not node.lag and node.subs is None:
            name = node.name.text
            if name not in env and (not self.scope.knows(name) or self.scope.namespace().role(name) == "dim"):
                self._unknown_index(node.name, env)
        value = self.expr(node, env, depth)
        if isinstance(value, ir.IndexValue):
            if dim is not None:
                self.indices.over(value.index, dim, node.span)
            return value.index
        if value.kind != "int":
            fail(
                "PSM208",
                f"a subscript is an index or an int, and this is {kind_text(value)}",
                node.span,
                helps=("declare what is gathered with ': int', as in 'input p[N] : int'",),
            )
        if isinstance(value, ir.Const):
            self._check_position(value.value, dim, node.span)
            return int(value.value)
        return value

    def _unknown_index(self, name: sf.Name, env: Env) -> NoReturn:
        if self.scope.namespace().role(name.text) == "dim":
            hint: tuple[str, ...] = (f"'{name.text}' is a dim; subscripts are index variables, as in S[i, j]",)
        else:
            hint = suggest(name.text, env) or (
                f"put '{name.text}' on the left-hand side, or sum over it: sum[{name.text}] …",
            )
        fail("PSM204", f"unknown index '{name.text}'", name.span, label="bound nowhere", helps=hint)

    def _check_position(self, value: Fraction, dim: str | None, span: Span) -> None:
        if dim is None:
            return
        size = self.scope.size(dim)
        if size is None:
            fail(
                "PSM227",
                f"a literal subscript needs a dim of known size, and '{dim}' has none",
                span,
                helps=(f"fix the size: dim {dim} = {int(value) + 1 if value >= 0 else 2}",),
            )
        if not 0 <= value < size:
            fail(
                "PSM227",
                f"position {value} is outside '{dim}', which has {size}",
                span,
                helps=(f"positions are 0 to {size - 1}",),
            )

    # --- operators --------------------------------------------------------------------------------

    def _op(self, op: str, args: tuple[ir.Expr, ...], span: Span) -> ir.Expr:
        try:
            return fold(op, args)
        except TypeError:
            kinds_refused(op, args, span)

    def _reduction(self, node: sf.Reduction, env: Env, depth: int) -> ir.Expr:
        inner = dict(env)
        bound: list[ir.Index] = []
        for name in node.indices:
            index = self.bind(name, inner)
            inner[name.text] = index
            bound.append(index)
        body = self.expr(node.body, inner, depth + len(bound))
        for index in reversed(bound):
            try:
                body = ir.Reduce(node.op, index, body)
            except TypeError:
                helps = kind_advice(node.op, [body.kind])
                fail("PSM208", f"'{node.op}' does not reduce {kind_text(body)}", node.body.span, helps=helps)
        return body

    def bind(self, name: sf.Name, env: Env) -> ir.Index:
        """A new index variable, which must not be in scope already nor name anything else."""
        if name.text in env:
            found = env[name.text]
            labels: tuple[Label, ...] = ()
            if isinstance(found, ir.Index):
                labels = (Label(self.indices.span(found), "first bound here"),)
            fail(
                "PSM205",
                f"index '{name.text}' is bound twice",
                name.span,
                label="bound again here",
                labels=labels,
                helps=("use another letter; a reduction reaches over the whole product to its right",),
            )
        self.scope.namespace().check_free(name, "index")
        return self.indices.bind(name)

    def _call(self, node: sf.Call, env: Env, depth: int) -> ir.Expr:
        from psmc.frontend.expand import expand

        name = node.fn.text
        if name == "eye":
            return self._eye(node, env, depth)
        info = OPS.get(name)
        if info is None or info.symbol is not None:
            fn = self.scope.library.fns.get(name)
            if fn is None:
                known = [*callable_ops(), "eye", *self.scope.library.fns]
                hint = suggest(name, known)
                if name == "prev":
                    hint = ("the state before this token is prev.s",)
                elif self.scope.knows(name):
                    hint = (f"'{name}' is a tensor; subscripts take square brackets: {name}[…]",)
                fail("PSM201", f"unknown function '{name}'", node.fn.span, helps=hint)
            return expand(self, fn, node, env, depth)
        check_arguments(node, _ARGUMENTS.get(name, ("x", "y")[: info.arity]))
        if node.subs is not None:
            fail("PSM203", f"'{name}' gives a number, which takes no subscripts", node.span)
        args: list[ir.Expr] = []
        for arg in node.args:
            args.append(self.expr(arg, env, depth + 1))
        return self._op(name, tuple(args), node.span)

    def _eye(self, node: sf.Call, env: Env, depth: int) -> ir.Expr:
        check_arguments(node, ("i", "j"))
        row, col = (self.sub(arg, None, env, depth + 1) for arg in node.args)
        if isinstance(row, int) and isinstance(col, int):
            return ir.Const(Fraction(int(row == col)))
        if isinstance(row, ir.Index) and isinstance(col, ir.Index):
            self.indices.same(row, col, node.span)
        return ir.Eye(row, col)


def number(sub: ir.Sub) -> ir.Expr:
    """A subscript as a number."""
    if isinstance(sub, ir.Index):
        return ir.IndexValue(sub)
    return ir.Const(Fraction(sub)) if isinstance(sub, int) else sub
