"""Exact numbers for evaluating the IR: rationals where possible, decimals of 100 digits where a function leaves them.

An operation without a value (0/0, inf - inf, log of a negative number, a comparison too close to call) raises
UndefinedError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal, DecimalException
from fractions import Fraction
from math import isqrt
from typing import TypeAlias, TypeGuard

from psmc.algebra.ring import UndefinedError

CONTEXT = Context(prec=100, rounding=ROUND_HALF_EVEN, Emin=-(10**6), Emax=10**6)
# Sums may pass through values 1e60 times the result before rounding could look like a difference.
_SAME, _DIFFERENT = Decimal("1e-60"), Decimal("1e-40")
_LARGEST_ARGUMENT = 10_000  # of exp: past it numbers get too long to be useful


@dataclass(frozen=True)
class Complex:
    re: Real
    im: Real


Real: TypeAlias = "Fraction | Decimal"  # Decimal also holds ±Infinity
Number: TypeAlias = "Fraction | Decimal | Complex"
INF, NEG_INF = Decimal("Infinity"), Decimal("-Infinity")
ZERO, ONE = Fraction(0), Fraction(1)


def _guard(fn: Callable[[], Decimal]) -> Decimal:
    try:
        out = fn()
    except DecimalException as error:
        raise UndefinedError(str(error)) from None
    if not out.is_finite():
        raise UndefinedError("out of range")
    return out


def decimal(x: Real) -> Decimal:
    if isinstance(x, Decimal):
        return x
    return CONTEXT.divide(Decimal(x.numerator), Decimal(x.denominator))


def infinite(x: Number) -> TypeGuard[Decimal]:
    return isinstance(x, Decimal) and x.is_infinite()


def real(x: Number) -> Real:
    if isinstance(x, Complex):
        raise UndefinedError("a complex number where a real one is needed")
    return x


def _real_op(exact: Callable[[Fraction, Fraction], Fraction], inexact: Callable[[Decimal, Decimal], Decimal]):  # type: ignore[no-untyped-def]
    def op(x: Real, y: Real) -> Real:
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return exact(x, y)
        return _guard(lambda: inexact(decimal(x), decimal(y)))

    return op


_add = _real_op(lambda x, y: x + y, CONTEXT.add)
_mul = _real_op(lambda x, y: x * y, CONTEXT.multiply)
_div = _real_op(lambda x, y: x / y, CONTEXT.divide)


def neg(x: Number) -> Number:
    if isinstance(x, Complex):
        return Complex(_neg(x.re), _neg(x.im))
    return _neg(x)


def _neg(x: Real) -> Real:
    return -x if isinstance(x, Fraction) else x.copy_negate()


def add_real(x: Real, y: Real) -> Real:
    if infinite(x) or infinite(y):
        if infinite(x) and infinite(y) and x != y:
            raise UndefinedError("inf - inf")
        return x if infinite(x) else y
    return _add(x, y)  # type: ignore[no-any-return]


def mul_real(x: Real, y: Real) -> Real:
    if infinite(x) or infinite(y):
        s = sign(x) * sign(y)
        if not s:
            raise UndefinedError("0 times infinity")
        return INF if s > 0 else NEG_INF
    return _mul(x, y)  # type: ignore[no-any-return]


def div_real(x: Real, y: Real) -> Real:
    if infinite(y):
        if infinite(x):
            raise UndefinedError("inf / inf")
        return ZERO
    if sign(y) == 0:
        raise UndefinedError("division by 0")
    return mul_real(x, Fraction(sign(y))) if infinite(x) else _div(x, y)


def sign(x: Real) -> int:
    return (x > 0) - (x < 0)


def parts(x: Number) -> tuple[Real, Real]:
    return (x.re, x.im) if isinstance(x, Complex) else (x, ZERO)


def _joined(re: Real, im: Real, complex_: bool) -> Number:
    return Complex(re, im) if complex_ else re


def add(x: Number, y: Number) -> Number:
    (a, b), (c, d) = parts(x), parts(y)
    both = isinstance(x, Complex) or isinstance(y, Complex)
    return _joined(add_real(a, c), add_real(b, d) if both else ZERO, both)


def mul(x: Number, y: Number) -> Number:
    if not isinstance(x, Complex) and not isinstance(y, Complex):
        return mul_real(x, y)
    (a, b), (c, d) = parts(x), parts(y)
    return Complex(
        add_real(mul_real(a, c), _neg(mul_real(b, d))), add_real(mul_real(a, d), mul_real(b, c))
    )


def div(x: Number, y: Number) -> Number:
    if not isinstance(y, Complex):
        (a, b) = parts(x)
        return _joined(div_real(a, y), div_real(b, y) if isinstance(x, Complex) else ZERO, isinstance(x, Complex))
    norm = add_real(mul_real(y.re, y.re), mul_real(y.im, y.im))
    return div(mul(x, Complex(y.re, _neg(y.im))), norm)


def conj(x: Number) -> Number:
    return Complex(x.re, _neg(x.im)) if isinstance(x, Complex) else x


# --- comparisons --------------------------------------------------------------------------------


def compare(x: Real, y: Real) -> int:
    """-1, 0 or 1; two inexact numbers that nearly agree are too close to call."""
    if (isinstance(x, Fraction) and isinstance(y, Fraction)) or infinite(x) or infinite(y):
        return (x > y) - (x < y)
    a, b = decimal(x), decimal(y)
    if _apart(a, b) <= _SAME:
        raise UndefinedError("too close to call")
    return (a > b) - (a < b)


def greatest(x: Real, y: Real) -> Real:
    return x if x >= y else y


def least(x: Real, y: Real) -> Real:
    return x if x <= y else y


def differ(x: Number, y: Number) -> bool:
    """Certainly different: exactly, or by far more than rounding can explain."""
    if isinstance(x, Complex) or isinstance(y, Complex):
        (a, b), (c, d) = parts(x), parts(y)
        return differ(a, c) or differ(b, d)
    if (isinstance(x, Fraction) and isinstance(y, Fraction)) or infinite(x) or infinite(y):
        return x != y
    a, b = decimal(x), decimal(y)
    return _apart(a, b) > _DIFFERENT


def _apart(a: Decimal, b: Decimal) -> Decimal:
    """Relative distance."""
    c = CONTEXT
    size = c.add(Decimal(1), c.add(a.copy_abs(), b.copy_abs()))
    return c.divide(c.subtract(a, b).copy_abs(), size)


# --- functions ----------------------------------------------------------------------------------


def exp(x: Number) -> Number:
    if isinstance(x, Complex):
        size = exp(x.re)
        return Complex(mul_real(real(size), cos(x.im)), mul_real(real(size), sin(x.im)))
    if infinite(x):
        return INF if x > 0 else ZERO
    if x == 0:
        return ONE
    if not -_LARGEST_ARGUMENT < x < _LARGEST_ARGUMENT:
        raise UndefinedError("out of range")
    return _guard(lambda: CONTEXT.exp(decimal(x)))


def log(x: Real) -> Real:
    if infinite(x) and x > 0:
        return INF
    if x == 0:
        return NEG_INF
    if x < 0:
        raise UndefinedError("log of a negative number")
    return ZERO if x == 1 else _guard(lambda: CONTEXT.ln(decimal(x)))


def sqrt(x: Real) -> Real:
    if infinite(x) and x > 0:
        return INF
    if x < 0:
        raise UndefinedError("root of a negative number")
    if isinstance(x, Fraction):
        top, bottom = isqrt(x.numerator), isqrt(x.denominator)
        if top * top == x.numerator and bottom * bottom == x.denominator:
            return Fraction(top, bottom)
    return _guard(lambda: CONTEXT.sqrt(decimal(x)))


def power(x: Number, y: Real) -> Number:
    if isinstance(y, Fraction) and y.denominator == 1 and abs(y) <= 200:
        out: Number = ONE
        for _ in range(abs(int(y))):
            out = mul(out, x)
        return out if y >= 0 else div(ONE, out)
    base = real(x)
    if base < 0:
        raise UndefinedError("a power of a negative number")
    if base == 0:
        if y > 0:
            return ZERO
        raise UndefinedError("a power of 0")
    if y == Fraction(1, 2):
        return sqrt(base)
    return exp(mul_real(y, log(base)))


_PI = Decimal(
    "3.1415926535897932384626433832795028841971693993751058209749445923078164062"
    "8620899862803482534211706798214808651328230664709384460955058223172535940813"
)


def sin(x: Real) -> Real:
    if x == 0:
        return ZERO
    return _series(decimal(x), first=1)


def cos(x: Real) -> Real:
    if x == 0:
        return ONE
    return _series(decimal(x), first=0)


def _series(x: Decimal, first: int) -> Decimal:
    """Taylor series of sin (first = 1) or cos (0) after reduction by 2π."""
    if not x.is_finite() or abs(x) > _LARGEST_ARGUMENT:
        raise UndefinedError("out of range")
    c = CONTEXT
    turn = c.multiply(_PI, Decimal(2))
    x = c.subtract(x, c.multiply(turn, c.divide(x, turn).to_integral_value()))
    term = x if first else Decimal(1)
    out, k = term, first
    while term.copy_abs() > Decimal("1e-110"):
        term = c.divide(c.multiply(term.copy_negate(), c.multiply(x, x)), Decimal((k + 1) * (k + 2)))
        out, k = c.add(out, term), k + 2
    return out


def erf(x: Real) -> Real:
    if x == 0:
        return ZERO
    if infinite(x):
        return Fraction(sign(x))
    if not -16 < x < 16:
        return Decimal(sign(x))  # 1 - erf(16) < 1e-110
    c = Context(prec=350)
    v = c.plus(decimal(x))
    term, out, k = v, v, 0
    while term.copy_abs() > Decimal("1e-130"):
        k += 1
        term = c.divide(c.multiply(term.copy_negate(), c.multiply(v, v)), Decimal(k))
        out = c.add(out, c.divide(term, Decimal(2 * k + 1)))
    return CONTEXT.plus(c.divide(c.multiply(out, Decimal(2)), c.sqrt(_PI)))
