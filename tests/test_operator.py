"""The scan as an operator of torch: opcheck, torch.compile, shapes that vary, registration once a process."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.compare import Result, carried, compiled, detached, errors, gradients, named, oracle
from contract.data import Batch, Case, make
from contract.examples import NAMES, declared, domain, example
from contract.poison import poisoned_memory
from contract.texts import compiled_text

import psmc

# pointwise, matrix states, layers, complex, ints, taps, declared start, both fixed orders
KINDS = ("linear_recurrence", "gla", "mlstm_recurrence", "lru", "s5_word", "tap_recurrence", "start_scalar", "elman")
EXACT = 1e-12  # both sides run the same code
torch.set_num_threads(1)


def known(name: str) -> Any:
    return example(name) if name in NAMES else compiled_text(name)


def batch_for(agg: Any, name: str, case: Case) -> Batch:
    return make(declared(agg), case, live=agg.spec.live, intervals=domain(name), extern=agg.rule)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(agg: Any, batch: Batch) -> tuple[Any, ...]:
    """What the operator takes; taps as leaves of their own."""
    m, flags = agg.module, batch.flags
    call = m.bind_call(agg.spec, (), {**batch.inputs, **batch.params}, tokens=True)
    rest = [flags.get(k) for k in ("mask", "reset", "cu_seqlens")]
    lags, _ = m.tap_tokens(agg.spec, call, batch.initial, *rest)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in lags.values()]
    initial = [] if batch.initial is None else [batch.initial[s.name] for s in agg.operator.live]
    return [*batch.inputs.values(), *leaves], list(batch.params.values()), initial, *rest, True


@pytest.mark.parametrize("name", [*KINDS, "pr_lstm"])
def test_opcheck(name: str):
    agg = known(name)
    tree = agg.fold_order == "tree"
    for case in (Case(13, lanes=(2,), initial=not tree, mask=True, reset=True), Case(9, packed=True, initial=not tree)):
        batch = batch_for(agg, name, case)
        for k, x in batch.inputs.items():
            batch.inputs[k] = x.nan_to_num(0.0)  # opcheck compares with ==
        torch.library.opcheck(agg.operator.op, operands(agg, batch.require_grad()))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph(name: str, backend: str):
    """fullgraph, forward and backward, state in and out, every flag: what eager gives."""
    agg = known(name)
    options = [{"mask": True, "reset": True, "initial": True}, {"packed": True, "initial": True}]
    for more in [{}, *options] if backend == "eager" else options[:1]:
        batch = batch_for(agg, name, Case(21, lanes=(2,), strided=True, **more))
        wanted = compiled(agg, batch)
        torch._dynamo.reset()
        traced = torch.compile(
            lambda x, p, s, f: agg(**x, **p, initial_state=s, return_state=True, **f), fullgraph=True, backend=backend
        )
        leaves = batch.require_grad()
        found, state = traced(leaves.inputs, leaves.params, leaves.initial, leaves.flags)
        outputs = named(agg, found)
        state = {k: x for k, x in state.items() if k in carried(agg)}
        grads = gradients(leaves, outputs, state, torch.float64)
        gaps = errors(Result(detached(outputs), detached(state), grads), wanted)
        assert max(gaps.values()) < EXACT, gaps


@pytest.mark.parametrize("name", ["linear_recurrence", "gla", "tap_recurrence", "elman"])
def test_a_step_is_one_graph(name: str):
    """`step` has no operator: it is traced."""
    agg = known(name)
    batch = batch_for(agg, name, Case(3, lanes=(2,)))
    traced = torch.compile(lambda s, x, p: agg.step(s, **x, **p), fullgraph=True, backend="eager")
    mine: Any = None
    theirs: Any = None
    for t in range(3):
        token = {k: x[:, t] for k, x in batch.inputs.items()}
        (a, mine), (b, theirs) = traced(mine, token, batch.params), agg.step(theirs, **token, **batch.params)
        assert all(torch.equal(y, named(agg, b)[k]) for k, y in named(agg, a).items())
    assert all(torch.equal(x, theirs[k]) for k, x in mine.items())


@pytest.mark.parametrize("name", ["linear_recurrence", "gla", "softmax_average", "pr_lstm"])
@pytest.mark.parametrize("packed", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_no_recompilation(name: str, packed: bool):
    """B, T and the number of sequences vary under one compiled graph."""
    agg = known(name)
    traced = torch.compile(lambda x, p, f: agg(**x, **p, **f), fullgraph=True, backend="aot_eager")
    for i, (rows, length) in enumerate([(2, 65), (3, 128), (5, 7), (2, 199)]):
        batch = batch_for(agg, name, Case(length, batch=rows, lanes=(2,), seed=2 * i, packed=packed))
        if packed:
            batch.offsets = [0, 3, *(length * k // (rows + 1) for k in range(1, rows + 1)), length]
            batch.offsets.sort()
            batch.flags["cu_seqlens"] = torch.tensor(batch.offsets)
            torch._dynamo.mark_dynamic(batch.flags["cu_seqlens"], 0)
        leaves = batch.require_grad()
        for x in leaves.inputs.values():
            torch._dynamo.mark_dynamic(x, 1)
            if not packed:
                torch._dynamo.mark_dynamic(x, 0)
        outputs = named(agg, traced(leaves.inputs, leaves.params, leaves.flags))
        found = Result(detached(outputs), {}, gradients(leaves, outputs, {}, torch.float64))
        leaves = batch.require_grad()
        outputs = named(agg, agg(**leaves.inputs, **leaves.params, **leaves.flags))
        wanted = Result(detached(outputs), {}, gradients(leaves, outputs, {}, torch.float64))
        gaps = errors(found, wanted)
        assert max(gaps.values()) < EXACT, gaps


def test_the_operator_needs_no_gradient():
    """Neither inputs that want none nor no_grad nor an integer input disturbs it."""
    agg = known("segmented_sum")
    batch = batch_for(agg, "segmented_sum", Case(12, lanes=(2,)))
    traced = torch.compile(lambda x: agg(**x), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(traced(batch.inputs), agg(**batch.inputs))
    y = traced(batch.require_grad().inputs)
    assert y.requires_grad and torch.equal(y, agg(**batch.inputs))


@pytest.mark.parametrize("name", ["gla", "mlstm_recurrence", "welford", "pr_lstm", "tap_int", "start_matrix"])
def test_uninitialised_memory_is_never_read(name: str):
    """Every buffer that torch leaves unset holds NaN (the largest integer) here, forward and backward."""
    agg = known(name)
    for more in ({"mask": True, "reset": True}, {"packed": True}):
        batch = batch_for(agg, name, Case(33, lanes=(2,), initial=agg.fold_order != "tree", **more))
        wanted = oracle(agg, batch)
        with poisoned_memory():
            found = compiled(agg, batch)
            results = agg.operator.op(*operands(agg, batch)) if agg.operator.live else []
        gaps = errors(found, wanted)
        assert max(gaps.values()) < 1e-10, gaps
        for slot, x in zip(agg.spec.outputs, results, strict=False):
            assert torch.equal(x, found.outputs[slot.name])


def loaded(path: Path, key: str) -> Any:
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    spec.loader.exec_module(module)
    return module


def test_registered_once(tmp_path: Path):
    """The same module again, vendored under another name, reloaded: one operator, all work, compiled too."""
    agg = known("linear_recurrence")
    path = tmp_path / "vendored.py"
    path.write_text(agg.source, encoding="utf-8")
    copies = [loaded(path, "vendored_a"), loaded(path, "vendored_b"), loaded(path, "vendored_a")]
    batch = batch_for(agg, "linear_recurrence", Case(10))
    wanted = compiled(agg, batch)
    for module in copies:
        again = module.linear_recurrence
        assert again.operator.op is agg.operator.op
        again.rule = None
        gaps = errors(compiled(again, batch), wanted)
        assert max(gaps.values()) == 0
        torch._dynamo.reset()
        traced = torch.compile(lambda x, again=again: again(**x), fullgraph=True, backend="eager")
        assert torch.equal(traced(batch.inputs), wanted.outputs["y"])


def test_a_class_redefined():
    """Running a notebook cell again: the same rule is the same operator, a changed one another."""

    def define(rate: float) -> Any:
        @psmc.aggregator(inputs="x", state="s=0 n=0", associative=True)
        class Mean:
            def lift(x):
                return dict(s=x.x * rate, n=1)

            def combine(l, r):
                return dict(s=l.s + r.s, n=l.n + r.n)

            def output(s, x):
                return s.s / s.n

        return Mean

    first, second, third = define(1.0), define(1.0), define(2.0)
    x = torch.arange(6.0).reshape(1, 6)
    assert first.operator.op is second.operator.op is not third.operator.op
    for agg, rate in ((first, 1), (second, 1), (third, 2), (first, 1)):
        traced = torch.compile(lambda x, agg=agg: agg(x), fullgraph=True, backend="eager")
        assert torch.allclose(traced(x), rate * torch.tensor([[0.0, 0.5, 1, 1.5, 2, 2.5]]))
        assert torch.equal(traced(x), agg(x))
