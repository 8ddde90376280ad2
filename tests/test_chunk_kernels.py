"""The chunk kernels against a sequential loop, in Triton's interpreter (in a process of its own: triton must be
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
    import torch
    from chunk_cases import SMALL, Data, check, check_steps, check_whole_spec, counted, inputs, kernels, table
    from contract.compare import compiled, errors, oracle
    from contract.data import Case, make
    from contract.examples import declared
    from contract.matrices import text
    from contract.texts import from_text

    import psmc

    EXAMPLES = Path(__file__).parent.parent / "examples"

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

    def test_what_no_decay_reaches_has_no_gradient_of_it() -> None:
        """Of the first token's decay exactly: nothing is before it, and its pair with itself does not decay."""
        q, b, c = (torch.randn(24, 1, 2, 16) for _ in range(3))
        log, number = (torch.full((24, 1, 2), x, requires_grad=True) for x in (-0.3, 1.7))
        y, _ = kernels(table(**SMALL)).scan(q, b, c, log, None, number=number)
        slopes = torch.autograd.grad(y.square().sum(), (log, number))
        assert not slopes[0].any() and slopes[1].all()

    @pytest.mark.parametrize("decay", [1, 2])
    def test_half(decay: int) -> None:
        """The interpreter has no bfloat16; here products are exact."""
        check(Data(1, 33, 1, 16, 16, decay, dtype=torch.float16).errors(kernels(table(**SMALL))), 1e-3)

    @pytest.mark.parametrize("decay", [1, 2])
    def test_later_tokens_change_nothing(decay: int) -> None:
        """Bitwise, also where another decay moves a row across the bound of the product form."""
        made = kernels(table(**SMALL))
        q, b, c, log, start = (x.detach().clone() for x in Data(1, 40, 1, 16, 16, decay).leaves[:5])
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

    SPECS = ["gla", "mamba2", "retnet", "rwkv6", "linear_attention", "mlstm", "hgrn2", "gated_rfa", "two_writes"]

    @pytest.mark.parametrize("name", SPECS)
    def test_whole_specs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        check_whole_spec(psmc.load(EXAMPLES / f"{name}.psm"), monkeypatch)

    FLAT = tuple(f"{x}_without_a_gradient" for x in ("decay", "value_decay", "normaliser"))

    @pytest.mark.parametrize("name", ["complex_state_real_log", "complex_beside_real", *FLAT])
    def test_what_kernels_do_not_do(name: str) -> None:
        """Complex states are left to torch; what has no gradient has no kernel's."""
        agg = from_text(text(name))
        batch = make(declared(agg), Case(5, lanes=(2,), initial=True), torch.float32, live=agg.spec.live)
        found = compiled(agg, batch.lower(torch.float32), torch.float32)
        assert max(errors(found, oracle(agg, batch, torch.float32)).values()) < 1e-5

    @pytest.mark.parametrize("name", ["gla", "mamba2", "rwkv6", "linear_attention", "mlstm"])
    def test_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        check_steps(psmc.load(EXAMPLES / f"{name}.psm"), monkeypatch)

    def test_steps_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
        """A program that moves a normaliser on goes through all columns."""
        agg = psmc.load(EXAMPLES / "linear_attention.psm")
        monkeypatch.setattr(agg.module, "_STEP_VALUES", 16)
        check_steps(agg, monkeypatch)

    def test_small_layers_by_their_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
        """The stabiliser of mlstm: prefixes in fp32, whatever the inputs are, and none of torch's scans."""
        agg = psmc.load(EXAMPLES / "mlstm.psm")
        small = agg.rules.layers[0].operator
        ran = counted(monkeypatch, small.kernels, "scan_forward")
        x, _ = inputs(agg, 9, False)
        agg(**{k: v.half() for k, v in x.items()})
        ((prefixes, _, _),) = ran
        assert [p.dtype for p in prefixes] == [torch.float32] * 2 and prefixes[0].shape == (2, 9, 2)
        assert torch.equal(prefixes[0][:, :-1], prefixes[1][:, 1:]) and (prefixes[1][:, 0] == -torch.inf).all()

    @pytest.mark.parametrize("name", ["mamba2", "gla", "linear_attention", "mlstm"])
    def test_known_calls(name: str) -> None:
        """A call or step of shapes that were checked goes straight to the kernels, and gives the same."""
        agg = psmc.load(EXAMPLES / f"{name}.psm")
        x, state = inputs(agg, 9, False)
        params = {s.name: x.pop(s.name) for s in agg.spec.params}
        args = [*x.values(), *params.values()]

        def results(begin: object) -> list[torch.Tensor]:
            leaves = [t.clone().requires_grad_() for t in args]
            out, end = agg(*leaves, initial_state=begin, return_state=True)
            total = sum((v * torch.arange(v.numel()).view(v.shape)).sum() for v in (out, *end.values()))
            return [out, *end.values(), *torch.autograd.grad(total, leaves)]

        for begin in (None, state):
            first, known = results(begin), len(agg._calls._known)
            again = results(begin)
            assert known == len(agg._calls._known) > 0
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        apart = [torch.stack([t, t], -1)[..., 0] for t in args]  # other strides: not the same call
        assert torch.equal(agg(*apart), agg(*args)) and torch.equal(agg(*apart), agg(**x, **params))
        token = [*(v[:, 0] for v in x.values()), *params.values()]
        steps = [agg.step(state, *token) for _ in range(2)]
        moved = [{k: v.clone() for k, v in state.items()} for _ in range(2)]
        for after in moved:
            assert torch.equal(agg.step_(after, *token), steps[0][0])
        for after in (steps[1][1], *moved):
            assert all(torch.equal(after[k], v) for k, v in steps[0][1].items())
        with pytest.raises(ValueError, match="PSM602"):
            agg(*[t[:, :5] if n == 0 else t for n, t in enumerate(args)])
