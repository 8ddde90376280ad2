"""The only list of stages: source, surface, IR, lifted IR, proof, structure, plan, module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from psmc.algebra.prover import Progress, prove
from psmc.algebra.repair import Repair, repair
from psmc.algebra.report import diagnostic_for
from psmc.algebra.verdict import Proof
from psmc.confirm import confirmed, noted
from psmc.derive.lifting import lifted
from psmc.diagnostics import Diagnostic, PsmcError, fail
from psmc.frontend import psm
from psmc.frontend.resolve import resolve
from psmc.frontend.surface import CombineExtern, File
from psmc.ir import Aggregator
from psmc.source import SourceFile, Span

if TYPE_CHECKING:
    from psmc.plan.base import Plan
    from psmc.plan.tuned import Tuned
    from psmc.structure.report import Structure


@dataclass
class Compilation:
    """One aggregator on its way through the stages; each is run when it is first asked for."""

    declared: Aggregator
    file: str
    budget: float = 20.0
    progress: Callable[[Progress], None] | None = None  # of the proof
    tuned: tuple[Tuned, ...] = ()  # files of tiles, of which one may be for this module

    @cached_property
    def agg(self) -> Aggregator:
        """What is proved and run: a recurrence lifted, anything else as declared."""
        return lifted(self.declared)

    @cached_property
    def proof(self) -> Proof:
        return self._checked[0]

    @cached_property
    def _checked(self) -> tuple[Proof, Mapping[str, str]]:
        """The proof, its counterexamples held against fp64, and what that has to say of them."""
        if self.agg.combine is None:
            return Proof(None, None), {}
        return confirmed(self.agg, prove(self.agg, self.budget, progress=self.progress))

    @cached_property
    def diagnostic(self) -> Diagnostic | None:
        """The error that the proof amounts to under the claim."""
        return noted(diagnostic_for(self.agg, self.proof, lambda agg, proof: self.repair), *self._checked)

    @cached_property
    def repair(self) -> Repair | None:
        """A changed spec that proves, where a law is refuted and one of the usual mistakes explains it."""
        return repair(self.agg, self.proof)

    @cached_property
    def structure(self) -> Structure | None:
        """None for a rule from Python and for a recurrence that is run as it stands."""
        from psmc.ir import Block
        from psmc.structure.analyse import analyse

        return analyse(self.agg) if isinstance(self.agg.combine, Block) else None

    @cached_property
    def plan(self) -> Plan:
        from psmc.plan.choose import choose

        return choose(self.agg, self.structure)

    @cached_property
    def text(self) -> str:
        """The generated module. Raises PsmcError if the claim does not hold, or a tuned file does not fit."""
        own = [t for t in self.tuned if t.aggregator == self.declared.name]
        chosen = next((t for t in own if t.digest == self.digest), None) if own else None
        return self.shipped if chosen is None else self._emitted(chosen)

    @cached_property
    def shipped(self) -> str:
        """The module with the tiles of its plan."""
        return self._emitted(None)

    @property
    def digest(self) -> str:
        """Of the module as it is shipped: what a tuned file is for."""
        from psmc.codegen.emit import digest_of

        return digest_of(self.shipped)

    @property
    def stale(self) -> tuple[Diagnostic, ...]:
        """A warning for each tuned file that was made for an earlier module of this aggregator."""
        own = [t for t in self.tuned if t.aggregator == self.declared.name]
        return tuple(t.stale(self.digest) for t in own if t.digest != self.digest)

    def _emitted(self, tuned: Tuned | None) -> str:
        from psmc.codegen.emit import emit

        if self.diagnostic is not None:
            raise PsmcError(self.diagnostic)
        return emit(self.agg, self.declared, self.proof, self.structure, self.plan, self.file, tuned)


def compilations(file: File, name: str, budget: float = 20.0) -> tuple[Compilation, ...]:
    """All aggregators of a parsed file. Raises PsmcError 2xx."""
    return tuple(Compilation(agg, name, budget) for agg in resolve(file, load=_used))


def read(path: str | Path, budget: float = 20.0) -> tuple[Compilation, ...]:
    """The aggregators of a .psm file. Raises PsmcError 1xx, 2xx."""
    source = psm.read(path)
    return compilations(psm.parse(source), Path(path).name, budget)


def read_text(text: str, name: str = "<string>", budget: float = 20.0) -> tuple[Compilation, ...]:
    """The same of a text."""
    return compilations(psm.parse(SourceFile(name, text)), name, budget)


def pick(found: Iterable[Compilation], name: str | None, where: str) -> Compilation:
    """The aggregator of that name, or the only one. Raises PsmcError PSM220."""
    every = tuple(found)
    names = [c.declared.name for c in every]
    if name is None and len(every) == 1:
        return every[0]
    if name in names:
        return every[names.index(name)]
    close = get_close_matches(name or "", names, 1)
    which = f"there is no aggregator '{name}'" if name else f"there are {len(every)} aggregators"
    fail(
        "PSM290", f"{where}: {which}.",
        helps=(f"did you mean '{close[0]}'?" if close else f"name one of {', '.join(names) or '(none)'}.",),
    )  # fmt: skip


def _used(path: str, span: Span) -> File:
    """The file that a `use` names, beside the one that uses it. Raises PsmcError PSM102, PSM291."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or pure.suffix != ".psm":
        fail(
            "PSM291", f"'use' takes a .psm file in this directory or below it, not \"{path}\".", span,
            helps=('write use "lib.psm", relative to this file.',),
        )  # fmt: skip
    return psm.parse(psm.read(Path(span.source.name).parent / path, span))


def extern_rule(file: File) -> Callable[..., Any] | None:
    """The rule that a decorated class brought along."""
    for aggregator in file.aggregators:
        for item in aggregator.items:
            if isinstance(item, CombineExtern):
                return item.fn
    return None
