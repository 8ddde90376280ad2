"""Scalar expressions as Triton text: one small function a block, for one token in one lane.

A function takes the values that its block reads (`x`, `x_lag1`, `l_a`, `r_a`, `prev_h`, `s_h`) and returns its
results in order. It works on tiles of any shape, and inside `tl.associative_scan`.
"""

from __future__ import annotations

import keyword
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from psmc.codegen.linearise import Step, fresh, linearise
from psmc.codegen.torch_ops import ATOM, PRODUCT, UNARY, Row
from psmc.codegen.triton_ops import HELPERS, NATIVE, NUMBER_OPS, SCALAR_OPS, exp_sum, whole_power
from psmc.ir import Block, Const, Expr, Infinity, Kind, Op, Ref
from psmc.ir.query import Terms, nearest_float, needs_safe_exp, signed_terms
from psmc.ir.rewrite import children, inline, transform, walk

Key = tuple[str, str, int]  # (space, name, lag): one scalar that a block reads
RESERVED = frozenset({*keyword.kwlist, "tl", "triton", "jit", "float", "int", *HELPERS})
_SIDES = {"left": "l_", "right": "r_", "prev": "prev_", "state": "s_"}
_LINE = 100  # characters of a right-hand side
_INT_LITERAL = 2**63
_MAX_POWER = 64
_DTYPES = {"real": "tl.float32", "int": "tl.int64", "bool": "tl.int1"}
_REAL_ARGUMENTS = frozenset({"div", "pow", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "sin", "cos", "tanh",
                             "sigmoid", "logsigmoid", "softplus", "silu", "gelu", "erf", "logaddexp"})  # fmt: skip


@dataclass(frozen=True)
class LaneFunction:
    """`arguments`: what to pass, in order. `results`: what it returns; results that read nothing are not among them
    but in `constants`, (name, number). `narrow`: results that read params only. `text` has no decorator."""

    name: str
    arguments: tuple[Key, ...]
    results: tuple[str, ...]
    constants: tuple[tuple[str, str], ...]
    narrow: frozenset[str]
    text: str
    helpers: tuple[str, ...]
    whole_numbers: frozenset[str] = frozenset()

    def dtype(self, name: str) -> str:
        """What a constant is filled in as."""
        return _DTYPES["int" if name in self.whole_numbers else "real"]

    def assign(self, prefix: str) -> str:
        """The targets of an assignment from a call."""
        return ", ".join(prefix + name for name in self.results)

    def call(self, values: Mapping[Key, str]) -> str:
        return f"{self.name}({', '.join(values[k] for k in self.arguments)})"


def key_of(ref: Ref) -> Key:
    return ref.space, ref.name, ref.lag


def reads(block: Block) -> set[Key]:
    """What a block reads besides its own lets."""
    values = [a.value for a in (*block.lets, *block.results)]
    return {key_of(n) for n in walk(*values) if isinstance(n, Ref) and n.space != "let"}


def print_function(
    name: str, block: Block, order: Sequence[Key], kinds: Mapping[str, Kind] | None = None, whole: bool = False
) -> LaneFunction:
    """A block over scalars (no index anywhere) as one function.

    order  everything that it may read, in the order of the parameters; what is not read is left out
    kinds  element types of results where they are not those of the values
    whole  all of `order` are parameters, and no result is a Python number (the rule of a scan)
    """
    found = reads(block)
    assert found <= set(order), f"{name} reads {sorted(found - set(order))}"
    arguments = tuple(k for k in order if whole or k in found)
    taken = set(RESERVED)
    local: dict[Key, str] = {}
    for key in arguments:
        local[key] = fresh(_wish(key), taken)
        taken.add(local[key])
    program = linearise(block, taken)
    kinds = kinds or {}
    wanted = {step: kinds[result] for result, step in program.results if result in kinds}
    printer = _Printer(local, program.definition)
    lines: list[str] = []
    held: dict[str, _Text] = {}
    taken |= {s.name for s in program.steps}
    for step in _split(program.steps, printer, taken):
        value = printer.show(step.value)
        if value.number is None:
            want = wanted.get(step.name, step.value.kind)
            if want != step.value.kind or (want == "int" and not isinstance(step.value, Ref)):
                value = _Text(f"{value.within(ATOM)}.to({_DTYPES[want]})", ATOM)
            if value.text != step.name:
                lines.append(f"{step.name} = {value.text}")
            value = _Text(step.name, ATOM)
        elif whole and step.name in {s for _, s in program.results}:
            cast = _DTYPES[wanted.get(step.name, "real")]
            lines.append(f"{step.name} = {_spread(value, local[arguments[0]])}.to({cast})")
            value = _Text(step.name, ATOM)
        printer.lets[step.name] = held[step.name] = value
    returned = [(result, step) for result, step in program.results if held[step].number is None]
    lines.append("return " + ", ".join(held[step].text for _, step in returned))
    body = "".join(f"    {line}\n" for line in lines)
    return LaneFunction(
        name,
        arguments,
        tuple(result for result, _ in returned),
        tuple((result, held[step].text) for result, step in program.results if held[step].number is not None),
        frozenset(r.name for r in inline(block).results if all(k[0] == "param" for k in reads(Block(results=(r,))))),
        f"def {name}({', '.join(local[k] for k in arguments)}):\n{body}",
        tuple(sorted(printer.helpers)),
        frozenset(name for name, kind in kinds.items() if kind == "int"),
    )


def number(expr: Expr) -> str:
    """The text of an expression that reads nothing."""
    shown = _Printer({}, lambda _: None).show(expr)
    assert shown.number is not None
    return literal(float(shown.number)).text


def helper_texts(functions: Iterable[LaneFunction], native: bool = False) -> list[str]:
    """The small functions that these call, each before its callers. `native`: in the module, NATIVE says whether they
    may be written in PTX."""
    used = {name for f in functions for name in f.helpers}
    basic = ("lane_exp", "lane_log", "lane_larger", "lane_smaller", "lane_sigmoid", "lane_turn", "lane_expm1",
             "lane_log1p")  # fmt: skip
    ordered = dict.fromkeys([*basic, *HELPERS])
    sized = sorted(n for n in used if n not in HELPERS)
    makers = {"lane_exp_sum": exp_sum, "lane_power": whole_power}
    made = [makers[kind](int(size)) for kind, size in (n.rsplit("_", 1) for n in sized)]
    known = {**HELPERS, **NATIVE} if native else HELPERS
    return [known[n] for n in ordered if n in used] + made


@dataclass(frozen=True)
class _Text:
    """`number`: its value, if it reads no tensor."""

    text: str
    precedence: int
    number: float | None = None

    def within(self, precedence: int) -> str:
        return self.text if self.precedence >= precedence else f"({self.text})"


class _Printer:
    def __init__(self, local: Mapping[Key, str], definition: Callable[[Ref], Expr | None]) -> None:
        self.local = local
        self.definition = definition
        self.lets: dict[str, _Text] = {}
        self.helpers: set[str] = set()

    def show(self, root: Expr) -> _Text:
        done: dict[Expr, _Text] = {}
        for node in walk(root):
            done[node] = self.node(node, done)
        return done[root]

    def node(self, node: Expr, done: dict[Expr, _Text]) -> _Text:
        match node:
            case Const(value=value):
                exact = value.denominator == 1 and abs(value) < _INT_LITERAL
                return literal(int(value) if exact else nearest_float(value))
            case Infinity(negative=negative):
                return literal(-math.inf if negative else math.inf)
            case Ref(space="let"):
                return self.lets[node.name]
            case Ref():
                return _Text(self.local[key_of(node)], ATOM)
            case Op():
                return self.op(node, done)
        raise AssertionError(f"{type(node).__name__} has no form in one lane")

    def op(self, node: Op, done: dict[Expr, _Text]) -> _Text:
        args = [done[a] for a in node.args]
        if all(a.number is not None for a in args) and (folded := _fold(node.op, args)) is not None:
            return folded
        if node.op in ("stop", "real", "conj"):
            return args[0]
        if node.op == "where" and args[0].number is not None:
            return args[1] if args[0].number else args[2]
        if node.op == "exp" and needs_safe_exp(terms := signed_terms(node.args[0], self.definition)):
            if (pair := self.of_larger(terms)) is not None:
                return pair
            name = f"lane_exp_sum_{len(terms)}"
            self.helpers |= {name, "lane_exp"}
            shown = [self.show(t) for _, t in terms]
            signed = [t.text if sign > 0 else f"-{t.within(UNARY)}" for (sign, _), t in zip(terms, shown, strict=True)]
            return _Text(f"{name}({', '.join(signed)})", ATOM)
        if node.op in _REAL_ARGUMENTS:
            args = [_as_real(t, a.kind) for t, a in zip(args, node.args, strict=True)]
        row = SCALAR_OPS[node.op]
        if node.op == "pow" and (special := self.power(node.args[1])) is not None:
            row = special
        elif row.helper is not None:
            like = next(a for a in args if a.number is None)
            args = [a if a.number is None else _Text(_spread(a, like.text), ATOM) for a in args]
        self.helpers |= set((row.helper or "").split())
        return _Text(row.text.format(*(a.within(p) for a, p in zip(args, row.needs, strict=False))), row.precedence)

    def of_larger(self, terms: Terms) -> _Text | None:
        """exp(a - max(a, b)) and exp(b - max(a, b)): one of them is 1, and the other exp(-|a - b|)."""
        taken = [t for sign, t in terms if sign < 0]
        bare = self.definition(taken[0]) if isinstance(taken[0], Ref) and taken[0].space == "let" else taken[0]
        if len(taken) > 1 or not isinstance(bare, Op) or bare.op != "max":
            return None
        rest = Counter(t for t in terms if t[0] > 0)
        for side, operand in zip(("left", "right"), bare.args, strict=True):
            if rest == Counter(signed_terms(operand, self.definition)):
                name = f"lane_{side}_of"
                self.helpers |= {name, "lane_exp", "lane_larger"}
                return _Text(f"{name}({', '.join(self.show(a).text for a in bare.args)})", ATOM)
        return None

    def power(self, exponent: Expr) -> Row | None:
        """A whole power as products, a half as a root."""
        if not isinstance(exponent, Const) or abs(exponent.value) > _MAX_POWER:
            return None
        if exponent.value == Fraction(1, 2):
            return SCALAR_OPS["sqrt"]
        if exponent.value.denominator > 1:
            return None
        name, size = f"lane_power_{abs(int(exponent.value))}", abs(int(exponent.value))
        if size == 0:
            return None
        if exponent.value > 0:
            return Row("{0}", 0, (0,)) if size == 1 else Row(f"{name}({{0}})", helper=name)
        return Row("1 / {0}", PRODUCT, (UNARY,)) if size == 1 else Row(f"1 / {name}({{0}})", PRODUCT, helper=name)


def literal(value: float) -> _Text:
    """A Python number as Triton text."""
    if isinstance(value, bool):
        return _Text(str(value), ATOM, value)
    if isinstance(value, float) and not math.isfinite(value):
        return _Text(f'float("{value}")', ATOM, value)
    text = repr(value)
    return _Text(text, UNARY if text.startswith("-") else ATOM, value)


def _spread(value: _Text, like: str) -> str:
    """A number as a tensor."""
    return f"tl.where({like} == {like}, {value.text}, {value.text})"


def _fold(op: str, args: list[_Text]) -> _Text | None:
    try:
        return literal(NUMBER_OPS[op](*(a.number for a in args)))
    except (ArithmeticError, ValueError):
        return literal(math.nan)


def _as_real(value: _Text, kind: Kind) -> _Text:
    if value.number is not None:
        return literal(float(value.number))
    return value if kind == "real" else _Text(f"{value.within(ATOM)}.to(tl.float32)", ATOM)


def _wish(key: Key) -> str:
    space, name, lag = key
    return _SIDES.get(space, "") + name + (f"_lag{lag}" if lag else "")


def _split(steps: Iterable[Step], printer: _Printer, taken: set[str]) -> Iterable[Step]:
    """The same steps, parts of those that make too long a line before them. Each must be printed before the next."""
    waiting = list(steps)[::-1]
    while waiting:
        step = waiting.pop()
        text = printer.show(step.value).text
        part = _half(step.value, printer, text) if len(text) > _LINE else None
        if part is None:
            yield step
            continue
        name = fresh("t", taken)
        taken.add(name)
        ref = Ref("let", name, (), part.kind)
        whole = transform(step.value, lambda n, part=part, ref=ref: ref if n is part else None)  # type: ignore[misc]
        waiting += [Step(step.name, step.axes, whole), Step(name, (), part)]


def _half(root: Expr, printer: _Printer, text: str) -> Expr | None:
    """The part whose text is nearest to half of it, not the argument of an exp."""
    kept = {root}
    sums = [n.args[0] for n in walk(root) if isinstance(n, Op) and n.op == "exp"]
    while sums:  # the terms of an exponent are looked at one by one
        kept.add(node := sums.pop())
        sums += node.args if isinstance(node, Op) and node.op in ("add", "sub", "neg") else ()
    parts = []
    for node in walk(root):
        if isinstance(node, Op) and node not in kept and node.kind != "bool" and children(node):
            own = printer.show(node)
            if own.number is None and len(own.text) > _LINE // 5 and own.text in text:
                parts.append((abs(2 * len(own.text) - len(text)), node))
    return min(parts, key=lambda p: p[0])[1] if parts else None


__all__ = ["Key", "LaneFunction", "helper_texts", "key_of", "literal", "number", "print_function", "reads"]
