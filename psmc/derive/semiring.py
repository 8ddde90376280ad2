"""Semirings in which a recurrence can be affine, and the split of an expression into a homogeneous part and the rest.

In a semiring (⊕, ⊗) a map s ↦ A ⊗ s ⊕ b composes to (A2 A1, A2 b1 ⊕ b2). (+, *) covers the affine models, (max, +)
running maxima with a decay (the stabiliser of an exponential gate), (logaddexp, +) log-sum-exp, (max, *) peaks that
leak, (max, min) bottlenecks and, on 0 and 1, reachability.

A minimum over an index is written as -max[i] -(...); semirings whose ⊕ is min read and write it like that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from psmc.derive.simplify import ONE, ZERO, make
from psmc.ir import Expr, Eye, Index, Infinity, Op, Reduce, Ref, Sub
from psmc.ir.rewrite import walk

IsState = Callable[[Ref], bool]


@dataclass(frozen=True)
class Semiring:
    """⊕ is `plus`, ⊗ is `times`; `reduce` is ⊕ over an index, if the language has it, and of negated terms if `dual`.

    With `positive_factors`, ⊗ keeps ⊕ only for some factors; `is_positive` decides which are: > 0, or where the zero is
    a number (`non_negative`: states and injections are >= 0 as well) >= 0.
    """

    plus: str
    times: str
    zero: Expr
    one: Expr
    reduce: str | None = None
    positive_factors: bool = False
    is_positive: Callable[[Expr], bool] = field(default=lambda _: False, compare=False)
    dual: bool = False
    non_negative: bool = False

    @property
    def inverse(self) -> str | None:
        """The operator that undoes ⊗."""
        return {"mul": "div", "add": "sub"}.get(self.times)

    def over(self, index: Index, body: Expr) -> Expr:
        """⊕ over `index`."""
        assert self.reduce is not None
        if self.dual:
            return make("neg", Reduce(self.reduce, index, make("neg", body)))
        return Reduce(self.reduce, index, body)

    def reduction(self, node: Expr) -> tuple[Index, Expr] | None:
        """The inverse of `over`: the index and body where `node` is a ⊕ over an index."""
        match node:
            case Op(op="neg", args=(Reduce(op=op, index=index, body=body),)) if self.dual and op == self.reduce:
                return index, negated(body)
            case Reduce(op=op, index=index, body=body) if not self.dual and op == self.reduce:
                return index, body
        return None

    def unit(self, row: Sub, col: Sub) -> Expr:
        """The identity matrix at (row, col)."""
        if self.reduce == "sum":
            return Eye(row, col)
        return make("where", Op("eq", (Eye(row, col), ONE)), self.one, self.zero)

    def add(self, a: Expr | None, b: Expr | None) -> Expr | None:
        """a ⊕ b, where None is the zero."""
        if a is None or a == self.zero:
            return b
        return a if b is None or b == self.zero else make(self.plus, a, b)

    def mul(self, a: Expr, b: Expr) -> Expr:
        """a ⊗ b, simplified at the unit and the zero."""
        if self.zero in (a, b):
            return self.zero
        if a == self.one:
            return b
        return a if b == self.one else make(self.times, a, b)


_NEVER, _EVER = Infinity(True), Infinity(False)
PLUS_TIMES = Semiring("add", "mul", ZERO, ONE, "sum")
MAX_PLUS = Semiring("max", "add", _NEVER, ZERO, "max")
MIN_PLUS = Semiring("min", "add", _EVER, ZERO, "max", dual=True)
LOG_PLUS = Semiring("logaddexp", "add", _NEVER, ZERO)
PEAK = Semiring("max", "mul", ZERO, ONE, "max", True, non_negative=True)
MAX_TIMES = Semiring("max", "mul", _NEVER, ONE, None, True)
MIN_TIMES = Semiring("min", "mul", _EVER, ONE, None, True)
MAX_MIN = Semiring("max", "min", _NEVER, _EVER, "max")
MIN_MAX = Semiring("min", "max", _EVER, _NEVER, "max", dual=True)

# Tried in this order; a component that never meets max, min or logaddexp is judged by the first.
SEMIRINGS = (PLUS_TIMES, MAX_PLUS, MIN_PLUS, LOG_PLUS, PEAK, MAX_TIMES, MIN_TIMES, MAX_MIN, MIN_MAX)


def negated(node: Expr) -> Expr:
    """-node, the sign moved to where terms do not carry it as a sum."""
    match node:
        case Op(op="sub", args=(a, b)):
            return make("add", negated(a), b)
        case Op(op="add", args=(a, b)):
            return make("add", negated(a), negated(b))
        case Op(op="max" | "min" as op, args=(a, b)):
            return make("min" if op == "max" else "max", negated(a), negated(b))
        case Op(op="where", args=(test, a, b)):
            return make("where", test, negated(a), negated(b))
    return make("neg", node)


class NotAffineError(Exception):
    """`node` is the smallest expression that is not affine in the state; `why`, in words; `advice`: what helps."""

    def __init__(self, node: Expr, why: str, advice: str = "") -> None:
        super().__init__(why)
        self.node = node
        self.why = why
        self.advice = advice


class NotPositiveError(NotAffineError):
    """It would be, were `factor` in `node` known to be positive."""

    def __init__(self, node: Expr, factor: Expr) -> None:
        super().__init__(node, "a factor not known to be positive does not pass through a maximum or minimum")
        self.factor = factor


Parts = tuple[Expr | None, Expr | None]
_Done = dict[Expr, Parts | NotAffineError]


def split(root: Expr, is_state: IsState, ring: Semiring = PLUS_TIMES) -> Parts:
    """(hom, rest) with root = hom ⊕ rest, hom homogeneous in the state, rest free of it; None stands for zero.

    Raises NotAffineError.
    """
    done: _Done = {}
    for node in walk(root):
        try:
            done[node] = _split(node, is_state, ring, done)
        except NotAffineError as error:  # of no matter where -max[i] -x is a minimum
            done[node] = error
    return _of(done, root)


def _of(done: _Done, node: Expr) -> Parts:
    found = done[node]
    if isinstance(found, NotAffineError):
        raise found
    return found


def _split(node: Expr, is_state: IsState, ring: Semiring, done: _Done) -> Parts:
    if ring.dual and (least := ring.reduction(node)) is not None:
        return _reduced(least[0], split(least[1], is_state, ring), node, ring)
    match node:
        case Ref(subs=subs):
            if any(isinstance(s, Expr) and _of(done, s)[0] is not None for s in subs):
                raise NotAffineError(node, "a gather at a position that depends on the state")
            return (node, None) if is_state(node) else (None, node)
        case Eye(row=row, col=col):
            if any(isinstance(s, Expr) and _of(done, s)[0] is not None for s in (row, col)):
                raise NotAffineError(node, "a position that depends on the state")
        case Reduce(op=op, index=index, body=body):
            parts = _of(done, body)
            if parts[0] is not None and (op != ring.reduce or ring.dual):
                raise NotAffineError(node, f"{op} over '{index.name}' of the state is not affine")
            return _reduced(index, parts, node, ring)
        case Op(op=op, args=args):
            of = [_of(done, a) for a in args]
            if all(hom is None for hom, _ in of):
                return None, node
            return _operator(node, op, of, ring)
    return None, node


def _reduced(index: Index, parts: Parts, node: Expr, ring: Semiring) -> Parts:
    hom, rest = parts
    if hom is None:
        return None, node
    return ring.over(index, hom), None if rest is None else ring.over(index, rest)


def _operator(node: Op, op: str, parts: list[Parts], ring: Semiring) -> Parts:
    if op == ring.plus:
        (h1, r1), (h2, r2) = parts
        return ring.add(h1, h2), ring.add(r1, r2)
    if op == "relu" and ring.plus == "max":
        ((hom, rest),) = parts
        return hom, ring.add(rest, ZERO)
    if op == "where":
        if parts[0][0] is not None:
            raise NotAffineError(node, "a choice that depends on the state is not affine")
        test, a, b = node.args[0], parts[1], parts[2]
        if ring.positive_factors and not ring.non_negative and any((a[n] is None) != (b[n] is None) for n in (0, 1)):
            # The zero is infinite: no factor, and as an injection it would meet factors and their gradients.
            raise NotAffineError(node, "a choice between a map with a bound and one without")
        hom, rest = (make("where", test, a[n] or ring.zero, b[n] or ring.zero) for n in (0, 1))
        return hom, None if rest == ring.zero else rest
    rules = _PLUS_TIMES if ring.times == "mul" and ring.plus == "add" else _SCALING[ring.times]
    rule = rules.get(op)
    if rule is None:
        raise NotAffineError(node, _reason(op))
    return rule(node, parts, ring)


def _reason(op: str) -> str:
    if op in ("lt", "le", "gt", "ge", "eq", "ne"):
        return "a condition on the state is not affine"
    words = {"max": "a maximum with", "min": "a minimum with", "mul": "a product with", "stop": "stop() of"}
    return f"{words.get(op, f'{op} of')} the state is not affine"


def _each(op: str, parts: list[Parts]) -> Parts:
    """`op` applied to both parts; for operators that keep zero."""
    ((hom, rest),) = parts
    return None if hom is None else make(op, hom), None if rest is None else make(op, rest)


def _neg(node: Op, parts: list[Parts], ring: Semiring) -> Parts:
    return _each("neg", parts)


def _sub(node: Op, parts: list[Parts], ring: Semiring) -> Parts:
    def minus(a: Expr | None, b: Expr | None) -> Expr | None:
        if b is None:
            return a
        return make("neg", b) if a is None else make("sub", a, b)

    (h1, r1), (h2, r2) = parts
    return minus(h1, h2), minus(r1, r2)


def _complex(node: Op, parts: list[Parts], ring: Semiring) -> Parts:
    hom, rest = (make("complex", *(p[n] or ZERO for p in parts)) for n in (0, 1))
    return hom, rest


def _scale(node: Op, parts: list[Parts], ring: Semiring) -> Parts:
    """⊗ with one factor free of the state."""
    (h1, r1), (h2, r2) = parts
    if h1 is not None and h2 is not None:
        raise NotAffineError(node, "a product of two terms that both read the state is not affine")
    free = r1 if h1 is None else r2
    assert free is not None
    state = (h2, r2) if h1 is None else (h1, r1)
    if ring.positive_factors and not ring.is_positive(free if node.op != "div" else Op("div", (ONE, free))):
        raise NotPositiveError(node, free)
    left = h1 is None
    hom, rest = (None if x is None else make(node.op, *((free, x) if left else (x, free))) for x in state)
    return hom, rest


def _unscale(node: Op, parts: list[Parts], ring: Semiring) -> Parts:
    """Division (or subtraction, in a semiring whose ⊗ is addition) by a term free of the state."""
    if parts[1][0] is not None:
        word = "division by" if node.op == "div" else "subtraction of"
        raise NotAffineError(node, f"{word} a term that reads the state is not affine")
    return _scale(node, parts, ring)


_Rule = Callable[[Op, list[Parts], Semiring], Parts]
_PLUS_TIMES: dict[str, _Rule] = {"sub": _sub, "neg": _neg, "complex": _complex, "mul": _scale, "div": _unscale}
_SCALING: dict[str, dict[str, _Rule]] = {
    "add": {"add": _scale, "sub": _unscale},
    "mul": {"mul": _scale, "div": _unscale},
    "min": {"min": _scale},
    "max": {"max": _scale},
}
