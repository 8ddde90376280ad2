"""Reverse-mode differentiation of IR expressions: one row per operator, one sweep over the DAG.

An expression with free indices is a tensor over them. Its cotangent is an expression over the same indices; an
operand that lacks some of them gets the sum over those (the transpose of a broadcast). Rows reuse the operator's own
result where that is cheaper or more stable, and every cotangent is built from the nodes of the forward expression,
so interning keeps shared work shared.

Conventions where a derivative is not unique, which are part of the language:

    max, min   a tie gives the whole gradient to the left operand, `max[i]` to the first maximal position
    abs        0 at 0                      relu       0 at 0                   sign, comparisons   none
    clamp      the bounds are inclusive: at x = lo and at x = hi the gradient goes to x
    exp        ct * result: 0 at -inf, whatever stands beside it
    logaddexp  half each where both operands are equal, so that two operands at -inf give no NaN
    pow        0 to an exponent whose base is 0; 0 to a base whose exponent is 0
    complex    torch's: the cotangent of z is d/d(re) + i d/d(im) of a real loss, so f'(z) enters conjugated
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fractions import Fraction

from psmc.derive.simplify import HALF, ONE, ZERO, make, sum_over, total
from psmc.ir import Const, DimValue, Expr, Eye, Index, IndexValue, Op, Reduce, Ref
from psmc.ir.rewrite import fresh, rename, walk

Row = Callable[[Expr, tuple[Expr, ...], Expr], "tuple[Expr | None, ...]"]  # (cotangent, operands, result)

_TWO_OVER_SQRT_PI = Const(Fraction("1.128379167095512573896158903121545172"))
_ONE_OVER_SQRT_2PI = Const(Fraction("0.398942280401432677939946059934381868"))
_ONE_OVER_SQRT_2 = Const(Fraction("0.707106781186547524400844362104849039"))


def vjp(
    results: Sequence[Expr], cotangents: Sequence[Expr], wrt: Sequence[Ref], keep: Collection[Index] = ()
) -> list[Expr | None]:
    """Gradients of Σ cotangents · results with respect to tensors.

    results, cotangents  pairwise; a result is a tensor over its own free indices and its cotangent's
    wrt                  tensors, each a Ref at distinct free indices; refs at other subscripts (a transpose, a
                         diagonal, a gather) of the same tensor count too
    keep                 indices never summed over: a tensor without them gets its share of every position apart

    Returns, in the order of `wrt`, an expression over that Ref's indices (and `keep`), or None where the results do
    not depend on it. Time and size are linear in the DAG of `results`. Lets must have been inlined.
    """
    kept = frozenset(keep)
    order = list(walk(*results))
    active = _active(order, {(w.space, w.name, w.lag) for w in wrt})
    pending: dict[Expr, list[Expr]] = {}
    leaves: dict[tuple[str, str, int], list[tuple[Ref, Expr]]] = {}
    for result, ct in zip(results, cotangents, strict=True):
        _push(pending, active, result, ct, (ct.free | result.free) - kept)
    for node in reversed(order):
        if node not in pending:
            continue
        ct = total(pending.pop(node))
        if ct == ZERO:
            continue
        match node:
            case Ref():
                leaves.setdefault((node.space, node.name, node.lag), []).append((node, ct))
            case Reduce(op=op, index=index, body=body):
                _push(pending, active, body, _REDUCE[op](ct, node), (node.free | {index}) - kept)
            case Op(op=op, args=args):
                for arg, share in zip(args, ROWS[op](ct, args, node), strict=True):
                    if share is not None:
                        _push(pending, active, arg, share, node.free - kept)
    found = {key: leaves.get(key) for key in ((w.space, w.name, w.lag) for w in wrt)}
    return [_gather_leaf(w, found[w.space, w.name, w.lag], kept) for w in wrt]


def _active(order: Sequence[Expr], targets: Collection[tuple[str, str, int]]) -> set[Expr]:
    """The nodes through which a gradient reaches a target."""
    active: set[Expr] = set()
    for node in order:
        match node:
            case Ref():
                hit = (node.space, node.name, node.lag) in targets and node.kind in ("real", "complex")
            case Op(op=op, args=args):
                hit = op not in _CUT and any(a in active for a in args)
            case Reduce(body=body):
                hit = body in active
            case _:
                hit = False
        if hit:
            active.add(node)
    return active


def _push(
    pending: dict[Expr, list[Expr]], active: set[Expr], node: Expr, ct: Expr, context: frozenset[Index]
) -> None:
    if node not in active or ct == ZERO:
        return
    if node.kind != "complex":
        ct = make("real", ct)
    pending.setdefault(node, []).append(sum_over(tuple(context - node.free), ct))


def _gather_leaf(want: Ref, found: list[tuple[Ref, Expr]] | None, kept: frozenset[Index]) -> Expr | None:
    """The cotangents of one tensor's reads, each moved from its own subscripts to the wanted indices."""
    if not found:
        return None
    return total([_scatter(want, node, ct, kept) for node, ct in found])


def _scatter(want: Ref, node: Ref, ct: Expr, kept: frozenset[Index]) -> Expr:
    """Entry `want.subs` of the tensor that holds `ct` at `node.subs` and zero elsewhere.

    X[i, j] renames; a repeated index, a literal position or a gather X[p[k]] is an Eye, summed over what is left.
    """
    if node.subs == want.subs:
        return ct
    moves: dict[Index, Index] = {}
    masks: list[tuple[Expr | Index | int, Index]] = []
    for sub, target in zip(node.subs, want.subs, strict=True):
        assert isinstance(target, Index), "vjp: the tensors to differentiate by are read at plain indices"
        if isinstance(sub, Index) and sub not in moves and sub not in kept:
            moves[sub] = target
        else:
            masks.append((sub, target))
    taken = {i.name for i in ct.free | node.free} | {i.name for i in want.free}
    summed: list[Index] = []
    for index in sorted(node.free - moves.keys() - kept):
        moves[index] = fresh(index, taken)
        taken.add(moves[index].name)
        summed.append(moves[index])
    out = rename(ct, moves)
    for sub, target in masks:
        source = moves.get(sub, sub) if isinstance(sub, Index) else rename(sub, moves) if isinstance(sub, Expr) else sub
        out = make("mul", Eye(source, target), out) if source != target else out
    return sum_over(summed, out)


# --- rows ------------------------------------------------------------------------------------------


def _mul(a: Expr, b: Expr) -> Expr:
    return make("mul", a, b)


def _conj(x: Expr) -> Expr:
    return make("conj", x)  # x itself, unless complex


def _square(x: Expr) -> Expr:
    return _mul(x, x)


def _unary(slope: Callable[[Expr, Expr], Expr]) -> Row:
    """f with f'(x) = slope(x, f(x))."""
    return lambda ct, args, out: (_mul(ct, _conj(slope(args[0], out))),)


def _none(arity: int) -> Row:
    return lambda ct, args, out: (None,) * arity


def _divide(ct: Expr, args: tuple[Expr, ...], out: Expr) -> tuple[Expr | None, ...]:
    top = make("div", ct, _conj(args[1]))
    return top, make("neg", _mul(top, _conj(out)))


def _power(ct: Expr, args: tuple[Expr, ...], out: Expr) -> tuple[Expr | None, ...]:
    x, y = args
    if isinstance(y, Const):
        if y.value == Fraction(1, 2):
            return make("div", _mul(ct, HALF), _conj(out)), None
        return _mul(ct, _conj(_mul(y, make("pow", x, Const(y.value - 1))))), None
    slope = make("where", make("eq", y, ZERO), ZERO, _mul(y, make("pow", x, make("sub", y, ONE))))
    growth = make("where", make("eq", x, ZERO), ZERO, _mul(out, make("log", x)))
    return _mul(ct, _conj(slope)), _mul(ct, _conj(growth))


def _pick(comparison: str) -> Row:
    def row(ct: Expr, args: tuple[Expr, ...], out: Expr) -> tuple[Expr | None, ...]:
        left = make(comparison, *args)
        return make("where", left, ct, ZERO), make("where", left, ZERO, ct)

    return row


def _select(ct: Expr, args: tuple[Expr, ...], out: Expr) -> tuple[Expr | None, ...]:
    return None, make("where", args[0], ct, ZERO), make("where", args[0], ZERO, ct)


def _clamp(ct: Expr, args: tuple[Expr, ...], out: Expr) -> tuple[Expr | None, ...]:
    """clamp(x, lo, hi) = min(max(x, lo), hi), ties to the left."""
    x, lo, hi = args
    above, raised = make("ge", x, lo), make("max", x, lo)
    below = make("le", raised, hi)
    inner = make("where", below, ct, ZERO)
    return make("where", above, inner, ZERO), make("where", above, ZERO, inner), make("where", below, ZERO, ct)


def _modulus(ct: Expr, args: tuple[Expr, ...], out: Expr) -> tuple[Expr | None, ...]:
    (x,) = args
    if x.kind != "complex":
        return (_mul(ct, make("sign", x)),)
    at_zero = make("eq", out, ZERO)
    return (make("where", at_zero, ZERO, _mul(ct, make("div", x, make("where", at_zero, ONE, out)))),)


def _logaddexp(ct: Expr, args: tuple[Expr, ...], out: Expr) -> tuple[Expr | None, ...]:
    a, b = args
    equal = make("eq", a, b)

    def share(x: Expr, y: Expr) -> Expr:
        return _mul(ct, make("where", equal, HALF, make("sigmoid", make("sub", x, y))))

    return share(a, b), share(b, a)


def _silu_slope(x: Expr, out: Expr) -> Expr:
    s = make("sigmoid", x)
    return make("add", s, _mul(out, make("sub", ONE, s)))


def _gelu_slope(x: Expr, out: Expr) -> Expr:
    cdf = _mul(HALF, make("add", ONE, make("erf", _mul(x, _ONE_OVER_SQRT_2))))
    density = _mul(_ONE_OVER_SQRT_2PI, make("exp", make("neg", _mul(HALF, _square(x)))))
    return make("add", cdf, _mul(x, density))


ROWS: dict[str, Row] = {
    "or": _none(2),
    "and": _none(2),
    "not": _none(1),
    "lt": _none(2),
    "le": _none(2),
    "gt": _none(2),
    "ge": _none(2),
    "eq": _none(2),
    "ne": _none(2),
    "add": lambda ct, args, out: (ct, ct),
    "sub": lambda ct, args, out: (ct, make("neg", ct)),
    "mul": lambda ct, args, out: (_mul(ct, _conj(args[1])), _mul(ct, _conj(args[0]))),
    "div": _divide,
    "neg": lambda ct, args, out: (make("neg", ct),),
    "pow": _power,
    "where": _select,
    "max": _pick("ge"),
    "min": _pick("le"),
    "abs": _modulus,
    "sign": _none(1),
    "clamp": _clamp,
    "exp": _unary(lambda x, out: out),
    "expm1": _unary(lambda x, out: make("add", out, ONE)),
    "log": lambda ct, args, out: (make("div", ct, _conj(args[0])),),
    "log1p": lambda ct, args, out: (make("div", ct, make("add", ONE, args[0])),),
    "sqrt": lambda ct, args, out: (make("div", _mul(ct, HALF), out),),
    "rsqrt": _unary(lambda x, out: make("neg", _mul(HALF, _mul(out, _square(out))))),
    "sin": _unary(lambda x, out: make("cos", x)),
    "cos": _unary(lambda x, out: make("neg", make("sin", x))),
    "tanh": _unary(lambda x, out: make("sub", ONE, _square(out))),
    "sigmoid": _unary(lambda x, out: _mul(out, make("sub", ONE, out))),
    "logsigmoid": _unary(lambda x, out: make("sigmoid", make("neg", x))),
    "softplus": _unary(lambda x, out: make("sigmoid", x)),
    "relu": lambda ct, args, out: (make("where", make("gt", args[0], ZERO), ct, ZERO),),
    "silu": _unary(_silu_slope),
    "gelu": _unary(_gelu_slope),
    "erf": _unary(lambda x, out: _mul(_TWO_OVER_SQRT_PI, make("exp", make("neg", _square(x))))),
    "logaddexp": _logaddexp,
    "stop": _none(1),
    "real": lambda ct, args, out: (ct,),
    "imag": lambda ct, args, out: (make("complex", ZERO, ct),),
    "conj": lambda ct, args, out: (_conj(ct),),
    "complex": lambda ct, args, out: (make("real", ct), make("imag", ct)),
}

# Operators that never pass a gradient on.
_CUT = frozenset({"or", "and", "not", "lt", "le", "gt", "ge", "eq", "ne", "sign", "stop"})


# --- reductions: (cotangent, reduction) -> cotangent of the body, over its indices -------------------


def _sum_row(ct: Expr, node: Reduce) -> Expr:
    return ct


def _max_row(ct: Expr, node: Reduce) -> Expr:
    """The first k with body[k] = max is the one whose -k is largest among the maximal positions."""
    k, body = node.index, node.body
    if k not in body.free:
        return Op("where", (Op("eq", (IndexValue(k), ZERO)), ct, ZERO))
    back = Op("neg", (IndexValue(k),))
    first = Reduce("max", k, Op("where", (Op("eq", (body, node)), back, Op("neg", (DimValue(k.dim),)))))
    return make("where", Op("eq", (back, first)), ct, ZERO)


def _prod_row(ct: Expr, node: Reduce) -> Expr:
    """ct · Π over the other positions: quadratic in the dim, but exact where a factor is 0."""
    k, body = node.index, node.body
    names = {i.name for n in walk(body) for i in n.free} | {i.name for i in ct.free} | {k.name}
    other = fresh(k, names)
    at_k = Op("eq", (IndexValue(other), IndexValue(k)))
    rest = Reduce("prod", other, make("where", at_k, ONE, rename(body, {k: other})))
    return _mul(ct, _conj(rest))


_REDUCE: dict[str, Callable[[Expr, Reduce], Expr]] = {"sum": _sum_row, "max": _max_row, "prod": _prod_row}
