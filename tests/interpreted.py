"""Tests of kernels in Triton's interpreter. Triton must be imported with it switched on, so that their file runs twice: as
all tests do, where one test runs it again, in a process of its own; and there, where INTERPRETED."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str) -> None:
    """The tests of a file that are for the interpreter; fails as they do."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    env, root = {**os.environ, "TRITON_INTERPRET": "1"}, Path(__file__).parent.parent
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def _quicken() -> None:
    """Half of the interpreter's time goes to what a launch has done: each call of a function by a kernel patches
    triton.language again, and each sum of whole numbers is computed twice, to see whether it overflows."""
    from triton import language
    from triton.runtime import interpreter

    patch, both = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": language, "core": language.core})
    interpreter._patch_lang = lambda fn: patch(both)  # what a kernel's own functions name, and those of Triton's library

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


if INTERPRETED:
    _quicken()
