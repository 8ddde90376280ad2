"""Diagnostics of lifting: which term of which component stands in the way, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from psmc.derive.moebius import MayVanishError
from psmc.derive.semiring import NotAffineError, NotPositiveError
from psmc.diagnostics import fail
from psmc.ir import Aggregator, Assign, Expr, Op, Reduce, Ref
from psmc.ir.rewrite import refs, walk
from psmc.ir.text import show
from psmc.source import Span

_LEFT = "if no parallel form exists, run it token by token: 'associative: no' with 'order: left'."
_PLAIN = (
    "composed, the maps of two tokens must be a map of the same form. Such are A * S + b, also with (max, +) or "
    "(max, min) in place of (+, *), (a * S + b) / (c * S + d), and clamp(a * S + b, lo, hi) with a > 0."
)
_CHOICE = "choose by the inputs; of the state, max, min, clamp and relu can be lifted."
_OUTSIDE = "apply it where the state is read, in 'output', or to the inputs."
_ADVICE = {
    **{op: _CHOICE for op in ("where", "lt", "le", "gt", "ge", "eq", "ne")},
    **{op: _OUTSIDE for op in ("tanh", "sigmoid", "silu", "gelu", "erf", "softplus", "logsigmoid", "sin", "cos", "exp",
                               "log", "sqrt", "rsqrt", "abs", "sign", "stop", "expm1", "log1p")},
}  # fmt: skip
# Where (+, *) stops at this operator, the class that gets further.
_FURTHER = {"max": "clamped", "min": "clamped", "clamp": "clamped", "relu": "clamped", "div": "fractional-linear"}


@dataclass(frozen=True)
class Failure:
    """Why a recurrence is not of a class: `kind` is a semiring in op names, 'max add', or a class of maps."""

    kind: str
    error: NotAffineError


def _span(agg: Aggregator, name: str) -> Span | None:
    return agg.where(f"recurrence {name}", "recurrence", "name")


def not_affine(agg: Aggregator, updates: Sequence[Assign], failures: Sequence[Failure]) -> NoReturn:
    """PSM401. Of the failures in each class the one that got closest to the whole term is told."""
    error = _closest(agg, updates, failures)
    name = next((u.name for u in updates if error.node in walk(u.value)), updates[0].name)
    fail(
        "PSM401",
        f"the recurrence of '{name}' cannot be lifted: {error.why}",
        _term(_span(agg, name), error.node),
        label=f"because of {_short(error.node)}",
        notes=(_PLAIN,),
        helps=(*_advice(error), _LEFT),
    )


def _advice(error: NotAffineError) -> tuple[str, ...]:
    node = error.factor if isinstance(error, NotPositiveError) else error.node
    if isinstance(error, NotPositiveError | MayVanishError) and (tap := _tap(node)) is not None:
        return (f"a tap reads 0 before the first token, so '{tap}' is 0 there: pass what it stands for as an input.",)
    if isinstance(error, NotPositiveError):
        return (f"say that {_short(error.factor)} is positive, with an interval: {_declared(error.factor)}.",)
    if isinstance(error, MayVanishError):
        signs = "say by intervals that no coefficient is negative and the denominator never 0"
        return (f"{signs}: {_declared(error.node)}.",)
    op = error.node.op if isinstance(error.node, Op) else ""
    advice = error.advice or _ADVICE.get(op)
    return (advice,) if advice else ()


def _tap(node: Expr) -> str | None:
    return next((show(r) for r in refs(node) if r.lag), None)


def _declared(node: Expr) -> str:
    """An interval on what it reads."""
    read = next((r for r in refs(node) if r.space in ("input", "param")), None)
    return "'input decay in (0, inf)'" if read is None else f"'{read.space} {read.name} in (0, inf)'"


def _closest(agg: Aggregator, updates: Sequence[Assign], failures: Sequence[Failure]) -> NotAffineError:
    first = failures[0].error
    node = first.node
    op = node.op if isinstance(node, Op) else ""
    whole = [f.error for f in failures if f.kind == "finite" and agg.component(updates[0].name).kind == "int"]
    if whole and len(updates[0].indices) == 1 and (isinstance(node, Ref) or _ADVICE.get(op) == _CHOICE):
        return whole[-1]
    own = {u.name: u.indices for u in updates}
    read = [r for u in updates for r in refs(u.value) if r.space == "prev" and r.name in own]
    if op in _FURTHER and all(r.subs == own[r.name] for r in read):
        further = [f.error for f in failures if f.kind == _FURTHER[op]]
        if further:
            return further[-1]
    if op in ("max", "min", "logaddexp") or isinstance(node, Reduce):
        others = [f.error for f in failures if f.error.node is not node]
        return next((e for e in others if isinstance(e, NotPositiveError)), others[0] if others else first)
    return first


def _term(statement: Span | None, node: Expr) -> Span | None:
    """Where the statement says `node`, blanks aside; the whole statement if it is not written like that, or twice."""
    if statement is None:
        return None
    kept = [n for n in range(statement.start, statement.end) if not statement.source.text[n].isspace()]
    text = "".join(statement.source.text[n] for n in kept)
    shown = "".join(show(node).split())
    for wanted in (shown, shown.replace("prev.", "")):
        if text.count(wanted) == 1:
            first = text.index(wanted)
            return Span(statement.source, kept[first], kept[first + len(wanted) - 1] + 1)
    return statement


def both_sides(agg: Aggregator, name: str) -> NoReturn:
    """PSM402."""
    fail(
        "PSM402",
        f"the recurrence of '{name}' acts on more than one of its indices at once",
        _span(agg, name),
        label=f"mixes entries of '{name}' along several indices",
        notes=(
            "a transition may mix entries along one index (A S or S A), or scale each one; not A S B, nor transpose.",
        ),
        helps=(f"flatten the mixed indices of '{name}' into one.", _LEFT),
    )


def depends_on(agg: Aggregator, updates: Sequence[Assign], node: Expr) -> NoReturn:
    """PSM403."""
    name = updates[0].name
    other = node.name if isinstance(node, Ref) else "another component"
    fail(
        "PSM403",
        f"the recurrence of '{name}' cannot be lifted: its coefficients depend on the component '{other}'",
        _span(agg, name),
        label=f"reads '{other}'",
        notes=(
            f"an element stands for any number of tokens and does not know '{other}' between them; only a scale that "
            f"is exp of it can be divided out, as in exp(prev.m + f - m) * {name} + exp(i - m) * x.",
        ),
        helps=(f"if no update reads '{name}', compute it in 'output'.", _LEFT),
    )


def different_shapes(agg: Aggregator, names: Sequence[str]) -> NoReturn:
    """PSM404."""
    shapes = ", ".join(f"{n}[{', '.join(d)}]" if (d := agg.component(n).dims) else n for n in names)
    fail(
        "PSM404",
        f"coupled components of different shapes cannot be lifted: {shapes}",
        _span(agg, names[-1]),
        label="reads a component of another shape",
        helps=("give them the same dims, or write lift and combine yourself.", _LEFT),
    )


def _short(node: Expr) -> str:
    text = show(node).replace("prev.", "")
    return f"'{text}'" if len(text) <= 60 else f"'{text[:57]}...'"
