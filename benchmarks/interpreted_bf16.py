"""bfloat16 in Triton's interpreter as a GPU computes it: casts round to nearest, even ones at ties, and products
multiply values. On its own the interpreter cuts digits off, and multiplies the bits of bf16 numbers as integers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

_BUILDER = interpreter.InterpreterBuilder


def widened(bits: Any) -> Any:
    """uint16 bits of bf16 numbers as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(x: Any) -> Any:
    """fp32 numbers as bits of the nearest bf16 ones, uint16."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _wide(x: Any) -> Any:
    return interpreter.TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x


def _narrow(x: Any) -> Any:
    """What came of bf16 numbers: fp32 is bf16 again, truth values stay."""
    return interpreter.TensorHandle(narrowed(x.data), tl.bfloat16) if x.dtype.scalar == tl.float32 else x


def _cast(plain: Any) -> Any:
    def cast(self: Any, x: Any, to: Any, *rounding: Any) -> Any:
        if x.dtype.scalar == to.scalar or tl.bfloat16 not in (x.dtype.scalar, to.scalar):
            return plain(self, x, to, *rounding)
        if to.scalar == tl.bfloat16:
            return _narrow(plain(self, x, tl.float32, *rounding))
        return plain(self, _wide(x), to, *rounding)

    return cast


def _operation(plain: Any) -> Any:
    def operation(self: Any, *operands: Any) -> Any:
        *numbers, op = operands
        if all(x.dtype.scalar != tl.bfloat16 for x in numbers):
            return plain(self, *operands)
        return _narrow(plain(self, *map(_wide, numbers), op))

    return operation


def _product(plain: Any) -> Any:
    return lambda self, a, b, *rest: plain(self, _wide(a), _wide(b), *rest)


_MENDED = {"cast_impl": _cast, "create_fp_to_fp": _cast, "binary_op": _operation, "unary_op": _operation,
           "create_dot": _product}  # fmt: skip


@contextmanager
def bf16() -> Iterator[None]:
    plain = {name: getattr(_BUILDER, name) for name in _MENDED}
    for name, mend in _MENDED.items():
        setattr(_BUILDER, name, mend(plain[name]))
    _BUILDER.get_bf16 = lambda self, x: interpreter.TensorHandle(narrowed(np.array([x], np.float32)), tl.bfloat16)
    try:
        yield
    finally:
        for name, was in plain.items():
            setattr(_BUILDER, name, was)
        del _BUILDER.get_bf16
