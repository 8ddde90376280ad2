"""The duality test passes what is right, and fails what is wrong, wherever it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import psmc
from psmc.cli import app
from psmc.duality import Setting, count, duality
from psmc.duality.compare import distances
from psmc.duality.draw import Draw
from psmc.frontend.psm import parse
from psmc.frontend.resolve import resolve
from psmc.source import SourceFile

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = Setting(dtypes=("fp32",), lengths=(1, 7), data=("hard",))
# One of each kind: a matrix state, complex, infinities, prev, ints, a tree, a left fold, a start that counts.
KINDS = ("gla", "lru", "softmax_average", "rwkv6", "s5_word", "segmented_sum", "pr_lstm", "elman", "viterbi_recurrence")
TAPPED = """
aggregator tapped {
  input x, g in (-inf, 0]
  state a = 1, h = 0
  lift { a = exp(g); h = x + x{-2} / 2 }
  combine (l, r) { a = l.a * r.a; h = r.a * l.h + r.h }
  output y = h + prev.h
  associative: yes
}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSMC_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


def spec(text: str):
    (agg,) = resolve(parse(SourceFile("t.psm", text)))
    return agg


@pytest.mark.parametrize("name", KINDS)
def test_examples_pass(name: str) -> None:
    rows = list(duality(psmc.load(EXAMPLES / f"{name}.psm"), SMALL))
    assert [r for r in rows if not r.passed] == []
    tree = [] if name in ("pr_lstm", "elman") else ["tree"]
    assert [r.path for r in rows if r.length == 7] == ["scan", "steps", "segments", *tree, "flags", "packed"]
    assert all(r.gradients or name == "s5_word" for r in rows)


def test_taps_bf16_and_fp64(tmp_path: Path) -> None:
    (tmp_path / "t.psm").write_text(TAPPED)
    agg = psmc.load(tmp_path / "t.psm")
    rows = list(duality(agg, Setting(dtypes=("bf16", "fp64"), lengths=(2, 5))))
    assert all(r.passed for r in rows) and len(rows) == 2 * 2 * 2 * 6
    assert max(r.outputs for r in rows if r.dtype == "fp64") < 1e-13
    assert any("initial x_tail" in r.gradients for r in rows)
    assert 1e-4 < max(r.outputs for r in rows if r.dtype == "bf16") < 2e-2


# --- what is broken is found ----------------------------------------------------------------------


def broken(agg: Any, **rules: Callable[..., Any]) -> Any:
    """A copy of an aggregator with other rules."""
    fresh = agg.module.Aggregator(agg.spec, SimpleNamespace(**{**vars(agg.rules), **rules}), fold=agg.fold_order)
    fresh.declared, fresh.reference = agg.declared, agg.reference
    return fresh


def failing(agg: Any, setting: Setting = SMALL) -> set[str]:
    return {row.path for row in duality(agg, setting) if not row.passed}


def test_a_wrong_combine_is_found() -> None:
    agg = psmc.load(EXAMPLES / "mingru.psm")
    combine = agg.rules.combine

    def wrong(l, r, p, n):
        found = combine(l, r, p, n)
        return {**found, "h": found["h"] * (1 + 1e-3)}

    assert failing(agg) == set()
    assert "tree" in failing(broken(agg, combine=wrong)), "a short scan may do with `advance` alone"
    assert failing(broken(agg, combine=wrong), replace(SMALL, lengths=(150,))) >= {"scan", "tree"}


def test_a_wrong_advance_is_found() -> None:
    agg = psmc.load(EXAMPLES / "mingru.psm")
    advance = agg.rules.advance
    found = failing(broken(agg, advance=lambda *a: {k: v * 1.001 for k, v in advance(*a).items()}))
    assert found >= {"scan", "steps", "segments"}


def test_a_wrong_step_is_found() -> None:
    agg = psmc.load(EXAMPLES / "mingru.psm")
    step = agg.step
    agg.step = lambda state, **x: (lambda out, after: (out, {"h": after["h"] * 1.001}))(*step(state, **x))
    try:
        assert failing(agg) == {"steps"}
    finally:
        del agg.step


@pytest.mark.parametrize("part", ["input", "initial"])
def test_a_lost_gradient_is_found(part: str) -> None:
    """As in torch's pointwise associative_scan: outputs are right, the gradient of the gate is 0."""
    agg = psmc.load(EXAMPLES / "mingru.psm")

    class Losing:
        spec, rules, fold_order, declared, reference = agg.spec, agg.rules, agg.fold_order, agg.declared, agg.reference
        step = staticmethod(agg.step)

        def __call__(self, z, x, initial_state=None, **flags):
            if part == "input":
                return agg(z.detach(), x, initial_state=initial_state, **flags)
            state = None if initial_state is None else {k: v.detach() for k, v in initial_state.items()}
            return agg(z, x, initial_state=state, **flags)

    rows = [r for r in duality(Losing(), SMALL) if not r.passed]
    assert {"scan", "flags"} <= {r.path for r in rows} <= {"scan", "segments", "flags", "packed"}
    lost = "z" if part == "input" else "initial h"
    assert all(r.outputs < 1e-5 and r.gradients[lost] > 1e-3 for r in rows)


def test_a_look_ahead_is_found() -> None:
    agg = psmc.load(EXAMPLES / "cumsum.psm")

    class Peeking:
        spec, rules, fold_order, declared, reference = agg.spec, agg.rules, agg.fold_order, agg.declared, agg.reference
        step = staticmethod(agg.step)

        def __call__(self, x, **flags):
            out, state = agg(x, **flags)
            return out + 1e-9 * x.sum(1, keepdim=True), state

    assert any(r.causal is False for r in duality(Peeking(), SMALL))


def test_a_mask_that_is_ignored_is_found() -> None:
    agg = psmc.load(EXAMPLES / "cumsum.psm")

    class Careless:
        spec, rules, fold_order, declared, reference = agg.spec, agg.rules, agg.fold_order, agg.declared, agg.reference
        step = staticmethod(agg.step)

        def __call__(self, x, mask=None, **flags):
            return agg(x, **flags)

    assert {r.path for r in duality(Careless(), SMALL) if not r.passed} == {"flags"}


# --- drawing and comparing ------------------------------------------------------------------------

DOMAINS = """
aggregator domains {
  dim N
  input a in [0, 1), b in (0, inf), c in (-inf, -2], d in (-1, 1), e, f[N], m : int in [1, 3], z[N] : complex
  input big in [100, inf)
  state s = 0
  lift { s = a }
  combine (l, r) { s = l.s + r.s }
  associative: yes
}
"""


@pytest.mark.parametrize("data", ["mild", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_lie_in_their_intervals_after_rounding(data: Any, dtype: torch.dtype) -> None:
    x = Draw(spec(DOMAINS), {}, (3,), 0, data).inputs(4, 500)
    r = {k: v.to(dtype) if v.is_floating_point() else v for k, v in x.items()}
    assert r["a"].min() >= 0 and r["a"].max() < 1 and r["b"].min() > 0 and r["c"].max() <= -2
    assert r["d"].abs().max() < 1 and set(x["m"].unique().tolist()) == {1, 2, 3} and r["big"].min() >= 100
    assert x["f"].shape == (4, 500, 3, 4) and x["z"].is_complex() and all(torch.isfinite(v).all() for v in r.values())
    if data == "hard":
        assert (x["a"] == 0).any() and (x["c"] == -2).any(), "closed ends are met"
        assert x["b"].min() < 3e-3 and x["b"].max() > 30
        near = torch.nn.functional.cosine_similarity(x["f"][:, :-1], x["f"][:, 1:], dim=-1)
        assert near.mean() > 0.8, "keys repeat"


def test_positions_lie_in_their_dim() -> None:
    agg = spec(
        "aggregator w { dim N input p[N] : int state q[N] : int = iota lift { q[i] = p[i] }"
        " combine (l, r) { q[i] = r.q[l.q[i]] } associative: yes }"
    )
    p = Draw(agg, {"N": 6}, (), 0, "hard").inputs(2, 50)["p"]
    assert p.shape == (2, 50, 6) and p.min() >= 0 and p.max() < 6


def test_distances() -> None:
    right = torch.tensor([[1.0, 2.0, 1e6]])
    left = right + torch.tensor([[0.0, 0.2, 0.0]])
    assert distances({"y": left}, {"y": right}, {"y": right}, True)["y"] == pytest.approx(0.1)
    assert distances({"y": left}, {"y": right}, {"y": right}, False)["y"] == pytest.approx(2e-7)
    inf = torch.tensor([[1.0, float("inf"), float("nan")]])
    assert distances({"y": inf}, {"y": inf}, {"y": inf}, True)["y"] == 0
    assert distances({"y": inf}, {"y": right}, {"y": right}, True)["y"] == float("inf")
    assert distances({"y": right}, {"y": inf}, {"y": inf}, True)["y"] == float("inf")
    ints = torch.tensor([[1, 2]])
    assert distances({"y": ints}, {"y": ints + 1}, {"y": ints}, True)["y"] == float("inf")
    assert distances({"y": right[:, :2]}, {"y": right}, {"y": right}, True)["y"] == float("inf")
    zero = torch.zeros(1, 3)
    assert distances({"a": zero, "b": right}, {"a": zero, "b": right}, {"a": zero, "b": right}, True)["a"] == 0


# --- the command ----------------------------------------------------------------------------------


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["test", str(EXAMPLES / "gla.psm"), "--dtype", "fp32", "-T", "1,5", "--dim", "K=2", "--lanes", "2,1"]
    assert app.run(argv) == 0
    out = capsys.readouterr().out
    assert "PASS" in out and "FAIL" not in out and "reassociation" in out
    assert app.run([*argv, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["passed"] and result["aggregator"] == "gla" and len(result["rows"]) == 2 * (4 + 6)
    assert result["rows"][0]["gradients"].keys() == {"q", "k", "v", "g", "initial S"}


def test_the_command_fails_where_the_test_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from psmc import api

    realise = api.realise

    def wrong(compilation, extern=None):
        agg = realise(compilation, extern)
        combine = agg.rules.combine
        return broken(agg, combine=lambda *a: {k: 1.01 * v for k, v in combine(*a).items()})

    monkeypatch.setattr(api, "realise", wrong)
    assert app.run(["test", str(EXAMPLES / "ema.psm"), "-T", "9"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "PASS 6" not in out and "outputs differ by" in out


def test_the_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["test", str(EXAMPLES / "wrong" / "leaky.psm")]) == 1
    assert app.run(["test", str(EXAMPLES / "transformer_psm.psm")]) == 1
    if not torch.cuda.is_available():
        assert app.run(["test", str(EXAMPLES / "ema.psm"), "--device", "cuda"]) == 2
    err = capsys.readouterr().err
    assert "PSM301" in err and "PSM292" in err
    assert count(Setting()) == 2 * 3 * 2
