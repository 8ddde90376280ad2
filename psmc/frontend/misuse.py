"""What is said of operators, functions and tensors that are used with the wrong number or kind of operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from psmc import ir
from psmc.diagnostics import fail
from psmc.frontend import surface as sf
from psmc.frontend.scope import Handle
from psmc.ir.ops import OPS
from psmc.source import Span


def check_arguments(node: sf.Call, names: Sequence[str]) -> None:
    """Fail unless there is one argument per name."""
    if len(node.args) == len(names):
        return
    given = f"{len(node.args)} {'is' if len(node.args) == 1 else 'are'} given"
    fail(
        "PSM218",
        f"'{node.fn.text}' takes {len(names)} argument{'s' if len(names) != 1 else ''}, and {given}",
        node.span,
        helps=(f"write {node.fn.text}({', '.join(names)})",),
    )


def wrong_rank(node: sf.Access, handle: Handle, given: int, brackets: bool) -> NoReturn:
    """A tensor read with the wrong number of subscripts."""
    name = (f"{node.owner.text}." if node.owner else "") + node.name.text
    declared = f"{name}[{', '.join(handle.dims)}]" if handle.dims else f"the scalar {name}"
    rank = len(handle.dims)
    example = f"write {name}[{', '.join('ijmnpstu'[:rank])}]" if 0 < rank <= 8 else f"write {name} without brackets"
    if handle.space == "input" and any(isinstance(s, (sf.Unary, sf.Binary)) for s in node.subs or ()):
        example += f"; one token earlier is {name}{{-1}}"
    fail(
        "PSM203",
        f"'{name}' takes {rank or 'no'} subscript{'s' if rank != 1 else ''}, and "
        f"{given if brackets else 'none'} {'are' if given != 1 else 'is'} given",
        node.span,
        label=f"this is {declared}",
        helps=(example,),
    )


def kinds_refused(op: str, args: tuple[ir.Expr, ...], span: Span) -> NoReturn:
    """An operator applied to kinds it does not take."""
    kinds = [kind_text(arg) for arg in args]
    taken = " and ".join(kinds) if len(kinds) < 3 else ", ".join(kinds)
    helps = kind_advice(op, [arg.kind for arg in args])
    fail("PSM208", f"'{OPS[op].symbol or op}' does not take {taken}", span, helps=helps)


def kind_text(expr: ir.Expr) -> str:
    return {"bool": "a condition", "int": "an int"}.get(expr.kind, f"a {expr.kind}")


def kind_advice(op: str, kinds: Sequence[ir.Kind]) -> tuple[str, ...]:
    if op == "where" and kinds[0] != "bool":
        return ("the first argument is a condition, as in where(x > 0, a, b)",)
    if op in ("and", "or", "not"):
        return ("logic joins conditions, as in x > 0 and y > 0",)
    if "bool" in kinds:
        return ("turn a condition into a number: where(condition, 1, 0)",)
    return ("take a real part first: real(z), imag(z) or abs(z)",)
