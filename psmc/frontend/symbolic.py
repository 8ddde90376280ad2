"""What a traced method computes with: arrays that behave like numpy's and record what was done to them."""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Rational, Real
from typing import Any, NoReturn

from psmc.diagnostics import Diagnostic, PsmcError, fail
from psmc.frontend import arrays, constants
from psmc.frontend import surface as sf
from psmc.frontend.arrays import Leaf, Node, Scalar, shape
from psmc.frontend.pysource import here
from psmc.frontend.scope import suggest
from psmc.source import Span

MAX_TAP = 64
_METHODS = ("T", "conj", "imag", "lag", "max", "mean", "ndim", "prod", "real", "shape", "sum", "transpose")


class TraceAttributeError(PsmcError, AttributeError):
    """A missing attribute: `hasattr` says False, and left alone it is shown as any other mistake."""


def refuse(what: str, help_: str, span: Span | None = None) -> NoReturn:
    """PSM252: Python needs a value, and while a method is traced there is none."""
    fail(
        "PSM252",
        f"{what}: it stands for a whole array, its numbers are known only later",
        span or here(),
        helps=(help_,),
    )


class Array:
    """A symbolic array. Its shape is a tuple of dim names; operators broadcast from the right, as in numpy."""

    __slots__ = ("_node",)
    _node: Node
    __hash__ = object.__hash__

    def __init__(self, node: Node) -> None:
        object.__setattr__(self, "_node", node)

    # --- reading ----------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[str | int, ...]:
        return tuple(a or 1 for a in self._node.axes)

    @property
    def ndim(self) -> int:
        return len(self._node.axes)

    @property
    def T(self) -> Array:
        return self.transpose()

    @property
    def real(self) -> Array:
        return apply("real", self)

    @property
    def imag(self) -> Array:
        return apply("imag", self)

    def conj(self) -> Array:
        return apply("conj", self)

    def transpose(self, *order: Any) -> Array:
        """The axes reversed, or in the given order."""
        span = here()
        if len(order) == 1 and isinstance(order[0], tuple | list):
            order = tuple(order[0])
        if not order:
            order = tuple(reversed(range(self.ndim)))
        places = [arrays.position(a, self._node, span) for a in order]
        return Array(arrays.transpose(self._node, places, span))

    def sum(self, axis: Any = None, keepdims: bool = False) -> Array:
        return Array(arrays.reduce("sum", self._node, axis, keepdims, here()))

    def max(self, axis: Any = None, keepdims: bool = False) -> Array:
        return Array(arrays.reduce("max", self._node, axis, keepdims, here()))

    def prod(self, axis: Any = None, keepdims: bool = False) -> Array:
        return Array(arrays.reduce("prod", self._node, axis, keepdims, here()))

    def mean(self, axis: Any = None, keepdims: bool = False) -> Array:
        """The sum over the axes, divided by their sizes."""
        span = here()
        listed = range(self.ndim) if axis is None else axis if isinstance(axis, tuple | list) else (axis,)
        out = arrays.reduce("sum", self._node, axis, keepdims, span)
        for place in sorted({arrays.position(a, self._node, span) for a in listed}):
            dim = self._node.axes[place]
            if dim is not None:
                out = arrays.pointwise("div", span, out, size(dim, span))
        return Array(out)

    def lag(self, tokens: int = 1) -> Array:
        """This input some tokens earlier; 0 before the start of a sequence."""
        node, span = self._node, here()
        if not isinstance(node, Leaf) or node.owner is not None or node.version:
            fail(
                "PSM257",
                "only an input has a value of an earlier token",
                span,
                helps=("write x.k.lag(1), then compute.",),
            )
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens + node.lag <= MAX_TAP:
            fail(
                "PSM107",
                f"a tap looks back by a whole number of tokens, from 1 to {MAX_TAP}",
                span,
                helps=("write .lag(1).",),
            )
        return Array(Leaf(span, node.axes, owner=None, name=node.name, scope=node.scope, lag=node.lag + tokens))

    def __getitem__(self, key: Any) -> Array:
        keys = key if isinstance(key, tuple) else (key,)
        return Array(arrays.index(self._node, [k._node if isinstance(k, Array) else k for k in keys], here()))

    # --- arithmetic -------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Array:
        return apply("add", self, other)

    def __radd__(self, other: Any) -> Array:
        return apply("add", other, self)

    def __sub__(self, other: Any) -> Array:
        return apply("sub", self, other)

    def __rsub__(self, other: Any) -> Array:
        return apply("sub", other, self)

    def __mul__(self, other: Any) -> Array:
        return apply("mul", self, other)

    def __rmul__(self, other: Any) -> Array:
        return apply("mul", other, self)

    def __truediv__(self, other: Any) -> Array:
        return apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Array:
        return apply("div", other, self)

    def __pow__(self, other: Any) -> Array:
        return apply("pow", self, other)

    def __rpow__(self, other: Any) -> Array:
        return apply("pow", other, self)

    def __matmul__(self, other: Any) -> Array:
        span = here()
        return Array(arrays.matmul(span, self._node, node_of(other, span)))

    def __rmatmul__(self, other: Any) -> Array:
        span = here()
        return Array(arrays.matmul(span, node_of(other, span), self._node))

    def __neg__(self) -> Array:
        return apply("neg", self)

    def __pos__(self) -> Array:
        return self

    def __abs__(self) -> Array:
        return apply("abs", self)

    def __lt__(self, other: Any) -> Array:
        return apply("lt", self, other)

    def __le__(self, other: Any) -> Array:
        return apply("le", self, other)

    def __gt__(self, other: Any) -> Array:
        return apply("gt", self, other)

    def __ge__(self, other: Any) -> Array:
        return apply("ge", self, other)

    def __eq__(self, other: object) -> Array:  # type: ignore[override]
        return apply("eq", self, other)

    def __ne__(self, other: object) -> Array:  # type: ignore[override]
        return apply("ne", self, other)

    def __and__(self, other: Any) -> Array:
        return apply("and", self, other)

    def __or__(self, other: Any) -> Array:
        return apply("or", self, other)

    def __invert__(self) -> Array:
        return apply("not", self)

    # --- what has no meaning before run time --------------------------------------------------------

    def __repr__(self) -> str:
        return f"<array {shape(self._node.axes)}>"

    def __bool__(self) -> bool:
        refuse(
            "an array has no truth value while its method is traced",
            "for a choice write where(condition, a, b) or maximum(a, b); for and, or, not write & | ~, in parentheses.",
        )

    def __index__(self) -> int:
        node = self._node
        if isinstance(node, Scalar) and node.dim is not None:
            return _fixed_size(node)
        refuse("an array is not a number while its method is traced", "use functions of psmc.lang on it.")

    def __float__(self) -> float:
        refuse("an array is not a number while its method is traced", "use functions of psmc.lang instead of math's.")

    __int__ = __index__
    __complex__ = __float__

    def __iter__(self) -> Any:
        node = self._node
        if isinstance(node, Scalar) and node.dim is not None:
            return iter(range(_fixed_size(node)))
        refuse(
            "an array cannot be iterated or unpacked",
            "index it, a[0], or loop over a dim of fixed size: for r in x.dims.R.",
        )

    def __len__(self) -> int:
        refuse("an array has no length", "write x.dims.K for the size of a dim.")

    def __contains__(self, item: object) -> bool:
        refuse("'in' needs the numbers of an array", "compare and reduce instead.")

    def __setitem__(self, key: Any, value: Any) -> None:
        refuse("an array cannot be changed in place", "compute a new array, for example with where(...).")

    def __array__(self, *_: Any, **__: Any) -> Any:
        _foreign("numpy")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> Any:
        # numpy's scalars try their own operators first: 2 numbers and a known name mean plain arithmetic
        op = _UFUNCS.get(getattr(ufunc, "__name__", ""))
        if op is not None and method == "__call__" and all(isinstance(i, Array | Real) for i in inputs):
            return apply(op, *inputs)
        _foreign("numpy")

    def __array_function__(self, *_: Any, **__: Any) -> Any:
        _foreign("numpy")

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        _foreign("torch")

    def __getattr__(self, name: str) -> Any:
        message = f"an array has no attribute '{name}'"
        if name.startswith("_"):
            raise AttributeError(message)
        helps = suggest(name, _METHODS) or ("functions such as exp and where are imported from psmc.lang.",)
        raise TraceAttributeError(Diagnostic("PSM253", message, here(), helps=helps))


_UFUNCS = {"add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "power": "pow"}


def _foreign(library: str) -> NoReturn:
    refuse(f"{library} cannot compute with a traced array", "import the function from psmc.lang instead.")


def _fixed_size(node: Scalar) -> int:
    fixed = getattr(node, "fixed", None)
    if fixed is None:
        refuse(
            f"the size of dim '{node.dim}' is not fixed", f"fix it: dims='… {node.dim}=2 …', or reduce over the axis."
        )
    return int(fixed)


# --- building -----------------------------------------------------------------------------------


class FixedScalar(Scalar):
    """The size of a dim that the spec fixes."""

    fixed: int | None = None


def size(dim: str, span: Span, fixed: int | None = None) -> Scalar:
    """The size of a dim as a number."""
    node = FixedScalar(span, (), expr=sf.Access(None, sf.Name(dim, span), None, 0, span), dim=dim)
    object.__setattr__(node, "fixed", fixed)
    return node


def apply(op: str, *args: Any) -> Array:
    """A pointwise operator of `ir.ops` on arrays and numbers."""
    span = here()
    return Array(arrays.pointwise(op, span, *(node_of(a, span) for a in args)))


def node_of(value: Any, span: Span) -> Node:
    """The node of an array or a plain number. Raises PSM252 for anything else."""
    if isinstance(value, Array):
        return value._node
    if isinstance(value, bool) or not isinstance(value, Real | complex):
        kind = type(value)
        name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__name__}"
        fail(
            "PSM252",
            f"a {name} cannot be part of a spec",
            span,
            helps=("numbers are plain; arrays come in as inputs or params: declare one.",),
        )
    if isinstance(value, Real):
        return Scalar(span, (), expr=number(value, span))
    parts = (number(value.real, span), number(value.imag, span))
    return Scalar(span, (), expr=sf.Call(sf.Name("complex", span), parts, span))


def number(value: Any, span: Span) -> sf.ExprNode:
    """A literal. A float means its shortest decimal, as it was typed."""
    if isinstance(value, Rational):
        exact = Fraction(int(value.numerator), int(value.denominator))
        for part in (exact.numerator, exact.denominator):
            constants.literal(str(abs(part)) if abs(part) < 10**constants.MAX_DIGITS else "1e999", span)
    elif math.isnan(value):
        fail(
            "PSM252", "nan cannot be part of a spec", span, helps=("for 'nothing yet' use inf or an identity element.",)
        )
    elif math.isinf(value):
        return sf.Inf(span) if value > 0 else sf.Unary("neg", sf.Inf(span), span)
    else:
        exact = Fraction(repr(float(value)))
    if exact < 0:
        return sf.Unary("neg", sf.Number(-exact, span), span)
    return sf.Number(exact, span)
