"""The one renderer: `file:line:column: error[CODE]: message`, the source with carets, notes, helps."""

from __future__ import annotations

from psmc.diagnostics.core import Diagnostic
from psmc.source import Span

_TAB = "    "


def _snippet(marks: list[tuple[Span, str, str]]) -> list[str]:
    """Source lines with their underlines, in source order. Each mark is (span, label, underline char)."""
    rows = sorted(((*span.source.position(span.start), span, label, char) for span, label, char in marks), key=lambda r: r[:2])
    width = max(len(str(row[0])) for row in rows)
    lines: list[str] = []
    shown: int | None = None
    for line, column, span, label, char in rows:
        text = span.source.line(line)
        if line != shown:
            lines.append(f"  {line:>{width}} | {text.expandtabs(4)[:200]}")
            shown = line
        indent = len(text[: column - 1].expandtabs(4))
        length = max(1, min(span.end - span.start, len(text) - column + 1))
        lines.append(f"  {' ' * width} | {' ' * indent}{char * length} {label}".rstrip())
    return lines


def render(diagnostic: Diagnostic) -> str:
    """The text of one diagnostic, without a trailing newline and without colour."""
    head = f"{diagnostic.severity}[{diagnostic.code}]: {diagnostic.message}"
    lines: list[str] = []
    if diagnostic.span is not None:
        line, column = diagnostic.span.source.position(diagnostic.span.start)
        lines.append(f"{diagnostic.span.source.name}:{line}:{column}: {head}")
        same_file = [lab for lab in diagnostic.labels if lab.span.source is diagnostic.span.source]
        lines += _snippet([(diagnostic.span, diagnostic.label, "^")] + [(lab.span, lab.text, "-") for lab in same_file])
    else:
        lines.append(head)
    lines += [f"  Note: {note}" for note in diagnostic.notes]
    lines += [f"  Help: {help_}" for help_ in diagnostic.helps]
    return "\n".join(lines)
