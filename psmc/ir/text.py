"""Canonical .psm text of the IR. `parse` and `resolve` of what `show` prints give an equal aggregator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from psmc.ir.nodes import (
    Aggregator,
    Assign,
    Block,
    Component,
    Const,
    DimValue,
    Expr,
    Extern,
    Eye,
    Index,
    IndexValue,
    Infinity,
    Interval,
    Op,
    Reduce,
    Ref,
    Space,
    Sub,
    Tensor,
)
from psmc.ir.ops import OPS
from psmc.ir.rewrite import inline, transform

WIDTH = 100
_OWNER: dict[Space, str] = {"left": "l.", "right": "r.", "prev": "prev."}
_SUM, _PRODUCT, _SIGN, _POWER, _ATOM = (OPS[name].precedence for name in ("add", "mul", "neg", "pow", "exp"))
# Smallest precedence of (left, right) operands; what is not listed associates to the left.
_OPERANDS = {
    "pow": (_ATOM, _ATOM),
    **{name: (_SUM, _SUM) for name, info in OPS.items() if info.symbol in ("<", "<=", ">", ">=", "==", "!=")},
}


def show(node: Aggregator | Expr) -> str:
    """Text of a whole spec, ending in a newline, or of one expression."""
    return _Spec(node).text() if isinstance(node, Aggregator) else show_expr(node)


def show_expr(expr: Expr) -> str:
    """One expression on one line, with as few parentheses as keep its meaning."""
    return _expr(expr, 0, False)


def show_assign(assign: Assign) -> str:
    """`name[indices] = value` on one line."""
    return f"{assign.name}{_brackets(assign.indices)} = {show_expr(assign.value)}"


def show_number(value: Fraction) -> str:
    """A decimal where it is exact and short, else a quotient."""
    if value < 0:
        return f"-{show_number(-value)}"
    if value.denominator == 1:
        digits = str(value.numerator)
        zeros = len(digits) - len(digits.rstrip("0"))
        return f"{digits[:-zeros]}e{zeros}" if zeros > 6 else digits
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
    significant = digits.lstrip("0")
    if places - len(significant) >= 4:
        return f"{significant[0]}{'.' if significant[1:] else ''}{significant[1:]}e-{places - len(significant) + 1}"
    return f"{digits[:-places]}.{digits[-places:]}"


# --- expressions --------------------------------------------------------------------------------
# Two frames a level, so that every depth the parser lets through fits the stack.


def _expr(node: Expr, least: int, open_right: bool) -> str:
    """`least`: parenthesise what binds less tightly. `open_right`: a '*' or '/' follows that a reduction would take."""
    brackets = _precedence(node) < least
    if brackets:
        open_right = False
    match node:
        case Const(value=value):
            text = show_number(value)
        case Infinity(negative=negative):
            text = "-inf" if negative else "inf"
        case IndexValue(index=index):
            text = index.name
        case DimValue(dim=dim):
            text = dim
        case Eye(row=row, col=col):
            text = f"eye({_subs((row, col))})"
        case Ref():
            tap = f"{{-{node.lag}}}" if node.lag else ""
            owner, subs = _OWNER.get(node.space, ""), node.subs
            if node.space in ("level", "prev_level"):
                owner, subs = f"{'prev.' if node.space == 'prev_level' else ''}at({_subs(subs[:1])}).", subs[1:]
            text = f"{owner}{node.name}{tap}{_brackets(subs)}"
        case Reduce():
            text = _reduce(node)
            brackets = brackets or open_right
        case Op():
            text = _op(node, open_right)
        case _:
            raise AssertionError(f"no text for {type(node).__name__}")
    return f"({text})" if brackets else text


def _precedence(node: Expr) -> int:
    match node:
        case Const(value=value):
            return _PRODUCT if "/" in show_number(value) else _SIGN if value < 0 else _ATOM
        case Infinity(negative=negative):
            return _SIGN if negative else _ATOM
        case Reduce():
            return _PRODUCT
        case Op(op=op):
            return OPS[op].precedence
    return _ATOM


def _reduce(node: Reduce) -> str:
    names = [node.index.name]
    body = node.body
    while isinstance(body, Reduce) and body.op == node.op:
        names.append(body.index.name)
        body = body.body
    # a sign as the whole body is bracketed: easier on the eye than the grammar asks for
    least = _SIGN + 1 if isinstance(body, Op) and body.op == "neg" else _PRODUCT
    return f"{node.op}[{', '.join(names)}] {_expr(body, least, False)}"


def _op(node: Op, open_right: bool) -> str:
    info = OPS[node.op]
    if info.symbol is None:
        args: list[str] = []
        for arg in node.args:
            args.append(_expr(arg, 0, False))
        return f"{node.op}({', '.join(args)})"
    if info.arity == 1:
        (arg,) = node.args
        if info.symbol.isalpha():
            return f"{info.symbol} {_expr(arg, info.precedence, open_right)}"
        # '--x' parses, but nobody should have to read it
        least = _PRODUCT if isinstance(arg, Reduce) else info.precedence + 1
        return f"{info.symbol}{_expr(arg, least, open_right)}"
    product = info.precedence == _PRODUCT
    left_least, right_least = _OPERANDS.get(node.op, (info.precedence, info.precedence + 1))
    left, right = node.args
    if product and isinstance(right, Reduce):
        right_least = _PRODUCT
    elif _signed(right):  # a sign after an operator is bracketed: a - (-b)
        right_least = max(right_least, _SIGN + 1)
    space = "" if node.op == "pow" else " "
    left_text = _expr(left, left_least, product)
    return f"{left_text}{space}{info.symbol}{space}{_expr(right, right_least, product and open_right)}"


def _signed(node: Expr) -> bool:
    match node:
        case Op(op="neg") | Infinity(negative=True):
            return True
        case Const(value=value):
            return value < 0
    return False


def _subs(subs: Sequence[Sub]) -> str:
    texts: list[str] = []
    for sub in subs:
        texts.append(sub.name if isinstance(sub, Index) else str(sub) if isinstance(sub, int) else _expr(sub, 0, False))
    return ", ".join(texts)


def _brackets(subs: Sequence[Sub]) -> str:
    return f"[{_subs(subs)}]" if subs else ""


# --- statements ---------------------------------------------------------------------------------


def _statement(assign: Assign, indent: int, prefix: str = "") -> str:
    """One statement; a long sum breaks before its operators."""
    head = f"{' ' * indent}{prefix}{assign.name}{_brackets(assign.indices)} = "
    whole = head + show_expr(assign.value)
    if len(whole) <= WIDTH:
        return whole
    terms: list[tuple[str, str]] = []
    node = assign.value
    while isinstance(node, Op) and node.op in ("add", "sub"):
        right = node.args[1]
        terms.append((OPS[node.op].symbol or "", _expr(right, _SIGN + 1 if _signed(right) else _SUM + 1, False)))
        node = node.args[0]
    lines = [head + _expr(node, _SUM, False)]
    pad = " " * (indent + 2)
    for symbol, text in reversed(terms):
        if len(lines[-1]) + len(text) + 3 <= WIDTH:
            lines[-1] += f" {symbol} {text}"
        else:
            lines.append(f"{pad}{symbol} {text}")
    return "\n".join(lines)


# --- specs --------------------------------------------------------------------------------------


class _Spec:
    def __init__(self, agg: Aggregator) -> None:
        self._agg = agg
        self._shared = _shared_lets(agg)
        self._readout = agg.readout
        if self._shared is None:  # a name is used for two things: outputs are printed without lets
            self._shared, self._readout = [], inline(agg.readout)

    def text(self) -> str:
        agg = self._agg
        parts: list[list[str]] = [self._head(), [_statement(let, 2, "let ") for let in self._shared or ()]]
        if agg.lift is not None:
            parts.append(self._block("lift", agg.lift))
        if isinstance(agg.combine, Extern):
            parts.append(["  combine extern"])
        elif agg.combine is not None:
            parts.append(self._block("combine (l, r)", agg.combine))
        if agg.recurrence is not None:
            parts.append(self._block("recurrence", agg.recurrence))
        parts.append([_statement(a, 2, "output ") for a in self._readout.results])
        claim = [f"  associative: {agg.claim}"]
        if agg.claim == "no":
            claim.append(f"  order: {agg.order}")
        parts.append(claim)
        body = "\n\n".join("\n".join(p) for p in parts if p)
        return f"aggregator {agg.name} {{\n{body}\n}}\n"

    def _head(self) -> list[str]:
        agg = self._agg
        lines = _doc(agg.doc) if agg.doc else []
        lines += _wrapped("dim", (d.name if d.size is None else f"{d.name} = {d.size}" for d in agg.dims))
        lines += _wrapped("input", (_declared(t) for t in agg.inputs))
        lines += _wrapped("param", (_declared(t) for t in agg.params))
        lines += _wrapped("state", (_component(c) for c in agg.state))
        lines += [f"  # {c.name} starts at {show_expr(c.initial.value)}" for c in agg.state if c.initial is not None]
        return lines

    def _block(self, title: str, block: Block) -> list[str]:
        lets = [let for let in block.lets if let not in (self._shared or ())]
        lines = [_statement(let, 4, "let ") for let in lets] + [_statement(a, 4) for a in block.results]
        return [f"  {title} {{", *lines, "  }"]


def _shared_lets(agg: Aggregator) -> list[Assign] | None:
    """The lets to print at aggregator level: those of the outputs, and what must precede them in other blocks.

    None: some name stands for different values in different blocks.
    """
    blocks = [b for b in (agg.lift, agg.recurrence, agg.combine) if isinstance(b, Block)]
    if not agg.readout.lets:
        return []
    order: list[Assign] = []
    for block in blocks:
        last = max((n for n, let in enumerate(block.lets) if let in agg.readout.lets), default=-1)
        _merge(order, block.lets[: last + 1])
    _merge(order, agg.readout.lets)
    known = {let.name: let for let in order}
    if len(known) != len(order) or any(known.get(let.name, let) != let for b in blocks for let in b.lets):
        return None
    return order


def _merge(order: list[Assign], lets: Iterable[Assign]) -> None:
    """Insert what is new right after what precedes it."""
    at = 0
    for let in lets:
        if let in order:
            at = order.index(let) + 1
        else:
            order.insert(at, let)
            at += 1


def _doc(doc: str) -> list[str]:
    close = '\n"""' if doc.endswith(('"', "\\")) else '"""'
    return [f"  {line}".rstrip() for line in f'"""{doc}{close}'.split("\n")]


def _wrapped(word: str, items: Iterable[str]) -> list[str]:
    """`word a, b, …`, on as many lines as it takes."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= WIDTH:
            lines[-1] += f", {item}"
        else:
            lines.append(f"  {word} {item}")
    return lines


def _declared(tensor: Tensor | Component) -> str:
    kind = "" if tensor.kind == "real" else f" : {tensor.kind}"
    interval = "" if tensor.interval is None else f" in {show_interval(tensor.interval)}"
    dims = f"[{', '.join(tensor.dims)}]" if tensor.dims else ""
    return f"{tensor.name}{dims}{kind}{interval}"


def show_interval(interval: Interval) -> str:
    lo = "-inf" if interval.lo is None else show_number(interval.lo)
    hi = "inf" if interval.hi is None else show_number(interval.hi)
    return f"{'(' if interval.lo_open else '['}{lo}, {hi}{')' if interval.hi_open else ']'}"


def _component(component: Component) -> str:
    return f"{_declared(component)} = {_identity(component.identity)}"


def _identity(identity: Assign) -> str:
    """`eye` and `iota` are the only ways to name positions in an identity."""

    def named(node: Expr) -> Expr | None:
        match node:
            case IndexValue():
                return Ref("let", "iota", (), "int")
            case Eye(row=Index(), col=Index()):
                return Ref("let", "eye", (), "int")
        return None

    return show_expr(transform(identity.value, named))
