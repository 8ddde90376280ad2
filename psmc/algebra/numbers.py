"""Exact numbers for evaluating the IR: rationals where possible; where a function leaves them, decimals of 100 digits
with a bound on their error.

An operation without a value (0/0, inf - inf, log of a negative number) raises UndefinedError; one that these numbers
cannot decide (a sign within the error, a number too long) its subclass UnclearError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, ROUND_UP, Context, Decimal, DecimalException
from fractions import Fraction
from functools import cache
from math import isqrt
from typing import TypeAlias, TypeGuard

from psmc.algebra.ring import UndefinedError

CONTEXT = Context(prec=100, rounding=ROUND_HALF_EVEN, Emin=-(10**6), Emax=10**6)
_UP = Context(prec=8, rounding=ROUND_UP, Emin=-(10**6), Emax=10**6)  # of errors
_ULP = Decimal(10) ** (2 - CONTEXT.prec)
_NOTHING = Decimal(0)
_SAME, _DIFFERENT = Decimal("1e-60"), Decimal("1e-40")
_LARGEST_ARGUMENT = 10_000  # of exp: past it numbers get too long to be useful
_LONGEST = 12_000  # bits of a numerator or denominator; Python prints up to 14_000


class UnclearError(UndefinedError):
    """There may be a value, but not one that these numbers can tell."""


@dataclass(frozen=True)
class Complex:
    re: Real
    im: Real


class Ball(Decimal):
    """All numbers within `error` of a finite decimal."""

    __slots__ = ("error",)
    error: Decimal

    def __new__(cls, value: Decimal, error: Decimal) -> Ball:
        new = super().__new__(cls, value)
        new.error = error
        return new


Real: TypeAlias = "Fraction | Decimal"  # a Decimal is a Ball or ±Infinity
Number: TypeAlias = "Fraction | Decimal | Complex"
INF, NEG_INF = Decimal("Infinity"), Decimal("-Infinity")
ZERO, ONE = Fraction(0), Fraction(1)


def _ball(fn: Callable[[], Decimal], error: Callable[[Decimal], Decimal]) -> Ball:
    """The result of `fn`, rounded, and the error that it inherits (of its size)."""
    try:
        out = fn()
        size = out.copy_abs()
        bound = _UP.add(error(size), _UP.multiply(size, _ULP))
    except DecimalException as problem:
        raise UnclearError(str(problem)) from None
    if not out.is_finite() or not bound.is_finite():
        raise UnclearError("out of range")
    return Ball(out, bound)


def decimal(x: Real) -> Decimal:
    if isinstance(x, Decimal):
        return x
    return _ball(lambda: CONTEXT.divide(Decimal(x.numerator), Decimal(x.denominator)), lambda _: _NOTHING)


def error_of(x: Real) -> Decimal:
    return x.error if isinstance(x, Ball) else _NOTHING


def infinite(x: Number) -> TypeGuard[Decimal]:
    return isinstance(x, Decimal) and x.is_infinite()


def real(x: Number) -> Real:
    if isinstance(x, Complex):
        raise UndefinedError("a complex number where a real one is needed")
    return x


def _exact(x: Fraction) -> Fraction:
    if max(x.numerator.bit_length(), x.denominator.bit_length()) > _LONGEST:
        raise UnclearError("a number too long to be useful")
    return x


def _add(x: Real, y: Real) -> Real:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return _exact(x + y)
    a, b = decimal(x), decimal(y)
    return _ball(lambda: CONTEXT.add(a, b), lambda _: _UP.add(error_of(a), error_of(b)))


def _mul(x: Real, y: Real) -> Real:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return _exact(x * y)
    a, b = decimal(x), decimal(y)
    e, f = error_of(a), error_of(b)

    def error(_: Decimal) -> Decimal:
        return _UP.add(_UP.multiply(a.copy_abs(), f), _UP.multiply(e, _UP.add(b.copy_abs(), f)))

    return _ball(lambda: CONTEXT.multiply(a, b), error)


def _div(x: Real, y: Real) -> Real:
    """y is not 0, beyond its error."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return _exact(x / y)
    a, b = decimal(x), decimal(y)
    e, f = error_of(a), error_of(b)
    least = _least_size(b)
    return _ball(
        lambda: CONTEXT.divide(a, b), lambda size: _UP.divide(_UP.add(e, _UP.multiply(size, f)), least)
    )  # fmt: skip


def _least_size(x: Decimal) -> Decimal:
    """A lower bound > 0 on the size of a number that is not 0, beyond its error."""
    least = CONTEXT.subtract(x.copy_abs(), error_of(x))
    return CONTEXT.multiply(least, Decimal("0.999999"))


def neg(x: Number) -> Number:
    if isinstance(x, Complex):
        return Complex(_neg(x.re), _neg(x.im))
    return _neg(x)


def _neg(x: Real) -> Real:
    if isinstance(x, Fraction):
        return -x
    return Ball(x.copy_negate(), x.error) if isinstance(x, Ball) else x.copy_negate()


def add_real(x: Real, y: Real) -> Real:
    if infinite(x) or infinite(y):
        if infinite(x) and infinite(y) and x != y:
            raise UndefinedError("inf - inf")
        return x if infinite(x) else y
    return _add(x, y)


def mul_real(x: Real, y: Real) -> Real:
    if infinite(x) or infinite(y):
        s = sign(x) * sign(y)
        if not s:
            raise UndefinedError("0 times infinity")
        return INF if s > 0 else NEG_INF
    return _mul(x, y)


def div_real(x: Real, y: Real) -> Real:
    if infinite(y):
        if infinite(x):
            raise UndefinedError("inf / inf")
        return ZERO
    if sign(y) == 0:
        raise UndefinedError("division by 0")
    return mul_real(x, Fraction(sign(y))) if infinite(x) else _div(x, y)


def sign(x: Real) -> int:
    if isinstance(x, Ball) and x.copy_abs() <= _UP.multiply(x.error, Decimal(2)):
        raise UnclearError("too close to 0 to call")
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
    if x is y:
        return 0
    if (isinstance(x, Fraction) and isinstance(y, Fraction)) or infinite(x) or infinite(y):
        return (x > y) - (x < y)
    a, b = decimal(x), decimal(y)
    if not _told_apart(a, b) or _apart(a, b) <= _SAME:
        raise UnclearError("too close to call")
    return (a > b) - (a < b)


def greatest(x: Real, y: Real) -> Real:
    return _with_error_of_both(x if x >= y else y, x, y)


def least(x: Real, y: Real) -> Real:
    return _with_error_of_both(x if x <= y else y, x, y)


def _with_error_of_both(chosen: Real, x: Real, y: Real) -> Real:
    """The other one may be the right choice, if their errors overlap."""
    if infinite(x) or infinite(y) or not (isinstance(x, Ball) or isinstance(y, Ball)):
        return chosen
    a, b = decimal(x), decimal(y)
    if _told_apart(a, b):
        return chosen
    return Ball(decimal(chosen), max(error_of(a), error_of(b)))


def differ(x: Number, y: Number) -> bool:
    """Certainly different: exactly, or by far more than rounding can explain."""
    if isinstance(x, Complex) or isinstance(y, Complex):
        (a, b), (c, d) = parts(x), parts(y)
        return differ(a, c) or differ(b, d)
    if (isinstance(x, Fraction) and isinstance(y, Fraction)) or infinite(x) or infinite(y):
        return x != y
    a, b = decimal(x), decimal(y)
    return _told_apart(a, b) and _apart(a, b) > _DIFFERENT


def _told_apart(a: Decimal, b: Decimal) -> bool:
    """Whether their errors do not explain the difference."""
    return CONTEXT.subtract(a, b).copy_abs() > _UP.multiply(_UP.add(error_of(a), error_of(b)), Decimal(2))


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
    if isinstance(x, Fraction) and x == 0:
        return ONE
    a = decimal(x)
    if not -_LARGEST_ARGUMENT < a < _LARGEST_ARGUMENT or error_of(a) > Decimal("0.5"):
        raise UnclearError("out of range")
    return _ball(lambda: CONTEXT.exp(a), lambda size: _UP.multiply(size, _UP.multiply(error_of(a), Decimal(2))))


def log(x: Real) -> Real:
    if infinite(x) and x > 0:
        return INF
    signed = sign(x)
    if signed == 0:
        return NEG_INF
    if signed < 0:
        raise UndefinedError("log of a negative number")
    if x == 1 and isinstance(x, Fraction):
        return ZERO
    a = decimal(x)
    return _ball(lambda: CONTEXT.ln(a), lambda _: _UP.divide(error_of(a), _least_size(a)))


def sqrt(x: Real) -> Real:
    if infinite(x) and x > 0:
        return INF
    if sign(x) < 0:
        raise UndefinedError("root of a negative number")
    if isinstance(x, Fraction):
        top, bottom = isqrt(x.numerator), isqrt(x.denominator)
        if top * top == x.numerator and bottom * bottom == x.denominator:
            return Fraction(top, bottom)
    a = decimal(x)
    return _ball(lambda: CONTEXT.sqrt(a), lambda size: _UP.divide(error_of(a), size) if a else _NOTHING)


def power(x: Number, y: Real) -> Number:
    if isinstance(y, Fraction) and y.denominator == 1 and abs(y) <= 200:
        out: Number = ONE
        for _ in range(abs(int(y))):
            out = mul(out, x)
        return out if y >= 0 else div(ONE, out)
    base = real(x)
    signed = sign(base)
    if signed < 0:
        raise UndefinedError("a power of a negative number")
    if signed == 0:
        if sign(y) > 0:
            return ZERO
        raise UndefinedError("a power of 0")
    if y == Fraction(1, 2):
        return sqrt(base)
    return exp(mul_real(y, log(base)))


@cache
def _pi(digits: int) -> Decimal:
    """Machin: π/4 = 4 arctan(1/5) - arctan(1/239)."""
    c = Context(prec=digits + 10)

    def arctan_inverse(n: int) -> Decimal:
        power = out = c.divide(Decimal(1), Decimal(n))
        for k in range(3, 2 * digits + 30, 2):
            power = c.divide(power.copy_negate(), Decimal(n * n))
            out = c.add(out, c.divide(power, Decimal(k)))
        return out

    return c.multiply(
        Decimal(4), c.subtract(c.multiply(Decimal(4), arctan_inverse(5)), arctan_inverse(239))
    )


def sin(x: Real) -> Real:
    if isinstance(x, Fraction) and x == 0:
        return ZERO
    return _series(decimal(x), first=1)


def cos(x: Real) -> Real:
    if isinstance(x, Fraction) and x == 0:
        return ONE
    return _series(decimal(x), first=0)


def _series(given: Decimal, first: int) -> Decimal:
    """Taylor series of sin (first = 1) or cos (0) after reduction by 2π."""
    x = given
    if not x.is_finite() or x.copy_abs() > _LARGEST_ARGUMENT:
        raise UnclearError("out of range")
    c = Context(prec=CONTEXT.prec + 20)
    turn = c.multiply(_pi(c.prec), Decimal(2))
    x = c.subtract(x, c.multiply(turn, c.divide(x, turn).to_integral_value()))
    term = x if first else Decimal(1)
    out, k = term, first
    least = Decimal(10) ** -c.prec
    while term.copy_abs() > least:
        term = c.divide(c.multiply(term.copy_negate(), c.multiply(x, x)), Decimal((k + 1) * (k + 2)))
        out, k = c.add(out, term), k + 2
    return _ball(lambda: CONTEXT.plus(out), lambda _: _UP.add(error_of(given), _ULP))


def erf(x: Real) -> Real:
    if isinstance(x, Fraction) and x == 0:
        return ZERO
    if infinite(x):
        return Fraction(sign(x))
    error = _UP.multiply(error_of(x), Decimal(2))
    span = isqrt(int(2.31 * CONTEXT.prec)) + 2  # past it 1 - erf(x) < exp(-x^2) is below the last digit
    if not -span < x < span:
        return Ball(Decimal(sign(x)), _UP.add(error, _ULP))
    c = Context(prec=2 * CONTEXT.prec + 150)  # terms grow up to exp(x^2)
    v = c.plus(decimal(x))
    term, out, k = v, v, 0
    least = Decimal(10) ** -(CONTEXT.prec + 20)
    while term.copy_abs() > least:
        k += 1
        term = c.divide(c.multiply(term.copy_negate(), c.multiply(v, v)), Decimal(k))
        out = c.add(out, c.divide(term, Decimal(2 * k + 1)))
    whole = c.divide(c.multiply(out, Decimal(2)), c.sqrt(_pi(c.prec)))
    return _ball(lambda: CONTEXT.plus(whole), lambda _: _UP.add(error, _ULP))
