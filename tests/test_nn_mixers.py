"""Compiled aggregators as mixers: inputs where the spec wants them, steps as the parallel call, one line a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import psmc
from psmc.diagnostics import PsmcError
from psmc.nn import LanguageModel, ScanMixer, generate, join, parameters_of, width_for
from psmc.nn.ranges import Range

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DOUBLE = torch.float64
NEAR = dict(rtol=1e-12, atol=1e-12)
SPECS = {
    "gla": dict(heads=2),
    "mamba2": dict(heads=4, sizes={"N": 6, "P": 8}, shared=("B", "C"), conv=4),
    "mingru": dict(heads=24),
    "mamba": dict(sizes={"N": 4, "D": 24}, conv=3),
    "deltanet": dict(heads=2, normalised=("q", "k"), gate=False),
    "retnet": dict(heads=2, init={"gamma": torch.tensor([0.9, 0.99])}),
    "rwkv6": dict(heads=2),
    "lru": dict(heads=8),
    "pr_lstm": dict(heads=8),
    "rg_lru": dict(heads=16, conv=1),
}


def mixer(name, dim=16):
    torch.manual_seed(0)
    return ScanMixer(EXAMPLES / f"{name}.psm", dim, **SPECS[name]).double()


@pytest.mark.parametrize("name", SPECS)
def test_steps_are_the_scan(name):
    """Token by token, from the start and after a prefill, in place and not; causal; gradients reach everything."""
    model = mixer(name)
    x = torch.randn(2, 11, 16, dtype=DOUBLE)
    whole = model(x)
    assert whole.shape == x.shape
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.numel())
    with torch.no_grad():
        for cut in (0, 1, 6):
            for in_place in (False, True):
                state = model.prefill(x[:, :cut])[1] if cut else model.init_state(2)
                for t in range(cut, 11):
                    y, state = model.step(x[:, t], state, in_place)
                    torch.testing.assert_close(y, whole[:, t], **NEAR)
        changed = x.clone()
        changed[:, 6] += 1
        other = model(changed)
        assert torch.equal(other[:, :6], whole[:, :6]) and (other[:, 6:] != whole[:, 6:]).any(-1).all()


def inside(value, interval):
    low, high = (None if end is None else float(end) for end in (interval.lo, interval.hi))
    above = low is None or (value > low if interval.lo_open else value >= low).all()
    return above and (high is None or (value < high if interval.hi_open else value <= high).all())


@pytest.mark.parametrize("name", SPECS)
def test_inputs_and_params_are_where_the_spec_wants_them(name):
    model = mixer(name)
    spec = model.scan.declared
    z = 5 * torch.randn(3, 7, model.into.out_features, dtype=DOUBLE)
    inputs = model._inputs(z)
    assert set(inputs) == {t.name for t in spec.inputs}
    for tensor in (*spec.inputs, *spec.params):
        value = inputs[tensor.name] if tensor in spec.inputs else model._params()[tensor.name]
        assert tensor.interval is None or inside(value.detach(), tensor.interval), tensor.name
        assert value.is_complex() == (tensor.kind == "complex")
    if name == "deltanet":
        torch.testing.assert_close(inputs["k"].norm(dim=-1), torch.ones(3, 7, 2, dtype=DOUBLE))
    if name == "mamba2":
        assert inputs["B"].shape == (3, 7, 1, 6) and inputs["x"].shape == (3, 7, 4, 8)
    if name == "retnet":
        torch.testing.assert_close(model._params()["gamma"], torch.tensor([0.9, 0.99], dtype=DOUBLE), rtol=1e-6, atol=0)


@pytest.mark.parametrize("ends", [(None, None), (0.0, None), (None, 0.0), (0.0, 1.0), (-3.0, 5.0), (2.0, None)])
def test_ranges(ends):
    range_ = Range(*ends)
    x = torch.linspace(-30, 30, 601, dtype=DOUBLE)
    y = range_.place(x)
    assert ends[0] is None or (y >= ends[0]).all()
    assert ends[1] is None or (y <= ends[1]).all()
    assert (y.diff() > 0).all() or (y.diff() < 0).all() or ends == (0.0, 1.0) or ends == (-3.0, 5.0)
    draw = torch.Generator().manual_seed(0)
    bias, param = range_.input_bias(1000, draw), range_.param(1000, draw)
    if (ends[0] is None) != (ends[1] is None):
        end = ends[0] if ends[0] is not None else ends[1]
        for start, low, high in ((bias, 1e-3, 0.1), (param, 1, 16)):
            distance = (range_.place(start) - end).abs()
            assert low * 0.99 < distance.min() < 1.1 * low and 0.9 * high < distance.max() < high * 1.01
    elif ends[0] is not None:
        assert not bias.any() and range_.place(param).diff().std() < 1e-3 * (ends[1] - ends[0])


def test_a_spec_of_ones_own():
    @psmc.aggregator(inputs="u gate in (0, 1)", state="a = 1 h = 0", associative=True)
    class mine:
        def lift(x):
            return dict(a=x.gate, h=x.u)

        def combine(l, r):
            return dict(a=l.a * r.a, h=r.a * l.h + r.h)

        def output(s, x):
            return s.h

    torch.manual_seed(0)
    model = LanguageModel(11, 16, 2, lambda d: ScanMixer(mine, d, heads=2 * d)).double()
    tokens = torch.randint(11, (2, 30))
    with torch.no_grad():
        whole = model(tokens)
        state = join([model.prefill(tokens[b : b + 1, :n])[1] for b, n in enumerate((3, 9))])
        for t in range(20):
            y, state = model.step(torch.stack([tokens[b, n + t] for b, n in enumerate((3, 9))]), state)
            for b, n in enumerate((3, 9)):
                torch.testing.assert_close(y[b], whole[b, n + t], **NEAR)
    greedy, seen = generate(model, tokens[:, :4], 12, temperature=0), tokens[:, :4]
    with torch.no_grad():
        for _ in range(12):
            seen = torch.cat([seen, model(seen)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy, seen[:, 4:])


def test_one_size_fits_all():
    """Widths for equal parameters, within the step that heads allow."""
    for name, multiple in (("gla", 16), ("mamba2", 8), ("mingru", 1)):
        options = {**SPECS[name]}

        def make(width, name=name, options=options):
            return LanguageModel(64, width, 2, lambda d: ScanMixer(EXAMPLES / f"{name}.psm", d, **options))

        width = width_for(100_000, make, multiple)
        assert abs(parameters_of(make(width)) - 100_000) <= min(
            abs(parameters_of(make(w)) - 100_000) for w in (width - multiple, width + multiple)
        )


def test_learns():
    """A delayed copy: loss falls from ln 8 to nearly nothing."""
    torch.manual_seed(0)
    model = LanguageModel(8, 32, 1, lambda d: ScanMixer(EXAMPLES / "gla.psm", d, heads=2, conv=4))
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        tokens = torch.randint(8, (16, 20))
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, 2:].flatten(0, 1), tokens[:, :-2].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ScanMixer(EXAMPLES / "gla.psm", 16, heads=3),
        lambda: ScanMixer(EXAMPLES / "gla.psm", 16, heads=2, sizes={"N": 4}),
        lambda: ScanMixer(EXAMPLES / "gla.psm", 16, heads=2, shared=("x",)),
        lambda: ScanMixer(EXAMPLES / "gla.psm", 16, heads=0),
        lambda: ScanMixer(EXAMPLES / "retnet.psm", 16, heads=2, init={"gamma": 1.5}),
        lambda: ScanMixer(EXAMPLES / "s5_word.psm", 16, heads=2),
        lambda: ScanMixer(torch.nn.Linear(3, 3), 16),
    ],
)
def test_mistakes(wrong):
    with pytest.raises(PsmcError) as caught:
        wrong()
    assert caught.value.diagnostics[0].code == "PSM654"


def test_psmc_alone_imports_no_torch():
    code = "import sys, psmc; assert 'torch' not in sys.modules and 'psmc.nn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
