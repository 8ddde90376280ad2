"""Printed pointwise kernels against the oracle, in Triton's interpreter (in a process of its own: triton must be
imported with it switched on)."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted import INTERPRETED, run_interpreted

pytest.importorskip("triton")

if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    import importlib.util
    import itertools
    import tempfile

    import torch
    from pointwise_cases import COUNTED, Case, example, kernels, scan_rows, spec

    from psmc.codegen.triton_expr import helper_texts, print_function
    from psmc.ir import OPS, Assign, Block, Op, Ref
    from psmc.reference.evaluate import Env, evaluate

    scan_rows()
    FOLDER = Path(tempfile.mkdtemp(prefix="psmc_triton_ops_"))

    REAL = ["linear_recurrence", "logsumexp", "affine2x2", "cumsum", "welford", "softmax_average"]
    BONUS = """
    aggregator bonus {
      dim H, D
      input r[H, D], k[H, D], w[H] in (-inf, 0]
      param u[D]
      state a[H] = 1, s[H, D] = 0
      lift { a[i] = exp(w[i]); s[i, j] = k[i, j] }
      combine (l, r) { a[i] = l.a[i] * r.a[i]; s[i, j] = r.a[i] * l.s[i, j] + r.s[i, j] }
      output o[i, j] = r[i, j] * (prev.s[i, j] + u[j] * k[i, j]) + s[i, j]^2
      associative: yes
    }"""
    TAPPED = """
    aggregator tapped {
      input x, w in (-1, 1)
      state a = 1, s = 0
      lift { a = w; s = 0.5 * x + 0.25 * x{-1} - x{-3} * x }
      combine (l, r) { a = l.a * r.a; s = r.a * l.s + r.s }
      output y = s * x{-2}
      associative: yes
    }"""
    STARTED = """
    aggregator started {
      input x, w in (0, 1)
      state s = 2
      recurrence { s = w * s + x }
      output y = s, before = prev.s * x
      associative: yes
    }"""

    @pytest.mark.parametrize("name", [*REAL, "mingru", "ema", "rg_lru", "hgrn"])
    def test_plain(name: str) -> None:
        Case(example(name), 1, 21, lanes=(2,)).check()

    @pytest.mark.parametrize("name", REAL[:-1])
    def test_initial_state_masks_and_resets(name: str) -> None:
        Case(example(name), 2, 19, lanes=(1,), initial=True, masked=True, resets=True).check()
        Case(example(name), 1, 18, lanes=(1,), masked=True, resets=True, seed=1).check()

    @pytest.mark.parametrize("name, initial", [("linear_recurrence", True), ("logsumexp", False)])
    def test_packed_sequences(name: str, initial: bool) -> None:
        cu = [0, 1, 1, 18, 22]
        Case(example(name), 1, 22, lanes=(1,), cu=cu, initial=initial).check()
        Case(example(name), 1, 22, lanes=(1,), cu=cu, initial=initial, masked=True, resets=True).check()

    @pytest.mark.parametrize("text", [BONUS, TAPPED, STARTED])
    def test_what_a_readout_and_a_lift_may_read(text: str) -> None:
        agg = spec(text)
        Case(agg, 1, 35, lanes=(2,), initial=agg.inputs[0].name != "x").check()
        Case(agg, 1, 35, lanes=(), masked=True, resets=True).check()

    def test_an_int_component_in_staged_scans() -> None:
        agg = spec(COUNTED)
        Case(agg, 1, 35, lanes=(2,)).check()
        Case(agg, 2, 19, lanes=(1,), initial=True, masked=True, resets=True).check()
        Case(agg, 1, 22, lanes=(1,), cu=[0, 1, 1, 18, 22], masked=True, resets=True).check()
        Case(agg, 1, 37, lanes=(1,), masked=True, resets=True).check(split=True)

    def test_complex() -> None:
        Case(example("lru"), 1, 19, lanes=(2,), initial=True).check()
        Case(example("lru"), 2, 5, lanes=(1,), masked=True, resets=True).check()

    def test_lanes_that_some_tensors_lack() -> None:
        lanes = {"a": (1, 2), "h": (2, 4), "*": (2, 4)}
        Case(example("linear_recurrence"), 1, 9, lanes=lanes, initial=True).check()
        Case(example("hgrn"), 2, 5, lanes={"fgate": (1,), "x": (4,), "*": (4,)}, param_lanes=()).check()
        Case(example("hgrn"), 1, 5, lanes=(2, 3), param_lanes=(1, 3)).check()
        Case(spec(BONUS), 1, 5, lanes={"r": (2,), "k": (2,), "w": (1,), "*": (2,)}, param_lanes=(1,)).check()

    @pytest.mark.parametrize("name", ["linear_recurrence", "logsumexp", "cumsum"])
    @pytest.mark.parametrize("flags", [False, True])
    def test_segments(name: str, flags: bool) -> None:
        Case(example(name), 1, 37, lanes=(1,), initial=flags, masked=flags, resets=flags).check(split=True)

    def test_segments_of_packed_sequences() -> None:
        Case(example("linear_recurrence"), 1, 41, lanes=(1,), cu=[0, 0, 3, 37, 41]).check(split=True)
        Case(spec(STARTED), 1, 41, lanes=(1,), cu=[0, 3, 41], masked=True, resets=True).check(split=True)

    @pytest.mark.parametrize("length", [0, 1, 2])
    def test_short_sequences(length: int) -> None:
        Case(example("linear_recurrence"), 2, length, lanes=(2,), initial=True).check()
        Case(example("logsumexp"), 1, length, lanes=(2,)).check()

    def test_empty() -> None:
        Case(example("linear_recurrence"), 0, 3, lanes=(2,)).check()
        Case(example("linear_recurrence"), 1, 3, lanes=(0,)).check()

    def test_half_precision() -> None:
        Case(example("mingru"), 1, 17, lanes=(1,), dtype=torch.bfloat16).check(tolerance=2e-2)

    @pytest.mark.parametrize("name", ["linear_recurrence", "logsumexp", "lru", "segmented_sum"])
    def test_steps_are_the_scan(name: str) -> None:
        case = Case(example(name), 3, 4, lanes=(2,), initial=True)
        outputs, final, _ = case.oracle()
        found = kernels(case.agg)
        order = torch.tensor([2, 0, 1])
        state = [case._cast(case.initial[n], torch.float32)[order] for n in case.structure.live]
        slots = torch.argsort(order)
        for t in range(4):
            inputs = [case._cast(case.inputs[x.name][:, t]) for x in case.agg.leaf_inputs]
            tensors = [*inputs, *(case._cast(p) for p in case.params.values())]
            named = dict(zip(case.structure.live, state, strict=True))
            here, _ = found.steps(len(inputs)).first(named, tensors, slots, True)
            here = here if isinstance(here, tuple) else (here,)
            for got, want in zip(here, outputs.values(), strict=True):
                torch.testing.assert_close(got.to(want.dtype), want[:, t].detach(), rtol=1e-5, atol=1e-5)
        for got, name in zip(state, case.structure.live, strict=True):
            torch.testing.assert_close(got[slots].to(final[name].dtype), final[name].detach(), rtol=1e-5, atol=1e-5)

    def test_two_exponentials_below_their_larger_exponent_are_one(tmp_path) -> None:
        """exp(a - max(a, b)) and exp(b - max(a, b)), whatever a and b are called and made of, at all kinds of numbers."""
        p, q, r = (Ref("input", n, ()) for n in "pqr")
        a, b = Op("add", (p, q)), Op("mul", (r, r))
        top = Op("max", (a, b))
        rows = [Op("exp", (Op("sub", (x, top)),)) for x in (a, b)] + [Op("exp", (Op("sub", (r, top)),))]
        block = Block(results=tuple(Assign(n, (), e) for n, e in zip("xyz", rows, strict=True)))
        function = print_function("lane", block, [("input", n, 0) for n in "pqr"])
        assert function.text.count("lane_left_of(") == function.text.count("lane_right_of(") == 1
        assert function.text.count("lane_exp_sum_2(") == 1  # neither operand
        inf = float("inf")
        grid = [-inf, -3.0, -1e-3, 0.0, 1.0, 1.5, 60.0, inf, float("nan")]
        points = torch.tensor(list(itertools.product(grid, repeat=3)), dtype=torch.float64)
        size = 1 << (len(points) - 1).bit_length()
        points = torch.cat([points, points[:1].expand(size - len(points), -1)]).float()
        text = "".join(f"@triton.jit\n{t}\n" for t in (*helper_texts([function]), function.text))
        text += "@triton.jit\ndef run(i, o, N: tl.constexpr):\n    n = tl.arange(0, N)\n"
        text += "    x, y, z = lane(tl.load(i + n), tl.load(i + N + n), tl.load(i + 2 * N + n))\n"
        text += "".join(f"    tl.store(o + {k} * N + n, {v})\n" for k, v in enumerate("xyz"))
        (tmp_path / "pair.py").write_text(f"import triton\nimport triton.language as tl\n\n{text}")
        found = importlib.util.spec_from_file_location("pair", tmp_path / "pair.py")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        out = torch.empty(3, size)
        module.run[(1,)](points.T.contiguous(), out, size)
        env = Env({("input", n, 0): points[:, k].double() for k, n in enumerate("pqr")}, {})
        lost = torch.isnan(evaluate(top, env, ()))  # then a NaN is carried on anyway
        for got, row in zip(out, rows, strict=True):
            want = torch.where(lost & torch.isnan(got), float("nan"), evaluate(row, env, ()))
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-37, equal_nan=True)

    SAMPLES = [-30.0, -2.5, -1.0, -0.3, -1e-4, 0.0, 1e-4, 0.3, 1.0, 2.5, 30.0]
    POSITIVE = {"log", "sqrt", "rsqrt"}

    @pytest.mark.parametrize("op", [o for o, info in OPS.items() if info.kind(("real",) * info.arity) == "real"])
    def test_operators(op: str) -> None:
        """Each operator's Triton text against the oracle in fp64, over a grid of operands."""

        names = "abc"[: OPS[op].arity]
        expr = Op(op, tuple(Ref("input", n, ()) for n in names))
        block = Block(results=(Assign("o", (), expr),))
        function = print_function("lane", block, [("input", n, 0) for n in names])
        text = "".join(f"@triton.jit\n{t}\n" for t in (*helper_texts([function]), function.text))
        loads = "".join(f"    {n} = tl.load(p + {k} * N + o)\n" for k, n in enumerate(names))
        text += f"@triton.jit\ndef run(p, q, N: tl.constexpr):\n    o = tl.arange(0, N)\n{loads}"
        text += f"    tl.store(q + o, lane({', '.join(names)}))\n" if function.results else ""
        if not function.results:  # the imaginary part of a real
            assert op == "imag" and function.constants == (("o", "0.0"),)
            return
        grid = [x for x in SAMPLES if x > 0 or op not in POSITIVE]
        grid = [x + 1.0001 for x in grid if x > -1] if op == "log1p" else grid
        points = torch.tensor(list(itertools.product(grid, repeat=len(names))), dtype=torch.float64)
        size = 1 << (len(points) - 1).bit_length()
        points = torch.cat([points, points[:1].expand(size - len(points), -1)]).float()
        file = FOLDER / f"{op}.py"
        file.write_text(f"import triton\nimport triton.language as tl\n\n{text}")
        found = importlib.util.spec_from_file_location(op, file)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        out = torch.empty(size)
        module.run[(1,)](points.T.contiguous(), out, size)
        values = {("input", n, 0): points[:, k].double() for k, n in enumerate(names)}
        want = evaluate(expr, Env(values, {}), ())
        kept = torch.isfinite(want) & (want.abs() < 1e30)
        torch.testing.assert_close(out.double()[kept], want[kept], rtol=1e-5 if op == "pow" else 3e-6, atol=1e-37)
        assert torch.equal(torch.isnan(out), torch.isnan(want))
