"""What an unfinished proof has left to show, as text."""

from __future__ import annotations

from psmc.algebra.equality import Outcome
from psmc.algebra.terms import Poly

_LIMIT = 400


def residual_text(component: str, outcome: Outcome) -> str:
    """`component: left - right = …` and the case it was found in."""
    if outcome.residual is None:
        return f"{component}: {outcome.reason}"
    text = f"{component}: {clipped(outcome.residual)} = 0"
    if outcome.facts is not None and outcome.facts.cases:
        text += ", where " + " and ".join(f"{clipped(c.poly)} {'>' if c.strict else '>='} 0" for c in outcome.facts.cases)
    return text


def clipped(poly: Poly) -> str:
    text = poly.key
    return text if len(text) <= _LIMIT else text[:_LIMIT] + " …"
