"""Canonical form: equal specs up to index renaming become equal (interned: identical) expressions.

Two things and no more, so that the floating-point order of the user's products is kept:

- constants fold exactly (`1/3` is one rational), and a factor of a sum's product chain that does not depend on the
  bound index leaves the sum: `sum[i] q[i] * S[i, j] / c` is `(sum[i] q[i] * S[i, j]) / c`;
- indices are renamed: the left-hand side's take the first free names of `i j m n p s t u`, bound ones the next ones by
  depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

from psmc.ir.nodes import (
    Aggregator,
    Assign,
    Block,
    Component,
    Const,
    Expr,
    Eye,
    Index,
    IndexValue,
    Infinity,
    Op,
    Reduce,
    Ref,
    Sub,
)
from psmc.ir.rewrite import refs, transform

POOL = ("i", "j", "m", "n", "p", "s", "t", "u")
ONE = Const(Fraction(1))
_FOLD_BITS = 200  # numerator and denominator of a folded constant; what is larger stays an operation


# --- constants ----------------------------------------------------------------------------------


def fold(op: str, args: tuple[Expr, ...]) -> Expr:
    """`Op(op, args)` with exact rational arithmetic done. Raises TypeError as `Op` does."""
    if op == "neg" and isinstance(args[0], Infinity):
        return Infinity(not args[0].negative)
    if op == "neg" and isinstance(args[0], Const):
        return Const(-args[0].value)
    values = [a.value for a in args if isinstance(a, Const)]
    if len(values) == len(args) and all(_bits(v) <= _FOLD_BITS for v in values):
        folded = _arithmetic(op, values)
        if folded is not None and _bits(folded) <= _FOLD_BITS:
            return Const(folded)
    return Op(op, args)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _arithmetic(op: str, values: list[Fraction]) -> Fraction | None:
    match op, values:
        case "add", [x, y]:
            return x + y
        case "sub", [x, y]:
            return x - y
        case "mul", [x, y]:
            return x * y
        case "div", [x, y] if y:
            return x / y
        case "pow", [x, y] if y.denominator == 1 and (x or y >= 0) and (_bits(x) - 1) * abs(y) <= _FOLD_BITS:
            return Fraction(x ** int(y))
    return None


# --- reductions ---------------------------------------------------------------------------------


def tighten(root: Expr) -> Expr:
    """Fold constants and move factors that do not depend on the bound index out of every sum."""
    return transform(root, _tighten_rule)


def _tighten_rule(node: Expr) -> Expr | None:
    if isinstance(node, Op):
        return fold(node.op, node.args)
    if isinstance(node, Reduce) and node.op == "sum":
        return hoist(node)
    return None


def chain(node: Expr) -> list[tuple[str, Expr]]:
    """The left-nested product of `node`: (operator, factor) from the left; the first operator is 'mul'."""
    factors: list[tuple[str, Expr]] = []
    while isinstance(node, Op) and node.op in ("mul", "div"):
        factors.append((node.op, node.args[1]))
        node = node.args[0]
    factors.append(("mul", node))
    return factors[::-1]


def _product(start: Expr | None, factors: Iterable[tuple[str, Expr]]) -> Expr | None:
    for op, factor in factors:
        leads = start is None and op == "mul"
        start = factor if leads else fold(op, (start or ONE, factor))
    return start


def hoist(node: Reduce) -> Expr:
    """Leading independent factors go to the left of the sum, later ones to its right, each group in its order."""
    factors = chain(node.body)
    inner = [(op, f) for op, f in factors if node.index in f.free]
    if len(inner) == len(factors) or not inner:
        return node
    first = factors.index(inner[0])
    before = factors[:first]
    if inner[0][0] == "div" and before == [("mul", ONE)]:
        inner, before = factors[:1] + inner, []
    after = [(op, f) for op, f in factors[first:] if node.index not in f.free]
    if not before and not after:
        return node
    body = _product(None, inner)
    assert body is not None
    reduced = hoist(Reduce("sum", node.index, body))  # a bracketed product may lead now
    left = _product(None, before)
    outer = _product(reduced if left is None else fold("mul", (left, reduced)), after)
    assert outer is not None
    return outer


# --- index names --------------------------------------------------------------------------------


class Names:
    """The canonical index names of a spec: the pool without what the spec declares, then i1, j1, ..."""

    def __init__(self, declared: Iterable[str]) -> None:
        self._declared = frozenset(declared)
        self._known: list[str] = []
        self._source = self._generate()

    def _generate(self) -> Iterator[str]:
        number = 0
        while True:
            yield from (n for p in POOL if (n := f"{p}{number or ''}") not in self._declared)
            number += 1

    def __getitem__(self, position: int) -> str:
        while len(self._known) <= position:
            self._known.append(next(self._source))
        return self._known[position]


def canonical_assign(assign: Assign, names: Names) -> Assign:
    """The same definition, tight, with canonical index names."""
    indices = tuple(Index(names[n], i.dim) for n, i in enumerate(assign.indices))
    value = _rename(tighten(assign.value), dict(zip(assign.indices, indices, strict=True)), len(indices), names, {})
    return Assign(assign.name, indices, value)


_Memo = dict[tuple[Expr, int, tuple[tuple[Index, Index], ...]], Expr]


def _rename(node: Expr, env: Mapping[Index, Index], depth: int, names: Names, memo: _Memo) -> Expr:
    """One frame per level, so that every depth the parser lets through fits the stack."""
    bound = tuple(sorted((k, v) for k, v in env.items() if k in node.free))
    key = (node, depth, bound)
    if key in memo:
        return memo[key]
    out: Expr = node
    match node:
        case Op():
            args: list[Expr] = []
            for arg in node.args:
                args.append(_rename(arg, env, depth, names, memo))
            out = Op(node.op, tuple(args))
        case Reduce():
            index = Index(names[depth], node.index.dim)
            out = Reduce(node.op, index, _rename(node.body, {**env, node.index: index}, depth + 1, names, memo))
        case IndexValue():
            out = IndexValue(env.get(node.index, node.index))
        case Ref() | Eye():
            subs: list[Sub] = []
            for sub in node.subs if isinstance(node, Ref) else (node.row, node.col):
                if isinstance(sub, Index):
                    subs.append(env.get(sub, sub))
                elif isinstance(sub, Expr):
                    subs.append(_rename(sub, env, depth, names, memo))
                else:
                    subs.append(sub)
            if isinstance(node, Ref):
                out = Ref(node.space, node.name, tuple(subs), node.value_kind, node.lag)
            else:
                out = Eye(subs[0], subs[1])
    memo[key] = out
    return out


# --- whole aggregators --------------------------------------------------------------------------


def prune(block: Block) -> Block:
    """Drop lets that no result reads."""
    needed: set[str] = set()
    kept: list[Assign] = []
    needed.update(r.name for r in refs(*(a.value for a in block.results)) if r.space == "let")
    for let in reversed(block.lets):
        if let.name in needed:
            kept.append(let)
            needed.update(r.name for r in refs(let.value) if r.space == "let")
    return Block(tuple(reversed(kept)), block.results)


def declared_names(agg: Aggregator) -> frozenset[str]:
    """Every name an index must not take: dims, inputs, params, components, lets and outputs."""
    blocks = [b for b in (agg.lift, agg.combine, agg.recurrence, agg.readout) if isinstance(b, Block)]
    return frozenset(
        [d.name for d in agg.dims]
        + [t.name for t in (*agg.inputs, *agg.params)]
        + [c.name for c in agg.state]
        + [a.name for b in blocks for a in (*b.lets, *b.results)]
    )


def canonical(agg: Aggregator) -> Aggregator:
    """The whole spec in canonical form; idempotent. Lets that nothing reads are dropped."""
    pruned = replace(
        agg,
        lift=agg.lift and prune(agg.lift),
        combine=prune(agg.combine) if isinstance(agg.combine, Block) else agg.combine,
        recurrence=agg.recurrence and prune(agg.recurrence),
        readout=prune(agg.readout),
    )
    names = Names(declared_names(pruned))

    def block(b: Block) -> Block:
        order = {c.name: n for n, c in enumerate(agg.state)}
        results = tuple(canonical_assign(a, names) for a in b.results)
        if all(a.name in order for a in results) and b is not pruned.readout:
            results = tuple(sorted(results, key=lambda a: order[a.name]))
        return Block(tuple(canonical_assign(a, names) for a in b.lets), results)

    def component(c: Component) -> Component:
        return replace(
            c,
            identity=canonical_assign(c.identity, names),
            initial=c.initial and canonical_assign(c.initial, names),
        )

    return replace(
        pruned,
        state=tuple(component(c) for c in pruned.state),
        lift=pruned.lift and block(pruned.lift),
        combine=block(pruned.combine) if isinstance(pruned.combine, Block) else pruned.combine,
        recurrence=pruned.recurrence and block(pruned.recurrence),
        readout=block(pruned.readout),
    )


__all__ = ["Names", "canonical", "canonical_assign", "chain", "fold", "hoist", "prune", "tighten"]
