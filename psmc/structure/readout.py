"""Outputs taken apart: linear reads of the state (queries on S and on prev.S) inside a pointwise epilogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psmc.derive.contract import contract
from psmc.derive.semiring import NotAffineError, split
from psmc.derive.simplify import ZERO, make
from psmc.ir import Aggregator, Assign, Block, Expr, Eye, Index, Kind, Op, Reduce, Ref, Sub
from psmc.ir.rewrite import fresh, inline, refs, rename, replace_refs, walk, with_children
from psmc.structure.products import Context, tidy
from psmc.structure.report import Affine, Linear, Readout


def contracted(agg: Aggregator) -> dict[str, tuple[int, ...]]:
    """Component -> positions at which some output sums over it."""
    found: dict[str, set[int]] = {c.name: set() for c in agg.state}
    for result in inline(agg.output).results:
        bound = {n.index for n in walk(result.value) if isinstance(n, Reduce)}
        for ref in refs(result.value):
            if ref.space in ("state", "prev"):
                found[ref.name] |= {k for k, s in enumerate(ref.subs) if s in bound}
    return {name: tuple(sorted(positions)) for name, positions in found.items()}


def readouts(agg: Aggregator, affines: Sequence[Affine], context: Context) -> tuple[Readout, ...]:
    """One per output."""
    kinds = {c.name: c.kind for c in agg.state}
    reader = _Reader({a.component: a for a in affines}, kinds, context)
    return tuple(reader.output(result) for result in inline(Block(agg.output.lets, agg.output.results)).results)


class _Reader:
    def __init__(self, affines: Mapping[str, Affine], kinds: Mapping[str, Kind], context: Context) -> None:
        self.affines, self.kinds, self.context = affines, kinds, context
        self.taken = set(context.taken)
        self.known: dict[tuple[object, ...], Linear] = {}

    def output(self, result: Assign) -> Readout:
        used: list[Linear] = []
        value = self._visit(result.value, used)
        state = [r for r in refs(value) if r.space in ("state", "prev")]
        whole = tuple(sorted({r.name for r in state}))
        reduces = sorted({n.index.dim for n in walk(value) if isinstance(n, Reduce) and _reads_lets(n)})
        return Readout(result.name, tuple(used), Assign(result.name, result.indices, value), whole, tuple(reduces))

    def _visit(self, node: Expr, used: list[Linear]) -> Expr:
        """`node` with its largest linear parts as lets."""
        if (
            isinstance(node, Reduce)
            and node.op == "sum"
            and isinstance(node.body, Op)
            and node.body.op in ("real", "imag")
        ):
            node = Op(node.body.op, (Reduce("sum", node.index, node.body.args[0]),))
        names = sorted({r.name for r in refs(node) if r.space in ("state", "prev") and r.name in self.affines})
        for name in names:
            found = self._linear(node, self.affines[name], used)
            if found is not None:
                return found
        return with_children(node, lambda child: self._visit(child, used)) if names else node

    def _linear(self, node: Expr, affine: Affine, used: list[Linear]) -> Expr | None:
        try:
            hom, rest = split(node, lambda r: r.space in ("state", "prev") and r.name == affine.component)
        except NotAffineError:
            return None
        if hom is None or (rest is not None and any(r.name == affine.component for r in refs(rest))):
            return None
        hom = contract(hom)
        order = [i for i in affine.decay.value.indices]
        reads = [r for r in refs(hom) if r.space in ("state", "prev") and r.name == affine.component]
        key = order.index(affine.key)
        others = {tuple(s for n, s in enumerate(r.subs) if n != key) for r in reads}
        if len(others) != 1:
            return None
        (at,) = others
        index = fresh(
            affine.key, {i.name for i in hom.free} | {n.index.name for n in walk(hom) if isinstance(n, Reduce)}
        )
        parts = [self._vector(hom, affine, space, key, index) for space in ("state", "prev")]
        columns = {s for s, i in zip(at, (i for i in order if i != affine.key), strict=True) if i == affine.value}
        if any(_refused(p, columns) for p in parts):
            return None
        return self._named(affine, parts, index, at, rest, used)

    def _vector(self, hom: Expr, affine: Affine, space: str, key: int, index: Index) -> Expr:
        """The row vector at `index` that multiplies S (or prev.S)."""

        def rule(ref: Ref) -> Expr | None:
            if ref.name != affine.component or ref.space not in ("state", "prev"):
                return None
            return Eye(ref.subs[key], index) if ref.space == space else ZERO

        return tidy(contract(replace_refs(hom, rule)), self.context)

    def _named(
        self,
        affine: Affine,
        parts: list[Expr],
        index: Index,
        at: tuple[Sub, ...],
        rest: Expr | None,
        used: list[Linear],
    ) -> Expr:
        own = [i for i in affine.decay.value.indices if i != affine.key]
        back: dict[Index, Sub] = {index: affine.key}
        back |= {s: i for s, i in zip(at, own, strict=True) if isinstance(s, Index)}
        extra = sorted({i for p in parts for i in p.free if i not in back})
        renamed, names = [], {i.name for i in (*own, affine.key)}
        for i in extra:
            back[i] = fresh(i, names)
            names.add(fresh(i, names).name)
        renamed = [self.context.alpha(rename(p, back)) for p in parts]
        over = tuple(i for i in (back[e] for e in extra) if isinstance(i, Index))
        identity = (affine.component, *renamed)
        linear = self.known.get(identity)
        if linear is None:
            vectors = [
                None if p == ZERO else Assign(name, (*affine.outer, affine.key, *over), p)
                for name, p in zip(("q", "p"), renamed, strict=True)
            ]
            linear = Linear(self._name(affine.component), affine.component, (*own, *over), vectors[0], vectors[1])
            self.known[identity] = linear
        if linear not in used:
            used.append(linear)
        read = Ref("let", linear.name, (*at, *extra), self.kinds[affine.component])
        return read if rest is None else make("add", read, self._visit(tidy(rest, self.context), used))

    def _name(self, component: str) -> str:
        name, number = f"y_{component}", 1
        while name in self.taken:
            number += 1
            name = f"y_{component}_{number}"
        self.taken.add(name)
        return name


def _refused(vector: Expr, columns: set[Sub]) -> bool:
    """A query must know nothing of any state, nor of the value index (`columns`: what stands there); reading one entry
    is no contraction."""
    if any(isinstance(n, Eye) and isinstance(n.row, Index) and isinstance(n.col, Index) for n in walk(vector)):
        return True
    return any(r.space in ("state", "prev") for r in refs(vector)) or any(
        s in vector.free for s in columns if isinstance(s, Index)
    )


def _reads_lets(node: Expr) -> bool:
    return any(r.space == "let" for r in refs(node))
