"""The cache of generated modules: what several processes, a full disk or a damaged file make of it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import psmc
from psmc.runtime import cache

ROOT = Path(__file__).parent.parent
TEXT = """aggregator NAME {
  input x
  state s = 0
  lift { s = x }
  combine (l, r) { s = l.s + r.s }
  output y = s
  associative: yes
}"""
ONES = torch.ones(1, 3)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a spec of that name, which no other test has loaded into this process."""
    monkeypatch.setenv("PSMC_CACHE_DIR", str(tmp_path / "cache"))

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.psm"
        path.write_text(TEXT.replace("NAME", name))
        return path

    return write


def forget(name: str) -> None:
    """As a new process would be."""
    for key in [k for k in sys.modules if k.startswith(f"psmc_generated_{name}_")]:
        del sys.modules[key]


def test_a_second_load_takes_what_is_there(spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = spec("cached_once")
    assert psmc.load(path)(ONES).tolist() == [[1, 2, 3]]
    forget("cached_once")
    monkeypatch.setattr("psmc.pipeline.read", None)  # nothing is compiled again
    assert psmc.load(path)(ONES).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("damage", ["empty", "wrong", "cut", "latin"])
def test_a_damaged_module_is_written_again(spec, tmp_path: Path, damage: str) -> None:
    name = f"cached_{damage}"
    path = spec(name)
    psmc.load(path)
    (module,) = (tmp_path / "cache").glob(f"{name}_*.py")
    good = module.read_bytes()
    module.write_bytes(
        {"empty": b"", "wrong": b"x = (", "cut": good[: len(good) // 2], "latin": good + b"# \xe9"}[damage]
    )
    forget(name)
    assert psmc.load(path)(ONES).tolist() == [[1, 2, 3]]
    assert module.read_bytes() == good


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cached_index": 3}', '{"cached_index": "../../etc/passwd"}', "\0"])
def test_a_damaged_index_is_no_error(spec, tmp_path: Path, text: str) -> None:
    path = spec("cached_index")
    psmc.load(path)
    for index in (tmp_path / "cache" / "index").iterdir():
        index.write_text(text)
    forget("cached_index")
    assert psmc.load(path)(ONES).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_cache_that_cannot_be_written(spec, monkeypatch: pytest.MonkeyPatch, code: int, tmp_path: Path) -> None:
    path = spec(f"cached_nowhere_{code}")
    mkstemp = cache.tempfile.mkstemp

    def refused(dir: Path, **more: str):
        if Path(dir).is_relative_to(tmp_path):
            raise OSError(code, os.strerror(code), str(dir))
        return mkstemp(dir=dir, **more)

    monkeypatch.setattr(cache.tempfile, "mkstemp", refused)
    with pytest.warns(UserWarning, match=f"{os.strerror(code)}. PSMC_CACHE_DIR names another place"):
        found = psmc.load(path)
    assert found(ONES).tolist() == [[1, 2, 3]]
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert psmc.load(path)(ONES).tolist() == [[1, 2, 3]]  # the module is loaded


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.write_atomic(tmp_path / "module.py", "text")
    assert list(tmp_path.iterdir()) == []


def test_only_files_are_replaced(tmp_path: Path) -> None:
    """A pipe (or a device) is written to; a file keeps its mode."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)
    cache.write_atomic(pipe, "text")
    assert os.read(reader, 9) == b"text" and pipe.is_fifo()
    os.close(reader)
    private = tmp_path / "private.py"
    private.write_text("old")
    private.chmod(0o600)
    cache.write_atomic(private, "new")
    assert private.read_text() == "new" and private.stat().st_mode & 0o777 == 0o600


def test_pickled_models(spec, tmp_path: Path) -> None:
    """A model that holds an aggregator is saved whole, and read by another process."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model.scan = psmc.load(spec("cached_pickled"))
    torch.save(model, tmp_path / "model.pt")
    code = "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); print(m.scan(torch.ones(1, 3)).tolist())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout == "[[1.0, 2.0, 3.0]]\n", done.stderr[-2000:]


def test_processes_at_once(spec, tmp_path: Path) -> None:
    """Each loads the same spec from an empty cache, and writes the same file with `psmc compile`."""
    path = spec("cached_together")
    code = f"import psmc, torch; print(psmc.load({str(path)!r})(torch.ones(1, 3)).tolist())"
    command = [sys.executable, "-m", "psmc", "compile", str(path), "-o", str(tmp_path / "out.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for argv in ([sys.executable, "-c", code], command) * 2
    ]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * 4, said
    assert said[0] == said[2] == "[[1.0, 2.0, 3.0]]\n"
    (module,) = (tmp_path / "cache").glob("*.py")
    assert module.read_text() == (tmp_path / "out.py").read_text()
    assert not [p for p in tmp_path.rglob("*.tmp")]
