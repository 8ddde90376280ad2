"""What a peer's autotuner does in its first call, in seconds instead of minutes.

`compile_only`: every candidate is compiled into triton's cache and none is launched, so that processes can share the
work, many at once. Afterwards the autotuner has only to time them; `short` makes it time each for 25 ms, not 100.
"""

from __future__ import annotations

from typing import Any

from triton.runtime.autotuner import Autotuner
from triton.testing import do_bench


def compile_only(part: int = 0, parts: int = 1) -> None:
    """From here on, autotuned kernels compile every `parts`-th candidate and do not run: results are garbage."""
    seen = {"count": 0}

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        named = {**self.nargs, **kwargs}
        dtypes = [str(x.dtype) for x in named.values() if hasattr(x, "dtype")]
        key = (*(named.get(k) for k in self.keys), *dtypes)
        if key in self.cache:
            return
        self.cache[key] = self.configs[0]
        given = {k: v for k, v in kwargs.items() if k != "warmup"}
        for config in self.prune_configs(kwargs):
            seen["count"] += 1
            if seen["count"] % parts != part:
                continue
            try:
                self.fn.warmup(*args, **given, **config.all_kwargs())
            except Exception as error:  # as in the autotuner, a candidate may not compile
                print(f"{self.base_fn.__name__} {config}: {type(error).__name__}", flush=True)

    Autotuner.run = run


def short(warmup: int = 5, rep: int = 25) -> None:
    """From here on, candidates are timed for so many ms."""

    def bench(self: Any) -> Any:
        return lambda call, quantiles: do_bench(call, warmup=warmup, rep=rep, quantiles=quantiles)

    Autotuner.do_bench = property(bench)
