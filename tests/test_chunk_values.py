"""Decays over the value in the chunk kernels, alone and beside one over the key: in Triton's interpreter, as
test_chunk_kernels.py is."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted import INTERPRETED, run_interpreted

pytest.importorskip("triton")

if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    import torch
    from chunk_cases import SMALL, Data, check, check_steps, check_whole_spec, kernels, table

    import psmc

    EXAMPLES = Path(__file__).parent.parent / "examples"

    @pytest.mark.parametrize(("decay", "shift"), [(0, 0), (1, 1), (2, 0)])
    def test_odd_sizes(decay: int, shift: int) -> None:
        check(Data(1, 37, 2, 24, 20, decay, over=True).errors(kernels(table(valued=True, **SMALL), valued=True), shift))

    @pytest.mark.parametrize(("decay", "shift"), [(0, 1), (1, 0), (2, 1)])
    def test_hard_decays_packed(decay: int, shift: int) -> None:
        data = Data(1, 71, 1, 16, 24, decay, cu=[0, 1, 40, 40, 71], hard=True, over=True)
        check(data.errors(kernels(table(valued=True, **SMALL), valued=True), shift))

    def test_segments_of_time() -> None:
        made = kernels(table(valued=True, tokens=16, values=16, keys=16), valued=True)
        made.processors = 6
        try:
            assert made._split(torch.empty(0), 2, 400, 16)[0] > 1
            check(Data(1, 400, 1, 16, 16, 2, cu=[0, 10, 400], seed=1, over=True).errors(made))
        finally:
            made.processors = 1

    def test_half_and_grouped_lanes() -> None:
        check(Data(1, 33, 1, 16, 16, 2, dtype=torch.float16, over=True).errors(kernels(table(valued=True, **SMALL), valued=True)), 1e-3)
        check(Data(2, 1, 4, 16, 16, 0, grouped=True, start=False, over=True).errors(kernels(table(valued=True, **SMALL), valued=True)))

    @pytest.mark.parametrize(("decay", "shift"), [(0, 0), (0, 1), (2, 0)])
    def test_later_tokens_change_nothing(decay: int, shift: int) -> None:
        """Bitwise, also where another decay, or growth, moves a row across the bound of the product form."""
        made = kernels(table(valued=True, **SMALL), valued=True)
        q, b, c, log, start, over = (None if x is None else x.detach() for x in Data(1, 40, 1, 16, 24, decay, over=True).leaves)

        def scan(q: torch.Tensor, b: torch.Tensor, c: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
            return made.scan(q, b, c, log, start, None, shift, log_value=over)[0]

        y = scan(q, b, c, over)
        for at, spot, value in (
            (5, 3, -50.0), (17, 3, -200.0), (6, 3, 900.0), (30, 3, -torch.inf), (33, 0, 7.0), (20, 2, -3.0),
        ):  # fmt: skip
            changed = [z.clone() for z in (q, b, c, over)]
            changed[spot][:, at:] = value
            assert torch.equal(y[:, :at], scan(*changed)[:, :at]), (at, spot)

    @pytest.mark.parametrize("name", ["value_gate", "grid_gate"])
    def test_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        agg = psmc.load(EXAMPLES / f"{name}.psm")
        check_whole_spec(agg, monkeypatch)
        check_steps(agg, monkeypatch)

    FED = """
    aggregator fed {
      dim K, V
      input q[K], k[K], v[V], x[V], f
      param w[V]
      state S[K, V] = 0
      recurrence { S[i, j] = sigmoid(f) * sigmoid(x[j] + w[j]) * exp(-abs(v[j])) * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * prev.S[i, j] * x[j] + v[j]
      associative: yes
    }
    """
    NORMED = """
    aggregator normed {
      dim K, V
      input q[K], k[K], v[V]
      input g[V] in (-inf, 0]
      state S[K, V] = 0, z[K] = 0
      recurrence { S[i, j] = exp(g[j]) * S[i, j] + exp(k[i]) * v[j]; z[i] = z[i] + exp(k[i]) }
      output o[j] = (sum[i] exp(q[i]) * S[i, j]) / (sum[i] exp(q[i]) * z[i] + 1)
      associative: yes
    }
    """

    @pytest.mark.parametrize(("text", "fused"), [(FED, True), (NORMED, False)])
    def test_what_a_decay_is_made_of(text: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A decay from what enters, from what the readout reads, from a param and a number a token; and a normaliser that
        does not decay with its state, so that they are no one matrix."""
        file = tmp_path / "spec.psm"
        file.write_text(text)
        agg = psmc.load(file)
        assert [layer.fused is not None for layer in agg.rules.layers if hasattr(layer, "fused")] == (
            [True] if fused else [False, False]
        )
        check_whole_spec(agg, monkeypatch)
