"""Attention kernels against torch in fp64 and rules with attention against the oracle, in Triton's interpreter (in a
process of its own: triton must be imported with it switched on)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from interpreted import INTERPRETED, run_interpreted

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent

if not INTERPRETED:
    from attention_cases import EXAMPLE, LAYER, MASKED, THREE

    from psmc.pipeline import read_text

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

    def test_one_set_of_kernels_a_form() -> None:
        """Printed by how many sets there are and what masks them, not by rule; numbered as the combine has them."""
        for text, forward, keys in ((EXAMPLE, 1, 1), (THREE, 1, 1), (MASKED, 1, 2), (LAYER, 2, 2)):
            (found,) = read_text(text)
            assert len(re.findall(r"def attention_forward_kernel_\d", found.text)) == forward
            assert len(re.findall(r"def attention_keys_kernel_\d_\d", found.text)) == keys
            assert found.text.count("return kernels(query, keys, values") == 1
            calls = re.findall(r"= _attention\(\s*ATTENTION_\d", found.text)
            assert len(calls) == 2 * forward, "each once, in combine and in advance"
        assert found.text.count("AttentionKernels(SimpleNamespace") == 2
        assert "ATTENTION_1 = ATTENTION_KERNELS_1" in found.text

    def test_numbers_are_factors_of_the_scores() -> None:
        (found,) = read_text(EXAMPLE)
        assert "scale=1 / math.sqrt(n.D)" in found.text and "/ math.sqrt" not in found.text.split("return kernels")[0]

    # What is refused says why, in `psmc explain`.
    SCORES = "let norm[n] = sum[e] r.h[n, e]; let tilt[n] = sum[e] l.h[n, e]; let u[n, m] = sum[e] r.h[n, e] * l.h[m, e]; let v[n, m] = sum[e] r.h[n, e] * r.h[m, e]"
    WHOLE = "(sum[m] {a} * l.h[m, e] + sum[m] {b} * r.h[m, e]) / (sum[m] {c} + sum[m] {d})"
    REASONS = {
        "the exponentials above and below the fraction differ": ("exp(u[n, m])", "exp(v[n, m])", "exp(2 * u[n, m])", "exp(v[n, m])"),
        "is not one sum of query times key": ("exp(u[n, m]^3)", "exp(v[n, m])") * 2,
        "the sets of tokens have scores that are shifted differently": (
            ("exp(u[n, m] - norm[n])", "exp(v[n, m])") * 2
        ),
        "the sets of tokens are asked with different queries": ("exp(2 * u[n, m])", "exp(v[n, m])") * 2,
        "reads more than the places of two tokens": (
            ("exp(where(tilt[m] > 0, u[n, m], -inf))", "exp(v[n, m])") * 2
        ),
        "what it divides by is not the sum of its own weights": ("exp(u[n, m])", "exp(v[n, m])", "exp(u[n, m])", "exp(v[n, m]) * tilt[m]"),
        "a mask reads the size of W": ("exp(where(m < W, u[n, m], -inf))", "exp(v[n, m])") * 2,
    }  # fmt: skip

    @pytest.mark.parametrize("reason", REASONS)
    def test_reasons(reason: str) -> None:
        a, b, c, d = REASONS[reason]
        head = "aggregator other { dim N, E, W input x[N, E], y[W] state h[N, E] = 0 lift { h[n, e] = x[n, e] + sum[w] y[w] }"
        value = WHOLE.format(a=a, b=b, c=c, d=d)
        (found,) = read_text(f"{head} combine (l, r) {{ {SCORES} h[n, e] = {value} }} associative: no }}")
        told = [why for name, why in found.plan.refused if name == "fused attention"]
        assert len(told) == 1 and reason in told[0]
        assert "attention_forward_kernel" not in found.text

else:
    import torch
    from attention_cases import EXAMPLE, LAYER, MASKED, THREE, compare, draw, kernels
    from torch import Tensor

    import psmc
    from benchmarks.interpreted_bf16 import bf16
    from psmc import reference

    NEAR = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 8e-3}

    @pytest.fixture(autouse=True)
    def bfloat16() -> Iterator[None]:
        with bf16():
            yield

    def held_to_the_oracle(
        text: str, folder: Path, length: int, lanes: tuple[int, ...] = (), dtype: torch.dtype = torch.float32,
        batch: int = 1, **sizes: int,
    ) -> None:  # fmt: skip
        """Outputs and all gradients of a call; tokens, too, one by one."""
        (found,) = psmc.pipeline.read_text(text)
        file = folder / f"{found.agg.name}.psm"
        file.write_text(text)
        agg = psmc.load(file)
        made = torch.Generator().manual_seed(length)
        sizes |= {d.name: d.size for d in found.agg.dims if d.size is not None}
        drawn: dict[str, Tensor] = {}
        for t in (*found.agg.leaf_inputs, *found.agg.params):
            is_input = t in found.agg.leaf_inputs
            shape = ((batch, length, *lanes) if is_input else ()) + tuple(sizes[d] for d in t.dims)
            drawn[t.name] = ((0.7 if is_input else 0.4) * torch.randn(shape, generator=made)).to(dtype).requires_grad_()
        wide = {k: v.detach().double().requires_grad_() for k, v in drawn.items()}
        inputs = {t.name: wide[t.name] for t in found.agg.leaf_inputs}
        params = {t.name: wide[t.name] for t in found.agg.params}
        expected = tuple(reference.fold(found.agg, inputs, params)[0].values())
        out = agg(**drawn)
        out = out if isinstance(out, tuple) else (out,)
        weights = [torch.randn(y.shape, generator=made, dtype=torch.float64) for y in expected]
        near = NEAR[dtype]
        sides = []
        for results, tensors in ((out, drawn), (expected, wide)):
            total = sum((y.double() * w).sum() for y, w in zip(results, weights, strict=True))
            sides.append((*results, *torch.autograd.grad(total, list(tensors.values()), allow_unused=True)))
        for mine, right in zip(*sides, strict=True):
            right = torch.zeros(()) if right is None else right
            mine = torch.zeros(()) if mine is None else mine
            scale = right.abs().max().clamp(min=1e-3)
            assert ((mine.double() - right).abs().max() / scale).item() < near
        with torch.no_grad():
            state, tokens = None, []
            for t in range(length):
                y, state = agg.step(state, *(drawn[k][:, t] for k in inputs), *(drawn[k] for k in params))
                tokens.append(y if isinstance(y, tuple) else (y,))
            for steps, whole in zip(zip(*tokens, strict=True), out, strict=True):
                torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=near, atol=near)

    @pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 40])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_token_counts(tokens: int, dtype: torch.dtype) -> None:
        (one,) = kernels()
        errors = compare(one, draw((2,), tokens, (tokens, tokens), 24, 20, dtype))
        assert max(errors) < NEAR[dtype], errors

    def test_fp16() -> None:
        (one,) = kernels()
        errors = compare(one, draw((1,), 17, (17, 5), 8, 20, torch.float16))
        assert max(errors) < NEAR[torch.float16], errors

    @pytest.mark.parametrize(("tokens", "sets"), [(1, (5, 0)), (3, (1, 70)), (37, (40, 33)), (70, (3, 2)), (9, (0, 9))])
    def test_sets_of_other_sizes(tokens: int, sets: tuple[int, int]) -> None:
        (one,) = kernels()
        assert max(compare(one, draw((2,), tokens, sets, 9, 17))) < 1e-5

    def test_three_sets_and_widths() -> None:
        (one,) = kernels(THREE)
        for key, value, lead in ((1, 3, ()), (256, 16, (1,)), (16, 200, (2, 1))):
            assert max(compare(one, draw(lead, 5, (4, 6, 5), key, value))) < 2e-5

    def test_large_scores() -> None:
        (one,) = kernels()
        assert max(compare(one, draw((2,), 20, (20, 20), 8, 8), scale=60.0)) < 1e-4

    def test_views_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
        """A level's operands: every other node of a buffer, heads inside, keys of all batches the same."""
        (one,) = kernels()
        made = torch.Generator().manual_seed(0)
        buffer = torch.randn(2, 6, 7, 3, 8, generator=made)  # [B, nodes, tokens, heads, width]
        left, right = (buffer[:, side::2].transpose(2, 3) for side in (0, 1))
        shared = torch.randn(7, 8, generator=made)
        tensors = [right, left, shared.expand(2, 3, 3, 7, 8), left, right]

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("copied")

        expected = [x.clone() for x in tensors]
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "contiguous", refuse)
            patch.setattr(Tensor, "clone", refuse)
            out = one(tensors[0], tensors[1:3], tensors[3:], 0.3)
        assert torch.equal(out, one(expected[0], expected[1:3], expected[3:], 0.3))
        leaves = [x[:1].detach().requires_grad_() for x in tensors]
        assert max(compare(one, leaves, 0.3)) < 1e-5

    def test_views_that_are_copied() -> None:
        """More leading axes than the kernels follow, a last axis with gaps."""
        (one,) = kernels()
        made = torch.Generator().manual_seed(0)
        four = torch.randn(5, 2, 1, 2, 2, 4, 8, generator=made).permute(0, 4, 2, 3, 1, 5, 6)
        gaps = torch.randn(4, 2, 1, 2, 2, 4, 16, generator=made)[..., ::2]
        assert max(compare(one, [x[:, 0].detach().requires_grad_() for x in (*four[:3], *gaps[:2])], 0.3)) < 1e-5

    def test_leading_axes_broadcast() -> None:
        (one,) = kernels()
        shapes = ((2, 1, 4, 8), (1, 3, 4, 8), (4, 8), (3, 4, 8), (2, 1, 4, 8))
        tensors = [torch.randn(s, requires_grad=True) for s in shapes]
        full = [x.detach().expand(2, 3, 4, 8).clone().requires_grad_() for x in tensors]
        mine, right = (one(t[0], t[1:3], t[3:], 0.5) for t in (tensors, full))
        assert torch.equal(mine, right)
        found, wanted = torch.autograd.grad(mine.sum(), tensors), torch.autograd.grad(right.sum(), full)
        for x, a, b in zip(tensors, found, wanted, strict=True):
            torch.testing.assert_close(a, b.sum_to_size(x.shape))

    def test_what_lies_beyond_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
        """Buffers of NaN: every element of a result is written; rows and columns around the operands are NaN, too."""
        (one,) = kernels()
        made = torch.Tensor.new_empty

        def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
            return made(self, *args, **kwargs).fill_(float("nan"))

        monkeypatch.setattr(Tensor, "new_empty", poisoned)
        monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: torch.full_like(x, float("nan"), **kwargs))
        tensors = []
        for x in draw((2,), 19, (18, 5), 12, 20):
            frame = torch.full((4, x.shape[1] + 20, x.shape[2] + 20), float("nan"))
            frame[1:3, 7 : 7 + x.shape[1], 4 : 4 + x.shape[2]] = x.detach()
            tensors.append(frame[1:3, 7 : 7 + x.shape[1], 4 : 4 + x.shape[2]].requires_grad_())
        assert max(compare(one, tensors)) < 1e-5

    def test_which_operands_it_takes() -> None:
        (one,) = kernels()
        wide = torch.zeros(2, 257)
        assert one.takes([wide[:, :256]] * 5) and not one.takes([wide] * 5) and not one.takes([wide[:, :0]] * 5)
        assert not one.takes([wide[:, :8].double()] * 5)
        assert not one.takes([wide[:, :8].half(), *[wide[:, :8].double()] * 4])

    def test_operands_of_different_dtypes() -> None:
        """What a rule projects is in bf16 in a call in bf16, what it takes from a state as it is, in fp32."""
        (one,) = kernels()
        tensors = draw((1,), 6, (6, 6), 8, 12)
        for at in (0, 2, 4):
            mixed = [x.detach().bfloat16().requires_grad_() if n == at else x for n, x in enumerate(tensors)]
            assert max(compare(one, mixed)) < NEAR[torch.bfloat16]
            assert one(*mixed[:1], mixed[1:3], mixed[3:]).dtype == torch.float32

    def test_compiled_with_a_state() -> None:
        """A call that takes or gives a state is traced, and each attention in it is one node."""
        agg = psmc.load(ROOT / "examples" / "attention_combine.psm")
        tensors = [torch.randn(s, requires_grad=True) for s in ((1, 3, 2, 4), (4, 4), (4, 4), (4, 4))]

        def call(*tensors: Tensor) -> Tensor:
            out: Tensor = agg(*tensors, return_state=True)[0]
            return out

        whole = torch.compile(call, fullgraph=True, backend="aot_eager")
        found, wanted = (f(*tensors) for f in (whole, call))
        torch.testing.assert_close(found, wanted)
        sides = (torch.autograd.grad(y.square().sum(), tensors) for y in (found, wanted))
        for a, b in zip(*sides, strict=True):
            torch.testing.assert_close(a, b)

    def test_once_differentiable_and_only_what_is_wanted() -> None:
        (one,) = kernels()
        q, k0, k1, v0, v1 = draw((1,), 4, (4, 4), 8, 8)
        out = one(q, [k0.detach(), k1], [v0.detach(), v1])
        weights = torch.ones_like(out, requires_grad=True)
        (gradient,) = torch.autograd.grad(out, [v1], weights, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.sum().backward()
        found = one.backward(torch.ones_like(out), [q, k0, v0, k1, v1], out, torch.zeros(1, 4), 1.0, "tf32x3",
                             [False, False, False, False, True])  # fmt: skip
        assert found[1] is None and found[2] is None and found[3] is not None

    def test_bit_for_bit_the_same_again() -> None:
        (one,) = kernels()
        first, second = (draw((1,), 33, (33, 20), 16, 16) for _ in range(2))
        runs = []
        for tensors in (first, second):
            out = one(tensors[0], tensors[1:3], tensors[3:])
            runs.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_no_rows() -> None:
        (one,) = kernels()
        for lead, tokens in (((0,), 3), ((2,), 0)):
            tensors = draw(lead, tokens, (3, 3), 8, 8)
            out = one(tensors[0], tensors[1:3], tensors[3:])
            assert out.shape == (*lead, tokens, 8)
            assert not any(g.any() for g in torch.autograd.grad(out.sum(), tensors))

    @pytest.mark.parametrize(("length", "tokens"), [(1, 3), (2, 1), (7, 5), (2, 17)])
    def test_the_example(length: int, tokens: int, tmp_path: Path) -> None:
        held_to_the_oracle(EXAMPLE, tmp_path, length, batch=1 + (length == 2), N=tokens, D=6)

    def test_inputs_of_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The states stay in fp32, products are as precise as the inputs."""
        agg = psmc.load(ROOT / "examples" / "attention_combine.psm")
        module, seen = agg.rules.combine.__globals__, []
        attention = module["_attention"]
        monkeypatch.setitem(module, "_attention", lambda *a, **k: seen.append((a[2].dtype, a[4][0].dtype)) or attention(*a, **k))
        for dtype in (torch.float16, torch.bfloat16):
            _, state = agg(*(torch.ones(s, dtype=dtype) for s in ((1, 2, 1, 2), (2, 2), (2, 2), (2, 2))), return_state=True)
            assert state["h.root.1"].dtype == torch.float32
        assert seen == [(torch.float32,) * 2, (torch.bfloat16,) * 2]
        held_to_the_oracle(EXAMPLE, tmp_path, 4, N=4, D=8, dtype=torch.bfloat16)
        held_to_the_oracle(EXAMPLE, tmp_path, 3, N=4, D=8, dtype=torch.float16)

    @pytest.mark.parametrize(("length", "tokens"), [(2, 9), (4, 4)])
    def test_masks(length: int, tokens: int, tmp_path: Path) -> None:
        held_to_the_oracle(MASKED, tmp_path, length, N=tokens, E=5)

    def test_every_argument_of_a_call() -> None:
        """Packed sequences, masks, resets and a state: outputs, gradients and the state after, beside torch's in fp64."""
        agg = psmc.load(ROOT / "examples" / "attention_combine.psm")
        made = torch.Generator().manual_seed(0)
        drawn = [torch.randn(s, generator=made) / 2 for s in ((1, 5, 2, 4), (4, 4), (4, 4), (4, 4))]
        flags = torch.tensor([[True, True, False, True, True]]), torch.tensor([[False, False, False, True, False]])
        begun = agg(*drawn, return_state=True)[1]
        calls = ({"cu_seqlens": torch.tensor([0, 3, 3, 5])}, {"mask": flags[0], "reset": flags[1]}, {"initial_state": begun})
        for arguments in calls:
            sides = []
            for dtype in (torch.float32, torch.float64):
                tensors = [x.to(dtype, copy=True).requires_grad_() for x in drawn]
                given = {k: {n: y.to(dtype) if y.is_floating_point() else y for n, y in x.items()} if isinstance(x, dict) else x
                         for k, x in arguments.items()}  # fmt: skip
                out, state = agg(*tensors, return_state=True, **given)
                sides.append([out, *state.values(), *torch.autograd.grad(out.square().sum(), tensors)])
            for mine, right in zip(*sides, strict=True):
                torch.testing.assert_close(mine.double(), right.double(), rtol=1e-5, atol=1e-5)

    def test_three_sets_in_a_rule(tmp_path: Path) -> None:
        held_to_the_oracle(THREE, tmp_path, 3, H=2, N=3, M=4, E=5, V=3)

    def test_heads_two_attentions_and_lanes(tmp_path: Path) -> None:
        held_to_the_oracle(LAYER, tmp_path, 3, lanes=(2,), N=3, D=4, E=3)

    def test_benchmark() -> None:
        sys.path.insert(0, str(ROOT))
        from benchmarks.attention import main

        rows = main(["--smoke"])
        assert [r["spec"] for r in rows] == ["attention_combine"] * 2 + ["two sets"] * 2
        assert all(r["ms"] > 0 and len(r["peers"]) == 1 for r in rows)

    def test_as_an_operator() -> None:
        """What torch.compile sees: the same numbers and gradients, and a fake of the right shape."""
        (one,) = kernels()
        q, k0, k1, v0, v1 = draw((2, 3), 5, (4, 6), 8, 7)
        flat = [q, k0, v0, k1, v1]
        torch.library.opcheck(one.op, (flat, 0.5, "tf32x3"), test_utils=("test_schema", "test_faketensor"))
        out, mine = one.op(flat, 0.5, "tf32x3")[0], one(q, [k0, k1], [v0, v1], 0.5)
        assert torch.equal(out, mine)
        pairs = zip(torch.autograd.grad(out.sum(), flat), torch.autograd.grad(mine.sum(), flat), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
