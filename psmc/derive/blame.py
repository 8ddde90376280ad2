"""Diagnostics of lifting: which term of which component stands in the way, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from psmc.derive.semiring import NotAffineError, NotPositiveError
from psmc.diagnostics import fail
from psmc.ir import Aggregator, Assign, Expr, Op, Ref
from psmc.ir.rewrite import walk
from psmc.ir.text import show
from psmc.source import Span

_LEFT = "if no parallel form exists, run it token by token: 'associative: no' with 'order: left'."
_INTERVAL = "say that it is positive, with an interval: 'input decay in (0, inf)'."
_PLAIN = "composed, the maps of two tokens must be a map of the same form; affine ones are: S = A * S + b."


def _span(agg: Aggregator, name: str) -> Span | None:
    return agg.where(f"recurrence {name}", "recurrence", "name")


def not_affine(agg: Aggregator, updates: Sequence[Assign], failures: Sequence[NotAffineError]) -> NoReturn:
    """PSM401. Of the failures in each semiring the one that got closest to the whole term is told."""
    error = failures[0]
    if isinstance(error.node, Op) and error.node.op in ("max", "min", "logaddexp"):
        others = [f for f in failures if f.node is not error.node]
        error = next((f for f in others if isinstance(f, NotPositiveError)), others[0] if others else error)
    name = next((u.name for u in updates if error.node in walk(u.value)), updates[0].name)
    fail(
        "PSM401",
        f"the recurrence of '{name}' cannot be lifted: {error.why}",
        _term(_span(agg, name), error.node),
        label=f"because of {_short(error.node)}",
        notes=(_PLAIN,),
        helps=((_INTERVAL,) if isinstance(error, NotPositiveError) else ()) + (_LEFT,),
    )


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
