"""A directory of generated modules, keyed by digest: safe under concurrent processes, never half-written."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
from functools import cache
from pathlib import Path


def directory() -> Path:
    """$PSMC_CACHE_DIR, else psmc under $XDG_CACHE_HOME or ~/.cache. Raises OSError where there is no home."""
    chosen = os.environ.get("PSMC_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME")
    if chosen or base:
        return Path(chosen) if chosen else Path(str(base)) / "psmc"
    try:
        return Path.home() / ".cache" / "psmc"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def write_atomic(path: Path, text: str) -> None:
    """The whole file or nothing: written beside its place, then renamed. Raises OSError."""
    there = path.stat().st_mode if path.exists() else None
    if there is not None and not stat.S_ISREG(there):  # a device, a pipe: to be written to, never to be replaced
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        # mkstemp makes files private; a generated module is as readable as any other source, or as the one before it.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask if there is None else stat.S_IMODE(there))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def digest(text: str) -> str:
    """What a cached module's name ends with."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stored(name: str, text: str) -> Path:
    """The path of a cached module with this text; written if it is not there yet.

    Where the cache cannot be written, a directory that lives as long as this process takes its place.
    """
    file = f"{name}_{digest(text)}.py"
    try:
        path = directory() / file
        if not intact(path):
            write_atomic(path, text)
    except OSError as error:
        why = error.strerror or error
        warnings.warn(f"psmc's cache cannot be used: {why}. PSMC_CACHE_DIR names another place for it.", stacklevel=2)
        path = Path(_instead().name) / file
        if not intact(path):
            write_atomic(path, text)
    return path


def intact(path: Path) -> bool:
    """Whether a file of the cache is there, and still says what its name promises."""
    try:
        return path.stem.rpartition("_")[2] == digest(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False


@cache
def _instead() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="psmc-")
