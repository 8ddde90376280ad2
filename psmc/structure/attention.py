"""Softmax attention inside a rule: a quotient of sums of exponentials over one or more sets of tokens.

    (Σ_m e^(a[n,m] - t[n]) v[m,d] + Σ_m e^(b[n,m] - t[n]) w[m,d]) / (Σ_m e^(a[n,m] - t[n]) + Σ_m e^(b[n,m] - t[n]))

with bilinear scores a[n,m] = s Σ_e q[n,e] k[m,e] is attention of the queries q to the keys and values of all sets, one
after the other, whatever t is (a shift leaves a softmax alone; it is there against overflow, of which a kernel takes
care itself). where(c[n,m], a[n,m], -inf) as a score, or where(c[n,m], e^.., 0) as its exponential, is a mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from psmc.ir import Assign, Block, Const, Expr, Index, Infinity, Op, Reduce
from psmc.ir.canonical import ONE, Names, canonical_assign
from psmc.ir.query import Terms, signed_terms
from psmc.ir.rewrite import refs, rename, walk
from psmc.ir.text import show_expr

Factors = list[tuple[str, Expr]]  # ('mul' or 'div', factor)


@dataclass(frozen=True)
class Attention:
    """What `places` are: (node, its indices: batch axes, token n, width d) each, equal but for the names of indices.

    query   [*batch, n, e]; `scale`, of numbers and sizes of dims alone, multiplies it
    keys    of each set of tokens [*batch, m, e], values [*batch, m, d]
    masks   of each set, over n and m, true where a token is seen; None: everywhere. They read no tensor.
    """

    places: tuple[tuple[Expr, tuple[Index, ...]], ...]
    query: Assign
    scale: Expr
    keys: tuple[Assign, ...]
    values: tuple[Assign, ...]
    masks: tuple[Assign | None, ...]


@dataclass(frozen=True)
class _Half:
    """Σ over `token` of e^exponent where `mask` holds (None: everywhere), times `weight` (None: 1)."""

    token: Index
    exponent: Terms
    mask: Expr | None
    weight: Expr | None

    @property
    def shape(self) -> object:
        """Equal for halves that differ in their weights and in the names of bound indices alone."""
        terms = Counter((sign, _shape(t, self.token)) for sign, t in self.exponent)
        return frozenset(terms.items()), None if self.mask is None else _shape(self.mask, self.token)


@dataclass(frozen=True)
class _Score:
    """A half whose score is bilinear: factors of query and key, the index that they share, the shift."""

    half: _Half
    query: Factors
    key: Factors
    inner: Index
    shift: frozenset[object]


def attentions(block: Block) -> tuple[Attention, ...]:
    """All of a block without lets, each once, in order."""
    found: dict[Expr, Attention] = {}
    for node in walk(*(a.value for a in block.results)):
        one = _match(node)
        if isinstance(one, Attention):
            ((_, indices),) = one.places
            kind = canonical_assign(Assign("", indices, node), Names(())).value
            first = found.setdefault(kind, one)
            if first is not one:
                found[kind] = replace(first, places=(*first.places, *one.places))
    return tuple(found.values())


def almost(block: Block) -> tuple[str, ...]:
    """Of the quotients of sums of exponentials that are no attention as above: why not."""
    found = (_match(node) for node in walk(*(a.value for a in block.results)))
    return tuple(dict.fromkeys(f for f in found if isinstance(f, str)))


def _match(node: Expr) -> Attention | str | None:
    if not (isinstance(node, Op) and node.op == "div" and node.kind == "real"):
        return None
    above, below = _halves(node.args[0]), _halves(node.args[1])
    if not above or not below:
        return None
    width = node.free - node.args[1].free
    if any(h.weight is None for h in above) or any(h.weight is not None for h in below) or len(width) != 1:
        return "what it divides by is not the sum of its own weights"
    left = {h.shape: h for h in below}
    if len(above) != len(below) or any(left.pop(h.shape, None) is None for h in above):
        return "the exponentials above and below the fraction differ"
    scores = []
    for half in above:
        score = _score(half)
        if isinstance(score, str):
            return score
        scores.append(score)
    if len({s.shift for s in scores}) > 1:
        return "the sets of tokens have scores that are shifted differently"
    return _assemble(node, node.args[1].free, next(iter(width)), scores)


def _assemble(node: Expr, rows: frozenset[Index], width: Index, scores: Sequence[_Score]) -> Attention | str:
    """The operands, if each reads only what it may."""
    read = [_free(s.key) | (s.half.weight.free if s.half.weight is not None else frozenset()) for s in scores]
    tokens = [r for r in sorted(rows) if not any(r in free for free in read)]
    if len(tokens) != 1:
        return "there is no one axis of queries that keys and values are without"
    batch = tuple(sorted(rows - set(tokens)))
    queries, keys, values, masks = [], [], [], []
    for s in scores:
        assert s.half.weight is not None
        queries.append(Assign("query", (*batch, tokens[0], s.inner), _product(s.query)))
        keys.append(Assign("keys", (*batch, s.half.token, s.inner), _product(s.key)))
        values.append(Assign("values", (*batch, s.half.token, width), s.half.weight))
        seen = s.half.mask
        masks.append(None if seen is None else Assign("mask", (tokens[0], s.half.token), seen))
    every = (*queries, *keys, *values)
    if not all(a.value.free <= set(a.indices) and len(set(a.indices)) == len(a.indices) for a in every):
        return "queries, keys and values are not matrices of their own tokens"
    for mask in masks:
        if mask is not None and (not mask.value.free <= set(mask.indices) or any(True for _ in refs(mask.value))):
            return f"the mask {show_expr(mask.value)} reads more than the places of two tokens"
    kinds = {(canonical_assign(q, Names(())).value, q.indices[-1].dim) for q in queries}
    if len(kinds) > 1:
        return "the sets of tokens are asked with different queries"
    fixed = [(op, f) for op, f in scores[0].query if not f.free and not any(True for _ in refs(f))]
    rest = [x for x in scores[0].query if x not in fixed]
    query = Assign("query", queries[0].indices, _product(rest))
    places = ((node, (*batch, tokens[0], width)),)
    return Attention(places, query, _product(fixed), tuple(keys), tuple(values), tuple(masks))


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
        ((power, exponent, mask),) = powers
        rest = [(op, f) for op, f in _factors(whole.body) if f is not power]
        rest += [(op, f) for op, f in outer if f is not whole]
        exponent, mask = _seen(exponent, mask)
        found.append(_Half(whole.index, exponent, mask, _product(rest) if rest else None))
    return found


def _powers(node: Reduce) -> list[tuple[Expr, Terms, Expr | None]]:
    """The exponentials of its own index among the factors of a sum: (factor, exponent, where it is not 0)."""
    found: list[tuple[Expr, Terms, Expr | None]] = []
    for op, factor in _factors(node.body):
        power, mask = factor, None
        if isinstance(factor, Op) and factor.op == "where":
            chosen = _chosen(factor, Const(Fraction(0)))
            if chosen is not None:
                mask, power = chosen
        if op == "mul" and isinstance(power, Op) and power.op == "exp" and node.index in power.free:
            found.append((factor, signed_terms(power.args[0]), mask))
    return found


def _seen(exponent: Terms, mask: Expr | None) -> tuple[Terms, Expr | None]:
    """The terms of an exponent without where(c, term, -inf), and all such c."""
    plain: list[tuple[int, Expr]] = []
    for sign, term in exponent:
        chosen = None
        if sign > 0 and isinstance(term, Op) and term.op == "where":
            chosen = _chosen(term, Infinity(negative=True))
        if chosen is None:
            plain.append((sign, term))
            continue
        condition, value = chosen
        inner, mask = _seen(signed_terms(value), condition if mask is None else Op("and", (mask, condition)))
        plain += [x for x in inner if x[1] is not Const(Fraction(0))]
    return tuple(plain), mask


def _chosen(node: Op, otherwise: Expr) -> tuple[Expr, Expr] | None:
    """(c, a) of where(c, a, otherwise), or of where(not c, otherwise, a)."""
    condition, a, b = node.args
    if b is otherwise:
        return condition, a
    return (Op("not", (condition,)), b) if a is otherwise else None


def _score(half: _Half) -> _Score | str:
    """Read as a bilinear score and a shift, or why that cannot be."""
    dependent = [(sign, t) for sign, t in half.exponent if half.token in t.free]
    shown = " + ".join(show_expr(t) for _, t in dependent)
    wrong = f"the score {shown if len(shown) < 60 else f'{shown[:57]}...'} is not one sum of query times key"
    if len(dependent) != 1 or dependent[0][0] < 0:
        return wrong
    factors = _factors(dependent[0][1])
    inner = [f for op, f in factors if op == "mul" and half.token in f.free]
    scale = [(op, f) for op, f in factors if half.token not in f.free]
    if len(inner) != 1 or len(scale) + 1 != len(factors):
        return wrong
    (product,) = inner
    if not isinstance(product, Reduce) or product.op != "sum":
        return wrong
    body = _factors(product.body)
    keys = [(op, f) for op, f in body if half.token in f.free]
    queries = [(op, f) for op, f in body if half.token not in f.free]
    shift = Counter((sign, _shape(t)) for sign, t in half.exponent if half.token not in t.free)
    return _Score(half, [*queries, *scale], keys, product.index, frozenset(shift.items()))


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
