"""Numeric evidence: for rules that nothing can be proved of, and said to be no more than that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import psmc
from psmc.cli import app

SPEC = """aggregator blocks {
  dim C, D
  input x[C, D]
  state s[C, D] = 0
  lift { s[c, d] = x[c, d] }
  combine extern
  output o[c, d] = prev.s[c, d]
  associative: assume
}
"""
RULES = """import torch
torch.manual_seed(0)
linear = torch.nn.Linear(16, 8)
def join(l, r): return {"s": torch.tanh(linear(torch.cat([l["s"], r["s"]], -1)))}
def plus(l, r): return {"s": l["s"] + r["s"]}
def breaks(l, r): raise KeyError("no such weight")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "blocks.psm").write_text(SPEC)
    (tmp_path / "rules.py").write_text(RULES)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]):
    def test(rule: str, *more: str) -> tuple[int, str]:
        code = app.run(["test", str(folder / "blocks.psm"), "--extern", str(folder / rule), "-T", "7", *more])
        seen = capsys.readouterr()
        assert "Traceback" not in seen.out + seen.err
        return code, seen.out + seen.err

    return test


def test_of_rules(folder: Path) -> None:
    sound = psmc.load(folder / "blocks.psm", extern=lambda l, r: {"s": l["s"] + r["s"]}).evidence()
    assert sound.associative and sound.identity and sound.dtype == "fp32" and "numeric evidence only" in str(sound)
    wrong = psmc.load(folder / "blocks.psm", extern=lambda l, r: {"s": l["s"] - r["s"]}).evidence()
    assert not wrong.associative and wrong.associativity > 0.1 and wrong.component == "s"
    assert wrong.left_identity > 0.1 and wrong.right_identity == 0


@pytest.mark.parametrize("name", ["gla", "welford", "viterbi", "s5_word", "lru", "mlstm"])
def test_agrees_with_the_prover(name: str) -> None:
    found = psmc.load(Path(__file__).parent.parent / "examples" / f"{name}.psm").evidence()
    assert found.associative and found.identity and found.dtype == "fp64"


def test_on_the_command_line(run) -> None:
    code, said = run("rules.py:plus")
    assert code == 0 and "numeric evidence only" in said and "prove" not in said.lower()
    code, said = run("rules.py:join", "--dim", "D=8", "--dtype", "fp32")
    assert code == 1 and "DIFFER" in said
    code, said = run("rules.py:plus", "--json")
    assert code == 0 and json.loads(said)["results"][0]["evidence"]["associativity"] < 1e-5


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("rules.py:breaks", "no such weight"),
        ("rules.py:jion", "did you mean"),
        ("rules.py:linaer", "did you mean"),
        ("ruels.py:join", "rules.py"),
        ("rules.py", "FILE.py:NAME"),
    ],
)
def test_mistakes(run, rule: str, text: str) -> None:
    code, said = run(rule)
    assert code in (1, 2) and text in said
