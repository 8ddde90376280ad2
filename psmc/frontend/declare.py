"""Declarations: dims, inputs, params, the state with its identity, aggregator-level lets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from psmc import ir
from psmc.diagnostics import Label, fail
from psmc.frontend import surface as sf
from psmc.frontend.budget import Budget
from psmc.frontend.scope import Errors, Handle, Library, Namespace, check_argument, suggest
from psmc.ir.ops import join
from psmc.source import Span

MAX_RANK = 8


@dataclass
class Declarations:
    """What an aggregator declares. `state` has placeholders for the identities until `identities` ran."""

    library: Library
    names: Namespace
    budget: Budget = field(default_factory=Budget)
    dims: dict[str, ir.Dim] = field(default_factory=dict)
    inputs: dict[str, ir.Tensor] = field(default_factory=dict)
    params: dict[str, ir.Tensor] = field(default_factory=dict)
    state: dict[str, ir.Tensor] = field(default_factory=dict)
    lets: dict[str, sf.Assign] = field(default_factory=dict)
    origin: dict[str, Span] = field(default_factory=dict)

    def handle(self, space: ir.Space, tensor: ir.Tensor) -> Handle:
        return Handle(space, tensor.name, tensor.dims, tensor.kind)


def declare(node: sf.Aggregator, library: Library, errors: Errors) -> Declarations:
    """Everything but identities and blocks."""
    names = Namespace()
    for name, span in library.const_spans.items():
        names.adopt(name, "const", span)
    found = Declarations(library, names)
    for item in node.items:
        if isinstance(item, sf.Dim):
            with errors:
                _dim(found, item)
    for item in node.items:
        with errors:
            match item:
                case sf.Declared():
                    _tensor(found, item)
                case sf.Assign():
                    names.declare(item.target, "let")
                    found.lets[item.target.text] = item
    if not found.state and not errors:
        fail(
            "PSM213",
            f"aggregator '{node.name.text}' has no state",
            node.name.span,
            helps=("declare what is carried from token to token: state S[K, V] = 0",),
        )
    with errors:
        found.lets = {let.target.text: let for let in _ordered(found.lets)}
    return found


def _dim(found: Declarations, item: sf.Dim) -> None:
    found.names.declare(item.name, "dim")
    found.dims[item.name.text] = ir.Dim(item.name.text, item.size)
    found.origin[f"dim {item.name.text}"] = item.name.span


def _tensor(found: Declarations, item: sf.Declared) -> None:
    found.names.declare(item.name, item.role)
    name = item.name.text
    if item.role != "state":
        check_argument(item.name)
    for dim in item.dims:
        if dim.text not in found.dims:
            fail(
                "PSM201",
                f"unknown dim '{dim.text}'",
                dim.span,
                helps=suggest(dim.text, found.dims) or (f"declare it: dim {dim.text}",),
            )
    if len(item.dims) > MAX_RANK:
        fail("PSM203", f"'{name}' has {len(item.dims)} dims; psmc takes at most {MAX_RANK}", item.span)
    if item.kind == "complex" and item.interval is not None:
        fail(
            "PSM223",
            "complex numbers have no order, so no interval",
            item.interval.span,
            helps=("delete the interval",),
        )
    if item.role == "state" and item.identity is None:
        zero = f"state {name}{'[' + ', '.join(d.text for d in item.dims) + ']' if item.dims else ''} = 0"
        fail(
            "PSM222",
            f"component '{name}' has no identity element",
            item.span,
            label="'= …' is missing",
            helps=(f"say what combines to nothing, for example: {zero}",),
        )
    tensor = ir.Tensor(name, tuple(d.text for d in item.dims), item.kind, _interval(item.interval))
    {"input": found.inputs, "param": found.params, "state": found.state}[item.role][name] = tensor
    found.origin[f"{item.role} {name}"] = item.span


def _interval(node: sf.Interval | None) -> ir.Interval | None:
    """None for no restriction at all. The frontends refuse empty ones."""
    if node is None or (node.lo is None and node.hi is None):
        return None
    return ir.Interval(node.lo, node.hi, node.lo is None or node.lo_open, node.hi is None or node.hi_open)


# --- aggregator-level lets ----------------------------------------------------------------------


def _ordered(lets: dict[str, sf.Assign]) -> list[sf.Assign]:
    """In dependency order, else as written. Fails on a cycle."""
    done: dict[str, sf.Assign] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in path:
            cycle = path[path.index(name) :]
            others = tuple(Label(lets[n].target.span, f"'{n}' is part of the cycle") for n in cycle[1:])
            fail(
                "PSM215",
                f"let '{name}' is defined by itself: {' -> '.join((*cycle, name))}",
                lets[name].target.span,
                labels=others,
                helps=("a value of the token before is a state, or a tap of an input: x{-1}",),
            )
        path.append(name)
        for read in plain_names(lets[name].value):
            if read in lets:
                visit(read)
        path.pop()
        done[name] = lets[name]

    for name in lets:
        visit(name)
    return list(done.values())


def plain_names(root: sf.ExprNode) -> Iterator[str]:
    """Names an expression reads without an owner, in source order."""
    stack: list[sf.ExprNode] = [root]
    while stack:
        match stack.pop():
            case sf.Access(owner=owner, name=name, subs=subs, level=level):
                if owner is None and level is None:
                    yield name.text
                stack.extend(reversed((*([] if level is None else [level]), *(subs or ()))))
            case sf.Call(args=args, subs=subs):
                stack.extend(reversed((*args, *(subs or ()))))
            case sf.Unary(arg=arg):
                stack.append(arg)
            case sf.Binary(left=left, right=right):
                stack.extend((right, left))
            case sf.Reduction(body=body):
                stack.append(body)


def check_kind(value: ir.Expr, tensor: ir.Tensor, span: Span, what: str) -> None:
    """A component holds values of its own kind or a smaller one."""
    if value.kind == "bool":
        fail(
            "PSM208",
            f"component '{tensor.name}' is {tensor.kind}, and {what} is a condition",
            span,
            helps=("turn a condition into a number: where(condition, 1, 0)",),
        )
    if join((value.kind, tensor.kind)) != tensor.kind:
        declared = f"{tensor.name}{'[' + ', '.join(tensor.dims) + ']' if tensor.dims else ''}"
        wider = f"state {declared} : complex" if value.kind == "complex" else f"state {declared}"
        fail(
            "PSM208",
            f"component '{tensor.name}' is {tensor.kind}, and {what} is {value.kind}",
            span,
            helps=(f"declare it {value.kind}: {wider}",),
        )
