"""One batch of the duality test: a draw, run in every way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from psmc.duality.balanced import balanced
from psmc.duality.compare import distances, same_bits
from psmc.duality.draw import Data, Draw, Tensors, complex_of
from psmc.duality.report import Path, Row, Setting
from psmc.ir import Aggregator

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Flags = Mapping[str, Tensor]  # keywords of a parallel call and of the oracle
NO_FLAGS: Flags = MappingProxyType({})
# Relative to the largest value: what is returned is rounded to the dtype, states are kept in fp32. A triangular solve
# over a chunk of keys that repeat is known to lose some 30 times more than the fold; a wrong rule loses far more.
_ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
# How much more than the sequential fold in the same dtype another order may lose. In narrow dtypes nearly all of that
# is the rounding of what goes in and out, which no order changes.
_CONDITION = {torch.float64: 16.0, torch.float32: 16.0, torch.bfloat16: 3.0, torch.float16: 3.0}


@dataclass
class _Result:
    """What one way of running gave; `gradients` by name, `state`'s as `initial <name>`."""

    outputs: Tensors
    state: Tensors
    gradients: Tensors


class Batch:
    """One draw of inputs, params, an initial state and cotangents."""

    def __init__(self, agg: Any, setting: Setting, dtype: str, length: int, data: Data) -> None:
        self.agg, self.setting, self.name, self.length, self.data = agg, setting, dtype, length, data
        self.declared: Aggregator = agg.declared
        self.dtype = DTYPES[dtype]
        self.compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.tree = agg.fold_order == "tree"
        draw = Draw(self.declared, setting.sizes or {}, setting.lanes, setting.seed, data)
        self.inputs = self._cast(draw.inputs(setting.batch, length), self.dtype)
        self.others = self._cast(draw.inputs(setting.batch, length), self.dtype)
        self.params = self._cast(draw.params(), self.dtype)
        self.draw = draw
        self.initial = {} if self.tree else self._warm(draw)

    def rows(self, wanted: Sequence[Path] | None = None) -> Iterator[Row]:
        """A row a path; `wanted`: of these alone."""
        plain = self._reference(self.inputs, self.initial)
        base = self._errors(self._reference(self.inputs, self.initial, self.dtype), plain)
        found: dict[str, _Result] = {}
        paths: dict[Path, Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]]
        paths = {"scan": self._whole, "steps": self._steps, "segments": self._segments}
        if self.agg.fold_order == "scan":
            paths["tree"] = self._balanced
        for path, run in paths.items():
            if wanted is not None and path not in wanted:
                continue
            found[path] = self._run(run, self.inputs, self.initial)
            row = self._row(path, found[path], plain, base)
            if path == "steps" and "scan" in found:
                apart = distances(found["scan"].outputs, found["steps"].outputs, plain.outputs, True)
                row = replace(row, reassociation=max(apart.values(), default=0.0))
            yield replace(row, causal=self._causal()) if path == "scan" else row
        for more, flags in (("flags", self._flagged), ("packed", self._packed)):
            if self.length > 1 and (wanted is None or more in wanted):
                yield flags()

    # --- ways to run: (inputs, params, initial state) -> (outputs, final state) -------------------

    def _scan(self, x: Tensors, p: Tensors, s: Tensors, **flags: Any) -> tuple[Tensors, Tensors]:
        out, state = self.agg(**x, **self._narrow(p), initial_state=s or None, return_state=True, **flags)
        return self._named(out), state

    def _whole(self, x: Tensors, p: Tensors, s: Tensors) -> tuple[Tensors, Tensors]:
        """A tree's state is made in PyTorch, and compared nowhere: without it, its kernels run."""
        return (self._named(self.agg(**x, **self._narrow(p))), {}) if self.tree else self._scan(x, p, s)

    def _steps(self, x: Tensors, p: Tensors, s: Tensors) -> tuple[Tensors, Tensors]:
        state: Tensors | None = s or None
        each = []
        for t in range(self.length):
            out, state = self.agg.step(state, **{k: v[:, t] for k, v in x.items()}, **self._narrow(p))
            each.append(self._named(out))
        assert state is not None
        return {k: torch.stack([one[k] for one in each], 1) for k in each[0]}, state

    def _segments(self, x: Tensors, p: Tensors, s: Tensors) -> tuple[Tensors, Tensors]:
        state = s
        third = self.length // 3
        bounds = sorted({0, third, min(third + 1, self.length), self.length})
        each = []
        for a, b in pairwise(bounds):
            out, state = self._scan({k: v[:, a:b] for k, v in x.items()}, p, state)
            each.append(out)
        return {k: torch.cat([one[k] for one in each], 1) for k in each[0]}, state

    def _balanced(self, x: Tensors, p: Tensors, s: Tensors) -> tuple[Tensors, Tensors]:
        return balanced(self.agg, x, self._narrow(p), s, self.draw.sizes, self.setting.lanes, self.compute)

    # --- flags, packing, causality ----------------------------------------------------------------

    def _flagged(self) -> Row:
        """Padding on the left of one row, holes, restarts."""
        g = torch.Generator().manual_seed(self.setting.seed + 1)
        shape = (self.setting.batch, self.length)
        mask, reset = torch.rand(shape, generator=g) < 0.8, torch.rand(shape, generator=g) < 0.1
        mask[0, : self.length // 2] = False
        flags = {"mask": mask.to(self.setting.device), "reset": reset.to(self.setting.device)}
        return self._flags("flags", self.inputs, self.initial, flags)

    def _packed(self) -> Row:
        """Sequences of 1, some and no tokens in a row."""
        inputs = {k: v[:1] for k, v in self.inputs.items()}
        ends = torch.tensor([0, 1, self.length // 2 + 1, self.length // 2 + 1, self.length])
        return self._flags("packed", inputs, {}, {"cu_seqlens": ends.to(self.setting.device)})

    def _flags(self, path: Path, inputs: Tensors, initial: Tensors, flags: Flags) -> Row:
        oracle = self._reference(inputs, initial, None, flags)
        base = self._errors(self._reference(inputs, initial, self.dtype, flags), oracle)
        found = self._run(lambda x, p, s: self._scan(x, p, s, **flags), inputs, initial)
        return self._row(path, found, oracle, base)

    @torch.no_grad()
    def _causal(self) -> bool:
        cut = (self.length + 1) // 2
        changed = {k: torch.cat([v[:, :cut], self.others[k][:, cut:]], 1) for k, v in self.inputs.items()}
        before, _ = self._whole(self.inputs, self.params, self.initial)
        after, _ = self._whole(changed, self.params, self.initial)
        return all(same_bits(before[k][:, :cut], after[k][:, :cut]) for k in before)

    # --- running and comparing --------------------------------------------------------------------

    def _cast(self, tensors: Tensors, dtype: torch.dtype) -> Tensors:
        out = {}
        for name, value in tensors.items():
            real = value.is_floating_point()
            wanted = dtype if real else complex_of(dtype) if value.is_complex() else value.dtype
            out[name] = value.to(self.setting.device, wanted)
        return out

    @torch.no_grad()
    def _warm(self, draw: Draw) -> Tensors:
        """A state that is reached from the start: that after a few other tokens."""
        before = self._cast(draw.inputs(self.setting.batch, 3), torch.float64)
        _, state = self.agg.reference(before, self._cast(self.params, torch.float64))
        kept = {k: v for k, v in state.items() if k in self.agg.spec.live or k.endswith("_tail")}
        return {k: self._cast({k: v}, self.dtype if k.endswith("_tail") else self.compute)[k] for k, v in kept.items()}

    def _narrow(self, params: Tensors) -> Tensors:
        return self._cast(params, self.dtype)

    def _named(self, out: Any) -> Tensors:
        names = [s.name for s in self.agg.spec.outputs]
        return dict(zip(names, (out,) if len(names) == 1 else out, strict=True))

    def _reference(
        self, inputs: Tensors, initial: Tensors, dtype: torch.dtype | None = None, flags: Flags = NO_FLAGS
    ) -> _Result:
        """The oracle; in fp64, or as well as it does in `dtype`."""

        def fold(x: Tensors, p: Tensors, s: Tensors) -> tuple[Tensors, Tensors]:
            outputs, state = self.agg.reference(
                x, p if dtype is None else self._narrow(p), initial_state=s or None, **flags
            )
            return self._cast(outputs, dtype or torch.float64), state

        if dtype is not None:
            return self._run(fold, inputs, initial)
        wide = {n: self._cast(t, torch.float64) for n, t in (("x", inputs), ("p", self.params), ("s", initial))}
        return self._run(fold, wide["x"], wide["s"], wide["p"])

    def _run(
        self, run: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]], inputs: Tensors, initial: Tensors,
        params: Tensors | None = None,
    ) -> _Result:  # fmt: skip
        # Leaves of params are wide and narrowed at each call, as in training: a sum of gradients loses nothing to bf16.
        wide = self._cast(self.params, self.compute) if params is None else params
        leaves = [_leaves(part) for part in (inputs, wide, initial)]
        outputs, state = run(*leaves)
        live = {} if self.tree else {k: v for k, v in state.items() if k in self.agg.spec.live}
        total = self._loss(outputs, live)
        named = {
            prefix + k: v
            for prefix, part in zip(("", "", "initial "), leaves, strict=True)
            for k, v in part.items() if v.requires_grad
        }  # fmt: skip
        gradients: Tensors = {}
        if total is not None and named:
            found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
            pairs = zip(named.items(), found, strict=True)
            gradients = {k: torch.zeros_like(v) if g is None else g.detach() for (k, v), g in pairs}
        return _Result({k: v.detach() for k, v in outputs.items()}, {k: v.detach() for k, v in live.items()}, gradients)

    def _loss(self, outputs: Tensors, state: Tensors) -> Tensor | None:
        """Re <cotangent, value> over all outputs and the final state; cotangents are the same in every dtype."""
        total: Tensor | None = None
        values = [part[name] for part in (outputs, state) for name in sorted(part)]
        for number, value in enumerate(values):
            if not value.requires_grad:
                continue
            g = torch.Generator().manual_seed(self.setting.seed + 100 + number)
            weight = torch.randn(value.shape, generator=g, dtype=torch.float64).to(self.dtype).to(value.device)
            wide = value.to(torch.complex128 if value.is_complex() else torch.float64)
            real = torch.view_as_real(wide).sum(-1) if wide.is_complex() else wide
            part = torch.where(torch.isfinite(real), real, 0) * weight.double()
            total = part.sum() if total is None else total + part.sum()
        return total if total is not None and total.requires_grad else None

    def _errors(self, found: _Result, oracle: _Result) -> tuple[float, float, dict[str, float]]:
        outputs = distances(found.outputs, oracle.outputs, oracle.outputs, True)
        state = distances(found.state, oracle.state, oracle.state, False)
        gradients = distances(found.gradients, oracle.gradients, oracle.gradients, False)
        return max(outputs.values(), default=0.0), max(state.values(), default=0.0), gradients

    def _row(self, path: Path, found: _Result, oracle: _Result, base: tuple[float, float, dict[str, float]]) -> Row:
        outputs, state, gradients = self._errors(found, oracle)
        allowed = (_ROUNDING[self.dtype], _ROUNDING[self.compute], _ROUNDING[self.dtype])
        worst = (base[0], base[1], max(base[2].values(), default=0.0))
        factors = (_CONDITION[self.dtype], _CONDITION[self.compute], _CONDITION[self.dtype])
        limits = tuple(max(a, f * b) for a, f, b in zip(allowed, factors, worst, strict=True))
        bad = [k for k, v in oracle.outputs.items() if v.is_floating_point() and bool(torch.isnan(v).any())]
        note = f"the oracle itself gives NaN in {', '.join(bad)}: declare the intervals of inputs" if bad else ""
        return Row(
            self.name, path, self.length, self.data, outputs, state if oracle.state else None, gradients,
            (limits[0], limits[1], limits[2]), max(worst[0], worst[1]), note=note,
        )  # fmt: skip


def _leaves(tensors: Tensors) -> Tensors:
    smooth = {k: v.is_floating_point() or v.is_complex() for k, v in tensors.items()}
    return {k: v.detach().clone().requires_grad_(smooth[k]) for k, v in tensors.items()}
