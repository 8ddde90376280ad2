"""Complex to real: every complex tensor becomes two real ones, every complex operator its real formulas.

Triton has no complex numbers, and gradients need none: differentiating by re and im as independent reals gives
exactly the real and imaginary part of torch's gradient of a real loss. A real expression keeps its nodes, so what
was shared stays shared. Quotients use |z|² and overflow where it does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TypeAlias

from psmc.derive.names import declared_names, fresh_name
from psmc.derive.simplify import ONE, ZERO, make
from psmc.diagnostics import fail
from psmc.ir import Aggregator, Assign, Block, Component, Const, Expr, Op, Reduce, Ref, Tensor
from psmc.ir.query import values
from psmc.ir.rewrite import refs, walk, with_children
from psmc.source import Span

Pair: TypeAlias = tuple[Expr, Expr]
Names: TypeAlias = Mapping[str, tuple[str, str]]

_MAX_POWER = 64
_PARTS = ("real", "imag", "conj")  # also written on real values, where they mean little


def realify(agg: Aggregator) -> tuple[Aggregator, dict[str, tuple[str, str]]]:
    """The same aggregator over real tensors, and for each complex tensor the names of its real and imaginary part.

    Every input, param, component and output of complex kind is replaced, in place, by its two parts; a name that is
    complex in one role and real in another (an output named as the component it reads) is split in the first only.
    Raises PsmcError 510 for an operator without real formulas.
    """
    kinds = [(t.name, t.kind) for t in (*agg.inputs, *agg.params)] + [(c.name, c.kind) for c in agg.state]
    kinds += [(a.name, a.value.kind) for a in agg.output.results]
    taken = declared_names(agg)
    names: dict[str, tuple[str, str]] = {}
    for name, kind in kinds:
        if kind == "complex" and name not in names:
            names[name] = (fresh_name(f"{name}_re", taken), fresh_name(f"{name}_im", taken))
    if not names and not any(_has_complex(b) for b in (agg.lift, agg.combine, agg.recurrence, agg.readout)):
        return agg, {}
    components = {c.name for c in agg.state if c.kind == "complex"}

    def block(part: str, body: Block, states: bool) -> Block:
        spans = {a.name: agg.where(f"{part} {a.name}", part) for a in (*body.lets, *body.results)}
        return realify_block(body, names, components if states else (), spans)

    if agg.combine is not None and not isinstance(agg.combine, Block):
        fail("PSM510", "an extern combine cannot be split into real and imaginary parts", agg.where("combine"))
    real = replace(
        agg,
        inputs=_tensors(agg.inputs, names),
        params=_tensors(agg.params, names),
        state=tuple(part for c in agg.state for part in _component(c, names)),
        lift=None if agg.lift is None else block("lift", agg.lift, True),
        combine=None if agg.combine is None else block("combine", agg.combine, True),
        recurrence=None if agg.recurrence is None else block("recurrence", agg.recurrence, True),
        readout=block("output", agg.readout, False),
    )
    return real, names


def realify_block(
    block: Block, names: Names, complex_results: Collection[str] = (), spans: Mapping[str, Span | None] | None = None
) -> Block:
    """The block over real tensors.

    names            complex tensor -> its two parts; a complex tensor that is not named becomes X_re and X_im
    complex_results  results that have two parts even where their value is real
    spans            where each assignment was written, for the error
    """
    spans = spans or {}
    taken = {a.name for a in (*block.lets, *block.results)} | {r.name for r in refs(*values(block))}
    taken |= {part for pair in names.values() for part in pair}
    lets = {
        a.name: (fresh_name(f"{a.name}_re", taken), fresh_name(f"{a.name}_im", taken))
        for a in block.lets
        if a.value.kind == "complex"
    }
    splitter = _Splitter(names, lets)

    def parts(a: Assign, both: bool, pair: tuple[str, str]) -> tuple[Assign, ...]:
        re, im = splitter.split(a.value, spans.get(a.name))
        if not both:
            return (replace(a, value=re),)
        return Assign(pair[0], a.indices, re), Assign(pair[1], a.indices, im)

    done = [part for a in block.lets for part in parts(a, a.name in lets, lets.get(a.name, ("", "")))]
    results = [
        part
        for a in block.results
        for part in parts(a, a.value.kind == "complex" or a.name in complex_results, _pair(names, a.name))
    ]
    return Block(tuple(done), tuple(results))


def split(expr: Expr, names: Names | None = None) -> Pair:
    """Real and imaginary part of an expression; see `realify_block` for `names`."""
    return _Splitter(names or {}, {}).split(expr, None)


class _Splitter:
    def __init__(self, names: Names, lets: Names) -> None:
        self.names, self.lets = names, lets
        self.memo: dict[Expr, Pair] = {}

    def split(self, root: Expr, span: Span | None) -> Pair:
        for node in walk(root):
            if node not in self.memo:
                self.memo[node] = self.node(node, span)
        return self.memo[root]

    def node(self, node: Expr, span: Span | None) -> Pair:
        match node:
            case Ref(space=space, name=name, subs=subs, lag=lag) if node.kind == "complex":
                here = with_children(node, self.real)
                subs = here.subs if isinstance(here, Ref) else subs
                pair = self.lets[name] if space == "let" and name in self.lets else _pair(self.names, name)
                return Ref(space, pair[0], subs, "real", lag), Ref(space, pair[1], subs, "real", lag)
            case Op(op=op, args=args) if op in _PARTS or any(a.kind == "complex" for a in (node, *args)):
                found = RULES[op](*(self.memo[a] for a in args)) if op in RULES else None
                return found or _refuse(op, span)
            case Reduce(op=op, index=index, body=body) if body.kind == "complex":
                if op != "sum":
                    _refuse(f"{op}[{index.name}]", span)
                re, im = self.memo[body]
                return Reduce(op, index, re), ZERO if im == ZERO else Reduce(op, index, im)
        return with_children(node, self.real), ZERO

    def real(self, node: Expr) -> Expr:
        return self.memo[node][0]


def _refuse(op: str, span: Span | None) -> Pair:
    fail(
        "PSM510",
        f"'{op}' on complex values has no form in real numbers that psmc knows",
        span,
        helps=("write it with exp, abs, powers by a whole number, or real and imaginary parts",),
    )


# --- rules: (re, im) of each operand -> (re, im) of the result; None: not in this form ------------------


def _mul(a: Pair, b: Pair) -> Pair:
    re = make("sub", make("mul", a[0], b[0]), make("mul", a[1], b[1]))
    return re, make("add", make("mul", a[0], b[1]), make("mul", a[1], b[0]))


def _norm2(z: Pair) -> Expr:
    return make("add", make("mul", z[0], z[0]), make("mul", z[1], z[1]))


def _scale(z: Pair, by: Expr) -> Pair:
    return make("div", z[0], by), make("div", z[1], by)


def _conj(z: Pair) -> Pair:
    return z[0], make("neg", z[1])


def _div(a: Pair, b: Pair) -> Pair:
    return _scale(a, b[0]) if b[1] == ZERO else _scale(_mul(a, _conj(b)), _norm2(b))


def _pow(z: Pair, exponent: Pair) -> Pair | None:
    power = exponent[0].value if isinstance(exponent[0], Const) and exponent[1] == ZERO else None
    if power is None or power.denominator != 1 or abs(power) > _MAX_POWER:
        return None
    out: Pair = (ONE, ZERO)
    square, left = z, abs(int(power))
    while left:
        out = _mul(out, square) if left % 2 else out
        left //= 2
        square = _mul(square, square) if left else square
    return out if power >= 0 else _div((ONE, ZERO), out)


def _abs(z: Pair) -> Pair:
    """|z|, guarded so that its gradient at 0 is 0 and not 0/0."""
    if z[1] == ZERO:
        return make("abs", z[0]), ZERO
    norm2 = _norm2(z)
    at_zero = make("eq", norm2, ZERO)
    return make("where", at_zero, ZERO, make("sqrt", make("where", at_zero, ONE, norm2))), ZERO


def _exp(z: Pair) -> Pair:
    size = make("exp", z[0])
    return make("mul", size, make("cos", z[1])), make("mul", size, make("sin", z[1]))


def _compare(join: str, op: str) -> Callable[[Pair, Pair], Pair]:
    return lambda a, b: (make(join, make(op, a[0], b[0]), make(op, a[1], b[1])), ZERO)


def _each(op: str) -> Callable[..., Pair]:
    return lambda *args: (make(op, *(a[0] for a in args)), make(op, *(a[1] for a in args)))


RULES: dict[str, Callable[..., Pair | None]] = {
    "add": _each("add"),
    "sub": _each("sub"),
    "neg": _each("neg"),
    "stop": _each("stop"),
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "where": lambda t, a, b: (make("where", t[0], a[0], b[0]), make("where", t[0], a[1], b[1])),
    "abs": _abs,
    "exp": _exp,
    "real": lambda z: (z[0], ZERO),
    "imag": lambda z: (z[1], ZERO),
    "conj": _conj,
    "complex": lambda re, im: (re[0], im[0]),
    "eq": _compare("and", "eq"),
    "ne": _compare("or", "ne"),
}


# --- declarations --------------------------------------------------------------------------------------


def _pair(names: Names, name: str) -> tuple[str, str]:
    return names.get(name) or (f"{name}_re", f"{name}_im")


def _has_complex(block: object) -> bool:
    return isinstance(block, Block) and any(n.kind == "complex" for n in walk(*values(block)))


def _tensors(tensors: tuple[Tensor, ...], names: Names) -> tuple[Tensor, ...]:
    out: list[Tensor] = []
    for t in tensors:
        split_up = [replace(t, name=n, kind="real", interval=None) for n in _pair(names, t.name)]
        out += split_up if t.kind == "complex" else [t]
    return tuple(out)


def _component(c: Component, names: Names) -> tuple[Component, ...]:
    if c.kind != "complex":
        return (c,)
    starts = [split(c.identity.value, names), split(c.initial.value, names) if c.initial is not None else None]
    identity, initial = starts[0], starts[1]
    assert identity is not None
    return tuple(
        Component(
            name,
            c.dims,
            "real",
            None,
            Assign(name, c.identity.indices, identity[k]),
            None if c.initial is None or initial is None else Assign(name, c.initial.indices, initial[k]),
        )
        for k, name in enumerate(_pair(names, c.name))
    )
