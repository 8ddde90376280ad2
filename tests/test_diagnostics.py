"""Every mistake has a code, a place and advice. `tests/bad/PSMnnn_*.psm` fail with the text in the `.txt` beside them.

To add one: write the .psm file, run this test with PSMC_PIN=1, and read what it wrote.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from psmc.algebra.prover import prove
from psmc.algebra.report import diagnostic_for
from psmc.derive.lifting import lifted
from psmc.diagnostics import Diagnostic, Label, PsmcError, fail, render
from psmc.diagnostics.catalogue import CATALOGUE
from psmc.frontend import psm
from psmc.frontend.resolve import resolve
from psmc.source import SourceFile, Span

ROOT = Path(__file__).parent.parent
BAD = Path(__file__).parent / "bad"
FILES = sorted(BAD.glob("*.psm"))
PIN = bool(os.environ.get("PSMC_PIN"))


def diagnose(name: str) -> str:
    """What a user sees who checks the file: all diagnostics, or nothing."""
    try:
        for agg in resolve(psm.parse(psm.read(name))):
            lifted_agg = lifted(agg)
            found = diagnostic_for(lifted_agg, prove(lifted_agg))
            if found is not None:
                raise PsmcError(found)
    except PsmcError as error:
        return f"{error}\n"
    return ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_bad_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BAD)
    text = diagnose(path.name)
    code = path.stem[:6]
    assert f"[{code}]" in text, f"{path.name} should fail with {code}, gave:\n{text}"
    pinned = path.with_suffix(".txt")
    if PIN:
        pinned.write_text(text, encoding="utf-8")
    assert text == pinned.read_text(encoding="utf-8")


def test_no_pinned_text_without_its_file() -> None:
    assert {p.stem for p in BAD.glob("*.txt")} == {p.stem for p in FILES}


def used_codes() -> Iterator[str]:
    for path in sorted((ROOT / "psmc").rglob("*.py")):
        if path.name != "catalogue.py":
            yield from re.findall(r"\bPSM\d{3}\b", path.read_text(encoding="utf-8"))


def test_catalogue() -> None:
    assert set(used_codes()) <= set(CATALOGUE), "a code is raised that the catalogue does not explain"
    assert all(re.fullmatch(r"PSM[1-69]\d\d", code) for code in CATALOGUE)
    assert len({title for title, _ in CATALOGUE.values()}) == len(CATALOGUE), "two codes have the same title"
    assert all(text.endswith((".", "…")) and title[0].islower() for title, text in CATALOGUE.values())


@pytest.mark.parametrize("code", [c for c in CATALOGUE if c.startswith(("PSM1", "PSM50"))])
def test_every_syntax_code_has_a_bad_file(code: str) -> None:
    assert code in used_codes(), "nothing raises this code"
    if code != "PSM501":  # a megabyte is made by the parser's tests, not shipped
        assert any(p.name.startswith(code) for p in FILES)


# --- the renderer ---------------------------------------------------------------------------------


def span(source: SourceFile, text: str) -> Span:
    start = source.text.index(text)
    return Span(source, start, start + len(text))


def test_render() -> None:
    source = SourceFile("a.psm", "aggregator a {\n  s = l.s * r.d\n  associative: yes\n}\n")
    diagnostic = Diagnostic(
        "PSM301",
        "not associative",
        span(source, "l.s"),
        "the decay is lost",
        (Label(span(source, "associative: yes"), "claimed here"),),
        ("two\nlines",),
        ("carry it",),
    )
    assert render(diagnostic).split("\n") == [
        "a.psm:2:7: error[PSM301]: not associative",
        "  2 |   s = l.s * r.d",
        "    |       ^^^ the decay is lost",
        "  3 |   associative: yes",
        "    |   ---------------- claimed here",
        "  Note: two",
        "        lines",
        "  Help: carry it",
    ]


def test_render_spans_of_several_lines_tabs_and_wide_characters() -> None:
    source = SourceFile("a.psm", "\tlift {\n\t\ta = 漢字 + b\n\t}\n")
    block = render(Diagnostic("PSM101", "m", span(source, "lift {\n\t\ta = 漢字 + b\n\t}"), "this"))
    assert block.split("\n")[1:] == ["  1 |     lift {", "    |     ^^^^^^", "  3 |     }", "    |     ^ this"]
    wide = render(Diagnostic("PSM101", "m", span(source, "+ b")))
    assert wide.split("\n")[1:] == ["  2 |         a = 漢字 + b", "    |                  ^^^"]


def test_render_clips_long_lines_around_the_span() -> None:
    source = SourceFile("a.psm", "x + " * 50_000 + "here" + " + y" * 50_000)
    lines = render(Diagnostic("PSM101", "m", span(source, "here"), "label")).split("\n")
    assert all(len(line) < 120 for line in lines)
    assert lines[1].startswith("  1 | …") and lines[1].endswith("…")
    assert lines[2].index("^^^^ label") == lines[1].index("here")


def test_render_neutralises_control_characters() -> None:
    source = SourceFile("a\x1b[2J.psm", "x = \x1b[31m\n")
    text = render(Diagnostic("PSM101", "bad \x1b]0;t\x07", span(source, "x"), "\x1b[0m"))
    assert "\x1b" not in text and "\x07" not in text


def test_render_labels_in_other_files() -> None:
    here, there = SourceFile("a.psm", "f(x)\n"), SourceFile("lib.psm", "fn f(x) = x\n")
    diagnostic = Diagnostic("PSM202", "m", span(here, "f"), labels=(Label(span(there, "fn f"), "defined here"),))
    expected = ["  1 | f(x)", "    | ^", "  lib.psm:1:1:", "  1 | fn f(x) = x", "    | ---- defined here"]
    assert render(diagnostic).split("\n")[1:] == expected


def test_render_at_the_end_and_in_nothing() -> None:
    source = SourceFile("a.psm", "a\n")
    assert render(Diagnostic("PSM101", "m", Span(source, 2, 2))).split("\n")[1:] == ["  2 |", "    | ^"]
    empty = SourceFile("e.psm", "")
    assert render(Diagnostic("PSM101", "m", Span(empty, 0, 0))).startswith("e.psm:1:1: error[PSM101]: m\n")


def test_style_colours_pieces_without_changing_the_text() -> None:
    source = SourceFile("a.psm", "a = b\n")
    label = Label(span(source, "a"), "second")
    diagnostic = Diagnostic("PSM101", "m", span(source, "b"), "label", (label,), ("n",), ("h",))
    roles: set[str] = set()

    def style(role: str, text: str) -> str:
        roles.add(role)
        return f"\x1b[1m{text}\x1b[0m"

    assert re.sub(r"\x1b\[\dm", "", render(diagnostic, style=style)) == render(diagnostic)
    assert roles == {"place", "error", "message", "gutter", "source", "primary", "secondary", "note", "help"}


def test_errors_print_as_text() -> None:
    with pytest.raises(PsmcError) as caught:
        fail("PSM101", "what", helps=("how",))
    assert str(caught.value) == "error[PSM101]: what\n  Help: how"
