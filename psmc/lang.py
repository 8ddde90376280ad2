"""The functions of the language, for decorated classes: `from psmc.lang import exp, outer, where`.

On the arrays of a traced method they record an operation; on plain numbers they compute it, so that a formula can be
tried in a notebook. Shapes are numpy's, over dim names.
"""

from __future__ import annotations

import builtins
import cmath
import math
from collections.abc import Callable
from typing import Any

from psmc.diagnostics import fail
from psmc.frontend import arrays
from psmc.frontend.pysource import here
from psmc.frontend.symbolic import Array, apply, node_of

__all__ = [
    "abs", "arange", "clamp", "complex", "conj", "const", "cos", "einsum", "erf", "exp", "expm1", "eye", "gelu", "imag",
    "inf", "let", "log", "log1p", "logaddexp", "logsigmoid", "maximum", "minimum", "outer", "real", "relu", "rsqrt",
    "sigmoid", "sign", "silu", "sin", "softplus", "sqrt", "stop", "tanh", "where",
]  # fmt: skip

inf = math.inf


def _traced(*args: Any) -> bool:
    return any(isinstance(a, Array) for a in args)


# --- on plain numbers ---------------------------------------------------------------------------


def _either(real: Callable[[float], float], full: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: full(x) if isinstance(x, builtins.complex) else real(x)


def _safe_exp(x: float) -> float:
    return math.inf if x > 709.782712893384 else math.exp(x)


def _log(x: float) -> float:
    return -math.inf if x == 0 else math.log(x)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-builtins.abs(x)))


def _logaddexp(x: float, y: float) -> float:
    high = max(x, y)
    return high if math.isinf(high) else high + math.log1p(math.exp(-builtins.abs(x - y)))


_PLAIN: dict[str, Callable[..., Any]] = {
    "abs": builtins.abs,
    "clamp": lambda x, lo, hi: min(max(x, lo), hi),
    "complex": builtins.complex,
    "conj": lambda x: x.conjugate(),
    "cos": math.cos,
    "erf": math.erf,
    "exp": _either(_safe_exp, cmath.exp),
    "expm1": math.expm1,
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "imag": lambda x: x.imag,
    "log": _either(_log, cmath.log),
    "log1p": math.log1p,
    "logaddexp": _logaddexp,
    "logsigmoid": lambda x: -_softplus(-x),
    "max": max,
    "min": min,
    "real": lambda x: x.real,
    "relu": lambda x: max(x, 0.0),
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "sigmoid": _sigmoid,
    "sign": lambda x: (x > 0) - (x < 0),
    "silu": lambda x: x * _sigmoid(x),
    "sin": math.sin,
    "softplus": _softplus,
    "sqrt": math.sqrt,
    "stop": lambda x: x,
    "tanh": math.tanh,
    "where": lambda condition, x, y: x if condition else y,
}


def _call(op: str, *args: Any) -> Any:
    return apply(op, *args) if _traced(*args) else _PLAIN[op](*args)


# --- pointwise ----------------------------------------------------------------------------------


def abs(x: Any) -> Any:
    """The absolute value, or the modulus of a complex number."""
    return _call("abs", x)


def clamp(x: Any, lo: Any, hi: Any) -> Any:
    """`x` kept within [lo, hi]."""
    return _call("clamp", x, lo, hi)


def complex(re: Any, im: Any) -> Any:
    """re + i im."""
    return _call("complex", re, im)


def conj(x: Any) -> Any:
    """The complex conjugate."""
    return _call("conj", x)


def cos(x: Any) -> Any:
    return _call("cos", x)


def erf(x: Any) -> Any:
    return _call("erf", x)


def exp(x: Any) -> Any:
    return _call("exp", x)


def expm1(x: Any) -> Any:
    """exp(x) - 1, exact near 0."""
    return _call("expm1", x)


def gelu(x: Any) -> Any:
    """x Φ(x), the exact form."""
    return _call("gelu", x)


def imag(x: Any) -> Any:
    return _call("imag", x)


def log(x: Any) -> Any:
    """The natural logarithm; -inf at 0."""
    return _call("log", x)


def log1p(x: Any) -> Any:
    """log(1 + x), exact near 0."""
    return _call("log1p", x)


def logaddexp(x: Any, y: Any) -> Any:
    """log(exp(x) + exp(y))."""
    return _call("logaddexp", x, y)


def logsigmoid(x: Any) -> Any:
    return _call("logsigmoid", x)


def maximum(x: Any, y: Any) -> Any:
    """The larger one; ties take `x`, gradient included."""
    return _call("max", x, y)


def minimum(x: Any, y: Any) -> Any:
    """The smaller one; ties take `x`, gradient included."""
    return _call("min", x, y)


def real(x: Any) -> Any:
    return _call("real", x)


def relu(x: Any) -> Any:
    return _call("relu", x)


def rsqrt(x: Any) -> Any:
    """1 / sqrt(x)."""
    return _call("rsqrt", x)


def sigmoid(x: Any) -> Any:
    return _call("sigmoid", x)


def sign(x: Any) -> Any:
    return _call("sign", x)


def silu(x: Any) -> Any:
    """x σ(x)."""
    return _call("silu", x)


def sin(x: Any) -> Any:
    return _call("sin", x)


def softplus(x: Any) -> Any:
    """log(1 + exp(x))."""
    return _call("softplus", x)


def sqrt(x: Any) -> Any:
    return _call("sqrt", x)


def stop(x: Any) -> Any:
    """`x`, without a gradient."""
    return _call("stop", x)


def tanh(x: Any) -> Any:
    return _call("tanh", x)


def where(condition: Any, x: Any, y: Any) -> Any:
    """`x` where the condition holds, else `y`."""
    return _call("where", condition, x, y)


# --- shapes -------------------------------------------------------------------------------------


def const(value: Any) -> Any:
    """An exact number: 1 - const(0.9) is 1/10, where 1 - 0.9 is what the floats make of it."""
    return Array(node_of(value, here()))


def let(name: str, value: Any) -> Any:
    """`value` under a name of its own: computed once however often it is used, and named so in generated code."""
    if not isinstance(value, Array):
        return value
    span = here()
    if not isinstance(name, str):
        fail(
            "PSM258",
            f"the name of a let is a string, not a {type(name).__name__}",
            span,
            helps=("write let('name', value).",),
        )
    node = value._node
    return Array(arrays.Named(span, node.axes, (node,), name=name))


def outer(a: Any, b: Any) -> Any:
    """a[:, None] * b[None, :]; of vectors [K] and [V], a matrix [K, V]."""
    if not _traced(a, b):
        return a * b
    span = here()
    left, right = node_of(a, span), node_of(b, span)
    for node in (left, right):
        if len(node.axes) != 1:
            fail(
                "PSM250",
                f"outer takes two vectors, not {arrays.shape(node.axes)}",
                span,
                helps=("write * with [:, None].",),
            )
    column = arrays.index(left, (slice(None), None), span)
    return Array(arrays.pointwise("mul", span, column, right))


def einsum(spec: str, *operands: Any) -> Any:
    """Products summed over the letters that the result leaves out: einsum("ij,jk->ik", a, b). No '->': numpy's rule."""
    span = here()
    nodes = [node_of(o, span) for o in operands]
    text = spec.replace(" ", "") if isinstance(spec, str) else ""
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    letters = "".join(terms)
    if not arrow:
        right = "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    wrong = not (letters + right).isalpha() or len(set(right)) != len(right) or not set(right) <= set(letters)
    if letters and (wrong or len(terms) != len(nodes)):
        fail(
            "PSM257",
            f"'{spec}' does not describe {len(nodes)} operand{'s' * (len(nodes) != 1)}",
            span,
            helps=("write 'ij,jk->ik'.",),
        )
    for term, node in zip(terms, nodes, strict=False):
        if len(term) != len(node.axes):
            fail("PSM257", f"'{term}' does not fit {arrays.shape(node.axes)}", span, helps=("one letter an axis.",))
    return Array(arrays.contract(span, terms, right, nodes))


def eye(dim: Any) -> Any:
    """The identity matrix over a dim: eye(x.dims.K)."""
    span = here()
    name = _dim(dim, "eye")
    return Array(arrays.Eye(span, (name, name)))


def arange(dim: Any) -> Any:
    """0 .. n-1 over a dim: arange(x.dims.N)."""
    span = here()
    return Array(arrays.Arange(span, (_dim(dim, "arange"),)))


def _dim(value: Any, what: str) -> str:
    node = value._node if isinstance(value, Array) else None
    if not isinstance(node, arrays.Scalar) or node.dim is None:
        fail("PSM257", f"{what} takes a dim, not a value", here(), helps=(f"write {what}(x.dims.K).",))
    return node.dim
