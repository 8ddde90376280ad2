"""Generated source to a live module. What runs is the file itself, so tracebacks and triton find its text."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from psmc.runtime import cache


def load_module(name: str, text: str) -> ModuleType:
    """The module of a generated text, from the cache directory; one module a text and process."""
    key = f"psmc_generated_{name}_{cache.digest(text)}"
    return sys.modules[key] if key in sys.modules else load_file(cache.stored(name, text), key)


def load_file(path: Path, key: str) -> ModuleType:
    """The module of a file, known as `key` from now on."""
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module
