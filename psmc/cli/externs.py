"""Rules from Python that a command line names: `--extern blocks.py:join`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import click

from psmc.cli import inputs
from psmc.diagnostics import fail


def load(text: str) -> Callable[..., Any]:
    """The callable FILE.py:NAME; the file is run. Raises UsageError, PsmcError PSM102, PSM296."""
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise click.UsageError(f"--extern {text}: write FILE.py:NAME, such as blocks.py:join.")
    path = Path(file)
    if not os.path.isfile(path):
        inputs.fail_missing(path)
    module = _run(path)
    found = getattr(module, name, None)
    if not callable(found):
        known = sorted(k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
        close = get_close_matches(name, known, 1)
        hint = f"did you mean {file}:{close[0]}?" if close else f"it has {', '.join(known[:8]) or 'no callables'}."
        fail("PSM296", f"{path}: there is no callable '{name}'", helps=(hint,))
    rule: Callable[..., Any] = found
    return rule


def _run(path: Path) -> Any:
    spec = spec_from_file_location(f"psmc_extern_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # its own imports, as when it is run
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        fail("PSM296", f"{path}: {last_line(error)}", helps=("the file of --extern is run when it is loaded.",))
    finally:
        sys.path.pop(0)
    return module


def last_line(error: BaseException) -> str:
    """What an exception of the user's own code says, in one line."""
    return traceback.format_exception_only(error)[-1].strip()
