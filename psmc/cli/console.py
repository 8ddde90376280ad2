"""All that the command line prints: results on stdout, complaints on stderr; plain text where it is no terminal."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import click

from psmc.diagnostics import Diagnostic, render
from psmc.diagnostics.render import Role

_ROLES: dict[Role, dict[str, object]] = {
    "place": {"bold": True},
    "error": {"fg": "red", "bold": True},
    "warning": {"fg": "yellow", "bold": True},
    "note": {"fg": "cyan"},
    "help": {"fg": "green"},
    "message": {"bold": True},
    "gutter": {"dim": True},
    "primary": {"fg": "red"},
    "secondary": {"fg": "blue"},
}
# Words that carry a verdict, wherever they stand alone in a table.
_WORDS = {
    "proved": "green", "PASS": "green", "refuted": "red", "FAIL": "red", "unknown": "yellow", "differs": "red",
    "chosen": "green", "wrong": "red", "died": "red",
}  # fmt: skip


def prepare() -> None:
    """A terminal that cannot print a character gets a '?', never an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(stream: TextIO) -> bool:
    """NO_COLOR is respected, see no-color.org."""
    return terminal(stream) and not os.environ.get("NO_COLOR")


def say(text: str = "") -> None:
    """A line of result."""
    click.echo(text, color=coloured(sys.stdout))


def complain(text: str) -> None:
    """A line for the person at the terminal."""
    sys.stdout.flush()
    click.echo(text, err=True, color=coloured(sys.stderr))


def bold(text: str) -> str:
    return click.style(text, bold=True) if coloured(sys.stdout) else text


def verdict(text: str) -> str:
    """A word in the colour of what it says."""
    first = text.split(maxsplit=1)[0].rstrip(":,") if text else ""
    return click.style(text, fg=_WORDS[first]) if first in _WORDS and coloured(sys.stdout) else text


def report(*diagnostics: Diagnostic) -> None:
    """Diagnostics, on stderr, a blank line between two."""
    style = _paint if coloured(sys.stderr) else None
    for number, diagnostic in enumerate(diagnostics):
        complain(("\n" if number else "") + render(diagnostic, style=style))


def _paint(role: Role, text: str) -> str:
    return click.style(text, **_ROLES[role]) if role in _ROLES else text  # type: ignore[arg-type]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Columns of text; those named in `right` end flush. A rich table on a terminal."""
    body = [list(row) for row in rows]
    if terminal(sys.stdout):
        _rich_table(headings, body, right)
        return
    widths = [max(len(row[n]) for row in [list(headings), *body]) for n in range(len(headings))]
    for row in [list(headings), *body]:
        cells = [
            cell.rjust(width) if head in right else cell.ljust(width)
            for cell, width, head in zip(row, widths, headings, strict=True)
        ]
        say("  ".join(cells).rstrip())


def _rich_table(headings: Sequence[str], body: list[list[str]], right: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for head in headings:
        shown.add_column(head, justify="right" if head in right else "left", overflow="fold")
    for row in body:
        shown.add_row(*(Text(cell, style=_WORDS.get(cell.split(" ")[0].rstrip(":,"), "")) for cell in row))
    Console(no_color=not coloured(sys.stdout), highlight=False).print(shown)


class Progress:
    """What is being done, out of how much."""

    def step(self, what: str) -> None:
        """The next item begins."""

    def detail(self, text: str) -> None:
        """What is being done about it."""


@contextmanager
def progress(title: str, total: int) -> Iterator[Progress]:
    """A bar on stderr while something takes long; nothing where that is no terminal."""
    if not terminal(sys.stderr) or not total:
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    screen = Console(stderr=True, no_color=not coloured(sys.stderr))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(title, total=total)

        class _Shown(Progress):
            begun = 0
            what = ""

            def step(self, what: str) -> None:
                self.what = what
                bar.update(task, completed=self.begun, description=f"{title} {what}"[:60])
                self.begun += 1

            def detail(self, text: str) -> None:
                bar.update(task, description=f"{title} {self.what}: {text}"[:90])

        yield _Shown()
