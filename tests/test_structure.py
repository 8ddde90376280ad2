"""Structure: live state, layers, classes; the factors of an affine layer reproduce its step, the readout its output."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_ir import EXAMPLES, draw, evaluated, example, spec, starts

from psmc.derive.graph import layers, vertex_cover
from psmc.derive.lifting import lifted
from psmc.ir import Assign, Block
from psmc.ir.text import show_expr
from psmc.structure.analyse import analyse
from psmc.structure.describe import as_data, describe

ALL = sorted(p.stem for p in EXAMPLES.glob("*.psm"))
PAIRS = [n for n in ALL if f"{n}_recurrence" in ALL]

NEW = {
    "decay on V": """aggregator s { dim K, V
        input q[K], k[K], v[V], g[V]
        state S[K, V] = 0
        recurrence { S[i, j] = sigmoid(g[j]) * S[i, j] + k[i] * v[j] }
        output o[j] = sum[i] q[i] * S[i, j]
        associative: yes }""",
    "two injections, decay on K and V, bonus": """aggregator s { dim K, V
        input q[K], k[K], v[V], k2[K], v2[V], f[K], g[V], u[K]
        state S[K, V] = 0
        recurrence { S[i, j] = exp(-abs(f[i]) - abs(g[j])) * S[i, j] + k[i] * v[j] - 2 * k2[i] * v2[j] }
        output o[j] = tanh((sum[i] q[i] * (S[i, j] + prev.S[i, j] / 2)) + (sum[i] u[i] * k[i]) * v[j])
        associative: yes }""",
    "value major": """aggregator s { dim V, K
        input r[K], w[K], k[K], v[V], a
        state S[V, K] = 0
        recurrence {
          S[i, j] = exp(-abs(w[j])) * S[i, j] - sigmoid(a) * (sum[m] S[i, m] * k[m]) * k[j] + v[i] * k[j]
        }
        output o[i] = sum[j] S[i, j] * r[j]
        associative: yes }""",
    "decay on V after a delta rule": """aggregator s { dim K, V
        input q[K], k[K], v[V], f[K], g[V]
        state S[K, V] = 0
        recurrence {
          S[i, j] = sigmoid(g[j]) * sigmoid(f[i]) * (S[i, j] - k[i] * sum[m] k[m] * S[m, j]) + k[i] * v[j]
        }
        output o[j] = sum[i] q[i] * S[i, j]
        associative: yes }""",
    "decay on V beside a delta rule": """aggregator s { dim K, V
        input q[K], k[K], v[V], g[V]
        state S[K, V] = 0
        recurrence { S[i, j] = sigmoid(g[j]) * S[i, j] - k[i] * (sum[m] k[m] * S[m, j]) + k[i] * v[j] }
        output o[j] = sum[i] q[i] * S[i, j]
        associative: yes }""",
    "rank in a dim": """aggregator s { dim K, V
        dim R = 3
        input q[K], k[R, K], v[R, V], g
        state S[K, V] = 0
        recurrence { S[i, j] = sigmoid(g) * S[i, j] + sum[r] k[r, i] * v[r, j] }
        output o[j] = sum[i] q[i] * S[i, j]
        associative: yes }""",
    "eight micro-steps": """aggregator s { dim K, V
        dim R = 8
        input q[K], k[R, K], v[R, V], beta[R] in [0, 1]
        state S[K, V] = 0
        recurrence { for r in R { S[i, j] = S[i, j] + beta[r] * k[r, i] * (v[r, j] - sum[m] k[r, m] * S[m, j]) } }
        output o[j] = sum[i] q[i] * S[i, j]
        associative: yes }""",
    "state returned": """aggregator s { dim K, V
        input k[K], v[V]
        state S[K, V] = 0, z[K] = 0
        recurrence { S[i, j] = 0.5 * S[i, j] + k[i] * v[j]; z[i] = 0.5 * z[i] + k[i] }
        associative: yes }""",
    "sums on both sides": """aggregator s { dim K, V
        input q[K], k[K], v[V], x[K], y[V]
        state S[K, V] = 0
        recurrence { S[i, j] = 0.5 * S[i, j] + (k[i] + x[i]) * (v[j] - y[j]) }
        output o[j] = sum[i] q[i] * S[i, j]
        associative: yes }""",
    "complementary gate": """aggregator s { dim K, V
        input q[K], k[K], v[V], f
        state S[K, V] = 0
        recurrence { S[i, j] = S[i, j] + (1 - sigmoid(f)) * (k[i] * v[j] - S[i, j]) }
        output o[j] = sum[i] q[i] * S[i, j]
        associative: yes }""",
    "outer dim": """aggregator s { dim G, K, V
        input q[G, K], k[G, K], v[G, V], g[G, K]
        state S[G, K, V] = 0
        recurrence { S[h, i, j] = exp(-abs(g[h, i])) * S[h, i, j] + k[h, i] * v[h, j] }
        output o[h, j] = sum[i] q[h, i] * S[h, i, j]
        associative: yes }""",
    "several queries": """aggregator s { dim Q, K, V
        input q[Q, K], k[K], v[V]
        state S[K, V] = 0
        recurrence { S[i, j] = 0.9 * S[i, j] + k[i] * v[j] }
        output o[h, j] = sum[i] q[h, i] * S[i, j], total = sum[h, j] (sum[i] q[h, i] * S[i, j]) ^ 2
        associative: yes }""",
    "three micro-steps with a decay": """aggregator s { dim K, V
        dim R = 3
        input q[K], k[R, K], v[R, V], beta[R] in [0, 1], g[K]
        state S[K, V] = 0
        recurrence {
          S[i, j] = sigmoid(g[i]) * S[i, j]
          for r in R { S[i, j] = S[i, j] + beta[r] * k[r, i] * (v[r, j] - sum[m] k[r, m] * S[m, j]) }
        }
        output o[j] = sum[i] q[i] * S[i, j]
        associative: yes }""",
    "scaled normaliser": """aggregator s { dim K, V
        input q[K], k[K], v[V], i, f
        state m = -inf, C[K, V] = 0, n[K] = 0
        recurrence {
          m = max(m + logsigmoid(f), i)
          C[a, b] = exp(prev.m + logsigmoid(f) - m) * C[a, b] + exp(i - m) * k[a] * v[b]
          n[a] = exp(prev.m + logsigmoid(f) - m) * n[a] + exp(i - m) * k[a]
        }
        output h[b] = (sum[a] q[a] * C[a, b]) / max(abs(sum[a] q[a] * n[a]), exp(-m))
        associative: yes }""",
}


def _analysed(name):
    agg = lifted(spec(NEW[name]) if name in NEW else example(name))
    return agg, analyse(agg)


def _value(assign: Assign, agg, **spaces) -> torch.Tensor:
    """[*indices of the assign]"""
    return evaluated(Block(results=(assign,)), agg, **spaces)[assign.name]


def _dims(assign: Assign) -> list[str]:
    return [i.name for i in assign.indices]


def _einsum(assigns: list[tuple[list[str], torch.Tensor]], out: list[str]) -> torch.Tensor:
    names = sorted({n for dims, _ in assigns for n in dims} | set(out))
    letter = dict(zip(names, "abcdefgh", strict=False))
    left = ",".join("".join(letter[n] for n in dims) for dims, _ in assigns)
    return torch.einsum(f"{left}->{''.join(letter[n] for n in out)}", [t.double() for _, t in assigns])


def _factored_step(affine, agg, old: torch.Tensor, **spaces) -> torch.Tensor:
    """D ⊙ S + U (Wᵀ S) + B Cᵀ, in the component's own order of dims."""
    own = _dims(affine.decay.value)
    new = _value(affine.decay.value, agg, **spaces) * old
    inner = [n for n in own if n != affine.key.name]
    for u, w in zip(affine.transition.left, affine.transition.right, strict=True):
        read = _einsum([(_dims(w), _value(w, agg, **spaces)), (own, old)], inner)
        term = _einsum([(_dims(u), _value(u, agg, **spaces)), (inner, read)], own)
        if affine.scaled:
            part = affine.decay.parts[1]
            term = _einsum([(_dims(part), _value(part, agg, **spaces)), (own, term)], own)
        new = new + term
    for b, c in zip(affine.injection.left, affine.injection.right, strict=True):
        new = new + _einsum([(_dims(x), _value(x, agg, **spaces)) for x in (b, c)], own)
    return new


@pytest.mark.parametrize("name", [*ALL, *NEW])
def test_factors_and_readout_reproduce_the_model(name):
    agg, found = _analysed(name)
    if not isinstance(agg.combine, Block) or not any(x.affine for x in found.layers):
        return
    _check_steps(agg, found)


def _check_steps(agg, found):
    inputs, params = draw(agg, 4, seed=3)
    state = starts(agg)
    for token in inputs:
        leaf = evaluated(agg.leaf, agg, input=token, param=params)
        new = evaluated(agg.combine, agg, left=state, right=leaf, param=params)
        spaces = {"input": token, "param": params, "prev": state, "state": new}
        for layer in found.layers:
            if layer.affine is not None:
                affine = layer.affine
                got = _factored_step(affine, agg, state[affine.component], **spaces)
                torch.testing.assert_close(got, new[affine.component], rtol=1e-10, atol=1e-10)
                _check_logs(affine.decay, agg, spaces)
        _check_readout(found, agg, spaces)
        state = new


def _check_logs(decay, agg, spaces):
    value = _value(decay.value, agg, **spaces).double()
    if decay.log is not None:
        log = _value(decay.log, agg, **spaces)
        torch.testing.assert_close(log.exp().expand_as(value), value, rtol=1e-10, atol=1e-12, check_dtype=False)
    for pair, undo in ((decay.parts, lambda t: t), (decay.logs, lambda t: t.double().exp())):
        if pair is not None:
            parts = [(_dims(x), undo(_value(x, agg, **spaces))) for x in pair]
            torch.testing.assert_close(_einsum(parts, _dims(decay.value)), value, rtol=1e-10, atol=1e-12)


def _check_readout(found, agg, spaces):
    want = evaluated(agg.output, agg, **spaces)
    for readout in found.readout:
        lets = {}
        for linear in readout.linear:
            own = _dims(found.layer(linear.component).affine.decay.value)
            total = 0
            for vector, space in ((linear.query, "state"), (linear.previous, "prev")):
                if vector is not None:
                    operands = [(_dims(vector), _value(vector, agg, **spaces)), (own, spaces[space][linear.component])]
                    total = total + _einsum(operands, [i.name for i in linear.indices])
            lets[linear.name] = total
        got = _value(readout.epilogue, agg, **spaces, let=lets)
        torch.testing.assert_close(got, want[readout.output], rtol=1e-10, atol=1e-10)


EXPECTED = {  # class of each layer; then of the affine ones: decay, rank of the transition, rank of the injection
    "cumsum": ["s pointwise"],
    "mingru": ["h pointwise"],
    "affine2x2": ["b1 b2 pointwise"],
    "viterbi": ["M dense"],
    "s5_word": ["p dense"],
    "elman": ["h opaque"],
    "transformer_psm": ["s opaque"],
    "mamba": ["h pointwise KV 0 1"],
    "softmax_average": ["m pointwise", "u pointwise", "w pointwise"],
    "welford": ["n pointwise", "mean pointwise", "m2 pointwise"],
    "linear_attention": ["S affine none 0 1", "z affine none 0 1"],
    "retnet": ["S affine constant 0 1"],
    "mamba2": ["h affine scalar 0 1"],
    "gla": ["S affine K 0 1"],
    "hgrn2": ["S affine K 0 1"],
    "rwkv6": ["S affine K 0 1"],
    "gated_rfa": ["S affine scalar 0 1", "z affine scalar 0 1"],
    "mlstm": ["m pointwise", "C affine scalar 0 1", "n affine scalar 0 1"],
    "deltanet": ["S affine none 1 1"],
    "gated_deltanet": ["S affine scalar 1 1"],
    "kda": ["S affine K 1 1"],
    "rwkv7": ["S affine K 1 1"],
    "delta_product": ["S affine none 2 2"],
    "decay on V": ["S affine V 0 1"],
    "two injections, decay on K and V, bonus": ["S affine KV 0 2"],
    "value major": ["S affine K 1 1"],
    "decay on V after a delta rule": ["S affine KV 1 1"],
    "decay on V beside a delta rule": ["S dense V 1 1"],
    "rank in a dim": ["S affine scalar 0 3"],
    "eight micro-steps": ["S affine none 8 8"],
    "state returned": ["S affine constant 0 1", "z pointwise"],
    "sums on both sides": ["S affine constant 0 1"],
    "complementary gate": ["S affine scalar 0 1"],
    "outer dim": ["S affine K 0 1"],
    "several queries": ["S affine constant 0 1"],
    "three micro-steps with a decay": ["S affine K 3 3"],
    "scaled normaliser": ["m pointwise", "C affine scalar 0 1", "n affine scalar 0 1"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_layers(name):
    _, found = _analysed(name)
    got = []
    for layer in found.layers:
        a = layer.affine
        facts = "" if a is None else f" {a.decay.kind} {a.rank} {a.injection.rank}"
        got.append(f"{' '.join(layer.components)} {layer.cls}{facts}")
    assert got == EXPECTED[name]


def _comparable(name):
    """The report without names that the two spellings need not share."""
    _, found = _analysed(name)
    data = as_data(found)
    return json.dumps({k: data[k] for k in ("live", "lanes", "layers", "outputs")})


@pytest.mark.parametrize(
    "name",
    # Where the combine carries something else than what is lifted: grid_gate a decay a side, lifted their product.
    sorted({*PAIRS} - {"affine2x2", "grid_gate", "linear_recurrence", "lindley", "logsumexp", "token_bucket", "viterbi"}),
)
def test_combine_and_recurrence_give_the_same_report(name):
    assert _comparable(name) == _comparable(f"{name}_recurrence")


def test_live_state_and_element():
    for name, live, element in (
        ("deltanet", ("S",), ("A", "S")),
        ("mlstm", ("m", "C", "n"), ("f", "m", "C", "n")),
        ("softmax_average", ("m", "u", "w"), ("m", "u", "w")),
        ("segmented_sum", ("s",), ("f", "s")),
    ):
        _, found = _analysed(name)
        assert (found.live, found.element) == (live, element), name
    unused = """aggregator s { input x
        state a = 0, b = 0
        lift { a = x; b = x }
        combine (l, r) { a = l.a + r.a; b = l.b + r.b }
        output y = a
        associative: yes }"""
    assert analyse(spec(unused)).element == ("a",)


def test_lanes_and_pointwise():
    for name, lanes, pointwise, expanded in (
        ("mamba", ("D",), False, ("N",)),
        ("s4d", ("D",), False, ("N",)),
        ("gla", (), False, ("K",)),
        ("mingru", (), True, ()),
        ("viterbi", (), False, ("N",)),
    ):
        _, found = _analysed(name)
        assert (found.lanes, found.pointwise, found.expanded) == (lanes, pointwise, expanded), name


def test_earlier_layers_are_read_as_prefixes():
    _, found = _analysed("mlstm")
    assert found.layer("C").reads == ("m",) and not found.layer("m").reads
    text = "\n".join(describe(found))
    assert "D[i, j] = exp(prev.m + logsigmoid(fgate) - m), log logsigmoid(fgate) + prev.m - m" in text
    assert found.layer("C").affine.injection.left[0].value == found.layer("n").affine.injection.left[0].value


def test_a_normaliser_stacks_on_its_matrix():
    for name in ("mlstm", "gated_rfa", "linear_attention", "scaled normaliser"):
        _, found = _analysed(name)
        assert [len(s) for s in found.stacks] == [2], name
        assert found.layer(found.stacks[0][0]).affine.value is not None
    assert _analysed("gla")[1].stacks == ()


def test_a_layer_can_be_scanned_by_itself():
    _, found = _analysed("mlstm")
    assert found.layer("m").element == ("f", "m")
    assert show_expr(found.layer("m").step[0].value) == "max(prev.m + logsigmoid(fgate), igate)"


def test_factors_of_two_delta_steps():
    _, found = _analysed("delta_product")
    text = describe(found)
    assert "  W0[i] = k[0, i]" in text and "  W1[i] = k[1, i]" in text and "  U1[i] = -(beta[1] * k[1, i])" in text


def test_readouts():
    _, found = _analysed("rwkv6")
    (readout,) = found.readout
    assert readout.linear[0].query is None and readout.linear[0].previous is not None and not readout.whole
    _, found = _analysed("several queries")
    assert [r.linear[0].name for r in found.readout] == ["y_S", "y_S"]
    assert [r.whole for r in _analysed("state returned")[1].readout] == [("S",), ("z",)]
    assert found.readout[1].reduces == ("Q", "V")
    _, found = _analysed("two injections, decay on K and V, bonus")
    assert found.readout[0].linear[0].query is not None and found.readout[0].linear[0].previous is not None


def test_layers_are_ordered_by_what_they_read():
    assert layers("abcd", {"a": "b", "b": "c", "c": "b", "d": ""}) == [("b", "c"), ("a",), ("d",)]


def test_vertex_cover_is_minimum():
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        edges = {(int(a), int(b)) for a, b in torch.randint(0, 5, (7, 2), generator=generator)}
        left, right = vertex_cover(edges)
        assert all(a in left or b in right for a, b in edges)
        best = min(
            len(chosen)
            for n in range(11)
            for chosen in itertools.combinations([*((0, v) for v in range(5)), *((1, v) for v in range(5))], n)
            if all((0, a) in chosen or (1, b) in chosen for a, b in edges)
        )
        assert len(left) + len(right) == best


def test_the_report_does_not_depend_on_the_hash_seed():
    code = (
        "from run_ir import example; from psmc.derive.lifting import lifted;"
        "from psmc.structure.analyse import analyse;"
        "from psmc.structure.describe import as_data;"
        "print([as_data(analyse(lifted(example(n)))) for n in ('delta_product_recurrence', 'mlstm', 'kda')])"
    )
    root = EXAMPLES.parent
    path = os.pathsep.join([str(root), str(root / "tests")])
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": s, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for s in ("0", "4")
    ]
    assert runs[0] == runs[1] and "delta_product" in runs[0]


# --- random affine matrix recurrences -------------------------------------------------------------------

DECAYS = (
    "1",
    "0.5",
    "exp(g)",
    "sigmoid(f[i])",
    "exp(-abs(f[i]) - abs(h[j]))",
    "(1 - sigmoid(f[i]))",
    "sigmoid(h[j])",
    "f[i]",
)
DELTAS = ("k[i] * (sum[m] w[m] * S[m, j])", "sigmoid(g) * f[i] * (sum[m] (w[m] - k[m]) * S[m, j])")
DRIVES = (
    "k[i] * v[j]",
    "(k[i] - w[i]) * (v[j] + h[j])",
    "sigmoid(g) * w[i] * h[j]",
    "exp(k[i] - abs(v[j]))",
    "f[i]",
    "v[j]",
)
READS = (
    "sum[i] q[i] * S[i, j]",
    "sum[i] q[i] * (S[i, j] - prev.S[i, j])",
    "tanh(g * (sum[i] w[i] * prev.S[i, j])) + v[j]",
)


@st.composite
def matrix_specs(draw_):
    """A decay, up to two delta-like terms read off the decayed state, up to two injections, one output."""
    lines = [f"S[i, j] = {draw_(st.sampled_from(DECAYS))} * S[i, j]"]
    for term in draw_(st.lists(st.sampled_from(DELTAS), max_size=2)):
        lines.append(f"S[i, j] = S[i, j] - {term}")
    drives = draw_(st.lists(st.sampled_from(DRIVES), min_size=1, max_size=2))
    lines.append(f"S[i, j] = S[i, j] + {' + '.join(drives)}")
    return (
        "aggregator s { dim K, V\n input q[K], k[K], w[K], f[K], v[V], h[V], g\n state S[K, V] = 0\n recurrence { "
        + "; ".join(lines)
        + f" }}\n output o[j] = {draw_(st.sampled_from(READS))}\n associative: yes }}"
    )


@settings(deadline=None, max_examples=40)
@given(matrix_specs())
def test_random_matrix_recurrences(text):
    agg = lifted(spec(text))
    found = analyse(agg)
    (layer,) = found.layers
    assert layer.cls == "affine" and layer.affine.rank == min(2, len(set(_used(text))))
    _check_steps(agg, found)


def _used(text: str) -> list[str]:
    return [t for t in DELTAS if t in text]
