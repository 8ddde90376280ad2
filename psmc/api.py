"""What `import psmc` offers: load a spec, decorate a class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from psmc.diagnostics import PsmcError, fail
from psmc.frontend.decorator import Extern, trace
from psmc.frontend.decorator import extern as extern
from psmc.ir import Extern as ExternRule
from psmc.pipeline import Compilation, compilations, extern_rule, pick, read


def load(
    path: str | Path, name: str | None = None, *, extern: Callable[..., Any] | None = None, budget: float = 20.0
) -> Any:
    """The compiled aggregator of a .psm file: prove, generate (or take from the cache), import.

    path    the file;  name   which aggregator, if there are several
    extern  the rule of `combine extern`: maps two dicts of tensors [batch, *lanes, *dims] to one
    budget  seconds for the proof

    The result is called as DESIGN's contract says, and has .proof, .structure, .plan, .source and .reference (the
    sequential oracle). Raises PsmcError if the spec is wrong or its claim does not hold.
    """
    return realise(pick(read(path, budget), name, str(path)), extern)


def realise(compilation: Compilation, extern: Callable[..., Any] | None = None) -> Any:
    """A compilation's module, imported, with what is known of it attached."""
    from psmc import reference
    from psmc.runtime.load import load_module

    text = compilation.text
    module = load_module(compilation.agg.name, text)
    found = getattr(module, compilation.agg.name)
    oracle = partial(reference.fold, compilation.declared)
    if isinstance(compilation.agg.combine, ExternRule):
        if extern is None:
            fail(
                "PSM292", f"'{compilation.declared.name}' takes its rule from Python.", compilation.declared.where("combine"),
                label="this rule", helps=("pass it: psmc.load(path, extern=my_combine).",),
            )  # fmt: skip
        found = found(extern)
        oracle = partial(reference.fold, compilation.declared, extern=extern)
    elif extern is not None:
        fail("PSM293", f"'{compilation.declared.name}' has a combine of its own; 'extern' is for 'combine extern'.")
    found.proof, found.structure, found.plan = compilation.proof, compilation.structure, compilation.plan
    found.source, found.reference, found.module, found.declared = text, oracle, module, compilation.declared
    return found


def aggregator(
    cls: type | None = None,
    *,
    state: str,
    inputs: str = "",
    params: str = "",
    dims: str = "",
    associative: bool | Literal["assume"],
    order: Literal["tree", "left"] | None = None,
    name: str | None = None,
) -> Any:
    """A class with methods lift, combine (or recurrence) and output, compiled: see `psmc.frontend.decorator`.

    The decorated name becomes the compiled aggregator. Raises PsmcError as `load` does.
    """

    def decorate(target: type) -> Any:
        file = trace(
            target,
            inputs=inputs,
            state=state,
            params=params,
            dims=dims,
            associative=associative,
            order=order,
            name=name,
        )
        (compilation,) = compilations(file, file.source.name)
        return realise(compilation, extern_rule(file))

    return decorate if cls is None else decorate(cls)


__all__ = ["Extern", "PsmcError", "aggregator", "extern", "load", "realise"]
