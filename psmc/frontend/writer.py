"""Array expressions to statements in index notation: the half of tracing that knows subscripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from psmc.diagnostics import Label, fail
from psmc.frontend import arrays as ar
from psmc.frontend import surface as sf
from psmc.ir.canonical import POOL
from psmc.ir.ops import OPS
from psmc.source import Span

Tensors = Mapping[str, ar.Axes]
MAX_LEVELS = 190  # of one written expression: three Python frames each, and the parser's own bound is 200


@dataclass(frozen=True)
class Declared:
    """What a spec declares, as shapes. `sizes` are the dims, None where the size is not fixed."""

    inputs: Tensors
    params: Tensors
    state: Tensors
    sizes: Mapping[str, int | None]
    lets: dict[str, ar.Axes] = field(default_factory=dict)

    def names(self) -> set[str]:
        return {*self.inputs, *self.params, *self.state, *self.sizes, *self.lets}


@dataclass(frozen=True)
class _Result:
    """A value that is returned under a name; `axes` as declared, None: its own."""

    name: str
    node: ar.Node
    axes: ar.Axes | None


class Writer:
    """Lowers array expressions to statements, one method's worth."""

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        self.statements: list[sf.Assign] = []
        self.axes: dict[str, ar.Axes] = {}  # of what was written
        self.version: dict[str, int] = {}
        self._values: dict[tuple[str, int], ar.Node] = {}  # what a component was assigned, by version
        self._results: dict[ar.Node, _Result] = {}  # values that are returned under a name
        self._written: dict[str, ar.Node] = {}
        self._names: Iterator[str] = iter(())
        self._depth = 0

    # --- statements -------------------------------------------------------------------------------

    def update(self, name: str, node: ar.Node, span: Span) -> None:
        """`s.S = value` in a recurrence."""
        self._statement(name, node, self.declared.state[name], span)
        self.version[name] = self.version.get(name, 0) + 1
        self._values[name, self.version[name]] = node

    def results(self, values: Mapping[str, ar.Node], shapes: Tensors) -> None:
        """A returned dict. A value that others of it use is written first and read by its name."""
        plain: dict[str, ar.Node] = {}
        for name, node in values.items():
            own = isinstance(node, ar.Named) and node.name == name  # S=let("S", value): the component is that name
            plain[name] = node.children[0] if own else node
            shared = own or not isinstance(node, ar.Leaf | ar.Scalar | ar.Named)
            if shared and shapes.get(name, node.axes) == node.axes:
                for alias in (node, plain[name]):
                    self._results.setdefault(alias, _Result(name, plain[name], shapes.get(name)))
        for name, node in plain.items():
            self._result(_Result(name, node, shapes.get(name)))

    def outputs(self, values: Mapping[str, ar.Node]) -> None:
        """The outputs: each stands for itself, none can read another."""
        for name, node in values.items():
            self._statement(name, node, None, node.span)

    def _result(self, result: _Result) -> None:
        if self._written.get(result.name) is not result.node:
            self._written[result.name] = result.node
            self._statement(result.name, result.node, result.axes, result.node.span)

    def _statement(self, name: str, node: ar.Node, axes: ar.Axes | None, span: Span, let: bool = False) -> None:
        """Append `name[…] = node`, after what it reads. `axes`: as declared; None: the value's own."""
        if axes is not None:
            _check_fit(name, node, axes)
        self._needed(node, node)
        outer, self._names = self._names, self._index_names()
        shown = tuple(a for a in node.axes if a is not None) if axes is None else axes
        self.axes[name] = shown
        indices = tuple(sf.Name(next(self._names), span) for _ in shown)
        subs: list[sf.ExprNode | None] = [_read(i) for i in indices]
        if axes is None:
            rest = iter(subs)
            subs = [None if a is None else next(rest) for a in node.axes]
        value = self._lower(node, _aligned(node.axes, tuple(subs)), node)
        self._names = outer
        self.statements.append(sf.Assign(sf.Name(name, span), indices, value, span, let))

    def _index_names(self) -> Iterator[str]:
        taken = self.declared.names() | {s.target.text for s in self.statements}
        number = 0
        while True:
            yield from (n for p in POOL if (n := f"{p}{number or ''}") not in taken)
            number += 1

    def _needed(self, node: ar.Node, root: ar.Node) -> None:
        """Write the lets and the results that `node` reads, before the statement that reads them."""
        seen: set[ar.Node] = set()
        stack = [node]
        while stack:
            at = stack.pop()
            if at in seen:
                continue
            seen.add(at)
            if at is not root and at in self._results:
                self._result(self._results[at])
                continue
            if isinstance(at, ar.Named):
                self._let(at)
                continue
            stack.extend(reversed(at.children))
            if isinstance(at, ar.Leaf):
                stack.extend(self._stale(at))

    def _let(self, node: ar.Named) -> None:
        found = self._written.get(node.name)
        if found is None:
            self._written[node.name] = node
            self._statement(node.name, node.children[0], None, node.span, let=True)
        elif found is not node:
            fail(
                "PSM202",
                f"'{node.name}' is declared twice",
                node.span,
                labels=(Label(found.span, "the first one"),),
                helps=("give every value a name of its own.",),
            )

    def _stale(self, leaf: ar.Leaf) -> list[ar.Node]:
        """The value of a version that was overwritten since: written out again where it is used."""
        if leaf.version and leaf.version != self.version.get(leaf.name):
            return [self._values[leaf.name, leaf.version]]
        return []

    # --- expressions ------------------------------------------------------------------------------

    def _lower(self, node: ar.Node, subs: tuple[sf.ExprNode | None, ...], root: ar.Node | None = None) -> sf.ExprNode:
        """`node` at these subscripts (None along axes of size 1)."""
        span = node.span
        self._depth += 1
        if self._depth > MAX_LEVELS:
            fail(
                "PSM502", "this value is nested too deeply", span, helps=("name parts of it: part = let('part', ...).",)
            )
        try:
            return self._lowered(node, subs, root)
        finally:
            self._depth -= 1

    def _lowered(self, node: ar.Node, subs: tuple[sf.ExprNode | None, ...], root: ar.Node | None) -> sf.ExprNode:
        span = node.span
        if node is not root and node in self._results:
            return _access(None, self._results[node].name, node.axes, subs, 0, span)
        match node:
            case ar.Scalar(expr=expr):
                return expr
            case ar.Leaf():
                return self._leaf(node, subs)
            case ar.Named(name=name):
                return _access(None, name, node.axes, subs, 0, span)
            case ar.Eye():
                return sf.Call(sf.Name("eye", span), _present(subs), span)
            case ar.Arange():
                return _present(subs)[0]
            case ar.Pointwise(op=op, children=children):
                args: list[sf.ExprNode] = []
                for child in children:
                    args.append(self._lower(child, _aligned(child.axes, subs)))
                return _operator(op, tuple(args), span)
            case ar.View():
                picked: list[sf.ExprNode | None] = []
                for pick in node.picks:
                    picked.append(self._pick(pick, subs, span))
                return self._lower(node.children[0], tuple(picked))
            case ar.Contract():
                return self._contract(node, subs)
        raise AssertionError(node)

    def _leaf(self, node: ar.Leaf, subs: tuple[sf.ExprNode | None, ...]) -> sf.ExprNode:
        if node.scope is not self:
            fail(
                "PSM256",
                f"'{node.name}' belongs to another method",
                node.span,
                helps=("a method reads its own arguments only; what lift and output share, 'let' returns.",),
            )
        stale = self._stale(node)
        if stale:
            return self._lower(stale[0], _aligned(stale[0].axes, subs))
        if node.level:
            read = _access(node.owner, node.name, node.axes[1:], subs[1:], 0, node.span)
            return replace(read, level=subs[0])
        return _access(node.owner, node.name, node.axes, subs, node.lag, node.span)

    def _pick(self, pick: ar.Pick, subs: tuple[sf.ExprNode | None, ...], span: Span) -> sf.ExprNode | None:
        match pick:
            case ar.Axis(position=position):
                return subs[position]
            case ar.Gather(index=index, positions=positions):
                return self._lower(index, tuple(subs[p] for p in positions))
            case int():
                return sf.Number(Fraction(pick), span)
        return None

    def _contract(self, node: ar.Contract, subs: tuple[sf.ExprNode | None, ...]) -> sf.ExprNode:
        at: dict[int, sf.ExprNode | None] = dict(enumerate(subs))
        named = {
            n
            for c, labels in zip(node.children, node.labels, strict=True)
            for n, a in zip(labels, c.axes, strict=True)
            if a
        }
        bound: list[sf.Name] = []
        for label in sorted(n for n in named if n >= len(node.axes)):
            bound.append(sf.Name(next(self._names), node.span))
            at[label] = _read(bound[-1])
        body: sf.ExprNode | None = None
        for child, labels in zip(node.children, node.labels, strict=True):
            factor = self._lower(
                child, tuple(at.get(n) if a else None for n, a in zip(labels, child.axes, strict=True))
            )
            body = factor if body is None else sf.Binary("mul", body, factor, node.span)
        assert body is not None
        return sf.Reduction(node.op, tuple(bound), body, node.span) if bound else body


def _check_fit(name: str, node: ar.Node, axes: ar.Axes) -> None:
    """Does a value fit what was declared? A scalar fits anything, an axis of size 1 any dim. Raises PSM251."""
    pairs = zip(node.axes, axes, strict=False)
    if node.axes and (len(node.axes) != len(axes) or any(a not in (None, b) for a, b in pairs)):
        fail(
            "PSM251",
            f"'{name}' is declared {ar.shape(axes)}, and its value is {ar.shape(node.axes)}",
            node.span,
            helps=("add an axis with [:, None] or [None, :], or transpose with .T.",),
        )


def _aligned(axes: ar.Axes, subs: tuple[sf.ExprNode | None, ...]) -> tuple[sf.ExprNode | None, ...]:
    """The subscripts of a broadcast operand: aligned from the right."""
    return tuple(s if a else None for a, s in zip(axes, subs[len(subs) - len(axes) :], strict=True))


def _present(subs: tuple[sf.ExprNode | None, ...]) -> tuple[sf.ExprNode, ...]:
    return tuple(s for s in subs if s is not None)


def _read(name: sf.Name) -> sf.ExprNode:
    return sf.Access(None, name, None, 0, name.span)


def _access(
    owner: str | None, name: str, axes: ar.Axes, subs: tuple[sf.ExprNode | None, ...], lag: int, span: Span
) -> sf.Access:
    used = tuple(s for a, s in zip(axes, subs, strict=True) if a is not None and s is not None)
    return sf.Access(None if owner is None else sf.Name(owner, span), sf.Name(name, span), used or None, lag, span)


def _operator(op: str, args: tuple[sf.ExprNode, ...], span: Span) -> sf.ExprNode:
    if OPS[op].symbol is None:
        return sf.Call(sf.Name(op, span), args, span)
    if len(args) == 1:
        return sf.Unary("neg" if op == "neg" else "not", args[0], span)
    return sf.Binary(op, args[0], args[1], span)
