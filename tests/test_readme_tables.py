"""The documents show the committed measurements, as benchmarks/tables.py prints them, and the printing is right."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
HEAD = {"commit": "abc1234", "device": "a GPU", "versions": {"torch": "2.0"}, "command": "python x.py"}


def write(folder: Path, name: str, rows: list[dict[str, Any]], **extra: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps({**HEAD, **extra, "rows": rows}), encoding="utf-8")


@pytest.mark.parametrize("document", SCRIPT["DOCUMENTS"])
def test_documents_are_up_to_date(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert SCRIPT["updated"](text, SCRIPT["tables"](document)) == text, "run `make tables`"


def test_committed_results_are_readable() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert SCRIPT["section"](path)


def test_no_results(tmp_path: Path) -> None:
    assert SCRIPT["NOTHING"] in SCRIPT["tables"]("README.md", tmp_path)


def test_timed_rows(tmp_path: Path) -> None:
    same = {"spec": "scan", "shape": "B8 T64", "dtype": "float32"}
    rows = [
        {**same, "pass": "fwd", "ms": 2.0, "floor_ms": 1.5, "floor": "bytes", "peers": {"theirs": 3.14159}},
        {**same, "pass": "fwd+bwd", "ms": 4.0, "floor_ms": 1.0, "peer_error": {"theirs": "out of memory"}},
    ]
    write(tmp_path, "pointwise", rows, copy_gb_s=4000)
    lines = SCRIPT["tables"]("README.md", tmp_path).splitlines()
    assert lines[0].startswith("**Pointwise scans.** a GPU; torch 2.0; commit abc1234; `python x.py`;")
    assert lines[0].endswith("device copy 4000 GB/s")
    assert lines[2] == "| spec | shape | dtype | pass | psmc ms | of the floor | theirs ms |"
    assert lines[4] == "| scan | B8 T64 | float32 | fwd | 2 | 0.75 (bytes) | 3.14 |"
    assert lines[5] == "| scan | B8 T64 | float32 | fwd+bwd | 4 | 0.25 (bytes) | fails |"


def test_other_rows_are_shown_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, "host", [{"what": "a | b", "us": 12.3456}, {"what": "c", "error": None, "right": True}])
    lines = SCRIPT["tables"]("README.md", tmp_path).splitlines()
    assert lines[0].startswith("**Host.**")
    assert lines[2:6] == ["| what | us | right |", "| --- | --- | --- |", "| a \\| b | 12.3 |  |", "| c |  | yes |"]


def test_rows_that_name_a_table(tmp_path: Path) -> None:
    write(tmp_path, "proofs", [{"table": "Mutants", "kind": "a", "n": 3}, {"table": "Monoids", "made": "b"}])
    assert SCRIPT["NOTHING"] in SCRIPT["tables"]("README.md", tmp_path)
    lines = SCRIPT["tables"]("docs/proofs.md", tmp_path).splitlines()
    assert lines[2:7] == ["Mutants:", "", "| kind | n |", "| --- | --- |", "| a | 3 |"]
    assert lines[8:10] == ["Monoids:", ""]


def test_summed_topics_are_in_readme_and_row_by_row_elsewhere(tmp_path: Path) -> None:
    rows = [{"spec": "a", "data": "hard", "output": 0.5}, {"table": "Worst", "data": "hard", "output": "0.5 (a)"}]
    write(tmp_path, "chunked_accuracy", rows)
    write(tmp_path, "accuracy", rows)
    readme, details = (SCRIPT["tables"](d, tmp_path) for d in ("README.md", "docs/measurements.md"))
    assert readme.count("| hard | 0.5 (a) |") == 2 and "| a |" not in readme
    assert details.count("| a | hard | 0.5 |") == 1 and "0.5 (a)" not in details
    write(tmp_path, "accuracy", rows[:1])
    assert "| a | hard | 0.5 |" in SCRIPT["tables"]("README.md", tmp_path), "there is no sum of it"


def test_a_row_with_peers_alone_and_hidden_columns(tmp_path: Path) -> None:
    row = {"spec": "a", "pass": "fwd", "peers": {"p": 2.0}, "peer_peak_mib": {"p": 7.0}, "note": "guard off"}
    write(tmp_path, "chunked", [{**row, "error": "lost"}])
    write(tmp_path, "other", [{"who": "x", "curve": [1.0, 2.0]}])
    found = SCRIPT["tables"]("README.md", tmp_path)
    assert "| a | fwd | fails | 2 | 7 | guard off |" in found and "curve" not in found


@pytest.mark.parametrize("text", ["{}", "[]", "no json"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json"):
        SCRIPT["tables"]("README.md", tmp_path)


def test_markers() -> None:
    begin, end = SCRIPT["BEGIN"], SCRIPT["END"]
    assert SCRIPT["updated"](f"a\n{begin}\nold\n{end}\nb", "new\n") == f"a\n{begin}\n\nnew\n\n{end}\nb"
    for text in ("none", f"{end} {begin}", f"{begin} {begin} {end}"):
        with pytest.raises(ValueError, match="expected one"):
            SCRIPT["updated"](text, "new")


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1"), (0.12345, "0.123"), (123.456, "123"), (4321.9, "4322"), (1.2e-7, "1.2e-07"), (0.0, "0"), (7, "7")],
)
def test_numbers(value: float, text: str) -> None:
    assert SCRIPT["number"](value) == text
