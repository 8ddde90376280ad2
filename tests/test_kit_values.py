"""Values that the border checks where it is asked to: intervals, finite numbers, offsets, rows of a state."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from psmc.pipeline import read_text
from psmc.runtime.kit_values import checks_wanted
from psmc.runtime.load import load_module

TEXT = """
aggregator watched {
  dim K
  input x[K], g in (-inf, 0], b in (0, 1)
  input z : complex
  param w[K] in [-1, 1]
  state a in (0, 1] = 1, n in (0, inf) = 0, s[K] = 0
  lift { a = exp(g); n = b; s[i] = w[i] * x[i] }
  combine (l, r) { a = l.a * r.a; n = l.n + r.n; s[i] = r.a * l.s[i] + r.s[i] }
  output y[i] = s[i] / n + real(z), q = a
  associative: yes
}"""
TREE = """
aggregator folded {
  input x in (-2, 2)
  state s = 0
  lift { s = x }
  combine (l, r) { s = sin(l.s) + r.s }
  output y = s
  associative: no
}"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    os.environ["PSMC_CACHE_DIR"], before = str(tmp_path_factory.mktemp("cache")), os.environ.get("PSMC_CACHE_DIR")
    found = {name: load_module(name, read_text(text)[0].text) for name, text in (("watched", TEXT), ("folded", TREE))}
    os.environ.pop("PSMC_CACHE_DIR") if before is None else os.environ.update(PSMC_CACHE_DIR=before)
    return found


@pytest.fixture
def agg(modules):
    found = modules["watched"].watched
    found.checks = True
    yield found
    found.checks = False


def given(batch: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, 3, generator=made)
    g, b = -torch.rand(batch, length, generator=made), torch.rand(batch, length, generator=made) * 0.8 + 0.1
    return {"x": x, "g": g, "b": b, "z": torch.randn(batch, length, dtype=torch.complex64), "w": torch.rand(3)}


CASES = [
    ("x", (1, 2, 0), float("nan"), r"PSM608: watched: 'x'\[1, 2, 0\] is nan\."),
    ("x", (1, 2, 0), float("inf"), r"'x'\[1, 2, 0\] is inf, but it must be finite\."),
    ("g", (0, 3), 0.25, r"'g'\[0, 3\] is 0\.25, outside of its interval \(-inf, 0\]\."),
    ("g", (0, 3), float("-inf"), r"'g'\[0, 3\] is -inf, but it must be finite\."),
    ("b", (1, 4), 0.0, r"'b'\[1, 4\] is 0\.0, outside of its interval \(0, 1\)\."),
    ("b", (1, 4), 1.0, r"'b'\[1, 4\] is 1\.0, outside of its interval \(0, 1\)\."),
    ("w", (2,), -1.5, r"'w'\[2\] is -1\.5, outside of its interval \[-1, 1\]\."),
    ("z", (0, 0), complex(0, float("nan")), r"'z'\[0, 0\] is nanj\."),
]


@pytest.mark.parametrize("name, at, value, message", CASES)
def test_a_value_that_was_ruled_out_is_named(agg, name, at, value, message) -> None:
    tensors = given()
    agg(**tensors)
    tensors[name][at] = value
    with pytest.raises(ValueError, match=message):
        agg(**tensors)
    agg.checks = False
    agg(**tensors)


def test_bounds_that_are_included_may_be_reached(agg) -> None:
    tensors = given()
    tensors["g"][0, 0], tensors["w"][0], tensors["w"][1] = 0.0, -1.0, 1.0
    agg(**tensors)


def test_masked_tokens_may_hold_anything(agg) -> None:
    tensors = given()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2], mask[0, 4] = False, False
    tensors["x"][1, 2], tensors["b"][0, 4] = float("nan"), 7.0
    agg(**tensors, mask=mask)
    mask[0, 4] = True
    with pytest.raises(ValueError, match=r"'b'\[0, 4\] is 7\.0"):
        agg(**tensors, mask=mask)


def test_steps_states_and_rows(agg) -> None:
    tensors = given()
    token = {k: v if k == "w" else v[:, 0] for k, v in tensors.items()}
    _, state = agg(**tensors, return_state=True)
    start = agg.init_state(2, (), K=3)
    agg.step(start, **token)  # its 'n' is 0, outside of its interval: what a sequence starts from
    agg.step_({k: v.clone() for k, v in state.items()}, **token, slots=torch.tensor([1, 0]))
    wrong = {(0, 2): r"slots\[1\] is 2, but the state has 2 rows", (1, 1): r"slots\[1\] is 1, as slots\[0\]"}
    for slots, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            agg.step_(state, **token, slots=torch.tensor(slots))
    for name, value in (("n", -1.0), ("n", float("nan")), ("a", 1.5)):
        bad = {k: v.clone() for k, v in state.items()}
        bad[name][1] = value
        with pytest.raises(ValueError, match=rf"state '{name}'\[1\] is {value}"):
            agg.step(bad, **token)
        with pytest.raises(ValueError, match=rf"state '{name}'\[1\] is {value}"):
            agg(**tensors, initial_state=bad)
    with pytest.raises(ValueError, match=r"'b'\[1\] is 3\.0"):
        agg.step(state, **{**token, "b": torch.tensor([0.5, 3.0])})


def test_what_comes_out_is_looked_at(modules) -> None:
    """An input without an interval makes what is not a number: 0 / 0."""
    rules = "lift { s = x } combine (l, r) { s = l.s + r.s } output y = x / s associative: yes"
    text = f"aggregator bare {{ input x state s = 0 {rules} }}"
    agg = load_module("bare_quotient", read_text(text)[0].text).bare
    agg.checks = True
    with pytest.raises(ValueError, match=r"output 'y'\[0, 0\] is nan"):
        agg(torch.zeros(1, 3))


def test_offsets_are_read_on_any_device(agg) -> None:
    tensors = given(1)
    agg(**tensors, cu_seqlens=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="PSM606"):
        agg(**tensors, cu_seqlens=torch.tensor([0, 4, 2, 5]))


def test_a_tree(modules) -> None:
    agg = modules["folded"].folded
    agg.checks = True
    try:
        x = torch.linspace(-1.9, 1.9, 6)[None]
        _, state = agg(x, return_state=True)
        agg.step(state, x[:, 0])
        with pytest.raises(ValueError, match=r"'x'\[0, 5\] is 2\.0"):
            agg(torch.linspace(-1.9, 2.0, 6)[None])
    finally:
        agg.checks = False


def test_compiled_graphs_are_left_alone(agg) -> None:
    tensors = given()
    found = torch.compile(agg, backend="eager", fullgraph=True)(**tensors)
    torch.testing.assert_close(found, agg(**tensors))


@pytest.mark.parametrize("value, wanted", [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_switches_it_on(monkeypatch, value, wanted) -> None:
    monkeypatch.delenv("PSMC_CHECK", raising=False)
    if value is not None:
        monkeypatch.setenv("PSMC_CHECK", value)
    assert checks_wanted() is wanted


def test_a_module_on_its_own_reads_the_environment(modules) -> None:
    code = f"import runpy; print(runpy.run_path({modules['watched'].__file__!r})['watched'].checks)"
    env = {**os.environ, "PSMC_CHECK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
