"""The chunk kernels against a sequential loop, in Triton's interpreter (in a process of its own: triton must be
imported with it switched on)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

else:
    import torch
    from chunk_cases import Data, kernels, table

    import psmc

    EXAMPLES = Path(__file__).parent.parent / "examples"
    SMALL = {"tokens": 32, "values": 16, "keys": 16}

    def check(errors: dict[str, float], bound: float = 3e-6) -> None:
        assert max(errors.values()) <= bound, errors  # also fails on nan

    @pytest.mark.parametrize("decay", [0, 1, 2])
    @pytest.mark.parametrize("shift", [0, 1])
    def test_lengths_and_odd_sizes(decay: int, shift: int) -> None:
        check(Data(1, 37, 2, 24, 20, decay).errors(kernels(table(**SMALL)), shift))

    @pytest.mark.parametrize("decay", [1, 2])
    @pytest.mark.parametrize("shift", [0, 1])
    def test_hard_decays_packed(decay: int, shift: int) -> None:
        data = Data(1, 71, 1, 16, 16, decay, cu=[0, 1, 40, 40, 71], hard=True)
        check(data.errors(kernels(table(**SMALL)), shift))

    @pytest.mark.parametrize("decay", [0, 1, 2])
    def test_segments_of_time(decay: int) -> None:
        made = kernels(table(tokens=16, values=16, keys=16))
        made.processors = 6
        try:
            assert made._split(torch.empty(0), 2, 400, 16)[0] > 1
            check(Data(1, 400, 1, 16, 16, decay, cu=[0, 10, 400] if decay else None, seed=1).errors(made))
        finally:
            made.processors = 1

    def test_one_token_and_grouped_lanes() -> None:
        check(Data(2, 1, 4, 16, 16, 1, grouped=True).errors(kernels(table(**SMALL))))
        check(Data(1, 33, 2, 16, 16, 2, grouped=True, start=False).errors(kernels(table(**SMALL))))

    @pytest.mark.parametrize("decay", [1, 2])
    def test_half(decay: int) -> None:
        """The interpreter has no bfloat16; here products are exact."""
        check(Data(1, 33, 1, 16, 16, decay, dtype=torch.float16).errors(kernels(table(**SMALL))), 1e-3)

    @pytest.mark.parametrize("decay", [1, 2])
    def test_later_tokens_change_nothing(decay: int) -> None:
        """Bitwise, also where another decay moves a row across the bound of the product form."""
        made = kernels(table(**SMALL))
        q, b, c, log, start = (x.detach().clone() for x in Data(1, 40, 1, 16, 16, decay).leaves)
        y, _ = made.scan(q, b, c, log, start)
        for at, spot, value in ((5, 3, -50.0), (17, 3, -200.0), (33, 0, 7.0), (9, 1, 9.0), (20, 2, -3.0)):
            changed = [z.clone() for z in (q, b, c, log)]
            changed[spot][:, at:] = value
            z, _ = made.scan(*changed, start)
            assert torch.equal(y[:, :at], z[:, :at]), (at, spot)

    def test_run_to_run() -> None:
        data = Data(1, 33, 1, 16, 16, 2)
        first, second = (data._call(kernels(table(**SMALL)).scan, 0, 1.0) for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first)

    SPECS = ["gla", "mamba2", "retnet", "rwkv6", "linear_attention", "mlstm", "hgrn2", "gated_rfa", "value_gate", "two_writes"]

    def inputs(agg: psmc.Aggregator, length: int, packed: bool, seed: int = 0):
        """Tensors by name for K 16, V 24 and two lanes; a state of its own for every sequence."""
        made = torch.Generator().manual_seed(seed)
        spec = agg.spec
        sizes = dict(zip(spec.dims, (16, 24), strict=True))
        x = {}
        for slot in (*spec.inputs, *spec.params):
            lead = (1 if packed else 2, length, 2) if slot in spec.inputs else (2,)
            x[slot.name] = torch.randn(*lead, *(sizes[d] for d in slot.dims), generator=made)
        for name in {"g", "A"} & x.keys():
            x[name] = -x[name].abs()
        for name in {"dt"} & x.keys():
            x[name] = x[name].abs()
        for name in {"gamma"} & x.keys():
            x[name] = torch.sigmoid(x[name])
        for name in {"B", "C"} & x.keys():  # one group of heads
            x[name] = x[name][:, :, :1].clone()
        state = {k: 0.5 * torch.randn(v.shape, generator=made) for k, v in agg.init_state(2, 2, sizes=sizes).items()}
        return x, {k: v.abs() if k == "z" else v for k, v in state.items()}

    def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[object]:
        """What each call of a method returned."""
        method, returned = getattr(owner, name), []

        def call(*args: object) -> object:
            returned.append(method(*args))
            return returned[-1]

        monkeypatch.setattr(owner, name, call)
        return returned

    @pytest.mark.parametrize("name", SPECS)
    def test_whole_specs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A generated module with its kernels against the same module without them, which others hold to the oracle:
        masks, restarts, packing, states in and out, all gradients."""
        agg = psmc.load(EXAMPLES / f"{name}.psm")
        kept = agg.rules.matrices
        launched = counted(monkeypatch, kept, "forward"), counted(monkeypatch, kept, "backward")
        for packed, flagged in ((False, False), (True, True)):
            x, state = inputs(agg, 21, packed)
            made = torch.Generator().manual_seed(5)
            call = {"cu_seqlens": torch.tensor([0, 8, 21])} if packed else {}
            shape = (1, 21) if packed else (2, 21)
            if flagged:
                call |= {
                    "mask": torch.rand(shape, generator=made) < 0.8,
                    "reset": torch.rand(shape, generator=made) < 0.2,
                }
            found = []
            for dtype, kernels_too in ((torch.float32, True), (torch.float64, False)):
                leaves = {k: v.to(dtype).requires_grad_() for k, v in x.items()}
                begin = {k: v.to(dtype).requires_grad_() for k, v in state.items()}
                if not kernels_too:
                    del agg.rules.matrices
                try:
                    out, end = agg(**leaves, initial_state=begin, return_state=True, **call)
                finally:
                    agg.rules.matrices = kept
                total = sum((v * (1 + torch.arange(v.numel()).view(v.shape) % 3)).sum() for v in (out, *end.values()))
                tensors = {**leaves, **{f"state {k}": v for k, v in begin.items()}}
                grads = torch.autograd.grad(total, list(tensors.values()))
                found.append({"out": out, **end, **dict(zip(tensors, grads, strict=True))})
            errors = {k: float((found[0][k] - v).detach().norm() / v.detach().norm()) for k, v in found[1].items()}
            check(errors, 2e-5)
        assert all(n and None not in n for n in launched)

    @pytest.mark.parametrize("name", ["gla", "mamba2", "rwkv6", "linear_attention"])
    def test_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Token by token, in place, in rows named by slots."""
        agg = psmc.load(EXAMPLES / f"{name}.psm")
        x, state = inputs(agg, 5, False)
        params = {s.name: x.pop(s.name) for s in agg.spec.params}
        out, end = agg(**x, **params, initial_state=state, return_state=True)
        rows = {k: torch.zeros(4, *v.shape[1:]).index_copy(0, torch.tensor([3, 1]), v) for k, v in state.items()}
        before = {k: v.clone() for k, v in rows.items()}
        launched = counted(monkeypatch, agg.rules.matrices, "step")
        for t in range(5):
            y = agg.step_(rows, **{k: v[:, t] for k, v in x.items()}, **params, slots=torch.tensor([3, 1]))
            assert torch.allclose(y, out[:, t], atol=1e-4, rtol=1e-4)
        for k, v in end.items():
            assert torch.allclose(rows[k][[3, 1]], v, atol=1e-4, rtol=1e-4)
            assert torch.equal(rows[k][[0, 2]], before[k][[0, 2]])
        again, after = agg.step(end, **{k: v[:, 0] for k, v in x.items()}, **params)
        assert torch.equal(agg.step(end, **{k: v[:, 0] for k, v in x.items()}, **params)[0], again)
        assert set(after) == set(end)
        assert len(launched) == 7 and None not in launched
