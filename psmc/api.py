"""What `import psmc` offers: load a spec, decorate a class.

The compiler is imported when something has to be compiled: a spec that was compiled before is a file to import.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from psmc import remembered
from psmc.diagnostics import PsmcError, fail

if TYPE_CHECKING:
    from psmc.algebra.verdict import Proof
    from psmc.duality.evidence import Evidence
    from psmc.frontend.decorator import Extern
    from psmc.ir import Aggregator
    from psmc.pipeline import Compilation
    from psmc.plan.base import Plan
    from psmc.structure.report import Structure


def load(
    path: str | Path, name: str | None = None, *, extern: Callable[..., Any] | None = None, budget: float = 20.0
) -> Any:
    """The compiled aggregator of a .psm file: prove, generate (or take from the cache), import.

    path    the file;  name   which aggregator, if there are several
    extern  the rule of `combine extern`: maps two dicts of tensors [batch, *lanes, *dims] to one
    budget  seconds for the proof

    The result is called on tensors, and has .proof, .structure, .plan, .source and .reference (the sequential oracle).
    Tuned files that PSMC_TUNED names are baked into the module. Raises PsmcError if the spec is wrong or its claim does
    not hold.
    """

    def compilation() -> Compilation:
        from psmc.pipeline import pick, read

        return _with_tiles(pick(read(path, budget), name, str(path)))

    text = _text(path)
    text = None if text is None else text + _tuned_texts()
    known = remembered.recall(text, name) if text is not None and extern is None else None
    if known is not None:
        from psmc.runtime.load import load_file

        public, place = known
        module = load_file(place, f"psmc_generated_{place.stem}")
        return _described(getattr(module, public), module, compilation)
    compiled = compilation()
    found = realise(compiled, extern)
    if text is not None and extern is None and _alone(text) and not compiled.stale:
        remembered.remember(text, {compiled.agg.name: Path(found.module.__file__).name})
    return found


def _text(path: str | Path) -> str | None:
    """The file's text, None where reading it is the frontend's to report."""
    from psmc.source import read_bytes

    try:
        return read_bytes(Path(path)).decode("utf-8")
    except (OSError, ValueError):
        return None


def _tuned_files() -> list[str]:
    return [file for file in os.environ.get("PSMC_TUNED", "").split(os.pathsep) if file]


def _tuned_texts() -> str:
    """What else decides how a module reads, for its key among those that are remembered."""
    return "".join(f"\n# {_text(file)}" for file in _tuned_files())


def _with_tiles(compilation: Compilation) -> Compilation:
    """The compilation, with the tiles of the files that PSMC_TUNED names; warns of files that are out of date."""
    if files := _tuned_files():
        from psmc.plan.tuned import read_files

        compilation.tuned = read_files(files)
        for diagnostic in compilation.stale:
            warnings.warn(str(PsmcError(diagnostic)), stacklevel=4)
    return compilation


def _alone(text: str) -> bool:
    """One aggregator that uses no other file. Words in comments may hide that, which only costs a compilation."""
    return len(re.findall(r"\baggregator\b", text)) == 1 and not re.search(r'\buse\s*"', text)


def realise(compilation: Compilation, extern: Callable[..., Any] | None = None) -> Any:
    """A compilation's module, imported, with what is known of it attached."""
    from psmc.ir import Extern as ExternRule
    from psmc.runtime.load import load_module

    module = load_module(compilation.agg.name, compilation.text)
    found = getattr(module, compilation.agg.name)
    if isinstance(compilation.agg.combine, ExternRule):
        if not callable(extern):
            given = "" if extern is None else f", a function or module, not {type(extern).__name__}"
            fail(
                "PSM292", f"'{compilation.declared.name}' takes its rule from Python{given}.",
                compilation.declared.where("combine"), label="this rule",
                helps=("pass it: psmc.load(path, extern=my_combine), or --extern blocks.py:my_combine to psmc test.",),
            )  # fmt: skip
        found = found(extern)
    elif extern is not None:
        fail("PSM293", f"'{compilation.declared.name}' has a combine of its own; 'extern' is for 'combine extern'.")
    return _described(found, module, lambda: compilation, extern)


class Described:
    """What is known of a compiled aggregator, beside its module: computed when it is first asked for."""

    _compile: Callable[[], Compilation]
    _extern: Callable[..., Any] | None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickled as its spec (and the rule from Python), which is compiled again where it is read."""
        from psmc.ir.text import show

        return _from_text, (show(self.declared), self._extern)

    @cached_property
    def _compilation(self) -> Compilation:
        return self._compile()

    @property
    def declared(self) -> Aggregator:
        return self._compilation.declared

    @property
    def proof(self) -> Proof:
        return self._compilation.proof

    @property
    def structure(self) -> Structure | None:
        return self._compilation.structure

    @property
    def plan(self) -> Plan:
        return self._compilation.plan

    @property
    def source(self) -> str:
        """The generated module's text."""
        return self._compilation.text

    @property
    def reference(self) -> Callable[..., Any]:
        """The oracle, `psmc.reference.fold` of this spec."""
        from psmc import reference

        if self._extern is None:
            return partial(reference.fold, self.declared)
        return partial(reference.fold, self.declared, extern=self._extern)

    def evidence(self, **options: Any) -> Evidence:
        """Both laws tried on random elements, `psmc.duality.evidence`: all there is for a rule from Python."""
        from psmc.duality.evidence import evidence

        return evidence(self, **options)


def _from_text(text: str, extern: Callable[..., Any] | None) -> Any:
    from psmc.pipeline import pick, read_text

    return realise(pick(read_text(text, "<pickled>"), None, "<pickled>"), extern)


def _described(
    found: Any, module: Any, compilation: Callable[[], Compilation], extern: Callable[..., Any] | None = None
) -> Any:
    if not isinstance(found, Described):
        base = type(found)
        found.__class__ = type(base.__name__, (Described, base), {"__module__": base.__module__})
        found.module, found._compile, found._extern = module, compilation, extern
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
        from psmc.frontend.decorator import trace
        from psmc.pipeline import compilations, extern_rule

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
        return realise(_with_tiles(compilation), extern_rule(file))

    return decorate if cls is None else decorate(cls)


def extern(fn: Callable[..., Any]) -> Extern:
    """`combine = psmc.extern(module)` in a decorated class: this callable is the rule. Raises PsmcError PSM258."""
    from psmc.frontend.decorator import extern as rule

    return rule(fn)


__all__ = ["Described", "PsmcError", "aggregator", "extern", "load", "realise"]
