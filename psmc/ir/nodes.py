"""The typed IR: what a spec means, in index notation.

    aggregator = name, dims, inputs, params, state, (lift, combine | recurrence), readout, claim, order
    block      = lets; results                      in order, single assignment, no cycles
    assign     = name[index, ...] = expr            free indices of expr ⊆ the left-hand side's
    expr       = Const | Infinity | IndexValue | DimValue | Eye | Ref | Op | Reduce
    sub        = Index | int | expr                 an index, a literal position, or an int-valued gather

Expressions are scalar-valued with free indices: a tensor is an expression and an order of its indices.
Nodes are interned: structural equality is identity, so memo tables keyed by node are exact and shared
subexpressions cost once. Nothing may depend on `id` or on hash order; sort by `text.show`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal, TypeAlias
from weakref import WeakValueDictionary

from psmc.ir.ops import OPS, REDUCTIONS, Kind
from psmc.source import Span

# level, prev_level: the roots that a tree's counter holds after and before this token; their first subscript is the
# level k, of 2^k tokens, the identity where there is none.
Space = Literal["input", "param", "left", "right", "state", "prev", "level", "prev_level", "let"]
Claim = Literal["yes", "assume", "no"]
Order = Literal["tree", "left"]
NO_INDICES: frozenset[Index] = frozenset()


@dataclass(frozen=True, order=True)
class Index:
    """A variable that runs over a dim: 0 .. dim-1."""

    name: str
    dim: str


class _Interned(type):
    _table: ClassVar[WeakValueDictionary[tuple[Any, ...], Any]] = WeakValueDictionary()
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        node = super().__call__(*args, **kwargs)
        key = (cls, *(getattr(node, name) for name in cls.__match_args__))  # type: ignore[attr-defined]
        with cls._lock:
            return cls._table.setdefault(key, node)


class Expr(metaclass=_Interned):
    """Base of all expressions. `kind` is the element type, `free` the unbound indices."""

    kind: Kind
    free: frozenset[Index]

    def _derive(self, kind: Kind, free: frozenset[Index]) -> None:
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "free", free)


Sub: TypeAlias = "Index | int | Expr"


@dataclass(frozen=True, eq=False)
class Const(Expr):
    """An exact rational."""

    value: Fraction

    def __post_init__(self) -> None:
        self._derive("int" if self.value.denominator == 1 else "real", NO_INDICES)


@dataclass(frozen=True, eq=False)
class Infinity(Expr):
    """+inf, or -inf if `negative`."""

    negative: bool = False

    def __post_init__(self) -> None:
        self._derive("real", NO_INDICES)


@dataclass(frozen=True, eq=False)
class IndexValue(Expr):
    """An index variable used as a number."""

    index: Index

    def __post_init__(self) -> None:
        self._derive("int", frozenset((self.index,)))


@dataclass(frozen=True, eq=False)
class DimValue(Expr):
    """The size of a dim used as a number."""

    dim: str

    def __post_init__(self) -> None:
        self._derive("int", NO_INDICES)


@dataclass(frozen=True, eq=False)
class Eye(Expr):
    """1 where the two positions agree, else 0."""

    row: Sub
    col: Sub

    def __post_init__(self) -> None:
        self._derive("int", subs_free((self.row, self.col)))


@dataclass(frozen=True, eq=False)
class Ref(Expr):
    """An element of a declared tensor or of a let. `lag` > 0 reads an input that many tokens earlier."""

    space: Space
    name: str
    subs: tuple[Sub, ...]
    value_kind: Kind = "real"
    lag: int = 0

    def __post_init__(self) -> None:
        self._derive(self.value_kind, subs_free(self.subs))


@dataclass(frozen=True, eq=False)
class Op(Expr):
    """A pointwise operator of `ops.OPS`. Raises TypeError if the operand kinds do not fit."""

    op: str
    args: tuple[Expr, ...]

    def __post_init__(self) -> None:
        info = OPS[self.op]
        kind = info.kind(tuple(a.kind for a in self.args)) if len(self.args) == info.arity else None
        if kind is None:
            raise TypeError(f"{self.op}({', '.join(a.kind for a in self.args)})")
        self._derive(kind, NO_INDICES.union(*(a.free for a in self.args)))


@dataclass(frozen=True, eq=False)
class Reduce(Expr):
    """`op`[index] body, with `op` of `ops.REDUCTIONS`. Binds `index`."""

    op: str
    index: Index
    body: Expr

    def __post_init__(self) -> None:
        kind = REDUCTIONS[self.op]((self.body.kind,))
        if kind is None:
            raise TypeError(f"{self.op}[{self.index.name}] of {self.body.kind}")
        self._derive(kind, self.body.free - {self.index})


def subs_free(subs: tuple[Sub, ...]) -> frozenset[Index]:
    """Free indices of a subscript list."""
    free = NO_INDICES
    for sub in subs:
        free |= {sub} if isinstance(sub, Index) else sub.free if isinstance(sub, Expr) else NO_INDICES
    return free


# --- declarations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A real interval; `None` is unbounded on that side. Open ends exclude the bound."""

    lo: Fraction | None = None
    hi: Fraction | None = None
    lo_open: bool = True
    hi_open: bool = True


@dataclass(frozen=True)
class Dim:
    """A named extent; `size` if the spec fixes it (`dim R = 2`), else known at run time."""

    name: str
    size: int | None = None


@dataclass(frozen=True)
class Tensor:
    """An input (`[B, T, *lanes, *dims]`) or a param (`[*lanes, *dims]` or `[*dims]`)."""

    name: str
    dims: tuple[str, ...] = ()
    kind: Kind = "real"
    interval: Interval | None = None


@dataclass(frozen=True)
class Assign:
    """name[indices] = value. As an output or a component, `indices` give its dims in order."""

    name: str
    indices: tuple[Index, ...]
    value: Expr


@dataclass(frozen=True)
class Component:
    """One tensor of the state.

    `identity` is the identity element, and where decoding starts unless `initial` says otherwise
    (a lifted recurrence whose declared start is not the monoid's identity).
    """

    name: str
    dims: tuple[str, ...]
    kind: Kind
    interval: Interval | None
    identity: Assign
    initial: Assign | None = None

    @property
    def start(self) -> Assign:
        return self.initial or self.identity


@dataclass(frozen=True)
class Block:
    """`lets` in dependency order (later ones may read earlier ones), then the results."""

    lets: tuple[Assign, ...] = ()
    results: tuple[Assign, ...] = ()

    def result(self, name: str) -> Assign:
        return next(r for r in self.results if r.name == name)


@dataclass(frozen=True)
class Extern:
    """The rule is a Python callable, bound at load: combine(l, r) on dicts of batched tensors."""

    name: str = "combine"


@dataclass(frozen=True)
class Aggregator:
    """A whole spec. Exactly one of `combine` and `recurrence` is set.

    lift        reads inputs and params, assigns every component; None: the inputs *are* the components
    combine     reads left, right and params, assigns every component
    recurrence  reads prev (the state before this token), inputs and params, assigns every component
    readout     reads inputs, params, state (after this token) and prev; no results: the state is returned
    """

    name: str
    dims: tuple[Dim, ...]
    inputs: tuple[Tensor, ...]
    params: tuple[Tensor, ...]
    state: tuple[Component, ...]
    lift: Block | None
    combine: Block | Extern | None
    recurrence: Block | None
    readout: Block
    claim: Claim
    order: Order = "tree"
    doc: str = ""
    # Where things were written, for diagnostics only: keys 'claim', 'combine', 'combine S', 'state S',
    # 'identity S', 'input q', 'lift a', 'recurrence S', 'output o', 'name'.
    origin: Mapping[str, Span] = field(default_factory=dict, compare=False, repr=False)

    def component(self, name: str) -> Component:
        return next(c for c in self.state if c.name == name)

    def where(self, *keys: str) -> Span | None:
        """The first known place among `keys`."""
        return next((self.origin[k] for k in keys if k in self.origin), None)

    @property
    def leaf_inputs(self) -> tuple[Tensor, ...]:
        """The inputs a caller passes: the declared ones, then, without a lift, one per component."""
        if self.lift is not None or self.recurrence is not None:
            return self.inputs
        return self.inputs + tuple(Tensor(c.name, c.dims, c.kind, c.interval) for c in self.state)

    @property
    def leaf(self) -> Block:
        """`lift`, made explicit where it was left out."""
        if self.lift is not None:
            return self.lift
        return Block(results=tuple(_copy(c, "input") for c in self.state))

    @property
    def output(self) -> Block:
        """`readout`, made explicit where it was left out."""
        return self.readout if self.readout.results else Block(results=tuple(_copy(c, "state") for c in self.state))


def _copy(component: Component, space: Space) -> Assign:
    indices = component.identity.indices
    return Assign(component.name, indices, Ref(space, component.name, indices, component.kind))
