"""The surface AST: what both frontends produce and the one resolver reads. Untyped; every node has a span."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, TypeAlias

from psmc.source import SourceFile, Span


@dataclass(frozen=True)
class Name:
    text: str
    span: Span


# --- expressions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    value: Fraction
    span: Span


@dataclass(frozen=True)
class Inf:
    span: Span


@dataclass(frozen=True)
class Access:
    """`name`, `name[subs]`, `owner.name[subs]`, `name{-lag}[subs]`. A bare name may turn out to be a tensor,
    a let, a const, an index variable or a dim: the resolver decides. `subs` None: no brackets were written.
    `level`: c of `at(c).name` and `prev.at(c).name`."""

    owner: Name | None
    name: Name
    subs: tuple[ExprNode, ...] | None
    lag: int
    span: Span
    level: ExprNode | None = None


@dataclass(frozen=True)
class Call:
    """An operator of `ir.ops` written as a call, `eye(i, j)`, or a `fn` of the file."""

    fn: Name
    args: tuple[ExprNode, ...]
    span: Span
    # `f(x)[i, j]`: subscripts on the result of a tensor-valued fn
    subs: tuple[ExprNode, ...] | None = None


@dataclass(frozen=True)
class Unary:
    op: Literal["neg", "not"]
    arg: ExprNode
    span: Span


@dataclass(frozen=True)
class Binary:
    """`op` is a name of `ir.ops.OPS`."""

    op: str
    left: ExprNode
    right: ExprNode
    span: Span


@dataclass(frozen=True)
class Reduction:
    """sum[i, j] body: `indices` outermost first."""

    op: Literal["sum", "max", "prod"]
    indices: tuple[Name, ...]
    body: ExprNode
    span: Span


ExprNode: TypeAlias = Number | Inf | Access | Call | Unary | Binary | Reduction


# --- statements ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assign:
    """`target[indices] = value`; with `let`, a new local name."""

    target: Name
    indices: tuple[Name, ...]
    value: ExprNode
    span: Span
    let: bool = False


@dataclass(frozen=True)
class For:
    """`for r in R { body }`: micro-steps, in order."""

    var: Name
    dim: Name
    body: tuple[Statement, ...]
    span: Span


Statement: TypeAlias = Assign | For


# --- declarations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    lo: Fraction | None
    hi: Fraction | None
    lo_open: bool
    hi_open: bool
    span: Span


@dataclass(frozen=True)
class Dim:
    name: Name
    size: int | None = None


@dataclass(frozen=True)
class Declared:
    """One declared tensor: an input, a param, or (with `identity`) a component of the state.

    `identity` is an expression over the component's own dims, which it may name through `eye`, `iota`
    (bare names, meaning the identity matrix and 0..n-1) or not at all.
    """

    role: Literal["input", "param", "state"]
    name: Name
    dims: tuple[Name, ...]
    kind: Literal["real", "complex", "int"]
    interval: Interval | None
    identity: ExprNode | None
    span: Span


@dataclass(frozen=True)
class Const:
    name: Name
    value: ExprNode
    span: Span


@dataclass(frozen=True)
class Fn:
    """`fn name(x[K], y)[i] = value`: a macro over index notation, expanded by the resolver."""

    name: Name
    params: tuple[tuple[Name, tuple[Name, ...]], ...]
    indices: tuple[Name, ...]
    value: ExprNode
    span: Span


@dataclass(frozen=True)
class Lift:
    body: tuple[Statement, ...]
    span: Span


@dataclass(frozen=True)
class Combine:
    left: Name
    right: Name
    body: tuple[Statement, ...]
    span: Span


@dataclass(frozen=True)
class CombineExtern:
    """`fn` is set by the decorator; a .psm file leaves it to be bound at load."""

    span: Span
    fn: Callable[..., Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Recurrence:
    body: tuple[Statement, ...]
    span: Span


@dataclass(frozen=True)
class Output:
    body: tuple[Assign, ...]
    span: Span


@dataclass(frozen=True)
class Claim:
    value: Literal["yes", "assume", "no"]
    span: Span


@dataclass(frozen=True)
class Order:
    value: Literal["tree", "left"]
    span: Span


Item: TypeAlias = (
    Dim | Declared | Const | Fn | Assign | Lift | Combine | CombineExtern | Recurrence | Output | Claim | Order
)  # an `Assign` here is an aggregator-level `let`


@dataclass(frozen=True)
class Aggregator:
    name: Name
    doc: str
    items: tuple[Item, ...]
    span: Span


@dataclass(frozen=True)
class Use:
    path: str
    span: Span


@dataclass(frozen=True)
class File:
    """A parsed .psm file, or the one aggregator of a decorated class."""

    source: SourceFile
    uses: tuple[Use, ...]
    consts: tuple[Const, ...]
    fns: tuple[Fn, ...]
    aggregators: tuple[Aggregator, ...]
