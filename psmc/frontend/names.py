"""Which words may be names: they are printed into generated code, so Python's and Triton's own are refused."""

from __future__ import annotations

import keyword

from psmc.diagnostics import Diagnostic
from psmc.source import Span

MAX_NAME_LENGTH = 64

# Words of the language; `grammar/psm.lark` is the source, a test holds this table to it.
KEYWORDS = frozenset(
    (
        *("aggregator", "dim", "input", "param", "state", "lift", "combine", "extern", "recurrence", "output"),
        *("associative", "order", "const", "let", "fn", "use", "for", "in"),
        *("and", "or", "not", "inf", "sum", "max", "prod"),
    )
)

# Names that generated code uses for itself or that Python or Triton would read specially.
_TAKEN = {
    "tl": "generated kernels use it for triton.language",
    "triton": "generated kernels import it",
    "torch": "generated code imports it",
    "math": "generated code imports it",
    "self": "generated classes use it",
    "cls": "generated classes use it",
    "nan": "it is not a number of the language",
}
ADVICE = {
    "lambda": "'lam' or 'decay' say the same",
    "True": "booleans come from comparisons",
    "False": "booleans come from comparisons",
    "if": "a choice is written where(condition, a, b)",
    "else": "a choice is written where(condition, a, b)",
    "return": "results are written as 'name = expression'",
    "nan": "use inf, or a state with no finite identity",
}


def name_problem(text: str, span: Span | None) -> Diagnostic | None:
    """Why `text` cannot be a name, or None if it can. For both frontends."""
    if len(text) > MAX_NAME_LENGTH:
        return Diagnostic(
            "PSM503",
            f"the name '{text[:12]}…' has {len(text)} characters; psmc takes at most {MAX_NAME_LENGTH}",
            span,
            helps=("choose a shorter name",),
        )
    why = _reason(text)
    if why is None:
        return None
    advice = ADVICE.get(text)
    helps = (advice,) if advice else (f"rename it, for example to '{text.strip('_').lower() or 'x'}_0'",)
    return Diagnostic("PSM104", f"'{text}' cannot be a name: {why}", span, helps=helps)


def _reason(text: str) -> str | None:
    if text in KEYWORDS:
        return "it is a word of the language"
    if keyword.iskeyword(text):
        return "it is a Python keyword, and names are printed into generated Python"
    if text in _TAKEN:
        return _TAKEN[text]
    if text.startswith("__"):
        return "names that begin with two underscores are Python's own"
    if not (text.isascii() and text.isidentifier()):
        return "names are ASCII letters, digits and underscores, and begin with a letter"
    return None
