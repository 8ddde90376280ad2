"""Sums against the identity matrix: Σ_m eye(i, m) x[m] = x[i], in any semiring, found through products and sums."""

from __future__ import annotations

from psmc.derive.semiring import PLUS_TIMES, Semiring
from psmc.derive.simplify import ONE, ZERO, make, simplify
from psmc.ir import Const, Expr, Eye, Index, Op, Sub
from psmc.ir.canonical import tighten
from psmc.ir.rewrite import rename, transform, walk

_Factors = tuple[tuple[str, Expr], ...]  # ("mul" or "div", factor), in order


def contract(root: Expr, ring: Semiring = PLUS_TIMES) -> Expr:
    """`root` without identity matrices under a sum over their index; factors free of a sum's index leave it."""
    return tighten(simplify(transform(root, lambda n: _rule(n, ring))))


def _rule(node: Expr, ring: Semiring) -> Expr | None:
    if isinstance(node, Eye):
        return _eye(node)
    found = ring.reduction(node)
    if found is not None and _unit_inside(found[1], found[0]):
        return _product_over(found[0], ((ring.times, found[1]),), ring)
    return None


def _eye(node: Eye) -> Expr | None:
    if node.row == node.col:
        return ONE
    row, col = (s.value if isinstance(s, Const) else s for s in (node.row, node.col))
    if isinstance(row, (Index, Expr)) or isinstance(col, (Index, Expr)):
        return None
    return ONE if row == col else ZERO


def _unit_inside(body: Expr, index: Index) -> bool:
    if index not in body.free:
        return False
    return any(isinstance(n, Eye) and index in n.free and index in (n.row, n.col) for n in walk(body))


def unit_at(node: Expr, index: Index, ring: Semiring) -> Sub | None:
    """e where `node` is the identity matrix at (index, e) and e is free of index."""
    eye = node
    if ring.reduce != "sum":
        match node:
            case Op(op="where", args=(Op(op="eq", args=(Eye() as eye, Const(value=1))), one, zero)):
                if one != ring.one or zero != ring.zero:
                    return None
            case _:
                return None
    if not isinstance(eye, Eye):
        return None
    for this, other in ((eye.row, eye.col), (eye.col, eye.row)):
        if this == index and other != index and not (isinstance(other, Expr) and index in other.free):
            return other
    return None


def _product_over(index: Index, factors: _Factors, ring: Semiring) -> Expr:
    """⊕ over `index` of a product, taken apart at the factor that hides the identity matrix."""
    factors = tuple(f for op, node in factors for f in _flat(op, node, ring))
    for n, (op, node) in enumerate(factors):
        position = unit_at(node, index, ring) if op == ring.times else None
        if position is not None:
            rest = factors[:n] + factors[n + 1 :]
            return _eye_free(rename(_chain(rest, ring), {index: position}))
    for n, (op, node) in enumerate(factors):
        if op != ring.times or not _unit_inside(node, index):
            continue

        def put(inner: Expr, n: int = n) -> Expr:
            return _product_over(index, (*factors[:n], (ring.times, inner), *factors[n + 1 :]), ring)

        match node:
            case Op(op=plus, args=(a, b)) if plus == ring.plus or (plus == "sub" and ring.reduce == "sum"):
                return make(plus, put(a), put(b))
            case Op(op="neg", args=(a,)) if ring.reduce == "sum":
                return make("neg", put(a))
            case Op(op="where", args=(test, a, b)) if index not in test.free:
                return make("where", test, put(a), put(b))
        if (found := ring.reduction(node)) is not None:
            others = (*factors[:n], *factors[n + 1 :])
            if not any(found[0] in f.free for _, f in others):
                return _reduced(found[0], put(found[1]), ring)
    return _reduced(index, _chain(factors, ring), ring)


def _reduced(index: Index, body: Expr, ring: Semiring) -> Expr:
    return body if body == ring.zero else ring.over(index, body)


def _flat(op: str, node: Expr, ring: Semiring) -> _Factors:
    if op == ring.times and isinstance(node, Op) and node.op in (ring.times, ring.inverse):
        return (*_flat(ring.times, node.args[0], ring), *_flat(node.op, node.args[1], ring))
    return ((op, node),)


def _chain(factors: _Factors, ring: Semiring) -> Expr:
    out: Expr = ring.one
    for op, node in factors:
        out = make(op, out, node) if op != ring.times else ring.mul(out, node)
    return out


def _eye_free(root: Expr) -> Expr:
    return simplify(transform(root, lambda n: _eye(n) if isinstance(n, Eye) else None))
