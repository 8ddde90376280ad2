"""`psmc explain`: what the compiler sees in a spec, and which plan it picks."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import click

from psmc.cli import console, inputs

if TYPE_CHECKING:
    from psmc.pipeline import Compilation

_CLAIMS = {
    "yes": "associative; `psmc check` proves it",
    "assume": "associative, by the author's word",
    "no": "not associative: a fixed order is the meaning",
}


@click.command(
    epilog="\b\nExamples:\n  psmc explain gla.psm\n  psmc explain deltanet.psm --json\n  psmc explain PSM301"
)
@click.argument("file", metavar="FILE|CODE")
@click.option("--json", "as_json", is_flag=True, help="Print a list, one item an aggregator.")
@click.option("--name", metavar="AGG", help="Only this aggregator of the file.")
def command(file: str, as_json: bool, name: str | None) -> int:
    """Show the algebra of a spec: live state, layers, their class, and the plan with its reasons.

    A layer that is affine on a matrix state is shown in factors, S' = D S + U (W^T S) + B C^T, with the readout's query
    q (of the state after the token) and p (before it). A CODE such as PSM301 is explained in words.
    """
    from psmc import pipeline

    if re.fullmatch(r"PSM\d{3}", file, re.I) and not os.path.exists(file):
        return _code(file.upper())

    path = inputs.one_file(file)
    found = pipeline.read(path)
    chosen = (pipeline.pick(found, name, str(path)),) if name else found
    if as_json:
        inputs.say_json([_as_data(c) for c in chosen])
        return 0
    for number, each in enumerate(chosen):
        if number:
            console.say()
        console.say(console.bold(each.declared.name))
        for line in lines(each):
            console.say(f"  {line}")
    return 0


def _code(code: str) -> int:
    from psmc.diagnostics.catalogue import CATALOGUE

    if code not in CATALOGUE:
        near = [known for known in CATALOGUE if known[:4] == code[:4]] or list(CATALOGUE)
        raise click.UsageError(f"there is no code {code}; near it are {', '.join(near[:12])}.")
    title, text = CATALOGUE[code]
    console.say(f"{console.bold(code)}: {title}")
    console.say(f"  {text}")
    return 0


def lines(found: Compilation) -> list[str]:
    """One fact a line."""
    from psmc.structure.describe import describe

    out = [f"claim: {_CLAIMS[found.declared.claim]}"]
    if found.declared.recurrence is not None and found.agg.combine is not None:
        out.append(f"lifted to a scan over {', '.join(c.name for c in found.agg.state)}")
    if found.structure is not None:
        out += describe(found.structure)
    else:
        out.append(f"live state: {', '.join(c.name for c in found.agg.state)}")
        out.append(f"layer 1: {', '.join(c.name for c in found.agg.state)}: opaque")
    out.append(f"plan: {found.plan.name}")
    out += [f"  {reason}" for reason in found.plan.why]
    out += [f"  not {name}: {reason}" for name, reason in found.plan.refused]
    return out


def _as_data(found: Compilation) -> dict[str, Any]:
    from psmc.structure.describe import as_data

    plan = found.plan
    if found.structure is not None:
        data = as_data(found.structure)
    else:
        names = [c.name for c in found.agg.state]
        data = {"aggregator": found.declared.name, "live": names, "layers": [{"components": names, "class": "opaque"}]}
    for layer in data["layers"]:
        layer["plan"] = plan.name
    data["plan"] = {"name": plan.name, "why": list(plan.why), "refused": {n: why for n, why in plan.refused}}
    return data
