"""What a printed expression is, how it is subscripted, and when it may stay a Python number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from psmc.codegen.torch_ops import ATOM, NUMBER_OPS, PRODUCT, UNARY
from psmc.ir import Const, DimValue, Expr, Index, Op
from psmc.ir.ops import Kind
from psmc.ir.query import nearest_float

Axes = tuple[Index, ...]
_EXACT_INT = 2**53
_EXP_MAX = 700


@dataclass(frozen=True)
class Printed:
    """`axes` are the indices of the trailing axes; None: a Python number."""

    text: str
    precedence: int
    axes: Axes | None
    kind: Kind
    # If the text is a plain subscript: what it is of, and the entries after `...`.
    base: str = ""
    places: tuple[str, ...] = ()

    def within(self, precedence: int) -> str:
        return self.text if self.precedence >= precedence else f"({self.text})"


@dataclass(frozen=True)
class Like:
    """A tensor of the function at hand whose device (and, if it is real, dtype) new tensors take."""

    text: str
    kind: Kind

    @property
    def dtype(self) -> str:
        return "torch.get_default_dtype()" if self.kind == "int" else f"{self._real}.dtype"

    @property
    def device(self) -> str:
        return f"{self.text}.device"

    @property
    def _real(self) -> str:
        return f"{self.text}.real" if self.kind == "complex" else self.text

    def full(self, shape: str, value: Printed) -> Printed:
        """A tensor of that shape filled with a number."""
        kind: Kind = "real" if value.kind == "int" else value.kind
        if kind == "real" and self.kind != "int":
            return Printed(f"{self._real}.new_full({shape}, {value.text})", ATOM, (), kind)
        complex_dtype = f"torch.promote_types({self.dtype}, torch.complex32)"
        dtype = {"complex": complex_dtype, "bool": "torch.bool"}.get(kind, self.dtype)
        text = f"torch.full({shape}, {value.text}, dtype={dtype}, device={self.device})"
        return Printed(text, ATOM, (), kind)


def number(value: Fraction) -> Printed:
    """An exact rational as Python: an int, a decimal, or a quotient of ints (which Python rounds correctly)."""
    if value.denominator == 1 and abs(value.numerator) < _EXACT_INT:
        text = str(value.numerator)
        precedence = ATOM
    elif math.isinf(nearest_float(value)):
        text = "math.inf" if value > 0 else "-math.inf"
        precedence = ATOM
    elif Fraction(repr(float(value))) == value or max(abs(value.numerator), value.denominator) >= _EXACT_INT:
        text = repr(float(value))
        precedence = ATOM
    else:
        text = f"{value.numerator} / {value.denominator}"
        precedence = PRODUCT
    kind: Kind = "int" if value.denominator == 1 and abs(value.numerator) < _EXACT_INT else "real"
    return Printed(text, min(precedence, UNARY) if value < 0 else precedence, None, kind)


def atom(text: str, kind: Kind) -> Printed:
    """A Python number."""
    return Printed(text, ATOM, None, kind)


def subscript(base: str, places: tuple[str, ...], axes: Axes, kind: Kind) -> Printed:
    """base[..., places]."""
    return Printed(f"{base}[..., {', '.join(places)}]", ATOM, axes, kind, base, places)


def as_number(node: Op) -> bool:
    """Whether Python can do it on numbers without an error for any size of any dim."""
    if node.op not in NUMBER_OPS or (node.kind == "complex" and node.op not in ("add", "sub", "mul", "neg", "complex")):
        return False
    match node:
        case Op(op="div", args=(_, denominator)):
            return _positive(denominator) or (isinstance(denominator, Const) and denominator.value != 0)
        case Op(op="pow", args=(base, Const(value=power))):
            return abs(power) <= 16 and (_positive(base) or (power >= 0 and power.denominator == 1))
        case Op(op="sqrt" | "rsqrt" | "log", args=(argument,)):
            return _positive(argument)
        case Op(op="exp", args=(argument,)):
            return isinstance(argument, Const) and argument.value <= _EXP_MAX
        case Op(op="pow"):
            return False
    return True


def _positive(node: Expr) -> bool:
    """Surely a number above 0."""
    match node:
        case Const(value=value):
            return value > 0
        case DimValue():
            return True
        case Op(op="mul" | "add" | "div", args=(a, b)):
            return _positive(a) and _positive(b)
        case Op(op="sqrt", args=(a,)):
            return _positive(a)
        case Op(op="pow", args=(a, Const())):
            return _positive(a)
    return False
