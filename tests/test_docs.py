"""The blocks of README and docs run.

    ```psm [name.psm]    parsed, resolved; claims of 'yes' proved; kept under its name for `use` and for Python
    ```psm error         refused, with exactly the ```text that follows
    ```python            run, in one namespace a document; what it prints is the ```text that follows, if one does
    ```console           lines with '$ ' are run; what follows is their output ('...' stands for any lines)

To write the ```text blocks anew: PSMC_PIN=1 pytest tests/test_docs.py, and read what it wrote.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from psmc import pipeline
from psmc.algebra.prover import prove
from psmc.algebra.report import diagnostic_for
from psmc.algebra.verdict import Proved
from psmc.derive.lifting import lifted
from psmc.diagnostics import PsmcError
from psmc.diagnostics.catalogue import CATALOGUE
from psmc.frontend.psm import parse, read
from psmc.frontend.resolve import resolve
from psmc.ir import Block as IRBlock
from psmc.ir.ops import OPS, REDUCTIONS

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PIN = bool(os.environ.get("PSMC_PIN"))
FENCE = re.compile(r"^```(?P<info>[a-z][^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Fenced:
    """A block of a page: language, the rest of the info string, the text, its line, and where the text lies."""

    language: str
    rest: str
    text: str
    line: int
    start: int
    end: int

    @property
    def name(self) -> str:
        return self.rest if self.rest.endswith(".psm") else "spec.psm"


def fenced(page: str) -> list[Fenced]:
    out = []
    for found in FENCE.finditer(page):
        language, _, rest = found["info"].partition(" ")
        line = page.count("\n", 0, found.start()) + 2
        out.append(Fenced(language, rest.strip(), found["text"], line, *found.span("text")))
    return out


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def check_spec(name: str) -> str:
    """The diagnostics of a file of the current directory, or nothing."""
    try:
        file = parse(read(name))
        for declared in resolve(file, load=lambda path, span: parse(read(path))):
            agg = lifted(declared)
            proof = prove(agg) if agg.combine is not None else None
            found = diagnostic_for(agg, proof) if proof is not None else None
            if found is not None:
                raise PsmcError(found)
            if agg.claim == "yes":
                assert isinstance(agg.combine, IRBlock) and proof is not None
                assert isinstance(proof.associativity, Proved) and isinstance(proof.identity, Proved)
    except PsmcError as error:
        return f"{error}\n"
    return ""


def run_python(block: Fenced, page: Path, names: dict[str, object]) -> str:
    """What the block prints."""
    file = f"<{name_of(page)}:{block.line}>"
    linecache.cache[file] = (len(block.text), None, block.text.splitlines(True), file)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(block.text, file, "exec"), names)  # documentation of this repository, not a user's text
    return said.getvalue()


def masked(text: str) -> str:
    """Without what differs from run to run: the seconds at the end of a row, spaces at the end of a line."""
    return re.sub(r"[ \t]+$", "", re.sub(r" +\d+\.\d\d$", " 0.00", text, flags=re.M), flags=re.M).strip() + "\n"


def run_console(block: Fenced, where: Path) -> None:
    """Each '$ psmc …' line is run in `where`; what it prints is compared, both streams in order of time."""
    parts = re.split(r"^\$ (.*)\n", block.text, flags=re.M)
    assert not parts[0].strip(), "a console block begins with a command"
    for command, expected in zip(parts[1::2], parts[2::2], strict=True):
        words = shlex.split(command, comments=True)
        if not words or words[0] != "psmc":
            continue
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=where, env=environment, text=True, timeout=120, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        pattern = re.escape(masked(expected)).replace(re.escape("...\n"), r"(?:.*\n)*?")
        assert re.fullmatch(pattern, masked(done.stdout)), f"$ {command}\n{done.stdout}\n--- expected\n{expected}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the examples, as in a checkout."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # what a page compiles, it imports
    monkeypatch.setenv("PSMC_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page(page: Path, here: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = fenced(text)
    names: dict[str, object] = {"__name__": "__docs__"}
    pinned: list[tuple[Fenced, str]] = []
    for block, following in zip(blocks, [*blocks[1:], None][: len(blocks)], strict=True):
        where = f"{name_of(page)}:{block.line}"
        said: str | None = None
        if block.language == "psm":
            (here / block.name).write_text(block.text, encoding="utf-8")
            said = check_spec(block.name)
            assert bool(said) == (block.rest == "error"), f"{where}:\n{said}"
        elif block.language == "python":
            said = run_python(block, page, names)
        elif block.language == "console":
            run_console(block, here)
        if said is not None and following is not None and following.language == "text":
            if PIN:
                pinned.append((following, said))
            else:
                assert said == following.text, f"{where}:\n{said}"
        else:
            assert not said, f"{where}: a ```text block should follow:\n{said}"
    for target, said in reversed(pinned):
        text = text[: target.start] + said + text[target.end :]
    if PIN:
        page.write_text(text, encoding="utf-8")


def test_readme_lists_each_example_under_its_plan() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \|[^|]*\|[^|]*\| ([\w, ]+) \|$", text, re.M)
    listed = {name: plan for plan, names in rows[1:] for name in names.split(", ")}
    found = {}
    for path in sorted((ROOT / "examples").glob("*.psm")):
        if not path.stem.endswith("_recurrence"):
            found |= {c.declared.name: c.plan.name for c in pipeline.read(path)}
    assert listed == found


def test_language_names_every_operator() -> None:
    text = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    for name, info in OPS.items():
        assert f"`{info.symbol or name}" in text or name == "neg", name
    for name in REDUCTIONS:
        assert f"`{name}[i]`" in text, name


def test_codes_and_files_that_pages_name_exist() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        unknown = set(re.findall(r"\bPSM\d{3}\b", text)) - CATALOGUE.keys() - runtime_codes()
        assert not unknown, f"{name_of(page)}: {sorted(unknown)}"
        prose = FENCE.sub("", text)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{name_of(page)}: {target}"
        for path in re.findall(r"`((?:psmc|grammar|templates|tests|examples|benchmarks|docs)/[\w./-]+)`", prose):
            assert (ROOT / path).exists(), f"{name_of(page)}: {path}"


def runtime_codes() -> set[str]:
    """Codes that generated modules print: they import no catalogue."""
    texts = (p.read_text(encoding="utf-8") for p in (ROOT / "psmc" / "runtime").glob("*.py"))
    return {code for text in texts for code in re.findall(r"PSM\d{3}", text)}


def test_decisions_are_numbered() -> None:
    numbers = [p.name[:3] for p in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    assert numbers == [f"{n:03}" for n in range(1, len(numbers) + 1)]


def test_anchors() -> None:
    """Links within a page lead to a heading."""
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        headings = re.findall(r"^#+ (.*)$", text, re.M)
        known = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
        for anchor in re.findall(r"\]\(#([^)]+)\)", text):
            assert anchor in known, f"{name_of(page)}: #{anchor}"


