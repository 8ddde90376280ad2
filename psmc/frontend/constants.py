"""Exact constants of the surface: number literals, and the constant arithmetic of interval bounds."""

from __future__ import annotations

from fractions import Fraction

from psmc.diagnostics import fail
from psmc.frontend import surface as s
from psmc.source import Span

INF = float("inf")
MAX_DIGITS = 64
MAX_EXPONENT = 400  # fp64 ends at 1e308: beyond it a literal can only be a mistake
_MAX_BITS = 4096

Value = Fraction | float  # a float is +inf or -inf, never finite


def literal(text: str, span: Span) -> Fraction:
    """The exact value of a decimal literal. Raises PSM504 for one that is out of all proportion."""
    mantissa, _, exponent = text.lower().partition("e")
    digits = mantissa.replace(".", "")
    power = exponent.lstrip("+-").lstrip("0") or "0"
    if len(digits) > MAX_DIGITS or len(power) > 3 or int(power) > MAX_EXPONENT:
        fail(
            "PSM504",
            "this number is out of range",
            span,
            notes=(f"literals have at most {MAX_DIGITS} digits and an exponent within ±{MAX_EXPONENT}",),
            helps=("write inf where no bound is meant",),
        )
    return Fraction(text)


def fold(node: s.ExprNode) -> Value:
    """The value of constant arithmetic: literals, inf, + - * / ^. Raises PSM106 for anything else."""
    match node:
        case s.Number(value=value):
            return value
        case s.Inf():
            return INF
        case s.Unary(op="neg", arg=arg):
            return -fold(arg)
        case s.Binary(op=op, left=left, right=right) if op in ("add", "sub", "mul", "div", "pow"):
            return _arithmetic(op, fold(left), fold(right), node.span)
    help_ = "write a number, such as -1/2 or 1e-3, or inf"
    fail("PSM106", "a bound of an interval is a constant", node.span, helps=(help_,))


def _arithmetic(op: str, a: Value, b: Value, span: Span) -> Value:
    if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
        fail("PSM106", "arithmetic with inf has no exact value", span, helps=("write inf or -inf alone",))
    if op == "div" and b == 0:
        fail("PSM106", "division by zero", span, helps=("write inf or -inf where no bound is meant",))
    if op == "pow":
        if b.denominator != 1 or abs(b) > 64 or (a == 0 and b < 0):
            message = "a power in a bound has a whole exponent from -64 to 64, and 0 none below 0"
            fail("PSM106", message, span, helps=("write the value as a decimal number",))
        result = a ** int(b)
    else:
        result = a + b if op == "add" else a - b if op == "sub" else a * b if op == "mul" else a / b
    if max(result.numerator.bit_length(), result.denominator.bit_length()) > _MAX_BITS:
        fail("PSM504", "this number is out of range", span, helps=("write inf where no bound is meant",))
    return result
