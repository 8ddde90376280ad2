"""The Triton printer's table: one row for each operator, and the small functions that printed kernels may call.

Reals are fp32, ints int64. Only what triton.language itself has is used (no device library), so that the same text
runs in Triton's interpreter; formulas keep their digits near 0 and give the limits at infinity.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

from psmc.codegen.torch_ops import ATOM, BIT_AND, BIT_OR, COMPARE, PRODUCT, SUM, UNARY, Row

_BOTH = (BIT_OR, BIT_OR)


def _call(function: str) -> Row:
    return Row(f"tl.{function}({{0}})")


def _helper(name: str, arity: int = 1, needs: str = "") -> Row:
    operands = ", ".join(f"{{{n}}}" for n in range(arity))
    return Row(f"{name}({operands})", helper=f"{needs} {name}".strip())


# An int operand of a division or of a function is made real before; `complex` is split into pairs before printing.
SCALAR_OPS: dict[str, Row] = {
    "or": Row("{0} | {1}", BIT_OR, (BIT_OR, BIT_AND)),
    "and": Row("{0} & {1}", BIT_AND, (BIT_AND, SUM)),
    "not": Row("{0} == 0", COMPARE, (BIT_OR,)),
    "lt": Row("{0} < {1}", COMPARE, _BOTH),
    "le": Row("{0} <= {1}", COMPARE, _BOTH),
    "gt": Row("{0} > {1}", COMPARE, _BOTH),
    "ge": Row("{0} >= {1}", COMPARE, _BOTH),
    "eq": Row("{0} == {1}", COMPARE, _BOTH),
    "ne": Row("{0} != {1}", COMPARE, _BOTH),
    "add": Row("{0} + {1}", SUM, (SUM, PRODUCT)),
    "sub": Row("{0} - {1}", SUM, (SUM, PRODUCT)),
    "mul": Row("{0} * {1}", PRODUCT, (PRODUCT, UNARY)),
    "div": Row("{0} / {1}", PRODUCT, (PRODUCT, UNARY)),
    "neg": Row("-{0}", UNARY, (UNARY,)),
    "pow": _helper("lane_power", 2, needs="lane_exp"),
    "where": Row("tl.where({0}, {1}, {2})"),
    "max": _helper("lane_larger", 2),
    "min": _helper("lane_smaller", 2),
    "abs": _call("abs"),
    "sign": _helper("lane_sign"),
    "clamp": Row("lane_smaller(lane_larger({0}, {1}), {2})", helper="lane_smaller lane_larger"),
    "exp": _helper("lane_exp"),
    "expm1": _helper("lane_expm1", needs="lane_exp"),
    "log": _helper("lane_log"),
    "log1p": _helper("lane_log1p"),
    "sqrt": _call("sqrt"),
    "rsqrt": _call("rsqrt"),
    "sin": _helper("lane_sin", needs="lane_turn"),
    "cos": _helper("lane_cos", needs="lane_turn"),
    "tanh": _helper("lane_tanh", needs="lane_exp lane_expm1"),
    "sigmoid": _helper("lane_sigmoid", needs="lane_exp"),
    "logsigmoid": _helper("lane_logsigmoid", needs="lane_exp lane_log1p"),
    "softplus": Row("-lane_logsigmoid(-{0})", UNARY, (UNARY,), "lane_exp lane_log1p lane_logsigmoid"),
    "relu": Row("lane_larger({0}, 0)", helper="lane_larger"),
    "silu": _helper("lane_silu", needs="lane_exp lane_sigmoid"),
    "gelu": _helper("lane_gelu"),
    "erf": _call("erf"),
    "logaddexp": _helper("lane_logaddexp", 2, needs="lane_exp lane_log1p"),
    "stop": Row("{0}", 0, (0,)),
    "real": Row("{0}", 0, (0,)),
    "imag": Row("0.0"),
    "conj": Row("{0}", 0, (0,)),
}

HELPERS: dict[str, str] = {
    "lane_exp": '''\
def lane_exp(x):
    return tl.exp2(x * 1.4426950408889634)
''',
    "lane_log": '''\
def lane_log(x):
    return tl.log(x)
''',
    "lane_larger": '''\
def lane_larger(a, b):
    """max(a, b), NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
''',
    "lane_smaller": '''\
def lane_smaller(a, b):
    """min(a, b), NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
''',
    "lane_left_of": '''\
def lane_left_of(a, b):
    """exp(a - max(a, b)), and 0 where a is -inf or the larger one infinite: with `lane_right_of`, one exponential."""
    e = tl.where(a > b, 1.0, lane_exp(-tl.abs(a - b)))
    return tl.where(tl.abs(lane_larger(a, b)) == float("inf"), 0.0, e)
''',
    "lane_right_of": '''\
def lane_right_of(a, b):
    """exp(b - max(a, b)), the same way."""
    e = tl.where(a < b, 1.0, lane_exp(-tl.abs(a - b)))
    return tl.where(tl.abs(lane_larger(a, b)) == float("inf"), 0.0, e)
''',
    "lane_sigmoid": '''\
def lane_sigmoid(x):
    """1 / (1 + exp(-x)): the square of a reciprocal root is cheaper than a quotient."""
    root = tl.rsqrt(1 + lane_exp(-x))
    return root * root
''',
    "lane_turn": '''\
def lane_turn(x, shift):
    """sin(x + shift pi / 2): the angle is brought to [-pi/4, pi/4] in three exact parts, then a polynomial (Cephes).
    Angles beyond 1e7 have lost their phase in fp32 anyway."""
    turns = tl.floor(x * 0.6366197723675814 + 0.5)
    a = x - turns * 1.5703125 - turns * 4.837512969970703125e-4 - turns * 7.549789948768648e-8
    z = a * a
    sine = a + a * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 1 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quarter = turns.to(tl.int32) + shift
    value = tl.where((quarter & 1) == 0, sine, cosine)
    value = tl.where((quarter & 2) == 0, value, -value)
    return tl.where(value > 1, 1.0, tl.where(value < -1, -1.0, value))
''',
    "lane_sin": '''\
def lane_sin(x):
    return lane_turn(x, 0)
''',
    "lane_cos": '''\
def lane_cos(x):
    return lane_turn(x, 1)
''',
    "lane_sign": '''\
def lane_sign(x):
    return tl.where(x > 0, 1, tl.where(x < 0, -1, 0)).to(x.dtype)
''',
    "lane_expm1": '''\
def lane_expm1(x):
    """exp(x) - 1; its series near 0."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.35, series, lane_exp(x) - 1)
''',
    "lane_log1p": '''\
def lane_log1p(x):
    """log(1 + x); what rounding 1 + x loses is put back by the quotient (Kahan)."""
    u = 1 + x
    return tl.where((u == 1) | (x == float("inf")), x, tl.log(u) * (x / (u - 1)))
''',
    "lane_tanh": '''\
def lane_tanh(x):
    e = lane_expm1(-2 * tl.abs(x))
    t = -e / (2 + e)
    return tl.where(x < 0, -t, t)
''',
    "lane_logsigmoid": '''\
def lane_logsigmoid(x):
    return tl.where(x < 0, x, 0.0) - lane_log1p(lane_exp(-tl.abs(x)))
''',
    "lane_silu": '''\
def lane_silu(x):
    return x * lane_sigmoid(x)
''',
    "lane_gelu": '''\
def lane_gelu(x):
    """x Phi(x), the exact form."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
''',
    "lane_logaddexp": '''\
def lane_logaddexp(a, b):
    """log(exp(a) + exp(b)); the same infinity twice gives it back."""
    return tl.where(a == b, a + 0.6931471805599453, tl.where(a < b, b, a) + lane_log1p(lane_exp(-tl.abs(a - b))))
''',
    "lane_power": '''\
def lane_power(x, y):
    """x ** y; a negative base wants a whole exponent."""
    size = tl.where(y == 0, 1.0, lane_exp(y * tl.log(tl.abs(x))))
    odd = y - 2 * tl.floor(y / 2)
    signed = tl.where(odd == 0, size, tl.where(odd == 1, -size, float("nan")))
    return tl.where(x < 0, signed, size)
''',
}


# The same where PTX is at hand (NATIVE, a constant of the module): what the hardware computes, to 2 units in the last
# place. What exp gives below the normal numbers is 0; next to 1, where a logarithm's digits cancel, log is its series.
NATIVE: dict[str, str] = {
    "lane_exp": '''\
def lane_exp(x):
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x * 1.4426950408889634)
''',
    "lane_log": '''\
def lane_log(x):
    if NATIVE:
        far = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        d = x - 1
        near = d * (1 + d * (-0.5 + d * (1 / 3 + d * (-0.25 + d * (0.2 + d * (-1 / 6 + d * (1 / 7)))))))
        return tl.where(tl.abs(d) < 0.125, near, far * 0.6931471805599453)
    else:
        return tl.log(x)
''',
}


def exp_sum(arity: int) -> str:
    """exp of a sum that may meet -inf - -inf."""
    names = "abcdefghijklmnopqrstuvwxyz"[:arity]
    gone = " | ".join(f'({n} == float("-inf"))' for n in names)
    return (
        f"def lane_exp_sum_{arity}({', '.join(names)}):\n"
        f'    """exp({" + ".join(names)}); 0 where a term is -inf, whatever the others are."""\n'
        f"    return tl.where({gone}, 0.0, lane_exp({' + '.join(names)}))\n"
    )


def whole_power(size: int) -> str:
    """x to a whole power, by squaring."""
    lines = [f"def lane_power_{size}(x):"]
    factors, square, exponent = [], "x", 1
    while exponent <= size:
        factors += [square] if size & exponent else []
        exponent *= 2
        if exponent <= size:
            lines.append(f"    x{exponent} = {square} * {square}")
            square = f"x{exponent}"
    return "\n".join([*lines, f"    return {' * '.join(factors)}\n"])


def _sign(x: float) -> float:
    return float((x > 0) - (x < 0))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# The same on numbers: what reads no tensor is computed when the kernel is written.
NUMBER_OPS: dict[str, Callable[..., float]] = {
    "or": lambda a, b: a or b,
    "and": lambda a, b: a and b,
    "not": lambda a: not a,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "pow": math.pow,
    "where": lambda c, a, b: a if c else b,
    "max": lambda a, b: a if a >= b else b,
    "min": lambda a, b: a if a <= b else b,
    "abs": abs,
    "sign": _sign,
    "clamp": lambda x, lo, hi: min(max(x, lo), hi),
    "exp": math.exp,
    "expm1": math.expm1,
    "log": math.log,
    "log1p": math.log1p,
    "sqrt": math.sqrt,
    "rsqrt": lambda a: 1 / math.sqrt(a),
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "sigmoid": _sigmoid,
    "logsigmoid": lambda a: -_softplus(-a),
    "softplus": _softplus,
    "relu": lambda a: max(a, 0.0),
    "silu": lambda a: a * _sigmoid(a),
    "gelu": lambda a: 0.5 * a * (1 + math.erf(a / math.sqrt(2))),
    "erf": math.erf,
    "logaddexp": lambda a, b: a + math.log(2) if a == b else max(a, b) + math.log1p(math.exp(-abs(a - b))),
    "stop": lambda a: a,
    "real": lambda a: a,
    "imag": lambda a: 0.0,
    "conj": lambda a: a,
}

__all__ = ["ATOM", "HELPERS", "NATIVE", "NUMBER_OPS", "SCALAR_OPS", "exp_sum", "whole_power"]
