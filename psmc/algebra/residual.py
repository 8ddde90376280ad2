"""What an unfinished proof has left to show, as .psm text."""

from __future__ import annotations

from fractions import Fraction
from functools import reduce
from typing import Any

from psmc.algebra.equality import Outcome
from psmc.algebra.terms import Atom, Mono, Poly, Term
from psmc.ir import Const, DimValue, Expr, Eye, Index, IndexValue, Op, Reduce, Ref, Sub
from psmc.ir.text import show_expr

_LIMIT = 400
_LETTERS = ["m", "n", "p", "s", "t", "u", "v", "w"]


def residual_text(component: str, outcome: Outcome) -> str:
    """`component: left - right = 0`, and the case it was left in."""
    if outcome.residual is None:
        return f"{component}: {outcome.reason}"
    text = f"{component}: {shown(outcome.residual)} = 0"
    if outcome.facts is not None and outcome.facts.cases:
        cases = (f"{shown(c.poly)} {'>' if c.strict else '>='} 0" for c in outcome.facts.cases)
        text += ", where " + " and ".join(cases)
    return text


def shown(poly: Poly) -> str:
    try:
        text = show_expr(expression(poly))
    except TypeError:  # an operator of reals on something real that is written with the imaginary unit
        text = poly.key
    return text if len(text) <= _LIMIT else text[:_LIMIT] + " …"


def expression(poly: Poly) -> Expr:
    """A normal form as an IR expression."""
    return _Printer().poly(poly)


class _Printer:
    def __init__(self) -> None:
        self.names: dict[Index, Index] = {}

    def poly(self, poly: Poly) -> Expr:
        if not poly:
            return Const(Fraction(0))
        terms = sorted(poly, key=lambda t: (t[1] < 0, t[0].key))
        out: Expr | None = None
        for mono, coef in terms:
            size = self.mono(mono, abs(coef))
            if out is None:
                out = Op("neg", (size,)) if coef < 0 else size
            else:
                out = Op("sub" if coef < 0 else "add", (out, size))
        assert out is not None
        return out

    def mono(self, mono: Mono, coef: Fraction) -> Expr:
        self.bind(mono.bound)
        top = [self.factor(a, p) for a, p in mono.factors if p > 0]
        bottom = [self.factor(a, -p) for a, p in mono.factors if p < 0]
        if coef.numerator != 1 or not top:
            top.insert(0, Const(Fraction(coef.numerator)))
        if coef.denominator != 1:
            bottom.insert(0, Const(Fraction(coef.denominator)))
        out = reduce(lambda x, y: Op("mul", (x, y)), top)
        if bottom:
            out = Op("div", (out, reduce(lambda x, y: Op("mul", (x, y)), bottom)))
        for index in reversed(mono.bound):
            out = Reduce("sum", self.index(index), out)
        return out

    def bind(self, bound: tuple[Index, ...]) -> None:
        for index in bound:
            used = {i.name for i in self.names.values()}
            free = [n for n in _LETTERS if n not in used]
            self.names[index] = Index(free[0] if free else f"m_{len(used)}", index.dim)

    def index(self, index: Index) -> Index:
        if index not in self.names and index.name.startswith("~"):  # bound further out, by something not shown
            self.bind((index,))
        return self.names.get(index, index)

    def sub(self, sub: Any) -> Sub:
        return self.index(sub) if isinstance(sub, Index) else self.poly(sub) if isinstance(sub, Poly) else int(sub)

    def factor(self, atom: Atom, p: Fraction) -> Expr:
        base = self.atom(atom)
        if p == 1:
            return base
        return Op("sqrt", (base,)) if p == Fraction(1, 2) else Op("pow", (base, Const(p)))

    def atom(self, atom: Atom) -> Expr:
        args = atom.args
        match atom.tag:
            case "elem":
                name, kind, conjugated, *subs = args
                ref = Ref("state", name, tuple(map(self.sub, subs)), kind)
                return Op("conj", (ref,)) if conjugated else ref
            case "i":
                return Op("complex", (Const(Fraction(0)), Const(Fraction(1))))
            case "dim":
                return DimValue(args[0])
            case "index":
                return IndexValue(self.index(args[0]))
            case "prime":
                return Const(Fraction(args[0]))
            case "eye":
                return Eye(self.sub(args[0]), self.sub(args[1]))
            case "pos" | "zero":
                test = Op("gt" if atom.tag == "pos" else "eq", (self.poly(args[0]), Const(Fraction(0))))
                return Op("where", (test, Const(Fraction(1)), Const(Fraction(0))))
            case "max":
                return reduce(lambda x, y: Op("max", (x, y)), [self.term(t, "max") for t in args[0]])
            case "prod":
                return self.term(args[0][0], "prod")
            case "base":
                return self.poly(args[0])
            case "pow":
                return Op("pow", tuple(map(self.poly, args)))
        return Op(_FUNCTIONS.get(atom.tag, atom.tag), tuple(map(self.poly, args)))

    def term(self, term: Term, op: str) -> Expr:
        self.bind(term.bound)
        out: Expr = reduce(lambda x, y: Op("min", (x, y)), [self.poly(lit) for lit in term.lits])
        for index in reversed(term.bound):
            out = Reduce(op, self.index(index), out)
        return out


_FUNCTIONS = {"plog": "log", "flog": "log", "clog": "log"}
