"""Softmax attention as a combine: the language's meaning, torch's own attention, and what is recognised as such."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import psmc
from psmc import reference
from psmc.pipeline import read, read_text

EXAMPLE = Path(__file__).parent.parent / "examples" / "attention_combine.psm"
HEAD = "aggregator merged {{ dim {dims} input x[{shape}] {params} state h[{shape}] = 0 lift {{ h[{at}] = x[{at}] }}"
HEADS = (
    HEAD.format(dims="A = 2, N, E", shape="A, N, E", at="a, n, e", params="param w[A, E, E]")
    + """ combine (l, r) {
      let q[a, n, e] = sum[c] r.h[a, n, c] * w[a, c, e]
      let u[a, n, m] = 0.3 * (sum[e] q[a, n, e] * l.h[a, m, e]); let v[a, n, m] = 0.3 * (sum[e] q[a, n, e] * r.h[a, m, e])
      h[a, n, e] = (sum[m] exp(v[a, n, m]) * r.h[a, m, e] * 2 + sum[m] exp(u[a, n, m]) * l.h[a, m, e])
        / (sum[m] exp(u[a, n, m]) + sum[m] exp(v[a, n, m]))
    } associative: no }"""
)
ONE_SIDE = (
    HEAD.format(dims="N, E", shape="N, E", at="n, e", params="")
    + """ combine (l, r) {
      let u[n, m] = sum[e] r.h[n, e] * l.h[m, e]; let t[n] = max[m] u[n, m]
      let z[n, e] = (sum[m] exp(u[n, m] - t[n]) * l.h[m, e]) / (sum[m] exp(u[n, m] - t[n]))
      h[n, e] = tanh(z[n, e] + r.h[n, e])
    } associative: no }"""
)
# Like attention, but none: two temperatures, a mask, a shift that differs, weights of another softmax, a sign.
SCORES = "let u[n, m] = sum[e] r.h[n, e] * l.h[m, e]; let v[n, m] = sum[e] r.h[n, e] * r.h[m, e]"
WHOLE = "(sum[m] exp({a}) * l.h[m, e] {sign} sum[m] exp({b}) * r.h[m, e]) / (sum[m] exp({c}) + sum[m] exp({d}))"
OTHERS = {
    "temperatures": ("2 * u[n, m]", "v[n, m]", "2 * u[n, m]", "v[n, m]", "+"),
    "masked": ("where(m <= n, u[n, m], -9)", "v[n, m]", "where(m <= n, u[n, m], -9)", "v[n, m]", "+"),
    "shifted": ("u[n, m] - 1", "v[n, m]", "u[n, m] - 1", "v[n, m]", "+"),
    "other weights": ("u[n, m]", "v[n, m]", "u[n, m]", "u[n, m]", "+"),
    "a difference": ("u[n, m]", "v[n, m]", "u[n, m]", "v[n, m]", "-"),
    "cubes": ("u[n, m]^3", "v[n, m]", "u[n, m]^3", "v[n, m]", "+"),
}


def other(name: str) -> str:
    a, b, c, d, sign = OTHERS[name]
    head = HEAD.format(dims="N, E", shape="N, E", at="n, e", params="")
    value = WHOLE.format(a=a, b=b, c=c, d=d, sign=sign)
    return f"{head} combine (l, r) {{ {SCORES} h[n, e] = {value} }} associative: no }}"


def check(text: str, tmp_path: Path, length: int = 5, **sizes: int) -> str:
    """Outputs and gradients against the oracle; the module's text."""
    (found,) = read_text(text)
    (tmp_path / "spec.psm").write_text(text)
    agg = psmc.load(tmp_path / "spec.psm")
    made = torch.Generator().manual_seed(0)
    sizes = {d.name: d.size or sizes[d.name] for d in found.agg.dims}
    drawn = {}
    for t in (*found.agg.leaf_inputs, *found.agg.params):
        lead = (2, length, 3) if t in found.agg.leaf_inputs else ()
        shape = (*lead, *(sizes[d] for d in t.dims))
        drawn[t.name] = (0.7 * torch.randn(shape, generator=made, dtype=torch.float64)).requires_grad_()
    params = {t.name: drawn[t.name] for t in found.agg.params}
    inputs = {k: v for k, v in drawn.items() if k not in params}
    out = agg(**drawn)
    (expected,) = reference.fold(found.agg, inputs, params)[0].values()
    weights = torch.randn_like(out)
    pairs = [(out, expected)]
    both = (torch.autograd.grad((y * weights).sum(), list(drawn.values())) for y in (out, expected))
    for a, b in (*pairs, *zip(*both, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    return found.text


def prefix(merge, chunks: torch.Tensor, n: int) -> torch.Tensor:
    """The fold of the roots of the first n chunks, [B, T, ...]."""
    roots, at = [], 0
    for k in reversed(range(n.bit_length())):
        if n >> k & 1:
            level = list(chunks[:, at : at + (1 << k)].unbind(1))
            while len(level) > 1:
                level = [merge(*pair) for pair in zip(level[::2], level[1::2], strict=True)]
            roots.append(level[0])
            at += 1 << k
    out = roots[0]
    for root in roots[1:]:
        out = merge(out, root)
    return out


@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_the_example_is_torchs_attention(length: int) -> None:
    """Another implementation: scaled_dot_product_attention on [left | right], in a recursive tree."""
    agg = psmc.load(EXAMPLE)
    made = torch.Generator().manual_seed(length)
    shapes = ((2, length, 4, 6), (6, 6), (6, 6), (6, 6))
    x, query, key, value = (torch.randn(s, generator=made, dtype=torch.float64).div(2).requires_grad_() for s in shapes)

    def merge(left, right):
        both = torch.cat([left, right], -2)
        return right + scaled_dot_product_attention(right @ query, both @ key, both @ value)

    expected = torch.stack([prefix(merge, x, n) for n in range(1, length + 1)], 1)
    out = agg(x, query, key, value)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    weights, tensors = torch.randn_like(out), [x, query, key, value]
    found = torch.autograd.grad((out * weights).sum(), tensors, allow_unused=True)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors, allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None), "no param matters to the first chunk"
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    state, tokens = None, []
    for t in range(length):
        y, state = agg.step(state, x[:, t], query, key, value)
        tokens.append(y)
    torch.testing.assert_close(torch.stack(tokens, 1), out, rtol=1e-11, atol=1e-11)


def test_the_example_is_recognised(tmp_path: Path) -> None:
    (found,) = read(EXAMPLE)
    assert found.text.count("attended = _attention(") == 2, "in combine and in advance"
    assert "torch.exp" not in found.text.split("# --- ")[1] and "fused kernels" in found.plan.why[-1]
    check(EXAMPLE.read_text(), tmp_path, N=3, D=4)


def test_heads_scales_weights_and_order(tmp_path: Path) -> None:
    assert "_attention(" in check(HEADS, tmp_path, N=3, E=2)


def test_one_side_inside_more(tmp_path: Path) -> None:
    assert "_attention(" in check(ONE_SIDE, tmp_path, N=3, E=2)


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_it(name: str, tmp_path: Path) -> None:
    assert "_attention(" not in check(other(name), tmp_path, length=3, N=3, E=2)


def test_large_scores(tmp_path: Path) -> None:
    """The shift that a rule leaves out is not needed."""
    (tmp_path / "spec.psm").write_text(ONE_SIDE.replace(" - t[n]", ""))
    agg = psmc.load(tmp_path / "spec.psm")
    assert agg(100 * torch.randn(1, 4, 3, 2)).isfinite().all()
