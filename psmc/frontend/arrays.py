"""The array expressions of a traced method: nodes and numpy's shape rules, over named dims instead of sizes.

An axis is the name of a dim, or None for an axis of size 1. Nodes are compared by identity: one Python value is one
node, so a value that a method both returns and uses is recognised as the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from psmc.diagnostics import Label, fail
from psmc.frontend import surface as sf
from psmc.source import Span

Axes = tuple["str | None", ...]
MAX_DEPTH = 150  # surface nodes nest up to one level deeper per array operation; 200 is the bound of every later pass
MAX_NODES = 50_000


@dataclass(frozen=True, eq=False)
class Node:
    span: Span
    axes: Axes
    children: tuple[Node, ...] = ()
    depth: int = field(init=False, default=0)
    nodes: int = field(init=False, default=1)  # written out as a tree

    def __post_init__(self) -> None:
        levels = len(self.children) if isinstance(self, Contract) else 1
        object.__setattr__(self, "depth", levels + max((c.depth for c in self.children), default=0))
        object.__setattr__(self, "nodes", 1 + sum(c.nodes for c in self.children))
        if self.depth > MAX_DEPTH:
            fail(
                "PSM502",
                f"this expression is nested deeper than {MAX_DEPTH} operations",
                self.span,
                helps=("name parts of it: part = let('part', ...), or use a reduction such as .sum().",),
            )
        if self.nodes > MAX_NODES:
            fail(
                "PSM217",
                f"written out, this expression has more than {MAX_NODES:,} operations",
                self.span,
                notes=("a value that is used twice is written twice, unless it has a name",),
                helps=("name what is used again: part = let('part', ...).",),
            )


@dataclass(frozen=True, eq=False)
class Scalar(Node):
    """A number, or the size of a dim."""

    expr: sf.ExprNode = field(kw_only=True)
    dim: str | None = field(kw_only=True, default=None)


@dataclass(frozen=True, eq=False)
class Leaf(Node):
    """A declared tensor. `scope` is the call it was handed to; `version` counts the state's updates in a recurrence."""

    owner: str | None = field(kw_only=True)
    name: str = field(kw_only=True)
    scope: object = field(kw_only=True)
    lag: int = field(kw_only=True, default=0)
    version: int = field(kw_only=True, default=0)
    level: bool = field(kw_only=True, default=False)  # the first axis counts the levels of a counter


@dataclass(frozen=True, eq=False)
class Eye(Node):
    """The identity matrix over one dim."""


@dataclass(frozen=True, eq=False)
class Arange(Node):
    """0 .. n-1 over one dim."""


@dataclass(frozen=True, eq=False)
class Pointwise(Node):
    """An operator of `ir.ops`, children broadcast from the right."""

    op: str = field(kw_only=True)


@dataclass(frozen=True, eq=False)
class Named(Node):
    """`let(name, value)`: the child under a name of its own."""

    name: str = field(kw_only=True)


@dataclass(frozen=True)
class Axis:
    """This axis of the child is axis `position` of the view."""

    position: int


@dataclass(frozen=True)
class Gather:
    """This axis of the child is read where an int array says; that array's axes are `positions` of the view."""

    index: Node
    positions: tuple[int, ...]


Pick: TypeAlias = "Axis | Gather | int | None"  # a literal place; None: an axis of size 1


@dataclass(frozen=True, eq=False)
class View(Node):
    """The child with its axes moved, added, or read at fixed places: one pick per axis of the child."""

    picks: tuple[Pick, ...] = field(kw_only=True)


@dataclass(frozen=True, eq=False)
class Contract(Node):
    """`op` over the axes that the result does not have, of the product of the children.

    `labels` names the axes of each child; 0 .. n-1 are the result's axes, the rest are bound, smaller ones outermost.
    """

    op: Literal["sum", "max", "prod"] = field(kw_only=True)
    labels: tuple[tuple[int, ...], ...] = field(kw_only=True)


# --- shapes -------------------------------------------------------------------------------------


def shape(axes: Axes) -> str:
    """[K, V] as messages print it."""
    return f"[{', '.join(a or '1' for a in axes)}]" if axes else "a scalar"


def broadcast(span: Span, args: Sequence[Node]) -> Axes:
    """The common axes, aligned from the right. Raises PSM250."""
    rank = max((len(a.axes) for a in args), default=0)
    out: list[str | None] = [None] * rank
    for arg in args:
        for position, axis in enumerate(arg.axes, rank - len(arg.axes)):
            if axis is not None and out[position] not in (None, axis):
                _mismatch(span, args, axis, out[position])
            out[position] = axis or out[position]
    return tuple(out)


def _mismatch(span: Span, args: Sequence[Node], one: str, two: str | None) -> None:
    shapes = [shape(a.axes) for a in args if a.axes]
    vectors = [a for a in args if len(a.axes) == 1]
    larger = max((len(a.axes) for a in args), default=0)
    help_ = "align the axes with [:, None] or [None, :]; shapes broadcast from the right, as in numpy."
    if vectors and larger == 1:
        help_ = "for an outer product write outer(a, b), or a[:, None] * b[None, :]."
    elif vectors and any(vectors[0].axes[0] == a.axes[0] for a in args if len(a.axes) > 1):
        help_ = f"write [:, None] behind the {shape(vectors[0].axes)} to run it along the first axis."
    fail(
        "PSM250",
        f"the shapes {' and '.join(shapes)} do not fit together: '{one}' meets '{two}'",
        span,
        labels=tuple(Label(a.span, shape(a.axes)) for a in args if a.axes and _inside(a.span, span)),
        helps=(help_,),
    )


def _inside(part: Span, whole: Span) -> bool:
    return part.source is whole.source and part != whole and whole.start <= part.start and part.end <= whole.end


def pointwise(op: str, span: Span, *args: Node) -> Node:
    return Pointwise(span, broadcast(span, args), args, op=op)


def position(axis: object, node: Node, span: Span) -> int:
    """A Python axis number, negative ones from the right. Raises PSM257."""
    rank = len(node.axes)
    if isinstance(axis, bool) or not isinstance(axis, int) or not -rank <= axis < rank:
        fail("PSM257", f"{shape(node.axes)} has no axis {axis!r}", span, helps=(_axes_help(rank),))
    return axis % rank


def _axes_help(rank: int) -> str:
    if rank == 0:
        return "it is a scalar: there is nothing to reduce."
    return f"axes are whole numbers from {-rank} to {rank - 1}."


def reduce(op: Literal["sum", "max", "prod"], node: Node, axis: object, keepdims: bool, span: Span) -> Node:
    """Reduce over one axis, several, or (None) all of them."""
    rank = len(node.axes)
    listed = range(rank) if axis is None else axis if isinstance(axis, tuple | list) else (axis,)
    gone = sorted({position(a, node, span) for a in listed})
    kept = [p for p in range(rank) if p not in gone]
    labels = [0] * rank
    for label, place in enumerate(kept + gone):
        labels[place] = label
    out: Node = Contract(span, tuple(node.axes[p] for p in kept), (node,), op=op, labels=(tuple(labels),))
    if keepdims:
        full: list[str | None] = [None if p in gone else node.axes[p] for p in range(rank)]
        out = View(span, tuple(full), (out,), picks=tuple(Axis(p) for p in kept))
    return out


def contract(span: Span, spelled: Sequence[Sequence[str]], result: Sequence[str], args: Sequence[Node]) -> Node:
    """Einstein summation: `spelled` names the axes of each argument, `result` those that stay. Raises PSM250."""
    dims: dict[str, str | None] = {}
    for letters, arg in zip(spelled, args, strict=True):
        for letter, axis in zip(letters, arg.axes, strict=True):
            if axis is not None and dims.get(letter) not in (None, axis):
                _mismatch(span, args, axis, dims[letter])
            dims[letter] = axis or dims.get(letter)
    order = {letter: n for n, letter in enumerate([*result, *(x for x in dims if x not in result)])}
    labels = tuple(tuple(order[x] for x in letters) for letters in spelled)
    return Contract(span, tuple(dims[x] for x in result), tuple(args), op="sum", labels=labels)


def matmul(span: Span, a: Node, b: Node) -> Node:
    """`a @ b`: the last axis of a against the last but one (or the only one) of b; leading axes broadcast."""
    for side, node in (("left", a), ("right", b)):
        if not node.axes:
            fail("PSM250", f"the {side} side of @ is a scalar", span, helps=("write '*' for a product with a scalar.",))
    lead_a, lead_b = len(a.axes[:-1]), max(len(b.axes) - 2, 0)
    rows = min(lead_a, 1)
    batch = [f"b{n}" for n in range(max(lead_a - rows, lead_b))]
    in_a = [*batch[len(batch) - (lead_a - rows) :], *["row"] * rows, "sum"]
    in_b = [*batch[len(batch) - lead_b :], "sum", *["column"] * (len(b.axes) > 1)]
    result = [*batch, *["row"] * rows, *["column"] * (len(b.axes) > 1)]
    return contract(span, (in_a, in_b), result, (a, b))


def transpose(node: Node, order: Sequence[int], span: Span) -> Node:
    """The axes in another order."""
    if sorted(order) != list(range(len(node.axes))):
        fail("PSM257", f"{tuple(order)} is not an order of the axes of {shape(node.axes)}", span)
    picks = tuple(Axis(order.index(p)) for p in range(len(order)))
    return View(span, tuple(node.axes[p] for p in order), (node,), picks=picks)


def index(node: Node, key: Sequence[Any], span: Span) -> Node:
    """numpy's basic indexing, and one int array to gather by. Raises PSM257."""
    taken = sum(k is not None and k is not Ellipsis for k in key)
    rank = len(node.axes)
    if sum(k is Ellipsis for k in key) > 1:
        fail("PSM257", "an index has at most one '...'", span)
    if taken > rank:
        fail(
            "PSM257",
            f"{taken} subscripts on {shape(node.axes)}",
            span,
            helps=("add an axis with None, or drop a subscript.",),
        )
    full: list[Any] = []
    for k in key if Ellipsis in [k for k in key if k is Ellipsis] else (*key, Ellipsis):
        full += [slice(None)] * (rank - taken) if k is Ellipsis else [k]
    axes: list[str | None] = []
    picks: list[Pick] = []
    children = [node]
    for k in full:
        if k is None:
            axes.append(None)
            continue
        axis = node.axes[len(picks)]
        if isinstance(k, slice):
            if k != slice(None):
                fail(
                    "PSM257",
                    "a dim cannot be sliced in part",
                    span,
                    helps=("dims are used whole: declare another dim.",),
                )
            picks.append(Axis(len(axes)))
            axes.append(axis)
        elif isinstance(k, Node):
            if len(children) > 1 and k.axes:
                fail("PSM257", "only one subscript can be an array", span, helps=("gather in two steps.",))
            picks.append(Gather(k, tuple(range(len(axes), len(axes) + len(k.axes)))))
            children.append(k)
            axes += k.axes
        else:
            picks.append(_place(k, axis, span))
    return View(span, tuple(axes), tuple(children), picks=tuple(picks))


def _place(k: Any, axis: str | None, span: Span) -> Pick:
    if isinstance(k, bool) or not isinstance(k, int):
        name = type(k).__name__
        fail(
            "PSM257",
            f"a {name} is not a subscript",
            span,
            helps=("subscripts are ':', None, whole numbers and int arrays.",),
        )
    if k < 0:
        fail("PSM257", "a subscript counts from the left, from 0", span, helps=("write the place from the left.",))
    return None if axis is None else k
