"""Lifting: a recurrence run token by token equals its lifted aggregator folded in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_ir import EXAMPLES, draw, evaluated, example, folded, identities, spec, stepped

from psmc.derive.lifting import lifted
from psmc.derive.logs import log_decay
from psmc.diagnostics import PsmcError, render
from psmc.ir.text import show, show_expr
from psmc.ir.verify import verify

RECURRENCES = sorted(
    p.stem for p in EXAMPLES.glob("*_recurrence.psm") if p.stem not in ("elman_recurrence", "linear_recurrence")
)

MORE = {
    "mlstm": """aggregator s { dim K, V
        input k[K], v[V], igate, fgate
        state m = -inf, C[K, V] = 0, n[K] = 0
        let f = logsigmoid(fgate)
        recurrence {
          m = max(m + f, igate)
          C[i, j] = exp(prev.m + f - m) * C[i, j] + exp(igate - m) * k[i] * v[j]
          n[i] = exp(prev.m + f - m) * n[i] + exp(igate - m) * k[i]
        }
        associative: yes }""",
    "softmax": """aggregator s { input score, value
        state m = -inf, u = 0, w = 0
        recurrence {
          m = max(m, score)
          u = u * exp(prev.m - m) + exp(score - m)
          w = w * exp(prev.m - m) + value * exp(score - m)
        }
        associative: yes }""",
    "squared scale": """aggregator s { input g, x
        state m = -inf, u = 0
        recurrence {
          m = logaddexp(m + g, x)
          u = exp(2 * (prev.m - m)) * sigmoid(x) * u + (exp(-2 * m) * x - exp(x - 2 * m))
        }
        associative: yes }""",
    "vector scale": """aggregator s { dim K, V
        input x[K], v[V]
        state m[K] = -inf, S[K, V] = 0
        recurrence {
          m[i] = max(m[i], x[i])
          S[i, j] = exp(prev.m[i] - m[i]) * S[i, j] + exp(x[i] - m[i]) * v[j]
        }
        associative: yes }""",
    "stabilised delta": """aggregator s { dim K, V
        input k[K], v[V], x
        state m = -inf, S[K, V] = 0
        recurrence {
          m = max(m, x)
          S[i, j] = exp(prev.m - m) * (S[i, j] - k[i] * sum[p] k[p] * S[p, j]) + exp(x - m) * k[i] * v[j]
        }
        associative: yes }""",
    "log-sum-exp from 0": """aggregator s { input x, f
        state m = 0
        recurrence { m = logaddexp(m - f, x) }
        associative: yes }""",
    "tropical matrix": """aggregator s { dim N
        input e[N]
        param t[N, N]
        state d[N] = 0
        recurrence { d[j] = max[i] (d[i] + t[i, j]) + e[j] }
        associative: yes }""",
    "running extrema": """aggregator s { input x, a
        input g in (0, 1]
        state hi = 0, lo = 7, slow = 2, gated = -3
        recurrence { hi = max(hi - 0.5, x); lo = min(lo, x + 1); slow = max(slow * sigmoid(a), x)
          gated = min(g * gated, x * g) }
        associative: yes }""",
    "queue": """aggregator s { input x
        state h = 4
        recurrence { h = relu(h + x) }
        associative: yes }""",
    "chain of three": """aggregator s { input x
        const b = 0.9
        state m = 0, v = 1, t = 0
        recurrence { m = b * m + (1 - b) * x; v = v * 0.99 + m; t = t + v + 1 }
        associative: yes }""",
    "rotation": """aggregator s { input w, x
        state p = 1, q = 0
        recurrence { p = cos(w) * prev.p - sin(w) * prev.q + x; q = sin(w) * prev.p + cos(w) * prev.q }
        associative: yes }""",
    "swap": """aggregator s { input x
        state p = 1, q = 2
        recurrence { p = prev.q; q = prev.p + x }
        associative: yes }""",
    "restart": """aggregator s { input x, a, z : int in [0, 1]
        state h = 5, last = 3
        recurrence { h = where(z > 0, x, a * h + x); last = x }
        associative: yes }""",
    "two vectors": """aggregator s { dim N
        input x[N]
        param W[N, N], U[N, N]
        state h[N] = 1, c[N] = 0
        recurrence {
          c[i] = c[i] + sum[j] W[i, j] * h[j]
          h[i] = h[i] * 0.5 + (sum[j] U[i, j] * c[j]) + x[i]
        }
        associative: yes }""",
    "decay on V and a delta rule": """aggregator s { dim K, V
        input k[K], v[V], g[V]
        state S[K, V] = 0
        recurrence { S[i, j] = exp(g[j]) * (S[i, j] - k[i] * sum[m] k[m] * S[m, j]) + k[i] * v[j] }
        associative: yes }""",
    "right action": """aggregator s { dim K, V
        input k[K], v[V]
        state S[K, V] = 0.5
        recurrence { S[i, j] = S[i, j] - (sum[m] S[i, m] * v[m]) * v[j] + k[i] * v[j] }
        associative: yes }""",
    "gather": """aggregator s { dim N = 3
        input p[N] : int in [0, 2], x[N]
        state h[N] = 1
        recurrence { h[i] = h[p[i]] + x[i] }
        associative: yes }""",
    "complex": """aggregator s { input w, x : complex
        state h : complex = 0
        recurrence { h = exp(complex(0, w)) * h + x }
        associative: yes }""",
    "four micro-steps": """aggregator s { dim K, V
        dim R = 4
        input k[R, K], v[R, V]
        state S[K, V] = 1
        recurrence { for r in R { S[i, j] = S[i, j] + k[r, i] * (v[r, j] - sum[m] k[r, m] * S[m, j]) } }
        associative: yes }""",
}


def _check(agg, seed=0, steps=6):
    once = lifted(agg)
    assert once.recurrence is None and lifted(once) is once
    verify(once)
    if not any(c.initial or len(c.dims) > 2 for c in once.state):  # the text has no words for these two
        assert spec(show(once)) == once
    inputs, params = draw(agg, steps, seed)
    for n in (0, 1, 2, steps):
        want = stepped(agg, inputs[:n], params)[-1]
        got = folded(once, inputs[:n], params, seed)
        for name, value in want.items():
            torch.testing.assert_close(got[name].expand_as(value), value, rtol=1e-9, atol=1e-9, check_dtype=False)
    leaf = evaluated(once.leaf, once, input=inputs[0], param=params)
    for left, right in ((identities(once), leaf), (leaf, identities(once))):
        got = evaluated(once.combine, once, left=left, right=right, param=params)
        for name, value in leaf.items():
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, check_dtype=False)
    return once


@pytest.mark.parametrize("name", RECURRENCES)
def test_examples(name):
    _check(example(name))


@pytest.mark.parametrize("name", MORE)
def test_more(name):
    _check(spec(MORE[name]), seed=1)


def _carried(text: str) -> str:
    agg = spec(text)
    known = {c.name for c in agg.state}
    return " ".join(
        f"{c.name}{list(c.dims)}".replace("[]", "").replace("'", "") for c in lifted(agg).state if c.name not in known
    )


def test_nothing_more_is_carried_than_the_structure_needs():
    assert _carried(MORE["mlstm"]) == "f"
    assert _carried(MORE["softmax"]) == ""
    assert _carried(MORE["chain of three"]) == "a_mm a_vm a_vv a_tm a_tv"
    assert _carried(MORE["rotation"]) == "a_pp a_pq a_qp a_qq"
    assert _carried(MORE["decay on V and a delta rule"]) == "A[K, K, V]"
    assert _carried(MORE["right action"]) == "A[V, V]"
    carried = {
        "linear_attention_recurrence": "", "retnet_recurrence": "a", "gla_recurrence": "a[K]",
        "gated_rfa_recurrence": "a", "mamba_recurrence": "a[D, N]", "kda_recurrence": "A[K, K]",
        "linear_recurrence_recurrence": "a_h",
    }  # fmt: skip
    for name, want in carried.items():
        assert _carried((EXAMPLES / f"{name}.psm").read_text()) == want, name


def test_a_sequential_recurrence_is_kept():
    agg = example("elman_recurrence")
    assert lifted(agg) is agg


def test_an_aggregator_with_a_combine_is_unchanged():
    agg = example("gla")
    assert lifted(agg) is agg


def test_start_that_is_not_the_identity():
    agg = lifted(spec(MORE["restart"]))
    starts = {c.name: (show_expr(c.identity.value), c.initial and show_expr(c.initial.value)) for c in agg.state}
    assert starts["h"] == ("0", "5") and starts["last"] == ("0", "3") and starts["a_h"] == ("1", None)


def test_text_of_the_stabilised_form():
    text = show(lifted(spec(MORE["mlstm"])))
    assert "let m_1 = max(l.m + r.f, r.m)" in text
    assert "C[i, j] = exp(l.m + r.f - m_1) * l.C[i, j] + exp(r.m - m_1) * r.C[i, j]" in text
    assert "C[i, j] = k[i] * v[j]" in text


WRONG = {
    "PSM401 tanh": ("h = tanh(prev.h) + x", "tanh of the state is not affine", "'tanh(h)'"),
    "PSM401 square": ("h = prev.h * prev.h + x", "a product of two terms that both read the state", "'h * h'"),
    "PSM401 choice": ("h = where(prev.h > 0, x, prev.h)", "a condition on the state", "'h > 0'"),
    "PSM401 division": ("h = x / (x + prev.h)", "a denominator that may be 0", "'h + x'"),
    "PSM401 velocities": ("h = (h + tanh(x)) / (1 + h * tanh(x))", "a denominator that may be 0", "'tanh(x) * h + 1'"),
    "PSM401 quotient": ("h = h / (1 + h) + x / (2 + h)", "of a degree above 1", "'h / (1 + h) + x / (2 + h)'"),
    "PSM401 logistic": ("h = x * h * (1 - h)", "a product of two terms that both read the state", "'x * h * (1 - h)'"),
    "PSM401 mixed": ("h = max(prev.h + x, 0) * x", "not known to be positive", "'max(h + x, 0) * x'"),
    "PSM401 falling": ("h = clamp(1 - h, x, 2)", "it falls where the state rises", "min(max(1 - h"),
    "PSM401 falling floor": ("h = 1 - max(0.5 * h, x)", "it falls where the state rises", "'1 - max(0.5 * h, x)'"),
    "PSM401 two floors": ("h = max(h, 0.5 * h + x) + max(h, x)", "of two terms that both read the state", "max(h"),
    "PSM401 bend": ("h = where(h > 0, 0.5 * h, h) + x", "a condition on the state", "'h > 0'"),
    "PSM401 gelu": ("h = clamp(gelu(h), -1, 1)", "gelu of the state", "'gelu(h)'"),
    "PSM401 sum in exponents": ("h = logaddexp(h, x) * 2", "a product with the state", "'logaddexp(h, x) * 2'"),
    "PSM401 abs": ("h = 0.5 * abs(prev.h) + x", "abs of the state is not affine", "'abs(h)'"),
    "PSM401 stop": ("h = stop(prev.h) + x", "stop() of the state is not affine", "'stop(h)'"),
    "PSM401 negative": ("h = max(prev.h * x, x)", "not known to be positive", "'h * x'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_not_liftable(case):
    statement, why, term = WRONG[case]
    with pytest.raises(PsmcError) as error:
        lifted(spec("aggregator s { input x\n state h = 0\n recurrence { " + statement + " }\n associative: yes }"))
    (found,) = error.value.diagnostics
    text = render(found)
    assert found.code == case[:6] and why in found.message and term in found.label
    assert "test.psm:3:" in text and "'order: left'" in text


def test_a_tap_is_never_positive():
    """It reads 0 before the first token, whatever the interval of its input."""
    with pytest.raises(PsmcError) as error:
        lifted(spec("aggregator s { input x in (0, inf), b\n state s = 0\n recurrence { s = max(x{-1} * s, b) }\n associative: yes }"))
    assert "so 'x{-1}' is 0 there" in render(error.value.diagnostics[0])


def test_whole_numbers_have_no_infinite_identity():
    body = "aggregator s {{ input x : int in [0, 5]\n state c : int{} = 0\n recurrence {{ c = {} }}\n associative: yes }}"
    for rule in ("max(c, x)", "clamp(c + x, 0, 3)"):
        with pytest.raises(PsmcError) as error:
            lifted(spec(body.format("", rule)))
        assert "leave out ': int' of 'c'" in render(error.value.diagnostics[0])
    assert lifted(spec(body.format(" in [0, inf)", "max(c, x)"))).component("c").kind == "int"


@pytest.mark.parametrize(
    "code, body",
    [
        ("PSM402", "dim K\n input x[K]\n state S[K, K] = 0\n recurrence { S[i, j] = S[j, i] + x[i] }"),
        ("PSM402", "dim K\n input x[K]\n state S[K, K] = 0\n recurrence { S[i, j] = x[i] * (sum[m] S[m, m]) }"),
        ("PSM403", "input x\n state c = 0, h = 0\n recurrence { c = 0.5 * c + x; h = tanh(c) * h + x }"),
        ("PSM403", "input x\n state c = 0, h = 0\n recurrence { c = 0.5 * c + x; h = h + tanh(c) }"),
        ("PSM404", "dim K, V\n input x[K], y[V]\n state z[K] = 0, S[K, V] = 0\n"
                   "recurrence { z[i] = z[i] + x[i]; S[i, j] = S[i, j] + z[i] * y[j] }"),
    ],
)  # fmt: skip
def test_other_refusals(code, body):
    with pytest.raises(PsmcError) as error:
        lifted(spec("aggregator s { " + body + "\n associative: yes }"))
    assert [d.code for d in error.value.diagnostics] == [code]
    assert "test.psm" in render(error.value.diagnostics[0])


# --- logarithms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decay, log",
    [
        ("exp(x)", "x"),
        ("sigmoid(x)", "logsigmoid(x)"),
        ("1 - sigmoid(x)", "logsigmoid(-x)"),
        ("1 / (1 + exp(x))", "-softplus(x)"),
        ("exp(x) * sigmoid(y)", "x + logsigmoid(y)"),
        ("sigmoid(x) ^ 0.5", "0.5 * logsigmoid(x)"),
        ("where(y > 0, exp(x), 1)", "where(y > 0, x, 0)"),
        ("x", None),
        ("1 - x", None),
        ("exp(x) - 1", None),
        ("-exp(x)", None),
    ],
)
def test_log_of_a_decay(decay, log):
    agg = spec(f"aggregator s {{ input x, y\n state h = 0\n recurrence {{ h = {decay} }}\n associative: yes }}")
    found = log_decay(agg.recurrence.result("h").value)
    assert (None if found is None else show_expr(found)) == log


# --- random affine recurrences ------------------------------------------------------------------------

COEFFICIENTS = ("0", "1", "0.5", "a", "sigmoid(b)", "exp(-abs(a))", "a * b", "where(a > 0, b, 1)")


@st.composite
def affine_specs(draw_):
    """One to three scalar components, any coupling, written out as sums."""
    names = ["p", "q", "r"][: draw_(st.integers(1, 3))]
    lines = []
    for name in names:
        terms = [f"({draw_(st.sampled_from(COEFFICIENTS))}) * prev.{m}" for m in names if draw_(st.booleans())]
        lines.append(f"{name} = " + " + ".join([*terms, draw_(st.sampled_from(("x", "a * x", "1")))]))
    start = ", ".join(f"{n} = {draw_(st.integers(0, 2))}" for n in names)
    return f"aggregator s {{ input a, b, x\n state {start}\n recurrence {{ {'; '.join(lines)} }}\n associative: yes }}"


@settings(deadline=None, max_examples=40)
@given(affine_specs())
def test_random_affine_recurrences(text):
    _check(spec(text), steps=4)
