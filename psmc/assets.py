"""Data files of psmc: the grammar and the kernel templates. In a checkout they lie at the repository root,
in an installed wheel inside the package, as `_grammar` and `_templates`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

Kind = Literal["grammar", "templates"]
_PACKAGE = Path(__file__).resolve().parent


@cache
def directory(kind: Kind) -> Path:
    """Where the files of `kind` lie. Raises FileNotFoundError in a broken installation."""
    installed = _PACKAGE / f"_{kind}"
    checkout = _PACKAGE.parent / kind
    for place in (installed, checkout):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"psmc is not installed completely: neither {installed} nor {checkout} exists")


def text(kind: Kind, name: str) -> str:
    """The text of one data file; `name` is relative to the directory of its kind."""
    root = directory(kind)
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"{name!r} leaves the {kind} directory")
    return path.read_text(encoding="utf-8")
