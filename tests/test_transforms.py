"""Gradients of gradients and torch.func: of the PyTorch paths here, of kernels in Triton's interpreter (in a process of
its own: triton must be imported with it switched on)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract.compare import error, named
from contract.data import Batch, Case, make
from contract.examples import declared, domain, example
from interpreted import INTERPRETED, run_interpreted
from torch import Tensor

KERNELS = ("mingru", "pr_lstm")
# Chunked with decays of each kind and a solve, pointwise, dense, one order, a tree, a tree whose output reads its levels.
PLAIN = ("gla", "mamba2", "gated_deltanet_recurrence", "mlstm", "logsumexp", "mamba", "elman", "pr_lstm")
torch.set_num_threads(1)


def batch_of(name: str, dtype: torch.dtype = torch.float64, length: int = 5) -> tuple[Any, Batch]:
    agg = example(name)
    return agg, make(declared(agg), Case(length, lanes=(2,), batch=1, seed=3), dtype, intervals=domain(name))


def run(agg: Any, batch: Batch) -> dict[str, Tensor]:
    return named(agg, agg(**batch.inputs, **batch.params))


def weighted(outputs: dict[str, Tensor]) -> Tensor:
    made = torch.Generator().manual_seed(0)
    total = [(y * torch.randn(y.shape, generator=made, dtype=torch.float64).to(y.dtype)).sum() for y in outputs.values()]
    return torch.stack(total).sum()


def second(batch: Batch, outputs: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of the squared length of the gradients of all arguments, one of which is made from another."""
    leaves = batch.require_grad()
    names, values = zip(*leaves.leaves().items(), strict=True)
    first = next(iter(leaves.inputs))
    leaves.inputs[first] = leaves.inputs[first] * values[-1].mean()
    found = torch.autograd.grad(weighted(outputs(leaves)), values, create_graph=True)
    total = torch.stack([(g**2).sum() for g in found]).sum()
    return dict(zip(names, torch.autograd.grad(total, values), strict=True))


if INTERPRETED:

    @pytest.mark.parametrize("name", KERNELS)
    def test_gradients_of_gradients(name: str) -> None:
        """Kernels give gradients; where those are differentiated again, plain PyTorch does."""
        agg, batch = batch_of(name, torch.float32)
        wanted = second(batch, lambda b: agg.reference(b.inputs, b.params)[0])
        narrow = batch.lower(torch.float32).require_grad()
        assert "Eager" in str(next(iter(run(agg, narrow).values())).grad_fn), "the kernels run"
        for k, g in second(narrow, lambda b: run(agg, b)).items():
            assert error(g, wanted[k], k) < 1e-4

    @pytest.mark.parametrize("name", KERNELS)
    def test_transforms_do_without_kernels(name: str) -> None:
        agg, batch = batch_of(name, torch.float32)
        tensors = [x.float() for x in (*batch.inputs.values(), *batch.params.values())]
        many = [torch.stack([x, 0.5 * x]) for x in tensors]
        found = torch.func.vmap(agg)(*many)
        assert error(found[1], agg(*(0.5 * x for x in tensors))) < 1e-5

else:

    def test_in_the_interpreter() -> None:
        pytest.importorskip("triton")
        run_interpreted(__file__)

    @pytest.mark.parametrize("name", PLAIN)
    def test_gradients_of_gradients(name: str) -> None:
        agg, batch = batch_of(name)
        wanted = second(batch, lambda b: agg.reference(b.inputs, b.params)[0])
        for k, g in second(batch, lambda b: run(agg, b)).items():
            assert error(g, wanted[k], k) < 1e-9

    @pytest.mark.parametrize("name", PLAIN)
    def test_transforms(name: str) -> None:
        """Gradients a sample, and forward mode, beside plain calls."""
        agg, batch = batch_of(name)
        tensors = [*batch.inputs.values(), *batch.params.values()]
        many = [torch.stack([x, 0.5 * x]) for x in tensors]

        def loss(*args: Tensor) -> Tensor:
            found = agg(*args)
            return torch.stack([(y**2).sum() for y in (found if isinstance(found, tuple) else (found,))]).sum()

        places = tuple(i for i, x in enumerate(tensors) if x.is_floating_point())
        each = torch.func.vmap(torch.func.grad(loss, places))(*many)
        leaves = [(0.5 * x).requires_grad_() for x in tensors]
        plain = torch.autograd.grad(loss(*leaves), leaves)
        for ours, theirs in zip(each, plain, strict=True):
            assert error(ours[1], theirs) < 1e-9
        along = tuple(torch.ones_like(x) for x in leaves)
        _, slope = torch.func.jvp(loss, tuple(x.detach() for x in leaves), along)
        assert error(slope, torch.stack([g.sum() for g in plain]).sum()) < 1e-9

    @pytest.mark.parametrize("name", PLAIN)
    def test_shapes_without_memory(name: str) -> None:
        agg, batch = batch_of(name)
        tensors = [*batch.inputs.values(), *batch.params.values()]
        wanted, found = (agg(*given) for given in (tensors, [x.to("meta") for x in tensors]))
        for x, y in zip(*(v if isinstance(v, tuple) else (v,) for v in (wanted, found)), strict=True):
            assert x.shape == y.shape and y.is_meta

    def test_dense_tensors_alone() -> None:
        agg, batch = batch_of("gla")
        q, *rest = batch.inputs.values()
        agg(q, *rest)  # a call that passed the checks has no say about this one
        with pytest.raises(ValueError, match=r"PSM602: gla: 'q' must be a dense tensor, not torch\.sparse_coo"):
            agg(q.to_sparse(), *rest)
