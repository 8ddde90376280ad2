"""One data type for everything psmc tells a user, and the one exception that carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NoReturn

from psmc.source import Span

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Label:
    """A secondary place in the source: `span` is underlined with dashes and followed by `text`."""

    span: Span
    text: str


@dataclass(frozen=True)
class Diagnostic:
    """What is wrong, where, and what to do.

    `code` is a key of `catalogue.CATALOGUE`; `label` stands behind the carets under `span`.
    """

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    labels: tuple[Label, ...] = ()
    notes: tuple[str, ...] = ()
    helps: tuple[str, ...] = ()
    severity: Severity = "error"


class PsmcError(Exception):
    """Any mistake a user can make. The command line prints it; it never shows a traceback."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        self.diagnostics = diagnostics
        super().__init__(*diagnostics)

    def __str__(self) -> str:
        from psmc.diagnostics.render import render

        return "\n".join(render(d) for d in self.diagnostics)


def fail(
    code: str,
    message: str,
    span: Span | None = None,
    *,
    label: str = "",
    labels: tuple[Label, ...] = (),
    notes: tuple[str, ...] = (),
    helps: tuple[str, ...] = (),
) -> NoReturn:
    """Raise one error diagnostic."""
    raise PsmcError(Diagnostic(code, message, span, label, labels, notes, helps))
