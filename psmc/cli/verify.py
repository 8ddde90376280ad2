"""`psmc verify`: a certificate, checked by the small program of psmc/checker.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from psmc.cli import console, inputs
from psmc.diagnostics import PsmcError, fail

_HEADINGS = ("aggregator", "law", "verdict", "checked", "how", "error")
_WORDS = {True: "accepted", False: "REJECTED", None: "-"}
_RULE = ("dims", "inputs", "params", "state", "lift", "combine")
Row = dict[str, Any]


@click.command(
    epilog="\b\nExamples:\n  psmc check gla.psm --certificate proof.json\n  psmc verify proof.json\n"
    "  psmc verify proof.json --spec gla.psm     # is it about this spec?\n"
    "  psmc verify proof.json --points 500 --seed 7",
)
@click.argument("certificate", metavar="CERTIFICATE")
@click.option("--spec", "specs", multiple=True, metavar="FILE", help="Is it about this .psm file? Compiles it anew.")
@click.option("--points", type=click.IntRange(1, 100_000), default=32, show_default=True, help="Points for each law.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed looks at other points.")
@click.option("--json", "as_json", is_flag=True, help="Print a list, one item a law.")
def command(certificate: str, specs: tuple[str, ...], points: int, seed: int, as_json: bool) -> int:
    """Accept or reject the certificate that `psmc check --certificate` wrote.

    The checker is one small file, psmc/checker.py, that knows nothing of the prover: it computes both sides of each law
    itself, at random points and modulo large primes. 'as expressions' means that a law holds on all of each cell of
    points that take the same branches; 'at points', that it held at every point looked at. A refuted law is accepted if
    its counterexample is one. The exit code is 1 if anything is rejected.
    """
    from psmc import checker

    path = inputs.existing(Path(certificate))
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe may never end, or never begin
        why = "is a directory" if os.path.isdir(path) else "is a pipe or a device, not a file"
        fail("PSM102", f"{path} {why}", helps=("psmc check FILE --certificate OUT.json writes one.",))
    try:
        document = checker.read(str(path))
    except checker.Refused as error:
        fail("PSM102", plain(str(error)), helps=("psmc check FILE --certificate OUT.json writes one.",))
    rows = checker.check(document, points, seed)
    if not rows:
        fail("PSM102", f"{path} holds no aggregator", helps=("psmc check FILE --certificate OUT.json writes one.",))
    for spec in specs:
        _compare(rows, document, spec)
    if as_json:
        inputs.say_json(rows)
    else:
        console.table(_HEADINGS, [_cells(row) for row in rows], right=("error",))
        for entry in _entries(document) if not specs else ():
            if isinstance(entry, dict):
                console.say(plain(f"{entry.get('aggregator')!s:.64}: digest of its spec {entry.get('digest')!s:.64}"))
        for row in rows:
            if row["accepted"] is False:
                console.complain(plain(f"rejected: {row['aggregator']}, {row['law']}: {row['why']}"))
    return int(any(row["accepted"] is False for row in rows))


def plain(text: str) -> str:
    """Without control characters: a certificate may come from anywhere."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _cells(row: Row) -> tuple[str, ...]:
    error = row.get("error")
    bound = "-" if error is None else f"2^{error}"
    verdict = "-" if row["verdict"] is None else str(row["verdict"])
    return plain(row["aggregator"]), row["law"], plain(verdict), _WORDS[row["accepted"]], how(row), bound


def how(row: Row) -> str:
    """`as expressions in 9 cells, 53 points`, or `at 32 points`."""
    if row["accepted"] is None:
        return "nothing was claimed"
    if not row["accepted"]:
        return "-"
    if row["verdict"] == "refuted":
        return "counterexample"
    cells, points, alone = row["cells"], row["points"], row["pointwise"]
    if not cells:
        return f"at {points} points"
    more = f", {alone} of them alone" if alone else ""
    return f"as expressions in {cells} cell{'s' * (cells > 1)}, {points} points{more}"


def _entries(document: Any) -> list[Any]:
    """The aggregators of a certificate: the checker gives two rows to each, in order."""
    found = document.get("aggregators") if isinstance(document, dict) else None
    return found if isinstance(found, list) else []


def _compare(rows: list[Row], document: Any, spec: str) -> None:
    """Rejects what the certificate says of another rule than the spec's."""
    from psmc import pipeline

    found = {c.declared.name: c for c in pipeline.read(inputs.one_file(spec))}
    for entry, first in zip(_entries(document), range(0, len(rows), 2), strict=False):
        name = rows[first]["aggregator"]
        why = _difference(found[name], entry) if name in found else ""
        for row in rows[first : first + 2] if why else ():
            row |= {"accepted": False, "why": f"{spec} says something else: {why}"}
    for name in sorted(found.keys() - {row["aggregator"] for row in rows}):
        why = f"it is in {spec}, but not in the certificate"
        rows.append({"aggregator": name, "law": "-", "verdict": None, "accepted": False, "why": why})


def _difference(found: Any, entry: Any) -> str:
    """What differs; empty if it is the spec's rule."""
    from psmc.algebra.certificate import digest, rule_of
    from psmc.algebra.certificate_rule import UnwritableError

    if entry.get("digest") != digest(found.declared):
        return "the digest"
    try:
        tensors = [*(entry.get("state") or {}).items(), *(entry.get("params") or {}).items()]
        used = frozenset(name.removesuffix(".re").removesuffix(".im") for name, t in tensors if t["used"])
        rule = rule_of(found.agg, used)
    except (PsmcError, UnwritableError, AttributeError, TypeError, KeyError):
        rule = None
    differing = [part for part in _RULE if (rule or {}).get(part) != entry.get(part)]
    return f"the {differing[0]}" if differing and (rule is not None or "combine" in entry) else ""
