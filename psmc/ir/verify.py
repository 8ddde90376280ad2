"""What must hold of every aggregator between passes. A failure is a bug of ours, never the user's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from psmc.ir.nodes import (
    Aggregator,
    Assign,
    Block,
    Component,
    DimValue,
    Expr,
    Extern,
    Eye,
    Index,
    IndexValue,
    Op,
    Reduce,
    Ref,
    Space,
    Sub,
    Tensor,
)
from psmc.ir.ops import OPS, REDUCTIONS, join
from psmc.ir.rewrite import children, walk
from psmc.ir.text import show_expr

MAX_LAG = 64
LEVELS: tuple[Space, ...] = ("level", "prev_level")

# Which spaces an expression of each block may read, besides lets.
READS: dict[str, frozenset[Space]] = {
    "identity": frozenset(),
    "lift": frozenset(("input", "param")),
    "combine": frozenset(("left", "right", "param")),
    "recurrence": frozenset(("prev", "input", "param")),
    "output": frozenset(("state", "prev", "level", "prev_level", "input", "param")),
}


def verify(agg: Aggregator) -> None:
    """Raise AssertionError, with text, at the first broken invariant of `agg`."""
    _Verifier(agg).run()


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


@dataclass
class _Verifier:
    agg: Aggregator
    sizes: dict[str, int | None] = field(default_factory=dict)
    # (space, name) -> dims and kind
    declared: dict[tuple[str, str], tuple[tuple[str, ...], str]] = field(default_factory=dict)

    def run(self) -> None:
        agg = self.agg
        self._declarations()
        _require((agg.combine is None) != (agg.recurrence is None), "exactly one of combine and recurrence is set")
        _require(agg.lift is None or agg.recurrence is None, "a recurrence has no lift")
        _require(not isinstance(agg.combine, Extern) or agg.claim != "yes", "an extern combine cannot be claimed")
        _require(agg.claim == "no" or agg.order == "tree", "an order without 'associative: no'")
        for component in agg.state:
            for definition in (component.identity, component.start):
                _require(
                    definition.name == component.name, f"identity of '{component.name}' is called '{definition.name}'"
                )
                self._result(definition, component.dims, component.kind, "identity", {})
        if agg.lift is not None:
            self._components("lift", agg.lift)
        if isinstance(agg.combine, Block):
            self._components("combine", agg.combine)
        if agg.recurrence is not None:
            self._components("recurrence", agg.recurrence)
        self._unique("outputs", (a.name for a in agg.readout.results))
        lets = self._lets("output", agg.readout)
        for result in agg.readout.results:
            self._assign(result, "output", lets)
            _require(result.value.kind != "bool", f"output '{result.name}' is a condition")

    def _declarations(self) -> None:
        agg = self.agg
        _require(bool(agg.state), "no state")
        tensors: list[Tensor | Component] = [*agg.inputs, *agg.params, *agg.state]
        self._unique("dims, inputs, params and components", [d.name for d in agg.dims] + [t.name for t in tensors])
        self.sizes = {d.name: d.size for d in agg.dims}
        for dim in agg.dims:
            _require(dim.size is None or dim.size > 0, f"dim '{dim.name}' has size {dim.size}")
        spaces: dict[Space, Sequence[Tensor | Component]] = {"input": agg.leaf_inputs, "param": agg.params}
        spaces |= {space: agg.state for space in ("left", "right", "state", "prev", *LEVELS)}
        for space, owners in spaces.items():
            for tensor in owners:
                self.declared[space, tensor.name] = (tensor.dims, tensor.kind)
                for dim_name in tensor.dims:
                    _require(dim_name in self.sizes, f"'{tensor.name}' has the unknown dim '{dim_name}'")

    def _unique(self, what: str, names: Iterable[str]) -> None:
        seen: set[str] = set()
        for name in names:
            _require(name not in seen, f"'{name}' appears twice among {what}")
            seen.add(name)

    def _components(self, where: str, block: Block) -> None:
        names = [r.name for r in block.results]
        expected = [c.name for c in self.agg.state]
        _require(names == expected, f"{where} assigns {names}, not {expected}")
        lets = self._lets(where, block)
        for component, result in zip(self.agg.state, block.results, strict=True):
            self._result(result, component.dims, component.kind, where, lets)

    def _lets(self, where: str, block: Block) -> dict[str, Assign]:
        self._unique(f"lets of {where}", (let.name for let in block.lets))
        known: dict[str, Assign] = {}
        taken = {name for _, name in self.declared} | set(self.sizes)
        for let in block.lets:
            _require(let.name not in taken, f"let '{let.name}' of {where} has the name of something declared")
            self._assign(let, where, known)
            known[let.name] = let
        return known

    def _result(self, assign: Assign, dims: tuple[str, ...], kind: str, where: str, lets: dict[str, Assign]) -> None:
        found = tuple(i.dim for i in assign.indices)
        _require(found == dims, f"{where} {assign.name} has dims {found}, not {dims}")
        fits = assign.value.kind != "bool" and join((assign.value.kind, kind)) == kind  # type: ignore[arg-type]
        _require(fits, f"{where} {assign.name} is {assign.value.kind}, not {kind}")
        self._assign(assign, where, lets)

    def _assign(self, assign: Assign, where: str, lets: dict[str, Assign]) -> None:
        place = f"{where} {assign.name}"
        self._unique(f"indices of {place}", (i.name for i in assign.indices))
        for index in assign.indices:
            _require(index.dim in self.sizes, f"{place}: index '{index.name}' runs over the unknown dim '{index.dim}'")
            _require(index.name not in self.sizes, f"{place}: index '{index.name}' has the name of a dim")
        loose = sorted(i.name for i in assign.value.free - set(assign.indices))
        _require(not loose, f"{place}: unbound {', '.join(loose)} in {show_expr(assign.value)}")
        for node in walk(assign.value):
            self._node(node, place, where, lets)
        self._scopes(assign.value, frozenset(i.name for i in assign.indices), place)

    def _node(self, node: Expr, place: str, where: str, lets: dict[str, Assign]) -> None:
        match node:
            case DimValue(dim=dim):
                _require(dim in self.sizes, f"{place}: unknown dim '{dim}'")
            case IndexValue(index=index):
                _require(index.dim in self.sizes, f"{place}: index '{index.name}' over the unknown dim '{index.dim}'")
            case Op(op=op, args=args):
                _require(OPS[op].arity == len(args), f"{place}: {op} of {len(args)}")
            case Reduce(op=op, index=index):
                _require(op in REDUCTIONS, f"{place}: no reduction '{op}'")
                _require(index.dim in self.sizes, f"{place}: '{op}' over the unknown dim '{index.dim}'")
            case Eye(row=row, col=col):
                dims = {s.dim for s in (row, col) if isinstance(s, Index)}
                _require(len(dims) < 2, f"{place}: eye over two dims")
                self._subs((row, col), (None, None), place)
            case Ref():
                self._ref(node, place, where, lets)

    def _ref(self, ref: Ref, place: str, where: str, lets: dict[str, Assign]) -> None:
        text = show_expr(ref)
        if ref.space == "let":
            _require(ref.name in lets, f"{place}: '{ref.name}' is read before it is defined")
            let = lets[ref.name]
            dims, kind = tuple(i.dim for i in let.indices), str(let.value.kind)
        else:
            _require(ref.space in READS[where], f"{place}: {where} reads {ref.space} {text}")
            _require((ref.space, ref.name) in self.declared, f"{place}: undeclared {ref.space} '{ref.name}'")
            dims, kind = self.declared[ref.space, ref.name]
        _require(ref.value_kind == kind, f"{place}: {text} is {kind}, not {ref.value_kind}")
        if ref.space in LEVELS:
            level = ref.subs[0] if ref.subs else None
            _require(isinstance(level, Index), f"{place}: the level of {text} is no index")
            assert isinstance(level, Index)
            _require(self.sizes[level.dim] is not None, f"{place}: the levels of {text} are not counted")
            dims = (level.dim, *dims)
        _require(len(ref.subs) == len(dims), f"{place}: {text} has {len(ref.subs)} subscripts, not {len(dims)}")
        _require(0 <= ref.lag <= (MAX_LAG if ref.space == "input" else 0), f"{place}: lag {ref.lag} of {text}")
        self._subs(ref.subs, dims, f"{place}: {text}")

    def _subs(self, subs: tuple[Sub, ...], dims: Sequence[str | None], place: str) -> None:
        for sub, dim in zip(subs, dims, strict=True):
            if isinstance(sub, Index):
                _require(dim is None or sub.dim == dim, f"{place}: '{sub.name}' runs over {sub.dim}, not {dim}")
            elif isinstance(sub, Expr):
                _require(sub.kind == "int", f"{place}: a gather by {sub.kind}")
                _require(not isinstance(sub, IndexValue), f"{place}: an index written as a gather")
            elif dim is not None:
                size = self.sizes[dim]
                _require(size is not None and 0 <= sub < size, f"{place}: position {sub} of {dim}, which has {size}")

    def _scopes(self, root: Expr, bound: frozenset[str], place: str) -> None:
        """No reduction rebinds a name that is in scope."""
        seen: set[tuple[Expr, frozenset[str]]] = set()
        stack = [(root, bound)]
        while stack:
            node, scope = stack.pop()
            if (node, scope) in seen:
                continue
            seen.add((node, scope))
            if isinstance(node, Reduce):
                name = node.index.name
                _require(name not in scope, f"{place}: '{name}' is bound twice")
                stack.append((node.body, scope | {name}))
            else:
                stack.extend((child, scope) for child in children(node))
