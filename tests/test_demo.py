"""The demo's measures are right, and the demo runs: a few steps of it, on a table of two specs."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(DEMO))
    import training

    return training


def test_bigram_entropy(training) -> None:  # type: ignore[no-untyped-def]
    """After 'a' come 'a' and 'b' alike, after 'b' always 'a'."""
    text = torch.tensor(list(b"aabaab" * 2000 + b"a"))
    assert training.bigram_entropy(text) == pytest.approx(2 / 3, abs=1e-3)
    assert training.bigram_entropy(torch.tensor(list(b"ab" * 100))) == 0
    noise = torch.randint(4, (400_000,), generator=torch.Generator().manual_seed(0))
    assert training.bigram_entropy(noise) == pytest.approx(2, abs=1e-3)


class Fixed(nn.Module):
    """Predicts the byte that it was given, with certainty `odds`."""

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.one_hot(tokens, 256).float() * math.log(255)


def test_bits_per_byte(training) -> None:  # type: ignore[no-untyped-def]
    same = torch.full((2000,), 65)
    assert training.bits_per_byte(Fixed(), same) == pytest.approx(1)  # e^log(255) against 255 others: one half
    changing = torch.tensor([65, 66] * 1000)
    assert training.bits_per_byte(Fixed(), changing) == pytest.approx(math.log2(510))


def test_the_tour(tmp_path: Path) -> None:
    specs = tmp_path / "specs"
    specs.mkdir()
    for name in ("mingru", "gla"):
        shutil.copy(ROOT / "examples" / f"{name}.psm", specs)
    command = [sys.executable, str(DEMO / "demo.py"), "--steps", "12", "--out", str(tmp_path / "out")]
    command += ["--specs", str(specs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    everything = done.stdout + done.stderr
    assert "Traceback" not in everything and "Warning" not in everything, everything

    assert done.stdout.count("proved") == 5, everything  # four laws in the table, one in a headline
    assert "PSM301" in everything and "(a∘b)∘c gives" in everything
    measured = re.search(r"held-out text: ([\d.]+) bits per byte, its bigram entropy: ([\d.]+)", done.stdout)
    assert measured is not None, everything
    bits, bar = map(float, measured.groups())
    assert 3.2 < bar < 3.3 and bits < 7, "a dozen steps already learn the frequencies of bytes"
    assert done.returncode == int(bits >= bar), everything
    assert float(re.findall(r"differ by at most ([\d.e+-]+)", done.stdout)[0]) < 1e-4
    assert (tmp_path / "out" / "mingru.py").stat().st_size > 1000
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_shipped_plot_and_text() -> None:
    assert (ROOT / "docs" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "Wikipedia" in (DEMO / "NOTICE.md").read_text(encoding="utf-8")
    assert len((DEMO / "wikitext.txt").read_bytes()) > 300_000
