"""Files named on the command line. Questions are asked of os.path, which says no of a name that no file can have."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import click

from psmc.cli import console
from psmc.diagnostics import PsmcError, fail

SUFFIX = ".psm"


class Seconds(click.FloatRange):
    """A number of seconds. 'nan' is one to Python, and no clock ever reaches it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        return self.fail(f"{value!r} is no number of seconds.", param, ctx) if found != found else found


def specs(names: Iterable[str]) -> list[Path]:
    """The files that are meant: a directory stands for its *.psm, in order of name. Raises PsmcError PSM102."""
    out: list[Path] = []
    for name in names:
        path = _named(name)
        if not os.path.isdir(path):
            out.append(path)
            continue
        inside = sorted(p for p in path.glob(f"*{SUFFIX}") if p.is_file())
        if not inside:
            helps = ("name a file, or start one: psmc new NAME",)
            fail("PSM102", f"{path}: this directory holds no {SUFFIX} file", helps=helps)
        out += inside
    return list(dict.fromkeys(out))


def _named(name: str) -> Path:
    """Not the empty name, which an unset variable of the shell leaves, and pathlib takes for the current directory."""
    if not name:
        fail("PSM102", "the name of a file is empty", helps=("is a variable of the shell not set?",))
    return Path(name)


def existing(path: Path) -> Path:
    """The path itself. Raises PsmcError PSM102, with the names that come close, where there is no such file."""
    if path.suffix == ".py" and os.path.isfile(path):
        fail(
            "PSM102", f"{path} is a Python file; psmc reads {SUFFIX} files",
            helps=("a class under @psmc.aggregator is proved and compiled when Python imports it.",),
        )  # fmt: skip
    return path if os.path.lexists(path) else fail_missing(path)


def fail_missing(path: Path) -> NoReturn:
    """Raises PsmcError PSM102, with the names that come close."""
    close = similar(path)
    hint = f"did you mean {' or '.join(close)}?" if close else "check the path; psmc new NAME writes a first spec."
    fail("PSM102", f"{path}: there is no such file", helps=(hint,))


def similar(path: Path) -> list[str]:
    """Files of the same kind (specs, if it has none) in the same directory with a name like this one's."""
    suffix = path.suffix or SUFFIX
    try:
        stems = sorted(p.stem for p in path.parent.iterdir() if p.suffix == suffix and p.name != path.name)
    except OSError:
        return []
    return [str(path.parent / (stem + suffix)) for stem in get_close_matches(path.stem, stems, 2)]


def one_file(name: str) -> Path:
    """A file, not a directory."""
    path = existing(_named(name))
    if os.path.isdir(path):
        fail("PSM102", f"{path} is a directory", helps=(f"name one {SUFFIX} file in it.",))
    return path


def destination(name: str, reads: Iterable[Path]) -> Path:
    """Where a command may write. Raises PsmcError PSM294 for what it reads, under whatever name, and for any spec."""
    path = Path(name)
    if any(_same(path, source) for source in reads):
        fail("PSM294", f"{path} is a file that this command reads", helps=("choose another place.",))
    if path.suffix == SUFFIX:
        fail("PSM294", f"{path} is named as a spec is", helps=("choose another place: what is written is no spec.",))
    return path


def _same(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):
        return False


def write(path: Path, text: str) -> None:
    """The whole file or nothing. Raises PsmcError PSM294."""
    from psmc.runtime.cache import write_atomic

    try:
        write_atomic(Path(os.path.realpath(path)), text)
    except OSError as error:
        why = (error.strerror or "cannot be written").lower()
        fail("PSM294", f"{path}: {why}", helps=("choose another place.",))


def say_json(data: Any) -> None:
    console.say(json.dumps(data, indent=2, ensure_ascii=False))


__all__ = [
    "PsmcError", "Seconds", "destination", "existing", "fail_missing", "one_file", "say_json", "similar", "specs",
    "write",
]  # fmt: skip
