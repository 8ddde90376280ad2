"""Running printed pointwise kernels beside the oracle: used by the interpreter's tests and on a GPU."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from psmc import reference
from psmc.codegen.paste import POINTWISE_KIT, imports, paste
from psmc.codegen.pointwise import print_kernels
from psmc.derive.lifting import lifted
from psmc.frontend.psm import parse
from psmc.frontend.resolve import resolve
from psmc.ir import Aggregator
from psmc.ir.query import taps
from psmc.plan import pointwise
from psmc.source import SourceFile
from psmc.structure.analyse import analyse

EXAMPLES = Path(__file__).parent.parent / "examples"
HEAD = f"from __future__ import annotations\n\n{imports(paste(POINTWISE_KIT))}\n"
# Scanned in stages, with a whole number among the components that are read before their token.
COUNTED = """
aggregator counted {
  input x
  state m = -inf, s = 0, n : int in [0, 99] = 0
  lift { m = x; s = 1; n = 1 }
  combine (l, r) {
    m = max(l.m, r.m)
    s = l.s * exp(l.m - m) + r.s * exp(r.m - m)
    n = l.n + r.n
  }
  output y = log(s) + m, late = prev.s * x, count = s * n, before = prev.n + x, seen = prev.n
  associative: yes
}"""
_FOLDER = Path(tempfile.mkdtemp(prefix="psmc_pointwise_"))
_MODULES: dict[str, ModuleType] = {}


def scan_rows() -> None:
    """Makes Triton's interpreter scan whole rows at a time; otherwise it goes element by element, which is slow."""
    from triton.runtime.interpreter import ScanOps

    def scan(self, parts):
        rows = [list(np.moveaxis(p.handle.data, self.axis, 0)) for p in parts]
        done = [r[:1] for r in rows]
        for n in range(1, len(rows[0])):
            before = [self.to_tensor(d[-1], p.dtype) for d, p in zip(done, parts, strict=True)]
            here = [self.to_tensor(r[n], p.dtype) for r, p in zip(rows, parts, strict=True)]
            found = self.combine_fn.fn(*before, *here)
            for d, value in zip(done, found if isinstance(found, tuple) else (found,), strict=True):
                data = value.handle.data
                like = np.asarray(d[0])
                d.append((data.reshape(()) if like.ndim == 0 else np.broadcast_to(data, like.shape)).astype(like.dtype))
        return [self.to_tensor(np.stack(d, self.axis), p.dtype) for d, p in zip(done, parts, strict=True)]

    ScanOps.generic_scan = scan


def spec(text: str) -> Aggregator:
    (agg,) = resolve(parse(SourceFile("test.psm", text)))
    return lifted(agg)


def example(name: str) -> Aggregator:
    return spec((EXAMPLES / f"{name}.psm").read_text())


def kernels_text(agg: Aggregator) -> str:
    structure = analyse(agg)
    assert (why := pointwise.licensed(agg, structure)) is None, why
    return HEAD + print_kernels(agg, structure, pointwise.plan(agg, structure))


def kernels(agg: Aggregator):
    """The KERNELS object of a spec's printed module."""
    text = kernels_text(agg)
    if text not in _MODULES:
        file = _FOLDER / f"{agg.name}_{len(_MODULES)}.py"
        file.write_text(text)
        found = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        _MODULES[text] = module
    return _MODULES[text].KERNELS


def draw(tensor, shape: tuple[int, ...], made: torch.Generator) -> Tensor:
    """Values inside the tensor's interval."""
    x = torch.randn(shape, generator=made, dtype=torch.float64)
    if tensor.kind == "complex":
        return torch.complex(x, torch.randn(shape, generator=made, dtype=torch.float64))
    lo, hi = (None, None) if tensor.interval is None else (tensor.interval.lo, tensor.interval.hi)
    if lo is not None and hi is not None:
        x = float(lo) + (float(hi) - float(lo)) * torch.sigmoid(x)
    elif lo is not None:
        x = x.abs() + float(lo)
    elif hi is not None:
        x = float(hi) - x.abs()
    return x.round().long() if tensor.kind == "int" else x


class Case:
    """One call. `lanes`: leading lane axes of all inputs, or by name; `dims`: sizes; `param_lanes`: those of params."""

    def __init__(
        self, agg: Aggregator, batch: int, length: int, lanes=(3,), dims=None, param_lanes=None, cu=None, initial=False,
        masked=False, resets=False, seed=0, dtype=torch.float32, device="cpu",
    ) -> None:  # fmt: skip
        made = torch.Generator().manual_seed(seed)
        self.agg, self.cu, self.device, self.dtype = agg, cu, device, dtype
        sizes = dims or {d.name: d.size or 3 for d in agg.dims}
        self.structure = analyse(agg)
        by_name = lanes if isinstance(lanes, dict) else {}

        def lanes_of(name: str) -> tuple[int, ...]:
            return tuple(by_name.get(name, by_name.get("*", ()))) if by_name else tuple(lanes)

        def rounded(x: Tensor) -> Tensor:
            return x if not x.is_floating_point() else x.to(dtype).double()

        own = {t.name: tuple(sizes[d] for d in t.dims) for t in (*agg.leaf_inputs, *agg.params)}
        self.inputs = {t.name: rounded(draw(t, (batch, length, *lanes_of(t.name), *own[t.name]), made)) for t in agg.leaf_inputs}
        front = lanes_of("*") if param_lanes is None else param_lanes
        self.params = {t.name: draw(t, (*front, *own[t.name]), made) for t in agg.params}
        rows = batch if cu is None else len(cu) - 1
        full = reference.fold(agg, {k: v[:, :1] for k, v in self.inputs.items()}, self.params)[1] if length and batch else {}
        self.initial = None
        if initial:
            self.initial = {}
            for c in agg.state:
                if c.name in self.structure.live:
                    shape = (rows, *(full[c.name].shape[1:] if full else (*lanes_of("*"), *(sizes[d] for d in c.dims))))
                    self.initial[c.name] = draw(c, shape, made)
        self.mask = torch.rand(batch, length, generator=made) < 0.7 if masked else None
        self.reset = torch.rand(batch, length, generator=made) < 0.15 if resets else None
        self.weights = torch.Generator().manual_seed(seed + 1)

    def oracle(self):
        """Outputs, final state, and gradients by ('input' | 'param' | 'initial', name), in fp64."""
        leaves = {("input", k): v for k, v in self.inputs.items()} | {("param", k): v for k, v in self.params.items()}
        leaves |= {("initial", k): v for k, v in (self.initial or {}).items()}
        leaves = {k: v.detach().clone().requires_grad_(v.is_floating_point() or v.is_complex()) for k, v in leaves.items()}
        named = {s: {k: v for (space, k), v in leaves.items() if space == s} for s in ("input", "param", "initial")}
        clean = named["input"]
        tails = {}
        if self.initial is not None:  # taps start from zeros
            tails = {f"{k}_tail": v[:1, :1].detach() * 0 for k, v in ()}
        outputs, final = reference.fold(
            self.agg, clean, named["param"], initial_state={**named["initial"], **tails} if self.initial else None,
            cu_seqlens=self.cu, mask=self.mask, reset=self.reset,
        )  # fmt: skip
        final = {k: v for k, v in final.items() if k in self.structure.live}
        self.ct_outputs = {k: self._ct(v) for k, v in outputs.items()}
        self.ct_final = {k: self._ct(v) for k, v in final.items()}
        pairs = [(v, self.ct_outputs[k]) for k, v in outputs.items()] + [(v, self.ct_final[k]) for k, v in final.items()]
        pairs = [(v, g) for v, g in pairs if v.requires_grad]
        wanted = [k for k, v in leaves.items() if v.requires_grad]
        grads = torch.autograd.grad(
            [v for v, _ in pairs], [leaves[k] for k in wanted], [g for _, g in pairs], allow_unused=True
        ) if pairs and wanted else [None] * len(wanted)  # fmt: skip
        return outputs, final, dict(zip(wanted, grads, strict=True))

    def _ct(self, value: Tensor) -> Tensor:
        x = torch.randn(value.shape, generator=self.weights, dtype=torch.float64)
        if value.is_complex():
            x = torch.complex(x, torch.randn(value.shape, generator=self.weights, dtype=torch.float64))
        return x.to(self.dtype).double() if not x.is_complex() else x

    def _cast(self, x: Tensor, real: torch.dtype | None = None) -> Tensor:
        if x.is_complex():
            return x.to(torch.complex64).to(self.device)
        return x.to(real or self.dtype).to(self.device) if x.is_floating_point() else x.to(self.device)

    def run(self, split: bool = False):
        """The same from the kernels; call after `oracle`. `split`: small tiles, and time in segments."""
        found = kernels(self.agg)
        before = found.processors, found.table.tiles, found.segment_tiles, found.table.every
        if split:
            found.processors, found.segment_tiles = 8, 1
        if found.interpreted:  # it goes through a tile element by element
            found.table.every, tile = 4, (4, 4, 1, 2)
            found.table.tiles = {way: dict.fromkeys((2, 4), tile) for way in ("forward", "backward")}
        inputs = [self._cast(self.inputs[t.name]) for t in self.agg.leaf_inputs]
        for name, longest in taps(self.agg).items():
            inputs += [self._cast(x) for x in lags(self.inputs[name], longest, self.cu, self.mask, self.reset)]
        if self.mask is not None:
            gone = ~self.mask.to(self.device)
            inputs = [x.masked_fill(gone.reshape(gone.shape + (1,) * (x.dim() - 2)), float("nan")) if x.is_floating_point() or x.is_complex() else x
                      for x in inputs]  # fmt: skip
        params = [self._cast(self.params[t.name]) for t in self.agg.params]
        initial = None
        if self.initial is not None:
            initial = [self._cast(self.initial[n], torch.float32) for n in self.structure.live]
        cu = None if self.cu is None else torch.tensor(self.cu, device=self.device)
        code = None
        if self.mask is not None or self.reset is not None:
            batch, length = inputs[0].shape[:2]
            ones = torch.ones(batch, length, dtype=torch.bool)
            mask = ones if self.mask is None else self.mask
            reset = ~ones if self.reset is None else self.reset
            code = (2 * reset.to(torch.int8) + mask.to(torch.int8)).to(torch.int8).to(self.device)
        if split:
            span = found._span("forward", found._shape(inputs, params), len(inputs[0]), inputs[0].shape[1], inputs)
            assert span.segments > 2
        outputs, finals, saved = found.scan_forward(inputs, params, initial, code, cu, True)
        ends = [self._cast(self.ct_final[n], torch.float32) for n in self.structure.live]
        names = [a.name for a in self.agg.output.results]
        cts = [self._cast(self.ct_outputs[n]) for n in names]
        d_inputs, d_params, d_initial = found.scan_backward(
            cts, ends, inputs, params, initial, saved, code, cu
        )
        found.processors, found.table.tiles, found.segment_tiles, found.table.every = before
        grads = {("input", t.name): g for t, g in zip(self.agg.leaf_inputs, d_inputs, strict=False)}
        extra = d_inputs[len(self.agg.leaf_inputs) :]
        for name, longest in taps(self.agg).items():
            here, extra = extra[:longest], extra[longest:]
            whole = torch.zeros_like(self.inputs[name]) if grads["input", name] is None else grads["input", name].cpu().double()
            for lag, g in enumerate(here, 1):
                if g is not None:
                    whole = whole + unlag(self.inputs[name], longest, lag, g.cpu().double(), self.cu, self.mask, self.reset)
            grads["input", name] = whole
        grads |= {("param", t.name): g for t, g in zip(self.agg.params, d_params, strict=True)}
        if d_initial is not None:
            grads |= {("initial", n): g for n, g in zip(self.structure.live, d_initial, strict=True)}
        return dict(zip(names, outputs, strict=True)), dict(zip(self.structure.live, finals, strict=True)), grads

    def check(self, split: bool = False, tolerance: float = 2e-5) -> None:
        outputs, final, grads = self.oracle()
        mine = self.run(split)
        for which, (theirs, ours) in enumerate(zip((outputs, final, grads), mine, strict=True)):
            for name, want in theirs.items():
                got = ours[name]
                if want is None:
                    assert got is None or not torch.nan_to_num(got, nan=1.0).any(), (which, name)
                    continue
                got = torch.zeros_like(want) if got is None else got
                assert tuple(got.shape) == tuple(want.shape), (name, got.shape, want.shape)
                close(got.detach().cpu(), want.detach(), tolerance, f"{self.agg.name} {name}")


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Relative to the largest value of its kind: one element's error may come from cancellation."""
    got = got.to(want.dtype)
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite), f"{what}: not finite in other places"
    if not finite.any():
        return
    scale = max(1.0, float(want[finite].abs().max()))
    error = float((got[finite] - want[finite]).abs().max()) / scale
    assert error <= tolerance, f"{what}: {error:.2e} of {scale:.2e}"


def lags(x: Tensor, longest: int, cu, mask, reset) -> list[Tensor]:
    """x read 1 .. longest tokens earlier."""
    out = [torch.zeros_like(x) for _ in range(longest)]
    for b, t, lag, source in _sources(x, longest, cu, mask, reset):
        out[lag - 1][b, t] = x[b, source]
    return out


def unlag(x: Tensor, longest: int, lag: int, grad: Tensor, cu, mask, reset) -> Tensor:
    out = torch.zeros_like(x)
    for b, t, here, source in _sources(x, longest, cu, mask, reset):
        if here == lag:
            out[b, source] += grad[b, t]
    return out


def _sources(x: Tensor, longest: int, cu, mask, reset):
    starts = set(cu or [0])
    for b in range(x.shape[0]):
        begin = 0
        for t in range(x.shape[1]):
            if t in starts or (reset is not None and reset[b, t]):
                begin = t
            for lag in range(1, longest + 1):
                if t - lag >= begin and (mask is None or mask[b, t - lag]):
                    yield b, t, lag, t - lag
