"""The tasks: their data says what they claim, and each command runs, resumes and writes what it promises."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "examples" / "psm_tasks"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TASKS))


def run(script: Path, *args: str) -> str:
    command = [sys.executable, str(script), "--threads", "1", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout, done.stdout + done.stderr
    return done.stdout


def test_products_are_those_of_permutations(tasks: None) -> None:
    import s5

    table = s5.products()
    all_ = list(itertools.permutations(range(5)))
    assert table.shape == (120, 120) and sorted(table[7].tolist()) == list(range(120))
    tokens, states = s5.draw(table, 20, 9, torch.Generator().manual_seed(0))
    for row, products in zip(tokens.tolist(), states.tolist(), strict=True):
        things = tuple(range(5))
        for token, product in zip(row, products, strict=True):
            things = tuple(all_[token][i] for i in things)
            assert all_[product] == things


def test_recall_asks_for_what_was_said(tasks: None) -> None:
    import mqar

    o = Namespace(vocab=8192, pairs=8)
    tokens, targets = mqar.draw(o, 50, 128, torch.Generator().manual_seed(0))
    asked = targets != mqar.NOTHING
    assert (asked.sum(1) == 8).all() and not asked[:, :16].any()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        known = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(known) == 8 and max(known) < 4096 <= min(known.values())
        for token, value in zip(row[16:], wanted[16:], strict=True):
            assert (value == known[token]) if token in known else (value == mqar.NOTHING and token >= 4096)
    places = asked.nonzero()[:, 1].double()
    assert 60 < places.mean() < 83, "uniform between 16 and 128"


def test_text_is_split_and_coded(tasks: None, tmp_path: Path) -> None:
    from corpus import Bytes, Pairs, read

    text = (ROOT / "examples" / "demo" / "wikitext.txt").read_bytes()[:60_000]
    pairs = Pairs(text, 400)
    assert pairs.size == 400 and len(set(pairs.pieces)) == 400
    for coder in (Bytes(), pairs):
        tokens = coder.encode(text + b"\x00\xff new words: zyzzyva 12345")
        assert coder.decode(tokens.tolist()) == text + b"\x00\xff new words: zyzzyva 12345"
        assert int(tokens.min()) >= 0 and int(tokens.max()) < coder.size
    assert len(pairs.encode(text)) < 0.7 * len(text)
    # The most frequent pair came first: counted by hand
    words = [w for w in Pairs.WORDS.findall(text) if len(w) > 1]
    counts: dict[bytes, int] = {}
    for word in words:
        for at in range(len(word) - 1):
            counts[word[at : at + 2]] = counts.get(word[at : at + 2], 0) + 1
    assert counts[pairs.pieces[256]] == max(counts.values())

    for n in range(60):
        (tmp_path / f"p{n}").mkdir()
        (tmp_path / f"p{n}" / "a.py").write_text(f"x = {n}\n")
        (tmp_path / f"p{n}" / "b.bin").write_text("no text")
    train, held = read(tmp_path, None, 10**6)
    assert sorted((train + held).split(b"\n")[:-1]) == sorted(b"x = %d" % n for n in range(60)) and held
    assert not set(train.split()) & set(held.split()) - {b"x", b"="}
    (tmp_path / "one.txt").write_bytes(bytes(range(100)))
    train, held = read(tmp_path / "one.txt", None, 10**6)
    assert (train, held) == (bytes(range(90)), bytes(range(90, 100)))


@pytest.mark.parametrize("name", ["s5", "mqar", "lm"])
def test_smoke(name: str, tmp_path: Path) -> None:
    models = {"s5": ["psm", "mamba2"], "mqar": ["psm-32", "gla"], "lm": ["psm-32", "gpt"]}[name]
    args = ["--smoke", "--device", "cpu", "--out", str(tmp_path), "--models", *models]
    first = run(TASKS / f"{name}.py", *args, *(["--vocab", "300"] if name == "lm" else []))
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert [row["model"] for row in found["rows"]] == models and "results:" in first
    assert all(row["tokens"] > 0 and row["parameters"] > 0 for row in found["rows"])
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_resuming_is_going_on(tasks: None, tmp_path: Path) -> None:
    """Interrupted behind a checkpoint and resumed: the same weights, bit for bit, as in one go."""
    from common import Training

    options = Namespace(decay=0.01, rate=1e-2, out=tmp_path, task="t.py", resume=True, steps=12, minutes=1e9)

    def train(name: str, stop: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        training = Training(name, model, options, torch.device("cpu"))

        def batch(step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            training.tokens += 8
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        training.run(batch, lambda: {"score": 1.0}, 5)
        assert training.step == 12 and training.tokens == 96 and [h["step"] for h in training.history] == [5, 10, 12]
        return model.state_dict()

    whole = train("whole", None)
    with pytest.raises(KeyboardInterrupt):
        train("parts", 7)
    parts = train("parts", None)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
