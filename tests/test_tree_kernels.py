"""Printed tree kernels against the oracle, in Triton's interpreter (in a process of its own: triton must be imported
with it switched on)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from interpreted import INTERPRETED, run_interpreted

pytest.importorskip("triton")

if not INTERPRETED:
    from psmc.pipeline import read, read_text
    from psmc.plan.tree import TreePlan

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    SPEC = """aggregator a {{ dim D, K = {k} {more}
      combine (l, r) {{ h[d] = {value} }} associative: no {order} }}"""

    @pytest.mark.parametrize(
        ("more", "value", "reason"),
        [
            ("state h[D] = 0", "sum[e] l.h[e] * r.h[d]", "a sum runs over D, and its size is not fixed"),
            ("param w[K] state h[D] = 0", "sum[k] w[k] * l.h[d] - r.h[d]", "9 entries are too many"),
            ("state h[D] : complex = 0", "l.h[d] - r.h[d]", "'h' holds complex numbers"),
            ("state h[D] = 0, u[K, D] = 0", "l.h[d] - r.h[d] u[k, d] = l.u[k, d]", "'u' has other dims than 'h'"),
            ("state h[D] = 0", "l.h[d] - d * r.h[d]", "an index over D is used as a number"),
        ],
    )  # fmt: skip
    def test_what_the_kernels_do_not_run(more: str, value: str, reason: str) -> None:
        (found,) = read_text(SPEC.format(k=9, more=more, value=value, order=""))
        assert found.plan.name == "tree" and not isinstance(found.plan, TreePlan)
        assert reason in found.plan.refused[0][1]
        assert "KERNELS = None" in found.text

    def test_chosen_by_structure() -> None:
        (found,) = read_text(SPEC.format(k=4, more="state h[D] = 0", value="tanh(l.h[d]) - r.h[d]", order=""))
        assert isinstance(found.plan, TreePlan) and found.plan.levels == 4
        (found,) = read_text(
            SPEC.format(k=4, more="state h[D] = 0", value="tanh(l.h[d]) - r.h[d]", order="order: left")
        )
        assert found.plan.name == "left"
        (lstm,) = read(Path(__file__).parent.parent / "examples" / "pr_lstm.psm")
        assert isinstance(lstm.plan, TreePlan) and lstm.plan.levels == 3

else:
    import torch
    from tree_cases import DENSE, EXAMPLES, LANE, WHOLE, compare, compiled, module, tensors

    # Lifts, rules and outputs that read little: params alone, one side, nothing; no lift; dims in another order.
    ODD = {
        "narrow": """input x[D] param w[D], v state h[D] = 0, n[D] = 0 lift { h[d] = w[d] + v; n[d] = x[d] }
          combine (l, r) { h[d] = l.h[d] - w[d] * r.h[d]; n[d] = w[d] } output y[d] = h[d] + n[d], z[d] = w[d]""",
        "right": """input x[D] param w state h[D] = 0 lift { h[d] = x[d] } combine (l, r) { h[d] = 2 * r.h[d] }
          output y[d] = 0 * h[d] + 1""",
        "bare": """state h[D] = 0, g[D] = 1
          combine (l, r) { h[d] = l.h[d] - 2 * r.h[d] * r.g[d]; g[d] = l.g[d] * exp(-r.g[d]^2) }""",
        "grouped": """dim E = 2 input x[E, D], y[D, E] param w[E, D], u state h[D, E] = 0 lift { h[d, e] = x[e, d] * y[d, e] }
          combine (l, r) { h[d, e] = sum[f] eye(e, f) * (l.h[d, f] - u * r.h[d, f] * w[f, d]) + l.h[d, 1] / E }
          output o[e, d] = h[d, e]""",
    }  # fmt: skip

    LENGTHS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 100)

    @pytest.mark.parametrize("length", LENGTHS)
    def test_all_lengths(length: int) -> None:
        """Blocks of four, eight or sixteen, up to three stages; the next test has four."""
        found = compiled(LANE, levels={31: 3, 32: 3, 100: 4}.get(length, 2))
        compare(found, tensors(found, 1, length, D=3))

    @pytest.mark.parametrize("length", [5, 16, 100])
    def test_the_very_tree(length: int) -> None:
        """Bit for bit what the PyTorch tree gives."""
        agg, _ = module(compiled(WHOLE, levels=2))
        x = torch.randint(-3, 4, (2, length)).float()
        tree, state = agg(x, return_state=True)  # a call with a state runs in PyTorch
        assert torch.equal(agg(x), tree) and state["position"].tolist() == [length] * 2

    @pytest.mark.parametrize("length", [1, 6, 17])
    def test_dense_maps_taps_and_the_prefix_before(length: int) -> None:
        found = compiled(DENSE, levels=2)
        compare(found, tensors(found, 1, length, D=2))

    @pytest.mark.parametrize("name", ODD)
    def test_rules_that_read_little(name: str) -> None:
        found = compiled(f"aggregator {name} {{ dim D {ODD[name]} associative: no }}", levels=1)
        compare(found, tensors(found, 1, 5, lanes=(2,), D=2))

    def test_benchmark() -> None:
        sys.path.insert(0, str(EXAMPLES.parent))
        from benchmarks.tree import main

        forward, backward = main(["--device", "cpu", "--shape", "1,3,2"])
        assert forward["peers"].keys() == backward["peers"].keys() == {"PyTorch tree"}
        assert forward["ms"] > 0 and backward["pass"] == "fwd+bwd"

    def test_an_lstm_cell() -> None:
        found = compiled((EXAMPLES / "pr_lstm.psm").read_text())
        compare(found, tensors(found, 1, 11, lanes=(2,)))

    def test_lanes_and_dtypes() -> None:
        """Grouped lanes, a transposed input, half precision, more lanes than a block has."""
        found = compiled(LANE)
        agg, _ = module(found)
        x, g = torch.randn(2, 4, 5, 40).transpose(1, 2), torch.randn(2, 5, 2, 40)
        w = torch.randn(4, 40)
        out = agg(x.bfloat16(), g.bfloat16(), w.bfloat16())
        wide = agg(x.bfloat16().double(), g.bfloat16().double(), w.bfloat16().double())
        assert out.dtype == torch.bfloat16 and out.shape == (2, 5, 4, 40)
        torch.testing.assert_close(out.double(), wide, rtol=1e-2, atol=1e-2)
        many = [torch.randn(1, 3, 130), torch.randn(1, 3, 130), torch.randn(130)]
        torch.testing.assert_close(agg(*many), agg(*(t.double() for t in many)).float(), rtol=1e-5, atol=1e-5)

    def test_nothing_to_do_and_what_runs_elsewhere() -> None:
        found = compiled(LANE)
        agg, _ = module(found)
        x, g, w = torch.randn(2, 0, 3, requires_grad=True), torch.randn(2, 0, 3), torch.randn(3, requires_grad=True)
        assert agg(x, g, w).shape == (2, 0, 3)
        assert not torch.autograd.grad(agg(x, g, w).sum(), [w])[0].any()
        x, g = torch.randn(1, 9, 3), torch.randn(1, 9, 3)
        whole = agg(x, g, w)
        parts = agg(x, g, w, cu_seqlens=torch.tensor([0, 9]))
        masked = agg(x, g, w, mask=torch.ones(1, 9, dtype=torch.bool))
        state, tokens = None, []
        for t in range(9):
            y, state = agg.step(state, x[:, t], g[:, t], w)
            tokens.append(y)
        for other in (parts, masked, torch.stack(tokens, 1)):
            torch.testing.assert_close(other, whole, rtol=1e-5, atol=1e-5)

    def test_as_an_operator() -> None:
        """What torch.compile sees: the same numbers, and a fake of the right shape."""
        found = compiled(DENSE, levels=2)
        agg, _ = module(found)
        values = [v.float() for v in tensors(found, 1, 5, D=2).values()]
        taps = torch.nn.functional.pad(values[0], (0, 0, 0, 0, 1, 0))[:, :5]
        inputs, params = [*values[:2], taps], values[2:]
        results = agg.operator.op(inputs, params, [], None, None, None, False)
        for a, b in zip(results, agg(*values), strict=True):
            assert torch.equal(a, b) and a.is_contiguous()
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [[mode.from_tensor(v) for v in part] for part in (inputs, params)]
            shapes = [tuple(r.shape) for r in agg.operator.op(*fakes, [], None, None, None, False)]
        assert shapes == [tuple(r.shape) for r in results]
