"""`psmc compile`: standalone Python modules, one an aggregator."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from psmc.cli import console, inputs
from psmc.diagnostics import Diagnostic, PsmcError, fail
from psmc.source import read_bytes

if TYPE_CHECKING:
    from psmc.pipeline import Compilation
    from psmc.plan.tuned import Tuned

_SHOWN = 20  # lines of a diff
_LARGEST = 100_000_000  # bytes of a module


@click.command(
    epilog="\b\nExamples:\n  psmc compile gla.psm                     # writes gla.py here\n"
    "  psmc compile gla.psm -o model/kernels    # into a directory\n"
    "  psmc compile gla.psm -o model --check    # does model/gla.py still say what gla.psm says?\n"
    "  psmc compile gla.psm --tuned tuned.json   # with the tiles that psmc tune found",
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-o", "--output", metavar="OUT", help="A directory, or a .py file for a single aggregator.  [default: .]")
@click.option("--name", metavar="AGG", help="Only this aggregator of each file.")
@click.option("--tuned", multiple=True, metavar="FILE", help="Tiles from psmc tune, for the device it ran on.")
@click.option("--check", "compare", is_flag=True, help="Write nothing; exit 1 if what is there differs.")
@click.option(
    "--budget", type=inputs.Seconds(0, min_open=True), default=20.0, show_default=True, metavar="SECONDS",
    help="Time for the proof of one aggregator.",
)  # fmt: skip
def command(
    files: tuple[str, ...], output: str | None, name: str | None, tuned: tuple[str, ...], compare: bool, budget: float
) -> int:  # fmt: skip
    """Write the Python module of each aggregator.

    A module holds the mathematics, the kernels and the runtime; it imports torch and nothing of psmc, and may be
    copied anywhere. Nothing is written if any claim does not hold. The same spec always gives the same text.
    """
    from psmc.plan.tuned import read_files

    chosen = [each for file in files for each in _chosen(file, name, budget)]
    tiles = read_files(tuned)
    for each in chosen:
        each.tuned = tiles
    places = _places(output, [c.declared.name for c in chosen])
    texts: list[str] = []
    wrong: list[Diagnostic] = []
    with console.progress("compiling", len(chosen)) as progress:
        for each in chosen:
            progress.step(each.declared.name)
            try:
                texts.append(each.text)
            except PsmcError as error:
                wrong += error.diagnostics
    if wrong:
        raise PsmcError(*wrong)
    console.report(*(d for each in chosen for d in each.stale), *_of_none(tiles, {c.declared.name for c in chosen}))
    modules = list(zip(places, texts, strict=True))
    if compare:
        return _compare(modules)
    for place in places:
        _replaceable(place)
    for place, text in modules:
        inputs.write(place, text)
        console.say(f"wrote {place}")
    return 0


def _chosen(file: str, name: str | None, budget: float) -> tuple[Compilation, ...]:
    from psmc import pipeline

    path = inputs.one_file(file)
    found = pipeline.read(path, budget)
    if not found:
        helps = ("a library is compiled into what uses it.",)
        fail("PSM290", f"{path}: there is no aggregator in this file.", helps=helps)
    return (pipeline.pick(found, name, str(path)),) if name else found


def _of_none(tiles: tuple[Tuned, ...], names: set[str]) -> list[Diagnostic]:
    """Warnings for files that are for none of these aggregators."""
    return [
        Diagnostic(
            "PSM623", f"{t.file} is for '{t.aggregator}', which is not compiled here: it is ignored.",
            severity="warning",
        )
        for t in tiles if t.aggregator not in names
    ]  # fmt: skip


def _places(output: str | None, names: list[str]) -> list[Path]:
    """Where each module goes."""
    target = Path(output or ".")
    if target.suffix == ".py" and not os.path.isdir(target):
        if len(names) > 1:
            fail(
                "PSM290", f"{target} is one file, but there are {len(names)} aggregators.",
                helps=(f"pass a directory, or --name with one of {', '.join(names)}.",),
            )  # fmt: skip
        return [target]
    if os.path.exists(target) and not os.path.isdir(target):
        fail("PSM294", f"{target} is neither a directory nor a .py file", helps=("pass -o DIR or -o FILE.py.",))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        helps = ("compile the files one by one, into different directories.",)
        fail("PSM290", f"there is more than one aggregator '{twice[0]}', which would be one module.", helps=helps)
    return [target / f"{name}.py" for name in names]


def _replaceable(place: Path) -> None:
    """What is there may be replaced if psmc wrote it. Raises PsmcError PSM295 for a person's own file."""
    there = _there(place)
    if there and b"\nWritten by psmc; " not in there:
        fail(
            "PSM295", f"{place} exists already, and psmc did not write it.",
            helps=("choose another place with -o, or remove it.",),
        )  # fmt: skip


def _there(place: Path) -> bytes | None:
    """The file's content; None where there is none."""
    try:
        return read_bytes(place, _LARGEST)
    except (OSError, ValueError):
        return None


def _compare(modules: list[tuple[Path, str]]) -> int:
    differing = 0
    for place, text in modules:
        found = _there(place)
        if found == text.encode():
            console.say(f"{place}: up to date")
            continue
        differing += 1
        if found is None:
            console.say(f"{place}: missing")
            continue
        there = found.decode("utf-8", "replace")
        lines = list(
            difflib.unified_diff(there.splitlines(), text.splitlines(), str(place), "as compiled now", n=1, lineterm="")
        )
        plus = sum(1 for x in lines[2:] if x.startswith("+"))
        minus = sum(1 for x in lines[2:] if x.startswith("-"))
        console.say(f"{place}: differs (+{plus} -{minus})")
        for line in lines[:_SHOWN]:
            console.say(f"  {line}")
        if len(lines) > _SHOWN:
            console.say(f"  … {len(lines) - _SHOWN} more lines")
    return 1 if differing else 0
