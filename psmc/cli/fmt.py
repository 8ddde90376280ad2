"""`psmc fmt`: the canonical layout."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import click

from psmc.cli import console, inputs
from psmc.diagnostics import Diagnostic, PsmcError


@click.command(epilog="\b\nExamples:\n  psmc fmt gla.psm\n  psmc fmt --check examples/\n  psmc fmt - < gla.psm")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--check", "compare", is_flag=True, help="Write nothing; exit 1 if a file is laid out differently.")
def command(files: tuple[str, ...], compare: bool) -> int:
    """Lay out specs canonically, in place. Comments and docstrings stay.

    FILE is a .psm file, a directory of them, or - for standard input to standard output. A file that does not parse is
    left as it is.
    """
    if "-" in files:
        return _filter(compare)
    wrong: list[Diagnostic] = []
    changed = 0
    for path in inputs.specs(files):
        try:
            changed += _format(inputs.one_file(str(path)), compare)
        except PsmcError as error:
            wrong += error.diagnostics
    console.report(*wrong)
    return 1 if wrong or (compare and changed) else 0


def _format(path: Path, compare: bool) -> bool:
    """Whether the file was not in canonical form."""
    from psmc.frontend.pretty import format_source
    from psmc.frontend.psm import read

    source = read(path)
    text = format_source(source)
    if text.encode() == path.read_bytes():
        return False
    if compare:
        lines = list(difflib.unified_diff(source.text.splitlines(), text.splitlines(), n=0, lineterm=""))[2:]
        count = sum(1 for x in lines if x.startswith(("+", "-")))
        console.say(f"{path}: would be reformatted ({count} changed lines)")
        return True
    inputs.write(path, text)
    console.say(f"formatted {path}")
    return True


def _filter(compare: bool) -> int:
    from psmc.diagnostics import fail
    from psmc.frontend.pretty import format_source
    from psmc.source import MAX_SOURCE_BYTES, SourceFile

    data = sys.stdin.buffer.read(MAX_SOURCE_BYTES + 1)
    if len(data) > MAX_SOURCE_BYTES:
        fail("PSM501", f"standard input has more than {MAX_SOURCE_BYTES:,} bytes", helps=("is this a spec?",))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        fail("PSM102", "standard input is not UTF-8 text", helps=("a spec is UTF-8 text.",))
    shown = format_source(SourceFile("<stdin>", text))
    if compare:
        return 0 if shown == text else 1
    click.echo(shown, nl=False)
    return 0
