"""Benchmarks run on any machine in sizes that measure nothing; what holds them together survives what they run into."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import accuracy, campaign, chunked, cold, decode, jobs, pointwise, training  # noqa: E402
from benchmarks.chunk_data import CHUNKED, KINDS, PARAMS, SPECS, Shape, inputs, load  # noqa: E402
from benchmarks.chunk_peers import PEERS, prepared, token  # noqa: E402
from benchmarks.reference_mixers import SCANS, Reference  # noqa: E402

# A process of cells, by the protocol that `serve` speaks: what a cell says is what happens to it.
SCRIPT = """
import json, os, sys, time
def tell(**what): print("\\x1e" + json.dumps(what), flush=True)
for cell in json.loads(sys.argv[-1]):
    n = cell["n"]
    if cell["do"] == "dies": os._exit(9)
    if cell["do"] == "hangs": time.sleep(60)
    if cell["do"] == "fails": tell(failed="no such kernel")
    else: tell(row={"spec": "a", "shape": str(n), "ms": float(n)})
    tell(done=True)
    if cell["do"] == "loses": os._exit(75)
"""


def failed(cell: jobs.Cell, why: str) -> list[dict[str, Any]]:
    return [{"spec": "a", "shape": str(cell["n"]), "error": why}]


def group(*what: str, limit: float = 30.0) -> jobs.Group:
    return jobs.Group("g", tuple({"n": n, "do": do} for n, do in enumerate(what, 1)), limit)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "cells.py"
    path.write_text(SCRIPT)
    return str(path)


def test_a_cell_that_kills_its_process_costs_itself(script: str, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    results = jobs.Results(out, False)
    results.run(script, [group("runs", "dies", "fails", "loses", "runs")], failed)
    kept = json.loads(out.read_text())
    found = {r["shape"]: r.get("ms", r.get("error")) for r in kept["rows"]}
    assert found == {"1": 1.0, "2": "exit code 9: no words", "3": "no such kernel", "4": 4.0, "5": 5.0}
    assert results.exit_code == 0 and "incomplete" not in kept and len(kept["cells"]) == 5
    again = jobs.Results(out, True)
    again.run("no such script", [group("runs", "dies", "fails", "loses", "runs")], failed)
    assert again.sorted() == results.sorted(), "nothing is left to do"


def test_a_cell_that_hangs_is_ended_and_left_for_another_time(script: str, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    results = jobs.Results(out, False)
    results.run(script, [group("hangs", "runs", limit=2)], failed)
    kept = json.loads(out.read_text())
    assert [r.get("ms", r.get("error")) for r in kept["rows"]] == ["out of time (2 s)", 2.0]
    assert list(kept["incomplete"].values()) == ["out of time (2 s)"] and results.exit_code == 3
    later = jobs.Results(out, True)
    later.run(script, [group("hangs", "runs", limit=2)], failed, seconds=1)
    assert list(later.missing.values()) == ["no time left"]
    last = jobs.Results(out, True)
    last.late = set(later.missing)
    last.run(script, [group("hangs", "runs", limit=2)], failed)
    assert not last.missing and last.exit_code == 0, "what ran out of its time twice is not tried again"


def test_a_script_that_cannot_start_is_not_tried_for_ever(tmp_path: Path) -> None:
    results = jobs.Results(tmp_path / "r.json", False)
    results.run(str(tmp_path / "none.py"), [group(*["runs"] * 6)], failed)
    assert len(results.rows) == 6 and all("exit code 2" in r["error"] for r in results.sorted())


def test_rows_of_one_thing_are_joined(tmp_path: Path) -> None:
    results = jobs.Results(None, False)
    same = {"spec": "a", "shape": "s", "pass": "fwd"}
    results.blame(same | {"error": "lost", "peer_error": {"p": "slow"}})
    results.add(same | {"ms": 1.0})
    results.add(same | {"peers": {"p": 2.0}})
    results.add(same | {"peers": {"q": 3.0}})
    results.blame(same | {"error": "late", "peer_error": {"p": "late", "r": "late"}})
    assert results.sorted() == [same | {"ms": 1.0, "peers": {"p": 2.0, "q": 3.0}, "peer_error": {"r": "late"}}]
    (found,) = chunked.ratios([*results.sorted(), same | {"shape": "u", "ms": 4.0, "peers": {"p": 6.0}}])
    assert found["rows"] == 3 and found["geometric mean"] == pytest.approx(9 ** (1 / 3))
    assert (found["least"], found["least at"]) == (1.5, "a, u, p")


def test_what_a_cell_raises_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def handle(cell: jobs.Cell) -> Any:
        yield {"spec": "a"}
        raise ValueError("wrong\nshape")

    jobs.serve('[{"n": 1}]', handle)
    told = [json.loads(line[1:]) for line in capsys.readouterr().out.split("\n") if line.startswith("\x1e")]
    assert told[0] == {"row": {"spec": "a"}} and told[2] == {"done": True}
    assert told[1]["failed"].startswith("ValueError: wrong shape (test_benchmarks_smoke.py:")


# --- the measurements, a cell of each


def test_chunked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"copy": 1e9, "bfloat16": 1e12, "float32": 1e12}
    monkeypatch.setenv("PSMC_CHUNKED", json.dumps({"folder": str(tmp_path), "speeds": speeds}))
    shape = Shape(1, 40, 2, 16, 16, "float32", sequences=3)
    cell = {"spec": "gla", "side": "psmc", "shape": astuple(shape), "warm": False}
    forward, backward = chunked.handle(cell)
    assert forward["floor_ms"] == pytest.approx(40 * 2 * 80 * 4 / 1e6, rel=0.02) and forward["floor"] == "bytes"
    assert backward["pass"] == "fwd+bwd" and backward["ms"] > 0 and list(tmp_path.glob("gla_*.pt"))
    assert list(chunked.handle({**cell, "warm": True})) == []
    slow = chunked.floor(Shape(1, 1, 1, 1024, 1024), [], False, {"copy": 1e12, "bfloat16": 1e12})
    assert slow == {"floor_ms": 0.0042, "floor": "flops"}


@pytest.mark.parametrize(("name", "kind"), [("gla", "gates"), ("mamba2", "zeros"), ("retnet", "trained")])
def test_accuracy(name: str, kind: str) -> None:
    rows = list(accuracy.handle({"spec": name, "data": kind, "tiny": True}))
    assert all(r["ok"] for r in rows), rows
    assert {r["dtype"] for r in rows if r["pass"] == "fwd+bwd"} == {"bfloat16", "float32"}
    assert [r["not within bounds"] for r in accuracy.worst_rows(rows)] == ["none", "none"]
    rows[0]["gradient"] = float("nan")
    assert "nan" in accuracy.worst_rows(rows)[0]["gradient"], "what is not a number is the worst"


def test_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSMC_DECODE", json.dumps({"copy": 1e12}))
    rows = list(decode.handle({"spec": "gla", "side": "psmc", "tiny": True}))
    assert [r["what"] for r in rows] == list(decode.HOW) and all(r["ms"] > r["floor_ms"] for r in rows)


def test_training() -> None:
    cell = {"spec": "mamba2", "steps": 3, "rows": 2, "length": 24, "parameters": 50_000, "layers": 1, "rate": 1e-3,
            "text": str(ROOT / "examples/demo/wikitext.txt"), "held": ""}  # fmt: skip
    rows = [list(training.handle({**cell, "who": who}))[-1] for who in training.SIDES]
    (row,) = training.against(rows)
    assert row["within 0.5 %"] and row["last: psmc"] == pytest.approx(row["last: reference"], rel=1e-4)


def test_cold_and_pointwise(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = cold.handle({"spec": "gla", "what": "warm", "tiny": True})
    assert row["all_s"] >= row["load_s"] + row["forward_s"]
    monkeypatch.setenv("PSMC_COPY", "1e8")
    cells = [{"spec": s, "size": pointwise.TINY, "dtype": "float32", "who": "psmc"} for s in pointwise.STREAMS]
    rows = [row for cell in cells for row in pointwise.handle(cell)]
    assert len(rows) == 4 and len(pointwise.bytes_rows(rows)) == 2


# --- what they are made of


@pytest.mark.parametrize("name", SCANS)
def test_references_are_right(name: str) -> None:
    fixed = PARAMS.get(name, ())
    agg = load(name, Path())
    x = {k: t.double() for k, t in inputs(name, Shape(2, 77, 4, 16, 8, "float32"), "gates").items()}
    right = agg.reference({k: t for k, t in x.items() if k not in fixed}, {k: x[k] for k in fixed})[0]
    found = Reference(name, agg)(**{k: t.float() for k, t in x.items()})
    torch.testing.assert_close(found.double(), right[agg.spec.outputs[0].name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_data_fit_their_specs(name: str, tmp_path: Path) -> None:
    agg = load(name, tmp_path)
    for kind in KINDS:
        x = inputs(name, Shape(2, 9, 2, 8, 4), kind)
        assert {s.name for s in (*agg.spec.inputs, *agg.spec.params)} == x.keys()
        assert not any(t.isnan().any() for t in x.values())
    assert (name in PEERS) == (name in CHUNKED[:6] or name == "mlstm")
    assert token(name) is None or name in decode.SPECS
    if name == "mlstm":
        assert prepared(name, x)["q"].shape == (2, 2, 9, 8)


def test_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, code in {
        "right": "rows = [{'spec': 'a', 'ms': 2.0, 'floor_ms': 1.0, 'table': 't'}]",
        "wrong": "raise SystemExit('no')",
        "slow": "import time; time.sleep(60)",
    }.items():
        (tmp_path / f"{name}.py").write_text(
            f"import sys, json\nprint('here')\n{code}\n"
            "open(sys.argv[sys.argv.index('--out') + 1], 'w').write(json.dumps({'rows': rows}))"
        )
    topics = tuple(campaign.Topic(n, (str(tmp_path / f"{n}.py"),), n, 0.04, ()) for n in ("right", "wrong", "slow"))
    monkeypatch.setattr(campaign, "TOPICS", topics)
    monkeypatch.setattr(campaign, "GRACE", 1)
    monkeypatch.setattr(sys, "argv", ["campaign.py", "--out-dir", str(tmp_path / "out"), "--share", "2"])
    assert campaign.main() == 3
    states = json.loads((tmp_path / "out" / "campaign.json").read_text())
    assert {n: s["state"] for n, s in states.items()} == {"right": "done", "wrong": "failed", "slow": "partial"}
    said = capsys.readouterr().out
    assert "0.50 / 0.50 / 0.50" in said and "right: spec=a" in said and "table=t" in said
    assert (tmp_path / "out" / "wrong.log").read_text().count("here") == 1
    campaign.main()
    campaign.main()
    logs = {n: (tmp_path / "out" / f"{n}.log").read_text().count("here") for n in ("right", "wrong")}
    assert logs == {"right": 1, "wrong": 2}, "what is done is not done again, what fails is tried twice"


def test_every_topic_has_its_script_and_words() -> None:
    for topic in campaign.TOPICS:
        text = (ROOT / "benchmarks" / topic.words[0]).read_text()
        for flag in (*topic.flags, topic.smoke, *(w for w in topic.words[1:] if w.startswith("--"))):
            assert f'"{flag}"' in text or "options(__doc__)" in text, f"{topic.name}: {flag}"


def test_rounding(tmp_path: Path) -> None:
    """In a process of its own: triton must be imported with its interpreter on."""
    command = [sys.executable, "benchmarks/rounding.py", "--smoke", "--out", str(tmp_path / "rounding.json")]
    if not importlib.util.find_spec("triton"):
        pytest.skip("no triton")
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, check=True, capture_output=True)
    (row,) = json.loads((tmp_path / "rounding.json").read_text())["rows"]
    assert row["spec"] == "linear_attention" and row["output"] < 1e-2 and row["worst gradient"] in "qkv"
