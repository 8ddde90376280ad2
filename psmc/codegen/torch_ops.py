"""The torch printer's table: one row for each operator, and the small functions that a printed module may paste.

Tensor operands are already aligned to the same trailing axes, and of the right kind. `{0}`, `{1}`, `{2}` are
operand texts.
"""

from __future__ import annotations

from dataclasses import dataclass

# Python's precedences, tightest last.
TERNARY, OR, AND, NOT, COMPARE, BIT_OR, BIT_AND, SUM, PRODUCT, UNARY, POWER, ATOM = range(12)


@dataclass(frozen=True)
class Row:
    """`needs`: the least precedence that each operand may have without parentheses. `helper`: a function of HELPERS."""

    text: str
    precedence: int = ATOM
    needs: tuple[int, ...] = (TERNARY, TERNARY, TERNARY)
    helper: str | None = None


def _infix(symbol: str, precedence: int) -> Row:
    return Row(f"{{0}} {symbol} {{1}}", precedence, (precedence, precedence + 1))


def _call(function: str) -> Row:
    return Row(f"torch.{function}({{0}})")


def _helper(name: str) -> Row:
    return Row(f"{name}({{0}}, {{1}})", helper=name)


TENSOR_OPS: dict[str, Row] = {
    "or": _infix("|", BIT_OR),
    "and": _infix("&", BIT_AND),
    "not": Row("~{0}", UNARY, (UNARY,)),
    "lt": Row("{0} < {1}", COMPARE, (BIT_OR, BIT_OR)),
    "le": Row("{0} <= {1}", COMPARE, (BIT_OR, BIT_OR)),
    "gt": Row("{0} > {1}", COMPARE, (BIT_OR, BIT_OR)),
    "ge": Row("{0} >= {1}", COMPARE, (BIT_OR, BIT_OR)),
    "eq": Row("{0} == {1}", COMPARE, (BIT_OR, BIT_OR)),
    "ne": Row("{0} != {1}", COMPARE, (BIT_OR, BIT_OR)),
    "add": _infix("+", SUM),
    "sub": _infix("-", SUM),
    "mul": _infix("*", PRODUCT),
    "div": _infix("/", PRODUCT),
    "neg": Row("-{0}", UNARY, (UNARY,)),
    "pow": Row("{0} ** {1}", POWER, (ATOM, POWER)),
    "where": Row("torch.where({0}, {1}, {2})"),
    "max": _helper("_max"),
    "min": _helper("_min"),
    "abs": _call("abs"),
    "sign": _call("sign"),
    "clamp": Row("_min(_max({0}, {1}), {2})", helper="_min _max"),
    "exp": _call("exp"),
    "expm1": _call("expm1"),
    "log": _call("log"),
    "log1p": _call("log1p"),
    "sqrt": _call("sqrt"),
    "rsqrt": _call("rsqrt"),
    "sin": _call("sin"),
    "cos": _call("cos"),
    "tanh": _call("tanh"),
    "sigmoid": _call("sigmoid"),
    "logsigmoid": _call("nn.functional.logsigmoid"),
    "softplus": Row("-torch.nn.functional.logsigmoid(-{0})", UNARY, (UNARY,)),  # F.softplus is linear from 20 on
    "relu": _call("relu"),
    "silu": _call("nn.functional.silu"),
    "gelu": _call("nn.functional.gelu"),
    "erf": _call("erf"),
    "logaddexp": _helper("_logaddexp"),
    "stop": Row("{0}.detach()", needs=(ATOM,)),
    "real": Row("{0}.real", needs=(ATOM,)),
    "imag": Row("{0}.imag", needs=(ATOM,)),
    "conj": Row("{0}.conj()", needs=(ATOM,)),
    "complex": Row("torch.complex({0}, {1})"),
}

# On Python numbers (constants and sizes). Others are done on a tensor of one element.
NUMBER_OPS: dict[str, Row] = {
    **{op: TENSOR_OPS[op] for op in ("lt", "le", "gt", "ge", "eq", "ne", "add", "sub", "mul", "div", "neg", "pow")},
    "or": _infix("or", OR),
    "and": _infix("and", AND),
    "not": Row("not {0}", NOT, (NOT,)),
    "where": Row("{1} if {0} else {2}", TERNARY, (OR, OR, TERNARY)),
    "max": Row("max({0}, {1})"),
    "min": Row("min({0}, {1})"),
    "abs": Row("abs({0})"),
    "sqrt": Row("math.sqrt({0})"),
    "rsqrt": Row("1 / math.sqrt({0})", PRODUCT),
    "log": Row("math.log({0})"),
    "exp": Row("math.exp({0})"),
    "stop": Row("{0}", TERNARY),
    "complex": Row("complex({0}, {1})"),
}

# Reductions over one trailing axis, {1}.
TENSOR_REDUCTIONS: dict[str, Row] = {
    "sum": Row("{0}.sum({1})", needs=(ATOM, TERNARY)),
    "prod": Row("{0}.prod({1})", needs=(ATOM, TERNARY)),
    "max": Row("{0}.max({1}).values", needs=(ATOM, TERNARY)),
}
# The same of a value that does not depend on the index; {1} is the size of its dim.
CONSTANT_REDUCTIONS: dict[str, Row] = {
    "sum": Row("{1} * {0}", PRODUCT, (UNARY, PRODUCT)),
    "prod": Row("{0} ** {1}", POWER, (ATOM, POWER)),
    "max": Row("{0}", TERNARY),
}

HELPERS: dict[str, str] = {
    "_attention": '''\
def _attention(kernels, n, query, keys, values, scale=1.0, masks=None):
    """softmax(scale query keysᵀ) values over several sets of tokens at once, [..., tokens, width] each, where masks()
    holds, [tokens, tokens] for each set: by kernels where there are some for these operands, else one call of torch."""
    if kernels is not None and kernels.takes([query, *keys, *values]):
        return kernels(query, keys, values, scale, getattr(n, "__dtype__", None))
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in (query, *keys, *values)))
    sides = [torch.cat([x.expand(*lead, *x.shape[-2:]) for x in part], -2) for part in ((query,), keys, values)]
    dtype = max((x.dtype for x in sides), key=lambda d: d.itemsize)
    q, k, v = (x.reshape(-1, 1, *x.shape[-2:]).to(dtype) for x in sides)
    seen = None if masks is None else torch.cat([*masks().values()], -1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=float(scale))
    if seen is not None:
        out = torch.where(seen.any(-1, keepdim=True), out, math.nan)  # 0 / 0, as the rule says
    return out.reshape(*lead, *out.shape[-2:])
''',
    "_as_precise": '''\
def _as_precise(kernels, n, x):
    """Where kernels run, matrix products in the operands are as precise as a call's inputs: bf16 if these are."""
    there = x.device.type == "cuda" or (kernels is not None and kernels.interpreted)
    if there and getattr(n, "__dtype__", None) == torch.bfloat16:
        return torch.autocast(x.device.type, torch.bfloat16)
    return torch.autocast("cpu", enabled=False)
''',
    "_exp_sum": '''\
def _exp_sum(first, *rest):
    """exp(first + ...); 0 with gradient 0 where a term is -inf, whatever the others are."""
    gone = first.real == -math.inf
    total = first
    for term in rest:
        gone = gone | (term.real == -math.inf)
        total = total + term
    return torch.where(gone, 0.0, torch.exp(torch.where(gone, 0.0, total)))
''',
    "_max": '''\
def _max(a, b):
    """The larger one; of equal ones the left, gradient included."""
    return torch.where((a >= b) | (a != a), a, b)
''',
    "_min": '''\
def _min(a, b):
    """The smaller one; of equal ones the left, gradient included."""
    return torch.where((a <= b) | (a != a), a, b)
''',
    "_logaddexp": '''\
def _logaddexp(a, b):
    """log(exp(a) + exp(b)); the same infinity twice gives it back, half the gradient each."""
    same = (a == b) & torch.isinf(a)
    return torch.where(same, (a + b) / 2, torch.logaddexp(torch.where(same, 0.0, a), torch.where(same, 0.0, b)))
''',
    "_expand": '''\
def _expand(value, *dims):
    """The trailing axes of `value` expanded to `dims`."""
    return value.expand(*value.shape[: value.dim() - len(dims)], *dims)
''',
    "_gather": '''\
def _gather(value, width, *positions):
    """value[..., positions]: one int position for each trailing axis of `value`; the tensors among them have `width`
    trailing axes of their own, which are the result's. Leading axes broadcast."""
    rank = len(positions)
    sizes = value.shape[value.dim() - rank :]
    flat = 0
    for position, size in zip(positions, sizes):
        flat = flat * size + position
    lead = torch.broadcast_shapes(value.shape[: value.dim() - rank], flat.shape[: flat.dim() - width])
    shape = flat.shape[flat.dim() - width :]
    source = value.expand([*lead, *sizes]).reshape(*lead, math.prod(sizes))
    index = flat.expand([*lead, *shape]).reshape(*lead, math.prod(shape))
    return source.gather(-1, index.long()).reshape([*lead, *shape])
''',
}
