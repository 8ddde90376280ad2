"""A directory of generated modules, keyed by digest: safe under concurrent processes, never half-written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def directory() -> Path:
    """$PSMC_CACHE_DIR, else psmc under $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("PSMC_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(chosen) if chosen else Path(base) / "psmc" if base else Path.home() / ".cache" / "psmc"


def write_atomic(path: Path, text: str) -> None:
    """The whole file or nothing: written beside its place, then renamed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        # mkstemp makes files private; a generated module is as readable as any other source.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def stored(name: str, digest: str, text: str) -> Path:
    """The path of a cached module with this text; written if it is not there yet."""
    path = directory() / f"{name}_{digest}.py"
    try:
        if path.read_text(encoding="utf-8") == text:
            return path
    except (OSError, UnicodeDecodeError):
        pass
    write_atomic(path, text)
    return path
