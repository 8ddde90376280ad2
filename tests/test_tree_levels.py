"""at(c).S: the counter of a tree read level by level, against sums by hand, the oracle and itself token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import psmc
from psmc import reference
from psmc.pipeline import read, read_text

EXAMPLE = Path(__file__).parent.parent / "examples" / "log_linear_attention.psm"
# The decay of a memory since it was complete is that of the later, smaller ones.
DECAYED = """
aggregator decayed {
  dim K, V, L = 6
  input q[K], k[K], v[V], g in (-inf, 0], w[L]
  state a = 1, S[K, V] = 0
  lift { a = exp(g); S[i, j] = k[i] * v[j] }
  combine (l, r) { a = l.a * r.a; S[i, j] = r.a * l.S[i, j] + r.S[i, j] }
  output o[j] = sum[c] w[c] * (prod[m] where(m < c, at(m).a, 1)) * sum[i] q[i] * at(c).S[i, j]
  associative: no
}"""
# Both counters, the state, the inputs, in a rule whose order matters.
BOTH = """
aggregator both {
  dim D, L = 5
  input x[D], w[L]
  state h[D] = 2
  combine (l, r) { h[d] = tanh(l.h[d] - 2 * r.h[d]) }
  lift { h[d] = x[d] }
  output y[d] = h[d] + prev.h[d] + sum[c] w[c] * (at(c).h[d] - prev.at(c).h[d] * x[d])
  associative: no
}"""


def values(found, batch: int, length: int, lanes=(2,), seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    sizes = {d.name: d.size or 3 for d in found.agg.dims}
    drawn = {}
    for t in found.agg.leaf_inputs:
        x = torch.randn((batch, length, *lanes, *(sizes[d] for d in t.dims)), generator=made, dtype=torch.float64)
        drawn[t.name] = (-x.abs() if t.interval is not None and t.interval.hi == 0 else x).requires_grad_()
    return drawn


@pytest.mark.parametrize("length", [1, 2, 7, 8, 21])
def test_log_linear_attention_is_the_papers(length: int) -> None:
    """Equation 5, with the Fenwick partition of the tokens before t by the bits of t."""
    (found,) = read(EXAMPLE)
    agg, x = psmc.load(EXAMPLE), values(found, 2, length)
    rows = []
    for t in range(length):
        q, k, v = (x[n][:, : t + 1] for n in "qkv")
        row = x["own"][:, t, :, None] * (q[:, t] * k[:, t]).sum(-1, keepdim=True) * v[:, t]
        start = 0
        for c in reversed(range(t.bit_length())):
            if t >> c & 1:
                part = slice(start, start + (1 << c))
                scores = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, part])
                row = row + x["past"][:, t, :, c, None] * torch.einsum("bhs,bshv->bhv", scores, v[:, part])
                start += 1 << c
        assert start == t
        rows.append(row)
    torch.testing.assert_close(agg(**x), torch.stack(rows, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", [DECAYED, BOTH, EXAMPLE.read_text()], ids=["decayed", "both", "example"])
def test_outputs_and_gradients_are_the_oracles(text: str, tmp_path: Path) -> None:
    (found,) = read_text(text)
    (tmp_path / "spec.psm").write_text(text)
    agg, x = psmc.load(tmp_path / "spec.psm"), values(found, 2, 19)
    out = agg(**x)
    weights = torch.randn_like(out)
    found_grads = torch.autograd.grad((out * weights).sum(), list(x.values()))
    (expected,) = reference.fold(found.agg, x)[0].values()
    wanted = torch.autograd.grad((expected * weights).sum(), list(x.values()))
    for a, b in zip((out, *found_grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

    state, tokens = None, []
    for t in range(19):  # training is decoding
        y, state = agg.step(state, **{k: v[:, t] for k, v in x.items()})
        tokens.append(y)
    torch.testing.assert_close(torch.stack(tokens, 1), out, rtol=1e-12, atol=1e-12)
    first, state = agg(**{k: v[:, :6] for k, v in x.items()}, return_state=True)
    second = agg(**{k: v[:, 6:] for k, v in x.items()}, initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", [DECAYED, BOTH], ids=["decayed", "both"])
def test_masks_restarts_and_packing(text: str, tmp_path: Path) -> None:
    (found,) = read_text(text)
    (tmp_path / "spec.psm").write_text(text)
    agg, x = psmc.load(tmp_path / "spec.psm"), values(found, 2, 17)
    made = torch.Generator().manual_seed(3)
    mask = torch.rand(2, 17, generator=made) < 0.7
    reset = torch.rand(2, 17, generator=made) < 0.2
    packed = {k: v[:1] for k, v in x.items()}
    cu = torch.tensor([0, 0, 5, 17])
    for inputs, flags in ((x, {"mask": mask, "reset": reset}), (packed, {"cu_seqlens": cu}), (x, {"mask": mask})):
        (expected,) = reference.fold(found.agg, inputs, **flags)[0].values()
        torch.testing.assert_close(agg(**inputs, **flags), expected, rtol=1e-11, atol=1e-11)


def test_more_tokens_than_levels(tmp_path: Path) -> None:
    (tmp_path / "spec.psm").write_text(BOTH)
    agg = psmc.load(tmp_path / "spec.psm")
    x, w = torch.randn(1, 32, 3), torch.randn(1, 32, 5)
    agg(x[:, :31], w[:, :31])
    for flags in ({}, {"mask": torch.ones(1, 32, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="PSM609: both: 32 tokens have 6 levels, not 5"):
            agg(x, w, **flags)
    agg(x, w, reset=torch.arange(32)[None] == 9)
    _, state = agg(x[:, :31], w[:, :31], return_state=True)
    with pytest.raises(ValueError, match="PSM609"):
        agg.step(state, x[:, 31], w[:, 31])


def test_in_a_compiled_graph(tmp_path: Path) -> None:
    """As an operator, which is what a compiled graph calls."""
    (tmp_path / "spec.psm").write_text(BOTH)
    agg = psmc.load(tmp_path / "spec.psm")
    x, w = torch.randn(2, 9, 3), torch.randn(2, 9, 5)
    (out,) = agg.operator.op([x, w], [], [], None, None, None, False)
    assert torch.equal(out, agg(x, w))
