"""Exact values as text a person can check by hand."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction

from psmc.algebra.exact import Array, Sizes
from psmc.algebra.numbers import Complex, Real


def nested(array: Array, dims: tuple[str, ...], sizes: Sizes, prefix: tuple[int, ...] = ()) -> object:
    """An array as nested tuples; a scalar as itself."""
    if len(prefix) == len(dims):
        return array[prefix]
    return tuple(nested(array, dims, sizes, (*prefix, k)) for k in range(sizes[dims[len(prefix)]]))


def formatted(value: object) -> str:
    """`3`, `-1/2`, `2.71828`, `1+2i`, `inf`, `[[1,0],[0,1]]`."""
    if isinstance(value, tuple):
        return "[" + ",".join(map(formatted, value)) + "]"
    if isinstance(value, Complex):
        return _complex(value)
    if value is None:
        return "undefined"
    assert isinstance(value, Fraction | Decimal)
    return _real(value)


def _real(value: Real) -> str:
    if isinstance(value, Fraction):
        return str(value)
    if value.is_infinite():
        return "inf" if value > 0 else "-inf"
    return f"{float(value):.6g}" if 1e-300 < abs(value) < 1e300 else f"{value:.5e}"


def _complex(value: Complex) -> str:
    if value.im == 0:
        return _real(value.re)
    imaginary = _real(value.im) + "i"
    if value.re == 0:
        return imaginary
    return f"{_real(value.re)}{'' if imaginary.startswith('-') else '+'}{imaginary}"


def element_text(element: Mapping[str, Array], dims: Mapping[str, tuple[str, ...]], sizes: Sizes) -> str:
    """`(s=1,d=2)`."""
    return "(" + ",".join(f"{n}={formatted(nested(a, dims[n], sizes))}" for n, a in element.items()) + ")"


