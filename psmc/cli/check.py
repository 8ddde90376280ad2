"""`psmc check`: the verdict on every claim."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from psmc.cli import console, inputs
from psmc.diagnostics import Diagnostic, PsmcError

if TYPE_CHECKING:
    from collections.abc import Callable

    from psmc.algebra.prover import Progress as ProofProgress
    from psmc.algebra.smt import Opinion
    from psmc.algebra.verdict import Proof, Verdict
    from psmc.pipeline import Compilation

_HEADINGS = ("file", "aggregator", "claim", "associativity", "identity", "seconds")
_SECOND = "second opinion"


@click.command(
    epilog="\b\nExamples:\n  psmc check gla.psm\n  psmc check examples/ --json > verdicts.json\n"
    "  psmc check gla.psm --certificate proof.json && psmc verify proof.json",
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON.")
@click.option(
    "--budget", type=inputs.Seconds(0, min_open=True), default=20.0, show_default=True, metavar="SECONDS",
    help="Time for the proof of one aggregator; what is open then is 'unknown'.",
)  # fmt: skip
@click.option("--second-opinion", "second", is_flag=True, help="Ask z3 too, at small sizes: it must not contradict.")
@click.option("--certificate", metavar="OUT", help="Write rules, verdicts and proofs as JSON, for psmc verify.")
def command(files: tuple[str, ...], as_json: bool, budget: float, second: bool, certificate: str | None) -> int:
    """Prove or refute what specs claim.

    FILE is a .psm file, or a directory of them. Every aggregator gets a row: is its combine associative over the reals,
    and is the declared identity element one? What fails is explained below, with a counterexample that you can check by
    hand. The exit code is 1 if a claim does not hold.
    """
    paths = inputs.specs(files)
    place = None if certificate is None else inputs.destination(certificate, paths)
    if second:
        _require_z3()
    rows: list[Row] = []
    with console.progress("checking", len(paths)) as progress:
        for path in paths:
            progress.step(path.name)
            rows += check_file(path, budget, second, lambda p: progress.detail(_doing(p)))
    failed = [d for row in rows for d in row.diagnostics]
    unread = sorted({row.file for row in rows if row.found is None})
    if place is not None and not unread:
        _write_certificate(place, rows)
    if as_json:
        _say_json(rows)
    else:
        headings = (*_HEADINGS, _SECOND) if second else _HEADINGS
        if rows:
            console.table(headings, [row.cells()[: len(headings)] for row in rows], right=("seconds",))
        for row in rows:
            if row.opinion is not None and row.opinion.word == "undecided":
                console.say(f"{row.cells()[1]}: z3 does not decide: {row.opinion.reason}")
        console.say(_summary(rows))
        for line in _floats(rows):
            console.say(line)
    if failed:
        console.complain("")
        console.report(*failed)
    if place is not None and unread:
        console.complain(f"\n{place} is not written: it would lack {', '.join(unread)}.")
    return 1 if failed else 0


@dataclass
class Row:
    """One aggregator's verdicts, or a file's mistake. `diagnostics` is empty if all is well."""

    file: str
    found: Compilation | None = None
    diagnostics: tuple[Diagnostic, ...] = ()
    seconds: float = 0.0
    verdicts: dict[str, Verdict | None] = field(default_factory=dict)
    opinion: Opinion | None = None
    asked: bool = False

    def cells(self) -> tuple[str, ...]:
        if self.found is None:
            return (self.file, "-", "-", self.diagnostics[0].code, "-", f"{self.seconds:.2f}", "-")
        agg = self.found.declared
        laws = [_word(self.verdicts.get(law)) for law in ("associativity", "identity")]
        if not self.verdicts:  # it could not be lifted
            laws = [self.diagnostics[0].code, "-"]
        elif agg.claim == "no":
            laws = [f"order: {agg.order}", "-"]
        elif None in self.verdicts.values():
            laws = ["assumed", "assumed"]
        second = "-" if self.opinion is None else self.opinion.word
        return (self.file, agg.name, agg.claim, *laws, f"{self.seconds:.2f}", second)

    def as_data(self) -> dict[str, Any]:
        """As `psmc check --json` documents it; null where a law is not claimed or nothing is known."""
        assert self.found is not None
        law, identity = self.verdicts.get("associativity"), self.verdicts.get("identity")
        residuals = [r for v in (law, identity) if (r := _residual(v))]
        if not self.verdicts:
            residuals = [self.diagnostics[0].message]
        return {
            "file": self.file,
            "aggregator": self.found.declared.name,
            "claim": self.found.declared.claim,
            "associativity": _word(law) if self.verdicts else "unknown",
            "identity": _word(identity) if self.verdicts else "unknown",
            "counterexample": _counterexample(law) or _counterexample(identity),
            "residual": "; ".join(residuals) or None,
            "repair": self._repair(),
            "float_breaks": list(self.float_breaks),
            "seconds": round(self.seconds, 3),
        } | ({"second_opinion": _opinion_data(self.opinion)} if self.asked else {})

    @property
    def float_breaks(self) -> tuple[str, ...]:
        """Components of which floats make NaN where the identity element is combined in, though the law holds."""
        return self.found.proof.float_breaks if self.found is not None and self.verdicts else ()

    def _repair(self) -> str | None:
        """The statement to write instead, where a claim is refuted and a repair proves."""
        assert self.found is not None
        fix = self.found.repair if self.verdicts and self.diagnostics else None
        return None if fix is None else fix.text


def _doing(at: ProofProgress) -> str:
    return f"{at.law} of '{at.component}'" + (f", {at.cases} cases" if at.cases else "")


def check_file(
    path: Path, budget: float, second: bool = False, progress: Callable[[ProofProgress], None] | None = None
) -> list[Row]:
    """A row an aggregator; one row for a file that cannot be read or parsed."""
    from psmc import pipeline

    begun = time.perf_counter()
    try:
        found = pipeline.read(inputs.one_file(str(path)), budget)
    except PsmcError as error:
        return [Row(str(path), None, error.diagnostics, time.perf_counter() - begun)]
    for each in found:
        each.progress = progress
    return [_check(str(path), each, second) for each in found]


def _check(file: str, found: Compilation, second: bool) -> Row:
    begun = time.perf_counter()
    try:
        proof, wrong = found.proof, found.diagnostic
    except PsmcError as error:  # a recurrence that cannot be lifted
        return Row(file, found, error.diagnostics, time.perf_counter() - begun, asked=second)
    verdicts: dict[str, Verdict | None] = {"associativity": proof.associativity, "identity": proof.identity}
    opinion = _second_opinion(found, proof) if second else None
    if opinion is not None and opinion.word == "contradicts":
        wrong = _contradicted(found, opinion)
        verdicts = {law: None if v is None else _unknown(opinion.reason) for law, v in verdicts.items()}
    found_wrong = () if wrong is None else (wrong,)
    return Row(file, found, found_wrong, time.perf_counter() - begun, verdicts, opinion, second)


def _write_certificate(path: Path, rows: list[Row]) -> None:
    """Of all aggregators that have verdicts. The same bytes for the same specs."""
    from psmc.algebra import certificate
    from psmc.algebra.verdict import Proof

    entries = [
        certificate.entry(
            row.found.agg, Proof(row.verdicts["associativity"], row.verdicts["identity"]),
            file=Path(row.file).name, declared=row.found.declared,
        )
        for row in rows if row.found is not None and row.verdicts
    ]  # fmt: skip
    inputs.write(path, certificate.text(certificate.document(entries)))


def _require_z3() -> None:
    from psmc.algebra.smt import available

    if not available():
        raise click.UsageError("--second-opinion asks z3, which is not installed: pip install 'psmc[proofs]'.")


def _second_opinion(found: Compilation, proof: Proof) -> Opinion | None:
    from psmc.algebra.smt import opinion

    return opinion(found.agg, proof, found.budget)


def _contradicted(found: Compilation, opinion: Opinion) -> Diagnostic:
    """Two methods disagree: neither is believed."""
    return Diagnostic(
        "PSM901",
        f"a bug of psmc: the proof and z3 disagree about '{found.declared.name}', so nothing is claimed.",
        found.agg.where("combine", "claim", "name"),
        notes=(opinion.reason + ("" if opinion.reason.endswith(".") else "."),),
        helps=("please report it, with the spec.",),
    )


def _opinion_data(opinion: Opinion | None) -> dict[str, str | None] | None:
    return None if opinion is None else {"verdict": opinion.word, "reason": opinion.reason or None}


def _word(verdict: Verdict | None) -> Any:
    return None if verdict is None else type(verdict).__name__.lower()


def _unknown(reason: str) -> Verdict:
    from psmc.algebra.verdict import Unknown

    return Unknown("", reason)


def _residual(verdict: Verdict | None) -> str:
    from psmc.algebra.verdict import Unknown

    return (verdict.residual or verdict.reason) if isinstance(verdict, Unknown) else ""


def _counterexample(verdict: Verdict | None) -> dict[str, Any] | None:
    from psmc.algebra.verdict import Refuted

    if not isinstance(verdict, Refuted):
        return None
    found = verdict.counterexample
    return {
        "law": found.law,
        "dims": dict(found.dims),
        "elements": {name: {c: _exact(v) for c, v in parts} for name, parts in found.elements},
        "component": found.component,
        "position": list(found.position),
        "left": _exact(found.left),
        "right": _exact(found.right),
        "text": found.text,
    }


def _exact(value: object) -> Any:
    """Exact numbers as text, arrays as nested lists; null is no value."""
    return [_exact(v) for v in value] if isinstance(value, list | tuple) else None if value is None else str(value)


def _say_json(rows: list[Row]) -> None:
    data: dict[str, Any] = {"results": [row.as_data() for row in rows if row.found is not None]}
    errors = [_error(row.file, d) for row in rows if row.found is None for d in row.diagnostics]
    inputs.say_json(data | ({"errors": errors} if errors else {}))


def _error(file: str, diagnostic: Diagnostic) -> dict[str, Any]:
    span = diagnostic.span
    line, column = span.source.position(span.start) if span else (None, None)
    return {"file": file, "code": diagnostic.code, "message": diagnostic.message, "line": line, "column": column}


def _floats(rows: list[Row]) -> list[str]:
    """One line on identity elements that hold over the reals and not in floats; none if there are none."""
    kept = [row for row in rows if row.float_breaks and not row.diagnostics]
    found = [f"{row.cells()[1]} ({', '.join(row.float_breaks)})" for row in kept]
    if not found:
        return []
    nan = f"in floats the identity element would make NaN of {'; '.join(found)}"
    return [f"Note: {nan}; compiled code never combines with it."]


def _summary(rows: list[Row]) -> str:
    wrong = sum(1 for row in rows if row.diagnostics)
    if wrong:
        return f"{wrong} of {len(rows)} failed."
    fixed = sum(1 for row in rows if row.found is not None and row.found.declared.claim == "no")
    held = len(rows) - fixed
    parts = [f"{held} {'claim holds' if held == 1 else 'claims hold'}"] if held else []
    parts += [f"{fixed} with a fixed order"] if fixed else []
    return (", ".join(parts) or "There is no aggregator here: nothing to check") + "."
