"""The wheel holds its data files and works where nothing of the checkout is, and where torch and triton are not."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = "import sys; sys.modules.update(dict.fromkeys(('torch', 'triton', 'numpy'), None))\n"


def run(*args: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline, with the hatchling that is installed."""
    out = tmp_path_factory.mktemp("dist")
    done = run("-m", "hatchling", "build", "-t", "wheel", "-d", str(out), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("psmc-*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a directory of its own."""
    target = tmp_path_factory.mktemp("site")
    done = run(
        "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-index", "--target", str(target),
        str(wheel), cwd=target,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "psmc").rglob("*.py")}
    grammar = {f"psmc/_grammar/{p.name}" for p in (ROOT / "grammar").iterdir()}
    templates = {
        f"psmc/_templates/{p.relative_to(ROOT / 'templates').as_posix()}"
        for p in (ROOT / "templates").rglob("*")
        if p.is_file()
    }
    assert grammar and templates
    assert modules | grammar | templates <= names, sorted((modules | grammar | templates) - names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    others = {n for n in names if not n.startswith("psmc/") and ".dist-info/" not in n}
    assert not others, f"does not belong into the wheel: {sorted(others)}"


def test_check_without_torch(site: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.psm").write_text((ROOT / "examples" / "gla.psm").read_text(encoding="utf-8"), encoding="utf-8")
    code = BLOCK + "import psmc; print(psmc.__file__)\nfrom psmc.cli import main; main(['check', 'spec.psm'])"
    done = run("-c", code, cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    where, *rest = done.stdout.splitlines()
    assert Path(where).is_relative_to(site), f"ran {where}, not the wheel"
    assert "proved" in "".join(rest)


def test_what_it_compiles_runs_without_it(site: Path, tmp_path: Path) -> None:
    """The installed command writes a module that needs torch alone."""
    (tmp_path / "spec.psm").write_text((ROOT / "examples" / "ema.psm").read_text(encoding="utf-8"), encoding="utf-8")
    command = BLOCK + "from psmc.cli import main; main(['compile', 'spec.psm', '-o', 'out.py'])"
    done = run("-c", command, cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    use = (
        "import sys; sys.modules.update(dict.fromkeys(('psmc', 'jinja2', 'lark'), None))\n"
        "import torch, out\n"
        "x = torch.randn(2, 7, 3, requires_grad=True)\n"
        "y = out.ema(x)\n"
        "y.sum().backward()\n"
        "print(tuple(y.shape), bool(x.grad.isfinite().all()))"
    )
    done = run("-c", use, cwd=tmp_path)
    assert done.stdout.strip() == "(2, 7, 3) True", done.stdout + done.stderr


def test_command(site: Path, tmp_path: Path) -> None:
    scripts = [p for p in (site / "bin", site / "Scripts") if p.is_dir()]
    (script,) = (p for folder in scripts for p in folder.iterdir() if p.stem == "psmc")
    done = run(str(script), "--version", cwd=tmp_path, path=site) if script.suffix != ".exe" else None
    assert done is None or done.stdout.startswith("psmc "), done.stdout + done.stderr
