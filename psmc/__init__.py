"""psmc: a compiler for sequence models. A small spec of a scan becomes a proof and fast, differentiable kernels.

    agg = psmc.load("gla.psm")          # or decorate a class with psmc.aggregator
    o = agg(q, k, v, g)                 # all tokens at once
    o_t, state = agg.step(state, ...)   # one token
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["PsmcError", "aggregator", "extern", "load"]

if TYPE_CHECKING:
    from psmc.api import PsmcError, aggregator, extern, load


def __getattr__(name: str) -> Any:
    """torch is imported when something is compiled, not by `import psmc` or `psmc check`."""
    if name in __all__:
        from psmc import api

        return getattr(api, name)
    raise AttributeError(f"module 'psmc' has no attribute '{name}'")
