"""Surface expressions to text, with the fewest parentheses that parse back to the same tree."""

from __future__ import annotations

from psmc.frontend import surface as s
from psmc.ir.ops import OPS

# What a printed expression is, in the grammar's terms. 'reduced' ends in a reduction and begins with it
# (but for signs); 'tail' is a chain that ends in one. Neither may have a factor to its right.
_ATOM = ("atom",)
_FACTOR = (*_ATOM, "power", "factor")
_CHAIN = (*_FACTOR, "chain")
_PRODUCT = (*_CHAIN, "tail", "reduced")
_SUM = (*_PRODUCT, "sum")
_NEGATION = (*_SUM, "comparison", "negation")
_CONJUNCTION = (*_NEGATION, "conjunction")
_EXPR = (*_CONJUNCTION, "expr")

# op -> (what the whole is, what may stand on the left, what on the right without parentheses)
_BINARY: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "or": ("expr", _EXPR, _CONJUNCTION),
    "and": ("conjunction", _CONJUNCTION, _NEGATION),
    **{op: ("comparison", _SUM, _SUM) for op in ("lt", "le", "gt", "ge", "eq", "ne")},
    "add": ("sum", _SUM, _PRODUCT),
    "sub": ("sum", _SUM, _PRODUCT),
    "mul": ("chain", _CHAIN, (*_FACTOR, "reduced")),
    "div": ("chain", _CHAIN, _FACTOR),  # a sum as a divisor keeps its parentheses: it reads as one thing
    "pow": ("power", _ATOM, _FACTOR),
}


def text(node: s.ExprNode) -> str:
    """`node` as the text of a .psm file, on one line. Numbers keep the spelling of the source."""
    return _print(node)[0]


def operands(node: s.ExprNode) -> list[tuple[str, str]]:
    """(operator, operand) of the loosest chain of `node`, left to right; the first has no operator. For line breaks."""
    out: list[tuple[str, str]] = []
    match node:
        case s.Binary(op=op):
            kind, left_fits, _ = _BINARY[op]
            chained = kind in left_fits  # the others do not associate
            while isinstance(node, s.Binary) and _BINARY[node.op][0] == kind and kind != "power":
                out.append((OPS[node.op].symbol or "", _fit(node.right, _BINARY[node.op][2])[0]))
                node = node.left
                if not chained or _print(node)[1] != kind:  # a chain that ends in a reduction takes parentheses
                    break
            out.append(("", _fit(node, left_fits)[0]))
            return out[::-1]
    return [("", text(node))]


def subscripts(subs: tuple[s.ExprNode, ...] | None) -> str:
    return "" if subs is None else f"[{', '.join(text(sub) for sub in subs)}]"


def names(found: tuple[s.Name, ...]) -> str:
    """`[i, j]`, or nothing where there are none."""
    return f"[{', '.join(n.text for n in found)}]" if found else ""


def _fit(node: s.ExprNode, allowed: tuple[str, ...]) -> tuple[str, str]:
    printed, kind = _print(node)
    return (printed, kind) if kind in allowed else (f"({printed})", "atom")


def _print(node: s.ExprNode) -> tuple[str, str]:
    match node:
        case s.Number(span=span):
            return span.text, "atom"
        case s.Inf():
            return "inf", "atom"
        case s.Access(owner=owner, name=name, subs=subs, lag=lag, level=level):
            at = "" if level is None else f"at({text(level)})."
            head = (f"{owner.text}." if owner else "") + at + name.text
            return head + (f"{{-{lag}}}" if lag else "") + subscripts(subs), "atom"
        case s.Call(fn=fn, args=args, subs=subs):
            return f"{fn.text}({', '.join(text(a) for a in args)})" + subscripts(subs), "atom"
        case s.Reduction(op=op, indices=indices, body=body):
            return f"{op}{names(indices)} {_fit(body, _PRODUCT)[0]}", "reduced"
        case s.Unary(op="not", arg=arg):
            return f"not {_fit(arg, _NEGATION)[0]}", "negation"
        case s.Unary(arg=arg):
            inner, kind = _fit(arg, (*_FACTOR, "reduced"))
            return f"-{inner}", "reduced" if kind == "reduced" else "factor"
        case s.Binary(op=op, left=left, right=right):
            kind, left_fits, right_fits = _BINARY[op]
            first, second = _fit(left, left_fits)[0], _fit(right, right_fits)
            gap = "" if op == "pow" else " "
            if kind == "chain" and second[1] == "reduced":
                kind = "tail"
            return f"{first}{gap}{OPS[op].symbol}{gap}{second[0]}", kind
