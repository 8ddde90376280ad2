"""Exact values as text a person can check by hand."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction

from psmc.algebra.exact import Array, Sizes
from psmc.algebra.numbers import Complex, Number, Real, decimal

_LEGIBLE = 60  # characters of an exact number; a longer one is rounded


def nested(array: Array, dims: tuple[str, ...], sizes: Sizes, prefix: tuple[int, ...] = ()) -> object:
    """An array as nested tuples; a scalar as itself."""
    if len(prefix) == len(dims):
        return array[prefix]
    return tuple(nested(array, dims, sizes, (*prefix, k)) for k in range(sizes[dims[len(prefix)]]))


def formatted(value: object, digits: int = 6) -> str:
    """`3`, `-1/2`, `2.71828`, `1+2i`, `inf`, `[[1,0],[0,1]]`."""
    if isinstance(value, tuple):
        return "[" + ",".join(formatted(v, digits) for v in value) + "]"
    if isinstance(value, Complex):
        return _complex(value, digits)
    if value is None:
        return "undefined"
    assert isinstance(value, Fraction | Decimal)
    return _real(value, digits)


def told_apart(x: Number, y: Number) -> tuple[str, str]:
    """Both values, with as many digits as it takes to see that they differ."""
    for digits in (6, 12, 24, 48):
        texts = formatted(x, digits), formatted(y, digits)
        if texts[0] != texts[1]:
            return texts
    if not (isinstance(x, Fraction) and isinstance(y, Fraction)):
        return texts
    return formatted(x), f"{formatted(x)} {'+' if y > x else '-'} {_real(decimal(abs(y - x)), 3)}"


def _real(value: Real, digits: int) -> str:
    if isinstance(value, Fraction):
        exact = str(value)
        if len(exact) <= _LEGIBLE:
            return exact
        value = decimal(value)
    if value.is_infinite():
        return "inf" if value > 0 else "-inf"
    return f"{value:.{digits}g}"


def _complex(value: Complex, digits: int) -> str:
    if value.im == 0:
        return _real(value.re, digits)
    imaginary = {1: "i", -1: "-i"}.get(value.im) or _real(value.im, digits) + "i"  # type: ignore[call-overload]
    if value.re == 0:
        return imaginary
    return f"{_real(value.re, digits)}{'' if imaginary.startswith('-') else '+'}{imaginary}"


def element_text(element: Mapping[str, Array], dims: Mapping[str, tuple[str, ...]], sizes: Sizes) -> str:
    """`(s=1,d=2)`."""
    return "(" + ",".join(f"{n}={formatted(nested(a, dims[n], sizes))}" for n, a in element.items()) + ")"


