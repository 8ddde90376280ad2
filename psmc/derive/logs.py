"""The logarithm of a decay, read off its expression: never as the log of a rounded value (DESIGN: decays)."""

from __future__ import annotations

from collections.abc import Callable

from psmc.derive.simplify import HALF, ONE, ZERO, make
from psmc.ir import Const, Expr, Infinity, Op

IsPositive = Callable[[Expr], bool]
_Rule = Callable[[tuple[Expr, ...], IsPositive], "Expr | None"]


def log_decay(expr: Expr, is_positive: IsPositive = lambda _: False) -> Expr | None:
    """log(expr) as an expression that keeps its digits, or None if `expr` is not known to be > 0.

    `is_positive` may know more than the form shows, from declared intervals. A sum of numbers that cannot cancel is
    as exact as its terms, and so is its log.
    """
    if expr.kind == "complex":
        return expr.args[0] if isinstance(expr, Op) and expr.op == "exp" else None
    match expr:
        case Const(value=value):
            return (ZERO if value == 1 else Op("log", (expr,))) if value > 0 else None
        case Op(op=op, args=args):
            rule = _RULES.get(op)
            if rule is not None:
                return rule(args, is_positive)
    return Op("log", (expr,)) if is_positive(expr) else None


def log_transition(expr: Expr, is_positive: IsPositive = lambda _: False) -> Expr | None:
    """The same where `expr` is a choice between decays and 0, whose log is -inf."""
    match expr:
        case Const(value=0):
            return Infinity(True)
        case Op(op="where", args=(test, a, b)):
            x, y = (log_transition(z, is_positive) for z in (a, b))
            return None if x is None or y is None else make("where", test, x, y)
    return log_decay(expr, is_positive)


def _both(op: str) -> _Rule:
    """`op` of the logs."""

    def rule(args: tuple[Expr, ...], known: IsPositive) -> Expr | None:
        a, b = (log_decay(x, known) for x in args)
        return None if a is None or b is None else make(op, a, b)

    return rule


def _div(args: tuple[Expr, ...], known: IsPositive) -> Expr | None:
    match args:
        case (Const(value=1), Op(op="add", args=(Const(value=1), Op(op="exp", args=(x,))))):
            return make("neg", make("softplus", x))  # 1 / (1 + exp x)
        case (Const(value=1), Op(op="add", args=(Op(op="exp", args=(x,)), Const(value=1)))):
            return make("neg", make("softplus", x))
    return _both("sub")(args, known)


def _sub(args: tuple[Expr, ...], known: IsPositive) -> Expr | None:
    if args[0] != ONE:
        return None
    x = args[1]
    if isinstance(x, Op) and x.op == "sigmoid":
        return Op("logsigmoid", (make("neg", x.args[0]),))
    if not known(Op("sub", args)):
        return None
    if isinstance(x, Op) and x.op == "exp":
        return Op("log", (make("neg", Op("expm1", x.args)),))
    return Op("log1p", (make("neg", x),))


def _add(args: tuple[Expr, ...], known: IsPositive) -> Expr | None:
    total = Op("add", args)
    return Op("log", (total,)) if known(total) or all(log_decay(a, known) is not None for a in args) else None


def _pow(args: tuple[Expr, ...], known: IsPositive) -> Expr | None:
    base = log_decay(args[0], known)
    return None if base is None else make("mul", args[1], base)


def _scaled(by: Expr) -> _Rule:
    def rule(args: tuple[Expr, ...], known: IsPositive) -> Expr | None:
        inner = log_decay(args[0], known)
        return None if inner is None else make("mul", by, inner)

    return rule


def _where(args: tuple[Expr, ...], known: IsPositive) -> Expr | None:
    a, b = (log_decay(x, known) for x in args[1:])
    return None if a is None or b is None else make("where", args[0], a, b)


def _stop(args: tuple[Expr, ...], known: IsPositive) -> Expr | None:
    inner = log_decay(args[0], known)
    return None if inner is None else make("stop", inner)


_RULES: dict[str, _Rule] = {
    "exp": lambda args, known: args[0],
    "sigmoid": lambda args, known: Op("logsigmoid", args),
    "softplus": lambda args, known: Op("log", (Op("softplus", args),)),
    "mul": _both("add"),
    "div": _div,
    "sub": _sub,
    "add": _add,
    "pow": _pow,
    "sqrt": _scaled(HALF),
    "rsqrt": _scaled(make("neg", HALF)),
    "where": _where,
    "max": _both("max"),
    "min": _both("min"),
    "stop": _stop,
}
