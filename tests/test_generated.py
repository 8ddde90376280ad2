"""generated/ holds what the compiler writes now, whatever the hash seed; regenerate as generated/README.md says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATED = ROOT / "generated"
MODULES = sorted(GENERATED.glob("*.py"))
SPECS = [ROOT / "examples" / f"{m.stem}.psm" for m in MODULES]
PLANS = {"chunked", "general", "left", "pointwise", "tree"}


@pytest.fixture(scope="module", params=["0", "4711"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them, compiled anew in a process of its own."""
    out = tmp_path_factory.mktemp(f"seed{request.param}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": request.param}
    argv = [sys.executable, "-m", "psmc", "compile", *map(str, SPECS), "-o", str(out)]
    ran = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=out)
    assert ran.returncode == 0, ran.stderr
    return out


def test_directories_are_the_same(compiled: Path) -> None:
    assert sorted(p.name for p in compiled.iterdir()) == [m.name for m in MODULES]
    stale = [
        m.name for m in MODULES if m.read_text(encoding="utf-8") != (compiled / m.name).read_text(encoding="utf-8")
    ]
    assert not stale, f"{', '.join(stale)} differ: regenerate as generated/README.md says, and read the diff"


def test_they_span_the_plans() -> None:
    plans = {re.search(r"^Plan: (\w+)", m.read_text(encoding="utf-8"), re.M)[1] for m in MODULES}
    assert plans >= PLANS and len(MODULES) >= 8


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.stem)
def test_they_are_standalone_and_say_where_they_come_from(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    tree = ast.parse(text)
    roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert roots - {"__future__", "torch", "triton"} <= set(sys.stdlib_module_names)
    doc = ast.get_docstring(tree)
    assert f"aggregator {module.stem} {{" in doc and f"regenerate with: psmc compile {module.stem}.psm" in doc
    assert not re.search(r"/home/|/root/|/tmp/|/work/|\b20[2-9]\d-\d\d-\d\d\b", text), "no paths, no dates"


def test_readme_names_them() -> None:
    readme = (GENERATED / "README.md").read_text(encoding="utf-8")
    (names,) = re.findall(r"psmc compile examples/\{([\w,]+)\}\.psm -o generated", readme)
    assert sorted(names.split(",")) == [m.stem for m in MODULES]
