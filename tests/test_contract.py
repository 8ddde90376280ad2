"""The contract between calls: steps, splits, states, causality, and corners that no shipped example reaches."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from contract.cases import FULL, GRID, fitting
from contract.compare import call, compiled, error, errors, gradients, named, oracle
from contract.cut import in_parts, in_steps, state_after
from contract.data import Batch, Case, make
from contract.examples import NAMES, declared, domain, example
from contract.texts import TEXTS, compiled_text

EXACT = 1e-10
ALL = (*NAMES, *TEXTS)
# One for each kind of state: scalars, matrices, layers, complex, ints, both fixed orders, taps, starts, extern.
KINDS = (
    "cumsum", "gla", "mlstm_recurrence", "lru", "s5_word", "elman", "pr_lstm", "transformer_psm", "rwkv6", "welford",
    "viterbi_recurrence", *(n for n in TEXTS if n.startswith(("tap", "start"))),
)  # fmt: skip
torch.set_num_threads(1)


def known(name: str) -> Any:
    return example(name) if name in NAMES else compiled_text(name)


def batch_for(name: str, case: Case, dtype: torch.dtype = torch.float64) -> tuple[Any, Batch]:
    agg = known(name)
    case = fitting(case, agg)
    return agg, make(declared(agg), case, dtype, live=agg.spec.live, intervals=domain(name), extern=agg.rule)


def close(found: Any, wanted: Any) -> None:
    worst = {k: v for k, v in errors(found, wanted).items() if v >= EXACT}
    assert not worst, worst


@pytest.mark.parametrize("name", TEXTS)
def test_corners_are_the_oracle(name: str):
    """Taps, declared starts, bare states, constants: under every option of a call."""
    for case in GRID:
        if FULL or case.length in (1, 2, 65 if sum(map(ord, name + str(case))) % 3 == 0 else 63):
            agg, batch = batch_for(name, case)
            try:
                close(compiled(agg, batch), oracle(agg, batch))
            except Exception as e:
                raise AssertionError(f"{name} {case}") from e


@pytest.mark.parametrize("name", ALL)
def test_steps_are_the_call(name: str):
    agg, batch = batch_for(name, Case(11, lanes=(4,), grouped=True, initial=True, seed=1))
    close(in_steps(agg, batch, agg.rule), oracle(agg, batch, module=agg.rule))


@pytest.mark.parametrize("name", KINDS)
def test_steps_from_nothing(name: str):
    agg, batch = batch_for(name, Case(5))
    close(in_steps(agg, batch, agg.rule), oracle(agg, batch, module=agg.rule))


@pytest.mark.parametrize("name", ALL if FULL else (*NAMES[1::3], *TEXTS))
def test_parts_are_the_whole(name: str):
    """Wherever a sequence is cut, the state carries on: values, and gradients through it."""
    agg, batch = batch_for(name, Case(37, lanes=(2,), initial=True, seed=2))
    wanted = oracle(agg, batch, module=agg.rule)
    for places in ((0, 1), (16, 17, 36), (37,)):
        close(in_parts(agg, batch, places, agg.rule), wanted)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", [{"mask": True, "reset": True}, {"reverse": True}, {"mask": True}], ids=str)
def test_parts_with_flags(name: str, options: dict[str, bool]):
    agg, batch = batch_for(name, Case(23, lanes=(2,), initial=True, seed=4, **options))
    close(in_parts(agg, batch, (1, 9, 10), agg.rule), oracle(agg, batch, module=agg.rule))


@pytest.mark.parametrize("name", KINDS)
def test_packed_sequences_carry_on(name: str):
    """The states of packed sequences, empty ones too, go on where each left off."""
    agg, batch = batch_for(name, Case(24, packed=True, reset=True, seed=5))
    bounds = batch.offsets or []
    pairs = list(pairwise(bounds))
    cuts = [(a + b) // 2 for a, b in pairs]
    state: Any = None
    found: list[list[dict[str, torch.Tensor]]] = [[] for _ in pairs]
    for lows, highs in ((bounds[:-1], cuts), (cuts, bounds[1:])):
        rows = [t for a, b in zip(lows, highs, strict=True) for t in range(a, b)]
        sizes = [b - a for a, b in zip(lows, highs, strict=True)]
        flags = {"cu_seqlens": torch.tensor([0, *sizes]).cumsum(0), "reset": batch.flags["reset"][:, rows]}
        piece = Batch(
            batch.agg, batch.case, {k: x[:, rows] for k, x in batch.inputs.items()}, batch.params, None, flags
        )
        outputs, state = state_after(agg, piece, state)
        for n, each in enumerate(zip(*(x.split(sizes, 1) for x in outputs.values()), strict=True)):
            found[n].append(dict(zip(outputs, each, strict=True)))
    wanted = oracle(agg, batch)
    for k, y in wanted.outputs.items():
        assert error(torch.cat([p[k] for parts in found for p in parts], 1), y) < EXACT
    for k, s in wanted.state.items():
        assert error(state[k], s) < EXACT


@pytest.mark.parametrize("name", KINDS)
def test_step_in_place(name: str):
    """`step_` is `step`, in the state's own memory; with slots, only in the rows named."""
    agg, batch = batch_for(name, Case(6, batch=3, lanes=(2,), seed=6))
    sizes = {d.name: n for d, n in zip(batch.agg.dims, (3, 2, 4), strict=False) if d.size is None}
    plain = agg.init_state(3, (2,), dtype=torch.float64, **sizes)
    slotted = agg.init_state(5, 2, dtype=torch.float64, **sizes)
    memory = {k: x.data_ptr() for k, x in plain.items()}
    slots = torch.tensor([4, 0, 3])
    state: Any = None
    for t in range(6):
        token = {k: x[:, t] for k, x in batch.inputs.items()}
        out, state = agg.step(state, **token, **batch.params)
        for mine in (
            agg.step_(plain, **token, **batch.params),
            agg.step_(slotted, slots=slots, **token, **batch.params),
        ):
            for k, y in named(agg, mine).items():
                assert torch.equal(y, named(agg, out)[k]) and not y.requires_grad
    fresh = agg.init_state(5, 2, dtype=torch.float64, **sizes)
    for k, x in state.items():
        assert torch.equal(plain[k], x)
        assert torch.equal(slotted[k][slots], x)
        if k in fresh:
            assert torch.equal(slotted[k][[1, 2]], fresh[k][[1, 2]])
    if agg.fold_order != "tree":
        assert {k: x.data_ptr() for k, x in plain.items()} == memory


def test_slots_of_a_tree_move_on_their_own():
    """Streams of a tree at positions of their own, with a tapped input."""
    agg, batch = batch_for("tap_tree", Case(9, batch=2, seed=7))
    state = agg.init_state(2, dtype=torch.float64)
    order = [(0,), (0, 1), (1,), (0,), (0, 1), (0, 1), (0,)]
    seen = [0, 0]
    wanted = agg(**batch.inputs)
    for rows in order:
        token = {k: torch.stack([x[r, seen[r]] for r in rows]) for k, x in batch.inputs.items()}
        out = agg.step_(state, slots=torch.tensor(rows), **token)
        for i, r in enumerate(rows):
            assert error(out[i], wanted[r, seen[r]]) < EXACT
            seen[r] += 1
    assert state["position"].tolist() == seen


@pytest.mark.parametrize("name", ALL)
def test_the_initial_state_is_none(name: str):
    """`init_state` says in tensors what None says: the same outputs, final state and gradients."""
    agg, batch = batch_for(name, Case(7, lanes=(3,)))
    sizes = {d.name: n for d, n in zip(batch.agg.dims, (3, 2, 4), strict=False) if d.size is None}
    start = agg.init_state(2, (3,), dtype=torch.float64, **sizes)
    wanted = compiled(agg, batch, module=agg.rule)
    batch.initial = start
    found = compiled(agg, batch, module=agg.rule)
    found.grads = {k: g for k, g in found.grads.items() if not k.startswith("initial ")}
    close(found, wanted)


@pytest.mark.parametrize("name", KINDS)
def test_later_tokens_change_nothing_before(name: str):
    """Bit for bit, in fp32, with and without flags; so does a reset or a mask later on."""
    for options in ({}, {"mask": True}, {"packed": True, "reset": True}):
        agg, batch = batch_for(name, Case(70, lanes=(2,), seed=8, **options), torch.float32)
        batch = batch.lower(torch.float32)
        changed = batch.map(lambda x: x)
        at = 41
        for k, x in changed.inputs.items():
            late = x[:, at:].flip(1) if x.dtype == torch.int64 else x[:, at:] * 0.5
            changed.inputs[k] = torch.cat([x[:, :at], late], 1)
        for k in changed.flags.keys() & {"mask", "reset"}:
            changed.flags[k] = torch.cat([changed.flags[k][:, :at], ~changed.flags[k][:, at:]], 1)
            if k == "mask":
                changed.inputs = {n: x.nan_to_num(0.0) for n, x in changed.inputs.items()}
        before, after = (call(agg, b)[0] for b in (batch, changed))
        for k, y in before.items():
            assert torch.equal(y[:, :at], after[k][:, :at]), (k, options)
        assert any(not torch.equal(y[:, at:], after[k][:, at:]) for k, y in before.items())


@pytest.mark.parametrize("name", ALL)
def test_folds_combine(name: str):
    """`fold` is the product of all elements: that of two halves is the two combined; of no tokens, the identity."""
    agg, batch = batch_for(name, Case(12, lanes=(2,), mask=not name.startswith("tap")))
    if agg.fold_order != "scan":
        with pytest.raises(agg.module.ArgumentError, match=f"PSM607: {name} is not associative"):
            agg.fold(**batch.inputs, **batch.params)
        return
    mask = batch.flags.get("mask", torch.ones(2, 12, dtype=torch.bool))
    n = type("Sizes", (), {d.name: d.size or s for d, s in zip(batch.agg.dims, (3, 2, 4), strict=False)})

    def fold(lo: int, hi: int) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = agg.fold(
            **{k: x[:, lo:hi] for k, x in batch.inputs.items()}, **batch.params, mask=mask[:, lo:hi]
        )
        return found

    product, empty = fold(0, 12), fold(5, 5)
    identity = agg.rules.identity(n, torch.zeros((), dtype=torch.float64))
    assert product.keys() == empty.keys() == {s.name for s in agg.spec.components}
    for k, x in empty.items():
        assert error(x, identity[k].expand_as(x).to(x.dtype)) == 0
    if not agg.spec.taps:
        left, right, params = (type("Values", (), v) for v in (fold(0, 5), fold(5, 12), batch.params))
        for k, x in agg.rules.combine(left, right, params, n).items():
            assert error(product[k], x.expand_as(product[k]).to(product[k].dtype)) < EXACT
    if not hasattr(agg.rules, "start"):
        final = call(agg, batch)[1]
        for k in agg.spec.live:
            assert error(product[k], final[k]) < EXACT


def test_folds_of_packed_sequences():
    agg, batch = batch_for("gla", Case(20, packed=True))
    product = agg.fold(**batch.inputs, **batch.params, cu_seqlens=batch.flags["cu_seqlens"])
    state = call(agg, batch)[1]
    assert error(product["S"], state["S"]) < EXACT
    assert product["a"].shape == (7, 3)
    assert torch.equal(product["a"][0], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", KINDS)
def test_no_sequences(name: str):
    """A batch of none: outputs and states of the right shapes, and zero gradients of params."""
    agg, batch = batch_for(name, Case(5, lanes=(2,)))
    wanted = compiled(agg, batch, module=agg.rule)
    batch.inputs = {k: x[:0] for k, x in batch.inputs.items()}
    for flags in ({}, {"mask": torch.ones(0, 5) > 0, "reset": torch.ones(0, 5) > 0}):
        batch.flags = flags
        found = compiled(agg, batch, module=agg.rule)
        for kind in ("outputs", "state"):
            for k, x in getattr(wanted, kind).items():
                assert getattr(found, kind)[k].shape == (0, *x.shape[1:])
        assert all(not bool(found.grads[k].any()) for k in batch.params)


@pytest.mark.parametrize("name", KINDS)
def test_autocast_changes_nothing(name: str):
    """State and sums stay fp32 whatever surrounds the call; only a rule from Python runs as its caller says."""
    agg, batch = batch_for(name, Case(33, lanes=(2,)), torch.float32)
    batch = batch.lower(torch.float32)
    token = {k: x[:, 0] for k, x in batch.inputs.items()}

    def run() -> tuple[Batch, Any, Any]:
        leaves = batch.require_grad()
        return leaves, call(agg, leaves), agg.step(None, **token, **batch.params)

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    for (one, (out, after), step), (other, (expected, state), stepped) in ((found, plain),):
        assert all(x.dtype == expected[k].dtype for k, x in out.items())
        if agg.rule is None:
            assert all(torch.equal(x, (expected | state)[k]) for k, x in (out | after).items())
            assert all(torch.equal(x, stepped[1][k]) for k, x in step[1].items())
            grads = gradients(other, expected, state, torch.float32)
            assert all(torch.equal(g, grads[k]) for k, g in gradients(one, out, after, torch.float32).items())


def test_copies():
    """A copy of a model shares what holds nothing, and has a rule of its own where the rule has weights."""
    agg = known("gla")
    assert deepcopy(agg) is agg
    tree, batch = batch_for("transformer_psm", Case(7))
    model = torch.nn.ModuleDict({"rule": tree.rule})
    model.scan = tree
    other = deepcopy(model)
    assert other.scan.rules.extern[1] is other["rule"] is not tree.rule
    assert other.scan.source == tree.source
    assert torch.equal(other.scan(**batch.inputs), tree(**batch.inputs))
    with torch.no_grad():
        other["rule"].left.zero_()
    assert not torch.equal(other.scan(**batch.inputs), tree(**batch.inputs))
    assert torch.equal(deepcopy(other).scan(**batch.inputs), other.scan(**batch.inputs))


@pytest.mark.parametrize("name", KINDS)
def test_without_gradients(name: str):
    """no_grad, inference_mode, and gradients of one argument alone."""
    agg, batch = batch_for(name, Case(21, lanes=(2,), initial=True))
    wanted = call(agg, batch)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = call(agg, batch.require_grad())
        for ours, theirs in zip(found, wanted, strict=True):
            assert all(torch.equal(x, theirs[k]) and not x.requires_grad for k, x in ours.items())
    full = compiled(agg, batch, module=agg.rule)
    for alone in batch.leaves():
        leaves = batch.require_grad()
        for k, x in leaves.leaves().items():
            x.requires_grad_(k == alone)
        outputs, state = call(agg, leaves)
        results = {k: x for part in (outputs, state) for k, x in part.items() if x.requires_grad}
        if results:
            g = gradients(leaves, outputs, state, torch.float64)[alone]
            assert error(g, full.grads[alone]) < EXACT
        else:
            assert not bool(full.grads[alone].any())
