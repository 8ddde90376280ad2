"""The shipped specs: each parses, resolves, prints back to itself, cites its source; both forms of a model agree."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import psmc
from psmc import ir
from psmc.algebra.prover import prove
from psmc.algebra.verdict import Proved, Refuted
from psmc.derive.lifting import lifted
from psmc.diagnostics import PsmcError
from psmc.frontend import surface
from psmc.frontend.decorator import extern, trace
from psmc.frontend.pretty import format_source
from psmc.frontend.psm import parse, read
from psmc.frontend.resolve import resolve
from psmc.ir.text import show
from psmc.reference import fold
from psmc.source import SourceFile

EXAMPLES = Path(__file__).parent.parent / "examples"
SPECS = sorted(EXAMPLES.glob("*.psm"))
WRONG = sorted((EXAMPLES / "wrong").glob("*.psm"))
SIZES = {"K": 3, "V": 2, "D": 2, "N": 3, "P": 2, "H": 3, "C": 2}
# No second form: nothing to lift (fixed order, extern), or not a recurrence over a token (counts).
ONE_FORM = {"welford", "transformer_psm", "pr_lstm", "log_linear_attention", "attention_combine"}


def load(name: str) -> ir.Aggregator:
    (agg,) = resolve(parse(read(EXAMPLES / f"{name}.psm")))
    return agg


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_each_spec_is_sound_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    (agg,) = resolve(parse(read(path)))
    assert agg.name == path.stem
    for place in (text.split("\naggregator ")[0], agg.doc):
        assert re.search(r"\b(19|20)\d\d\b", place), "a citation in the comment on top and in the docstring"
    assert max(map(len, text.splitlines())) <= 120
    assert format_source(read(path)) == text, "as psmc fmt writes it"
    (again,) = resolve(parse(SourceFile("shown.psm", show(agg))))
    assert again == agg


def test_both_forms_are_there() -> None:
    names = {p.stem for p in SPECS}
    base = {n for n in names if not n.endswith("_recurrence") or n == "linear_recurrence"}
    assert {f"{n}_recurrence" for n in base - ONE_FORM} == names - base


def sample(tensor: ir.Tensor, lead: tuple[int, ...], sizes: dict[str, int], generator: torch.Generator) -> torch.Tensor:
    """Numbers inside the declared interval, closed bounds included now and then."""
    shape = (*lead, *(sizes[d] for d in tensor.dims))
    lo, hi = (tensor.interval.lo, tensor.interval.hi) if tensor.interval else (None, None)
    if tensor.kind == "int":
        assert lo is not None and hi is not None
        return torch.randint(int(lo), int(hi) + 1, shape, generator=generator)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if tensor.kind == "complex":
        return torch.complex(noise, torch.randn(shape, generator=generator, dtype=torch.float64))
    if lo is not None and hi is not None:
        return float(lo) + (float(hi) - float(lo)) * torch.sigmoid(noise)
    if lo is None and hi is None:
        return noise
    return float(lo) + noise.abs() + 0.01 if lo is not None else float(hi or 0) - noise.abs() - 0.01


@pytest.mark.parametrize(
    "path", [p for p in SPECS if f"{p.stem}_recurrence" in {q.stem for q in SPECS}], ids=lambda p: p.stem
)
def test_combine_and_recurrence_compute_the_same(path: Path) -> None:
    combine, recurrence = load(path.stem), load(f"{path.stem}_recurrence")
    assert (combine.claim, combine.order) == (recurrence.claim, recurrence.order)
    generator = torch.Generator().manual_seed(0)
    sizes = {**SIZES, **{d.name: d.size for d in combine.dims if d.size}}
    ours, theirs = combine.leaf_inputs, recurrence.leaf_inputs
    assert [(t.dims, t.kind, t.interval) for t in ours] == [(t.dims, t.kind, t.interval) for t in theirs]
    inputs = [sample(t, (2, 5), sizes, generator) for t in ours]
    params = {t.name: sample(t, (), sizes, generator) for t in combine.params}
    expected, _ = fold(recurrence, dict(zip((t.name for t in theirs), inputs, strict=True)), params)
    forms = [combine] if combine.claim == "no" else [combine, lifted(recurrence)]
    for form in forms:
        named = dict(zip((t.name for t in form.leaf_inputs), inputs, strict=True))
        outputs, _ = fold(form, named, params)
        assert outputs.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(outputs[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", WRONG, ids=lambda p: p.stem)
def test_wrong_specs_are_wrong_in_their_algebra_only(path: Path) -> None:
    (agg,) = resolve(parse(read(path)))
    try:
        proof = prove(lifted(agg))
    except PsmcError as error:
        assert path.stem == "nonlinear"
        assert [d.code for d in error.diagnostics] == ["PSM401"]
        return
    assert isinstance(proof.associativity, Proved if path.stem == "bad_identity" else Refuted)
    assert isinstance(proof.associativity, Refuted) or isinstance(proof.identity, Refuted)
    assert agg.doc, "says what is wrong with it"


def test_the_extern_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psmc, "extern", extern, raising=False)
    monkeypatch.setattr(psmc, "aggregator", lambda **a: lambda cls: trace(cls, **a), raising=False)
    file = runpy.run_path(str(EXAMPLES / "transformer_psm.py"))["TransformerPsm"]
    rule = next(i.fn for i in file.aggregators[0].items if isinstance(i, surface.CombineExtern))
    x = torch.randn(2, 4, 3, 64, generator=torch.Generator().manual_seed(0))
    outputs, _ = fold(*resolve(file), {"x": x}, extern=rule)
    chunks = [{"s": x[:, t]} for t in range(3)]
    first_two = rule(chunks[0], chunks[1])
    expected = torch.stack([torch.zeros_like(x[:, 0]), x[:, 0], first_two["s"], rule(first_two, chunks[2])["s"]], dim=1)
    torch.testing.assert_close(outputs["o"], expected)
