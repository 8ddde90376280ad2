"""Softmax attention inside a rule: a quotient of sums of exponentials over one or more sets of tokens.

    (Σ_m e^(a[n,m] - t[n]) v[m,d] + Σ_m e^(b[n,m] - t[n]) w[m,d]) / (Σ_m e^(a[n,m] - t[n]) + Σ_m e^(b[n,m] - t[n]))

with bilinear scores a[n,m] = Σ_e q[n,e] k[m,e] is attention of the queries q to the keys and values of all sets, one
after the other, whatever t is (a shift leaves a softmax alone; it is there against overflow, of which a kernel takes
care itself).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psmc.ir import Assign, Block, Expr, Index, Op, Reduce
from psmc.ir.canonical import ONE, Names, canonical_assign
from psmc.ir.query import signed_terms
from psmc.ir.rewrite import rename, walk

Factors = list[tuple[str, Expr]]  # ('mul' or 'div', factor)


@dataclass(frozen=True)
class Attention:
    """`node` over `indices`: batch axes, token n, width d. query [*batch, n, e], scaled; for each set of tokens keys
    [*batch, m, e] and values [*batch, m, d]."""

    node: Expr
    indices: tuple[Index, ...]
    query: Assign
    keys: tuple[Assign, ...]
    values: tuple[Assign, ...]


@dataclass(frozen=True)
class _Half:
    """Σ over `token` of e^exponent times `weight` (None: 1)."""

    token: Index
    exponent: Expr
    weight: Expr | None


def attentions(block: Block) -> tuple[Attention, ...]:
    """All of a block without lets, each once, in order."""
    found = (_match(node) for node in walk(*(a.value for a in block.results)))
    return tuple(f for f in found if f is not None)


def _match(node: Expr) -> Attention | None:
    if not (isinstance(node, Op) and node.op == "div" and node.kind == "real"):
        return None
    above, below = _halves(node.args[0]), _halves(node.args[1])
    if not above or not below or len(above) != len(below) or any(h.weight is not None for h in below):
        return None
    width = node.free - node.args[1].free
    rows = node.args[1].free
    if len(width) != 1:
        return None
    left = {_shape(h.exponent, h.token): h for h in below}
    parts: list[tuple[_Half, Factors, Factors, Index]] = []
    shifts = set()
    for half in above:
        score = _score(half)
        if half.weight is None or left.pop(_shape(half.exponent, half.token), None) is None or score is None:
            return None
        queries, keys, inner, shift = score
        shifts.add(shift)
        parts.append((half, queries, keys, inner))
    if left or len(shifts) > 1:
        return None
    return _assemble(node, rows, next(iter(width)), parts)


def _assemble(
    node: Expr, rows: frozenset[Index], width: Index, parts: Sequence[tuple[_Half, Factors, Factors, Index]]
) -> Attention | None:
    """The operands, if each reads only what it may."""
    read = [_free(keys) | (h.weight.free if h.weight is not None else frozenset()) for h, _, keys, _ in parts]
    tokens = [r for r in sorted(rows) if not any(r in free for free in read)]
    if len(tokens) != 1:
        return None
    batch = tuple(sorted(rows - set(tokens)))
    queries, keys, values = [], [], []
    for half, query, key, inner in parts:
        assert half.weight is not None
        queries.append(Assign("query", (*batch, tokens[0], inner), _product(query)))
        keys.append(Assign("keys", (*batch, half.token, inner), _product(key)))
        values.append(Assign("values", (*batch, half.token, width), half.weight))
    every = (*queries, *keys, *values)
    fits = all(a.value.free <= set(a.indices) and len(set(a.indices)) == len(a.indices) for a in every)
    if not fits or len({canonical_assign(q, Names(())).value for q in queries}) > 1:
        return None
    if len({tuple(i.dim for i in q.indices) for q in queries}) > 1:
        return None
    return Attention(node, (*batch, tokens[0], width), queries[0], tuple(keys), tuple(values))


def _halves(node: Expr) -> list[_Half] | None:
    """A sum of sums over tokens of exponentials, with weights; None if it is something else."""
    found = []
    for sign, term in signed_terms(node):
        outer = _factors(term)
        sums = [f for op, f in outer if op == "mul" and isinstance(f, Reduce) and f.op == "sum" and _powers(f)]
        if sign < 0 or len(sums) != 1:
            return None
        (whole,) = sums
        powers = _powers(whole)
        if len(powers) != 1:
            return None
        rest = [(op, f) for op, f in _factors(whole.body) if f is not powers[0]]
        rest += [(op, f) for op, f in outer if f is not whole]
        found.append(_Half(whole.index, powers[0].args[0], _product(rest) if rest else None))
    return found


def _powers(node: Reduce) -> list[Op]:
    """The exponentials of its own index among the factors of a sum."""
    factors = (f for op, f in _factors(node.body) if op == "mul")
    return [f for f in factors if isinstance(f, Op) and f.op == "exp" and node.index in f.free]


def _score(half: _Half) -> tuple[Factors, Factors, Index, frozenset[tuple[int, Expr]]] | None:
    """(factors of the query, of the key, the index that they share, the shift), if the score is bilinear."""
    terms = signed_terms(half.exponent)
    dependent = [(sign, t) for sign, t in terms if half.token in t.free]
    if len(dependent) != 1 or dependent[0][0] < 0:
        return None
    factors = _factors(dependent[0][1])
    inner = [f for op, f in factors if op == "mul" and half.token in f.free]
    scale = [(op, f) for op, f in factors if half.token not in f.free]
    if len(inner) != 1 or len(scale) + 1 != len(factors):
        return None
    (product,) = inner
    if not isinstance(product, Reduce) or product.op != "sum":
        return None
    body = _factors(product.body)
    keys = [(op, f) for op, f in body if half.token in f.free]
    queries = [(op, f) for op, f in body if half.token not in f.free]
    shift = frozenset((sign, _shape(t)) for sign, t in terms if half.token not in t.free)
    return [*queries, *scale], keys, product.index, shift


def _factors(node: Expr) -> Factors:
    """A product as its factors, brackets and signs aside."""
    match node:
        case Op(op="mul", args=(a, b)):
            return _factors(a) + _factors(b)
        case Op(op="div", args=(a, b)):
            return [*_factors(a), ("div", b)]
        case Op(op="neg", args=(a,)):
            return [("mul", Op("neg", (ONE,))), *_factors(a)]
    return [("mul", node)]


def _product(factors: Factors) -> Expr:
    out: Expr | None = None
    for op, factor in factors:
        out = factor if out is None and op == "mul" else Op(op, (ONE if out is None else out, factor))
    return ONE if out is None else out


def _free(factors: Factors) -> frozenset[Index]:
    return frozenset().union(*(f.free for _, f in factors))


def _shape(node: Expr, token: Index | None = None) -> Expr:
    """Equal for expressions that differ in the names of bound indices alone, and in that of `token`."""
    if token is not None:
        node = rename(node, {token: Index("@", token.dim)})
    order = tuple(sorted(node.free))
    named = canonical_assign(Assign("", order, node), Names(())).value
    back = {Index(Names(())[n], i.dim): Index(f"{i.name}@", i.dim) for n, i in enumerate(order)}
    return rename(named, back)
