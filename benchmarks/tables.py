"""The documents' tables, printed from benchmarks/results/*.json between the two markers of each document.

    python benchmarks/tables.py [--check]

A file is {"commit", "device", "versions", "command", "rows": [...]}. Rows with "ms" have "spec", "shape", "dtype",
"pass" ("fwd", "bwd", "fwd+bwd", "step"), "tile" (block sizes), "what" (how it is run), "floor_ms", "floor" (what bounds
it: "bytes", "flops", "exp"), "peers": {name: ms}, "peer_error": {name: text}, "peak_mib", "peer_peak_mib": {name: MiB},
"first_call_s", "note"; keys that do not apply are left out. Any other rows are shown as they are, a column a key; rows
that name a "table" are shown in that one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks/tables.py: begin -->", "<!-- benchmarks/tables.py: end -->"
NOTHING = "No measurements are committed yet."
TITLES = {
    "pointwise": "Pointwise scans",
    "overhead": "First calls and host time",
    "gradients": "Gradients against the oracle",
    "accuracy": "Error against the fp64 oracle",
    "decode": "One token",
    "tree": "Trees",
    "chunked": "Matrix states in chunks",
    "chunked_accuracy": "Chunked specs on hard data, against the fp64 oracle",
    "training": "A language model of 50 M parameters, trained with psmc and with a reference",
    "cold": "First call of chunked specs, empty caches",
    "psm": "Prefix-scannable models",
    "rounding": "bf16 in the chunk kernels, in Triton's interpreter",
}
# Where a topic's tables stand, if not in README.
ELSEWHERE = {
    **dict.fromkeys(("fuzz", "proofs", "reassociation"), "docs/proofs.md"),
    **dict.fromkeys(("pointwise_tiles", "chunk_tiles"), "docs/measurements.md"),
    "rounding": "docs/precision.md",
}
# Topics of which README has the tables that rows name, and docs/measurements.md the rows one by one.
SUMMED = ("accuracy", "chunked_accuracy", "training")
UNLISTED = ("accuracy",)  # too many rows for any document
DETAILS = "docs/measurements.md"
HIDDEN = ("curve",)  # of rows, for plots
DOCUMENTS = ("README.md", *dict.fromkeys(ELSEWHERE.values()))
Row = Mapping[str, Any]


def number(value: object) -> str:
    """Three significant digits; whole numbers as they are."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        digits = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return digits
    return f"{value:.1e}"


def cell(value: object) -> str:
    """Text for one cell of a table in Markdown."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{k} {number(v)}" for k, v in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(number(v) for v in value)
    return number(value).replace("|", "\\|").replace("\n", " ")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns in which nothing stands are left out."""
    body = [list(r) for r in rows]
    kept = [n for n in range(len(headings)) if any(r[n] for r in body)]
    lines = [[headings[n] for n in kept], ["---"] * len(kept), *([r[n] for n in kept] for r in body)]
    return [f"| {' | '.join(line)} |" for line in lines]


def timed(rows: Sequence[Row]) -> list[str]:
    """psmc beside its peers and the floor, a row a measurement."""
    peers = list(dict.fromkeys(p for r in rows for p in (*r.get("peers", {}), *r.get("peer_error", {}))))
    heavy = [p for p in peers if any(p in r.get("peer_peak_mib", {}) for r in rows)]
    headings = ["spec", "shape", "dtype", "pass", "tile", "what", "psmc ms", "of the floor"]
    headings += [*(f"{p} ms" for p in peers), "peak MiB", *(f"{p} peak MiB" for p in heavy), "first call s", "note"]
    body = []
    for row in rows:
        ms, floor = row.get("ms"), row.get("floor_ms")
        share = f"{floor / ms:.2f} ({row.get('floor', 'bytes')})" if ms and floor else ""
        errors = row.get("peer_error", {})
        theirs = [cell(row.get("peers", {}).get(p)) or ("fails" if p in errors else "") for p in peers]
        named = [cell(row.get(k)) for k in ("spec", "shape", "dtype", "pass", "tile", "what")]
        memory = [cell(row.get("peak_mib")), *(cell(row.get("peer_peak_mib", {}).get(p)) for p in heavy)]
        rest = [cell(row.get("first_call_s")), cell(row.get("note"))]
        body.append([*named, cell(ms) or "fails", share, *theirs, *memory, *rest])
    return table(headings, body)


def plain(rows: Sequence[Row]) -> list[str]:
    """A column a key, in the order in which keys first appear."""
    keys = [k for k in dict.fromkeys(k for r in rows for k in r) if k not in HIDDEN]
    return table(keys, ([cell(r.get(k)) for k in keys] for r in rows))


def section(path: Path, document: str = "README.md") -> list[str]:
    """One file, as a document has it; [] if it has nothing there.

    Raises ValueError with the path if the file is not what the header says.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = record["rows"]
        versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        source = f"{record['device']}; {versions}; commit {record['commit']}; `{record['command']}`"
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name}: {error!r}; expected commit, device, versions, command, rows") from error
    if path.stem in SUMMED and any("table" in r for r in rows):
        rows = [r for r in rows if ("table" in r) == (document != DETAILS)]
        if not rows:
            return []
    if "copy_gb_s" in record:
        source += f"; device copy {record['copy_gb_s']} GB/s"
    if "note" in record:
        source += f"; {record['note']}"
    title = TITLES.get(path.stem, path.stem.replace("_", " ").capitalize())
    lines = [f"**{title}.** {source}", ""]
    for name in dict.fromkeys(r.get("table", "") for r in rows):
        mine = [{k: v for k, v in r.items() if k != "table"} for r in rows if r.get("table", "") == name]
        is_timed = all("pass" in r and not r.keys().isdisjoint(("ms", "error", "peers")) for r in mine)
        is_timed &= any("ms" in r for r in mine) or not any("data" in r for r in mine)
        lines += [*([f"{name}:", ""] if name else []), *(timed(mine) if is_timed else plain(mine)), ""]
    return lines


def tables(document: str = "README.md", results: Path = RESULTS) -> str:
    """Everything between the markers of a document."""
    paths = [p for p in sorted(results.glob("*.json")) if ELSEWHERE.get(p.stem, "README.md") == document
             or (document == DETAILS and p.stem in SUMMED and p.stem not in UNLISTED)]  # fmt: skip
    return "\n".join([line for path in paths for line in section(path, document)] or [NOTHING, ""])


def updated(text: str, found: str) -> str:
    """The text with what stands between the markers replaced. Raises ValueError without exactly one pair of them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one '{BEGIN}' and, after it, one '{END}'")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{found}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document differs")
    options = parser.parse_args(argv)
    stale = False
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        try:
            new = updated(text, tables(document))
        except ValueError as error:
            print(f"{document}: {error}", file=sys.stderr)
            return 2
        stale |= new != text
        if not options.check:
            (ROOT / document).write_text(new, encoding="utf-8")
    return int(stale and options.check)


if __name__ == "__main__":
    sys.exit(main())
