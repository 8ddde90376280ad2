"""What a spec's text compiled to last time, so that a second process neither proves nor prints it again."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path

from psmc.runtime import cache as files

_PACKAGE = Path(__file__).resolve().parent


@cache
def compiler() -> str:
    """This compiler: names, sizes and times of its own files. Whatever changes one of them is another compiler."""
    found = []
    for root in (_PACKAGE, _PACKAGE.parent / "templates", _PACKAGE.parent / "grammar"):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f != "__pycache__")
            for name in sorted(names):
                stat = os.stat(os.path.join(folder, name))
                found.append(f"{folder}/{name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def recall(text: str, name: str | None) -> tuple[str, Path] | None:
    """(aggregator, path of its module) that this text compiled to; `name` None: its only one."""
    try:
        known: dict[str, str] = json.loads(_index(text).read_text(encoding="utf-8"))
        if name is None and len(known) != 1:
            return None
        chosen = next(iter(known)) if name is None else name
        path = files.directory() / known[chosen]
        return (chosen, path) if files.intact(path) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None  # no index, or not one of ours: compile


def remember(text: str, modules: dict[str, str]) -> None:
    """Aggregator -> file name of its module in the cache directory. A cache that cannot be written is no error."""
    try:
        files.write_atomic(_index(text), json.dumps(modules, sort_keys=True) + "\n")
    except OSError:
        return


def _index(text: str) -> Path:
    key = hashlib.sha256(f"{compiler()}\n{text}".encode()).hexdigest()[:32]
    return files.directory() / "index" / f"{key}.json"
