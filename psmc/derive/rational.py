"""Quotients of polynomials in the state, as far as a recurrence is written with + - * /.

Coefficients are polynomials over atoms: `whole` terms without the state, or (`expanded`) what their sums and products
are made of. So (P + R) - P is R, and P - P * P / (P + R) comes out as R * P / (P + R).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from psmc.derive.semiring import IsState, NotAffineError
from psmc.derive.simplify import ONE, ZERO, make
from psmc.ir import Const, Expr, Op, Ref
from psmc.ir.rewrite import refs, walk
from psmc.ir.text import show_expr

MAX_DEGREE = 4
MAX_TERMS = 64

Monomial = tuple[tuple[Expr, int], ...]  # atoms with powers, in the order of their text
Coefficient = Mapping[Monomial, Fraction]
Poly = tuple[Coefficient, ...]  # by power of the state; the last one is not zero


@dataclass(frozen=True)
class Quotient:
    num: Poly
    den: Poly


def quotient(root: Expr, is_state: IsState, expanded: bool) -> Quotient:
    """`root` as a quotient in lowest terms as far as equal denominators show. Raises NotAffineError."""
    reader = _Reader(is_state, expanded)
    for node in walk(root):
        reader.visit(node)
    return _reduced(reader.done[root], reader.factors)


class _Reader:
    def __init__(self, is_state: IsState, expanded: bool) -> None:
        self.is_state, self.expanded = is_state, expanded
        self.done: dict[Expr, Quotient] = {}
        self.factors: list[Poly] = []  # denominators met on the way

    def visit(self, node: Expr) -> None:
        if isinstance(node, Ref) and self.is_state(node):
            self.done[node] = Quotient(({}, {(): Fraction(1)}), _ONE)
            return
        if not any(self.is_state(r) for r in refs(node)):
            self.done[node] = self._free(node)
            return
        match node:
            case Op(op="where", args=(test, a, b)) if not any(self.is_state(r) for r in refs(test)):
                self.done[node] = _choice(test, self.done[a], self.done[b])
                return
            case Op(op="pow", args=(a, Const(value=power))) if power in (2, 3):
                once = self.done[a]
                self.done[node] = _mul(once, once if power == 2 else _mul(once, once))
                return
        rule = _RULES.get(node.op) if isinstance(node, Op) else None
        if rule is None:
            op = node.op if isinstance(node, Op) else "a reduction"
            raise NotAffineError(node, f"{op} of the state is not a quotient of polynomials")
        assert isinstance(node, Op)
        found = rule(*(self.done[a] for a in node.args))
        high = max(len(found.num), len(found.den)) > MAX_DEGREE
        if high or any(len(c) > MAX_TERMS for c in (*found.num, *found.den)):
            raise NotAffineError(node, "a quotient of polynomials of a high degree in the state")
        self.done[node] = found
        if node.op == "div":
            self.factors.append(self.done[node.args[1]].num)

    def _free(self, node: Expr) -> Quotient:
        if isinstance(node, Const):
            return Quotient(_poly({(): node.value}), _ONE)
        if self.expanded and isinstance(node, Op) and node.op in ("add", "sub", "mul", "neg"):
            return _RULES[node.op](*(self.done[a] for a in node.args))
        return Quotient(_poly({((node, 1),): Fraction(1)}), _ONE)


# --- arithmetic ---------------------------------------------------------------------------------------


def _poly(*coefficients: Coefficient) -> Poly:
    kept = [{m: c for m, c in x.items() if c} for x in coefficients]
    while kept and not kept[-1]:
        kept.pop()
    return tuple(kept)


_ONE: Poly = _poly({(): Fraction(1)})


def _plus(a: Poly, b: Poly, sign: int = 1) -> Poly:
    size = max(len(a), len(b))
    out: list[dict[Monomial, Fraction]] = [dict(a[n]) if n < len(a) else {} for n in range(size)]
    for n, coefficient in enumerate(b):
        for m, c in coefficient.items():
            out[n][m] = out[n].get(m, Fraction(0)) + sign * c
    return _poly(*out)


def _times(a: Poly, b: Poly) -> Poly:
    out: list[dict[Monomial, Fraction]] = [{} for _ in range(len(a) + len(b) - 1 if a and b else 0)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            for m, c in x.items():
                for n, d in y.items():
                    mn = _product(m, n)
                    out[i + j][mn] = out[i + j].get(mn, Fraction(0)) + c * d
    return _poly(*out)


def _product(a: Monomial, b: Monomial) -> Monomial:
    powers = dict(a)
    for atom, power in b:
        powers[atom] = powers.get(atom, 0) + power
    return tuple(sorted(powers.items(), key=lambda kv: show_expr(kv[0])))


def _sum(a: Quotient, b: Quotient, sign: int = 1) -> Quotient:
    if a.den == b.den:
        return _lowest(_plus(a.num, b.num, sign), a.den)
    return _lowest(_plus(_times(a.num, b.den), _times(b.num, a.den), sign), _times(a.den, b.den))


def _mul(a: Quotient, b: Quotient) -> Quotient:
    if a.den == b.num:
        return _lowest(a.num, b.den)
    if b.den == a.num:
        return _lowest(b.num, a.den)
    return _lowest(_times(a.num, b.num), _times(a.den, b.den))


def _div(a: Quotient, b: Quotient) -> Quotient:
    if a.den == b.den:
        return _lowest(a.num, b.num)
    return _mul(a, Quotient(b.den, b.num))


def _reduced(x: Quotient, factors: Sequence[Poly]) -> Quotient:
    """Without those of `factors` that divide both, which a sum over a common denominator may have in it twice."""
    for factor in factors:
        while len(factor) > 1 and len(x.den) > 2:
            num, den = _divided(x.num, factor), _divided(x.den, factor)
            if num is None or den is None:
                break
            x = Quotient(num, den)
    return x


def _divided(a: Poly, by: Poly) -> Poly | None:
    """a / by where that is a polynomial; None also where the leading coefficient of `by` is a sum."""
    if len(by[-1]) != 1:
        return None
    ((lead, weight),) = by[-1].items()
    out: Poly = ()
    while len(a) >= len(by):
        term: dict[Monomial, Fraction] = {}
        for monomial, c in a[-1].items():
            powers = dict(monomial)
            for atom, power in lead:
                powers[atom] = powers.get(atom, 0) - power
            if min(powers.values(), default=0) < 0:
                return None
            term[tuple((atom, n) for atom, n in powers.items() if n)] = c / weight
        step: Poly = (*({},) * (len(a) - len(by)), term)
        out, a = _plus(out, step), _plus(a, _times(step, by), -1)
    return None if a else out


def _choice(test: Expr, a: Quotient, b: Quotient) -> Quotient:
    """where(test, a, b), coefficient by coefficient."""

    def one(x: Poly, y: Poly) -> Poly:
        return _poly(*(atom(make("where", test, coefficient(x, n), coefficient(y, n))) for n in range(len(x) + len(y))))

    def atom(c: Expr) -> Coefficient:
        return {(): c.value} if isinstance(c, Const) else {((c, 1),): Fraction(1)}

    return Quotient(one(a.num, b.num), one(a.den, b.den))


def _lowest(num: Poly, den: Poly) -> Quotient:
    """Without powers of the state that both have."""
    while num and den and not num[0] and not den[0]:
        num, den = num[1:], den[1:]
    return Quotient(_ONE, _ONE) if num == den else Quotient(num, den)


_RULES: dict[str, Callable[..., Quotient]] = {
    "add": _sum,
    "sub": lambda a, b: _sum(a, b, -1),
    "mul": _mul,
    "div": _div,
    "neg": lambda a: Quotient(_plus((), a.num, -1), a.den),
}


def coefficient(poly: Poly, power: int) -> Expr:
    """As an expression, positive terms first."""
    if power >= len(poly):
        return ZERO
    total: Expr = ZERO
    terms = sorted(poly[power].items(), key=lambda kv: kv[1] < 0)
    for monomial, weight in terms:
        term: Expr = ONE
        for atom, exponent in monomial:
            for _ in range(exponent):
                term = make("mul", term, atom)
        term = make("mul", Const(abs(weight)), term)
        total = make("add" if weight > 0 else "sub", total, term)
    return total
