"""Stabilised recurrences: C carried relative to exp(c·m), where m is another component with its own recurrence.

C' = α(prev.m, m) C + β(m) has coefficients that no element knows. With Ĉ = C·exp(c·m) they become free of m if
α = exp(c·prev.m - c·m)·α̂ and β = exp(-c·m)·β̂, and Ĉ' = α̂ Ĉ + β̂ lifts. Back in C, elements combine as
C = α̂_r exp(c·l.m - c·m) C_l + exp(c·r.m - c·m) C_r, in which no exponential exceeds 1 where m is a running maximum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from psmc.derive.semiring import split
from psmc.derive.simplify import ONE, ZERO, make
from psmc.ir import Assign, Const, Expr, Op, Reduce, Ref
from psmc.ir.query import signed_terms
from psmc.ir.rewrite import refs, transform, walk

Shift = tuple[Fraction, Ref]  # c and the reference to m after this token
_Weights = dict[Expr, Fraction]


class CannotRescaleError(Exception):
    """A coefficient still reads `node`, another component, after rescaling."""

    def __init__(self, node: Expr) -> None:
        super().__init__()
        self.node = node


def shifts(updates: Sequence[Assign]) -> tuple[Shift, ...]:
    """How the members are scaled: the weights of the components m in the exponents of their coefficients.

    `updates` are in the form of `newest`. m's weight is read off Ref('state', m) in exponents, where it is -c.
    """
    found: dict[Ref, Fraction] = {}
    for update in updates:
        for exponent in _exponents(update.value):
            for ref, weight in weights(exponent).items():
                if isinstance(ref, Ref) and ref.space == "state":
                    found.setdefault(ref, -weight)
    return tuple((c, ref) for ref, c in sorted(found.items(), key=lambda kv: (kv[0].name, str(kv[0].subs))))


def _exponents(root: Expr) -> Iterable[Expr]:
    return (n.args[0] for n in walk(root) if isinstance(n, Op) and n.op == "exp")


def rescaled(update: Assign, members: Sequence[str], by: tuple[Shift, ...]) -> Assign:
    """The update of Ĉ: affine in prev.C with coefficients free of every m in `by`. Raises CannotRescaleError."""
    hom, rest = split(update.value, lambda r: r.space == "prev" and r.name in members)
    now: _Weights = {ref: c for c, ref in by}
    before: _Weights = {Ref("prev", ref.name, ref.subs, ref.value_kind): -c for c, ref in by}
    total: Expr = ZERO
    if hom is not None:
        total = _checked(_times_exp(hom, {**now, **before}), members)
    if rest is not None:
        total = make("add", total, _checked(_times_exp(rest, now), members))
    return Assign(update.name, update.indices, total)


def _checked(value: Expr, members: Sequence[str]) -> Expr:
    for ref in refs(value):
        if ref.space == "state" or (ref.space == "prev" and ref.name not in members):
            raise CannotRescaleError(ref)
    return value


def _times_exp(node: Expr, by: _Weights) -> Expr:
    """node · exp(Σ weight·ref), the exponent merged into the exponentials that read its references."""
    scales = {r.name for r in by if isinstance(r, Ref)}
    match node:
        case Const(value=0):
            return node
        case Op(op=("add" | "sub") as op, args=(a, b)):
            return make(op, _times_exp(a, by), _times_exp(b, by))
        case Op(op="neg", args=(a,)):
            return make("neg", _times_exp(a, by))
        case Op(op="where", args=(test, a, b)):
            return make("where", test, _times_exp(a, by), _times_exp(b, by))
        case Reduce(op="sum", index=index, body=body) if not any(index in r.free for r in by):
            return Reduce("sum", index, _times_exp(body, by))
        case Op(op="mul", args=args) | Op(op="div", args=args):
            inner = [n for n, a in enumerate(args) if _is_sum(a) and _reads(a, scales)]
            if len(inner) == 1 and (node.op == "mul" or inner == [0]):
                return make(node.op, *(_times_exp(a, by) if n in inner else a for n, a in enumerate(args)))
    exponent = dict(by)
    body = _without_exp(node, Fraction(1), exponent, scales)
    return make("mul", make("exp", linear(exponent)), body)


def _is_sum(node: Expr) -> bool:
    return isinstance(node, Reduce) or (isinstance(node, Op) and node.op in ("add", "sub", "where", "neg"))


def _reads(node: Expr, names: set[str]) -> bool:
    return any(r.space in ("prev", "state") and r.name in names for r in refs(node))


def _without_exp(node: Expr, sign: Fraction, exponent: _Weights, scales: set[str]) -> Expr:
    """A product without its exponentials of the scales, whose exponents are added to `exponent`."""
    match node:
        case Op(op="exp", args=(x,)) if _reads(x, scales):
            for term, weight in weights(x).items():
                exponent[term] = exponent.get(term, Fraction(0)) + sign * weight
            return ONE
        case Op(op="mul", args=(a, b)):
            return make("mul", *(_without_exp(x, sign, exponent, scales) for x in (a, b)))
        case Op(op="div", args=(a, b)):
            return make("div", _without_exp(a, sign, exponent, scales), _without_exp(b, -sign, exponent, scales))
        case Op(op="neg", args=(a,)):
            return make("neg", _without_exp(a, sign, exponent, scales))
    return node


def weights(root: Expr) -> _Weights:
    """`root` as Σ weight · term, like terms collected, in the order in which terms first appear."""
    found: _Weights = {}
    for sign, term in signed_terms(root):
        weight = Fraction(sign)
        while isinstance(term, Op) and term.op in ("mul", "div"):
            a, b = term.args
            if isinstance(b, Const) and b.value:
                weight, term = weight * b.value if term.op == "mul" else weight / b.value, a
            elif isinstance(a, Const) and term.op == "mul":
                weight, term = weight * a.value, b
            else:
                break
        inner = (
            {ONE: term.value} if isinstance(term, Const) else weights(term) if _is_linear(term) else {term: Fraction(1)}
        )
        for atom, own in inner.items():
            found[atom] = found.get(atom, Fraction(0)) + weight * own
    return {t: w for t, w in found.items() if w}


def _is_linear(node: Expr) -> bool:
    return isinstance(node, Op) and node.op in ("add", "sub", "neg")


def linear(found: _Weights) -> Expr:
    """The inverse of `weights`; positive terms first."""
    total: Expr = ZERO
    for term, weight in sorted(found.items(), key=lambda kv: kv[1] < 0):
        if weight:
            scaled = make("mul", Const(abs(weight)), term)
            total = make("add" if weight > 0 else "sub", total, scaled)
    return total


def collect_exponents(root: Expr) -> Expr:
    """exp(i - i) and the like taken out: like terms of exponents are collected wherever that shortens them."""

    def rule(node: Expr) -> Expr | None:
        if not (isinstance(node, Op) and node.op == "exp"):
            return None
        collected = weights(node.args[0])
        shorter = len(collected) < len(signed_terms(node.args[0]))
        return make("exp", linear(collected)) if shorter else None

    return transform(root, rule)
