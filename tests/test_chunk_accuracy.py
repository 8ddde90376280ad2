"""What rounding costs the chunk kernels, in Triton's interpreter. bf16: errors of outputs and of every gradient against the
oracle in fp64 on exact data, over those that the oracle makes when its tensors, and results, are rounded to bf16."""

from __future__ import annotations

import pytest
from interpreted import INTERPRETED, run_interpreted

pytest.importorskip("triton")

if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    import functools
    from pathlib import Path

    import torch

    import psmc
    from benchmarks.accuracy import called, derived, errors, lower, oracle
    from benchmarks.chunk_data import PARAMS, Shape, inputs, load
    from benchmarks.interpreted_bf16 import bf16

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("gla", "iid"), ("rwkv6", "gates"), ("mamba2", "iid"), ("retnet", "repeated"), ("value_gate", "gates"),
         ("grid_gate", "iid")],
    )  # fmt: skip
    def test_bf16(name: str, kind: str, tmp_path: Path) -> None:
        shape, fixed = Shape(1, 96, 1, 32, 32, "float32"), PARAMS.get(name, ())
        agg = load(name, tmp_path)
        exact = {k: x.float() for k, x in inputs(name, shape, kind).items()}
        rounded = lower(exact, fixed, torch.bfloat16)
        weight = torch.randn(1, 96, 1, 32, generator=torch.Generator().manual_seed(9))
        right, weight = oracle(agg, fixed, exact, weight), weight.bfloat16().float()
        best = lower(oracle(agg, fixed, {k: x.float() for k, x in rounded.items()}, weight), fixed, torch.bfloat16)
        with bf16():
            found = derived(functools.partial(called, agg), rounded, weight)
        ours, least = errors(found, right), errors(best, right)
        assert all(ours[k] <= 1.5 * least[k] for k in ours), {k: (ours[k], least[k]) for k in ours}

    STEEP = """
    aggregator steep {
      dim K, V
      input q[K], k[K], v[V], w%s
      state S[K, V] = 0
      recurrence { S[i, j] = exp(-exp(w%s)) * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]
      associative: yes
    }
    """

    @pytest.mark.parametrize(("dims", "index", "wide"), [("", "", ()), ("[K]", "[i]", (32,)), ("[V]", "[j]", (24,))])
    def test_steep_gates_in_fp32(dims: str, index: str, wide: tuple[int, ...], tmp_path: Path) -> None:
        """Logs of decays from 1e-3 to 50, each the slope of its gate: what should cancel in their gradients is multiplied."""
        file = tmp_path / "steep.psm"
        file.write_text(STEEP % (dims, index))
        agg, made = psmc.load(file), torch.Generator().manual_seed(0)
        q, k, v, weight = (torch.randn(1, 150, 1, n, generator=made) for n in (32, 32, 24, 24))
        w = torch.log(10 ** (torch.rand(1, 150, 1, *wide, generator=made) * 4.7 - 3))
        exact = {"q": q, "k": k, "v": v, "w": w}
        found = errors(derived(functools.partial(called, agg), exact, weight), oracle(agg, (), exact, weight))
        assert max(found.values()) <= 1e-5, found
