"""Chunked specs against the fp64 oracle on hard data: outputs and every gradient.

    python benchmarks/accuracy.py --out benchmarks/results/chunked_accuracy.json

Exact data are fp32 tensors. A row has the relative error (2-norm) of the output and of the worst gradient against the
oracle in fp64 on them. bf16: of psmc on the rounded tensors, of the oracle on the rounded tensors ("rounding"), and the
largest quotient of the two over all tensors ("over rounding", at most 1.5); fla beside it. Where an output is a mean of
many tokens, the operands' rounding averages out, and rounding the result alone is more: "over both" is the quotient to
the oracle on rounded tensors with its results rounded, which is what bf16 costs a perfect computation, and what is held
to 1.5 there. fp32: at most 1e-5. Kinds of data: chunk_data.py, and "trained", the tensors that reach the scan in a byte
model of two layers after some hundred steps on English text. "causal": the share of outputs before a token that change
by a bit when tokens from it on do. TRITON_INTERPRET=1 with --smoke: in the interpreter, without a GPU.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import chunk_peers, measure  # noqa: E402
from benchmarks.chunk_data import CHUNKED, DTYPES, GATED, KINDS, PARAMS, Shape, Tensors, inputs, load  # noqa: E402
from benchmarks.jobs import Cell, Group, Results, free, serve  # noqa: E402
from benchmarks.measure import EXAMPLES, Row, options, relative  # noqa: E402

SPECS = (*CHUNKED, "signed_decay")
BIG, TINY = Shape(1, 512, 16, 128, 128, "float32"), Shape(1, 40, 2, 16, 16, "float32")
BARS = {"bfloat16": 1.5, "float32": 1e-5}
WORST = "Worst over all specs"


def kinds(name: str) -> list[str]:
    """What makes sense of it: without gates none are hard, without keys none are alike."""
    left_out = {
        "linear_attention": GATED, "retnet": ("zeros",), "hgrn2": ("cosine 5", "cosine 9", "repeated"),
        "signed_decay": ("cosine 5", "cosine 9", "repeated", "trained"),
    }  # fmt: skip
    return [k for k in (*KINDS, "trained") if k not in left_out.get(name, ())]


# --- data ------------------------------------------------------------------------------------------------------


class Recorder:
    """A scan that remembers what it was called with."""

    def __init__(self, scan: Any) -> None:
        self.scan, self.spec, self.seen = scan, scan.spec, Tensors()

    def __call__(self, **given: Tensor) -> Any:
        self.seen = {k: x.detach().float() for k, x in given.items()}
        return self.scan(**given)


def trained(name: str, agg: Any, shape: Shape, steps: int) -> Tensors:
    """What reaches the scan of the last layer of a small byte model, behind so many steps on text."""
    from psmc.nn import LanguageModel, ScanMixer

    torch.manual_seed(0)
    text = torch.frombuffer(bytearray((EXAMPLES / "demo" / "wikitext.txt").read_bytes()), dtype=torch.uint8).long()
    sizes = dict(zip(agg.spec.dims, (shape.key, shape.value), strict=True))
    dim = 16 * shape.heads
    model = LanguageModel(256, dim, 2, lambda d: ScanMixer(agg, d, heads=shape.heads, sizes=sizes))
    model = model.to(measure.device())
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    made = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(len(text) - shape.length - 1, (4,), generator=made)
        rows = text[at[:, None] + torch.arange(shape.length + 1)].to(measure.device())
        logits = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    mixer: Any = model.stack()[-1].mixer
    mixer.scan = Recorder(mixer.scan)
    with torch.no_grad():
        model(rows[: shape.batch, :-1])
    return {k: x.clone() for k, x in mixer.scan.seen.items()}


# --- errors ----------------------------------------------------------------------------------------------------


def lower(x: Tensors, fixed: tuple[str, ...], dtype: torch.dtype) -> Tensors:
    return {k: t if k in fixed else t.to(dtype) for k, t in x.items()}


def derived(fn: Any, x: Tensors, weight: Tensor) -> Tensors:
    """The output, and the gradient of its product with `weight` for each tensor."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in x.items()}
    y = fn(leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), weight.to(y.dtype), allow_unused=True)
    found = {"output": y.detach()}
    return found | {k: torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(leaves, grads, strict=True)}


def oracle(agg: Any, fixed: tuple[str, ...], x: Tensors, weight: Tensor) -> Tensors:
    """In fp64. Params are those of the whole call, so that their gradients are."""

    def run(given: Tensors) -> Tensor:
        tokens = {k: t for k, t in given.items() if k not in fixed}
        y: Tensor = agg.reference(tokens, {k: given[k] for k in fixed})[0][agg.spec.outputs[0].name]
        return y

    return derived(run, {k: t.double() for k, t in x.items()}, weight.double())


def errors(found: Tensors, exact: Tensors) -> dict[str, float]:
    return {k: relative(found[k], y) for k, y in exact.items() if k in found}


def sorted_worst(found: dict[str, float]) -> list[str]:
    """Names from the worst on, nan first."""
    return sorted(found, key=lambda k: -found[k] if found[k] == found[k] else -float("inf"))


def summary(found: dict[str, float], prefix: str = "") -> Row:
    rest = {k: e for k, e in found.items() if k != "output"}
    worst = sorted_worst(rest)[0]
    return {f"{prefix}output": short(found["output"]), f"{prefix}gradient": short(rest[worst])}


def short(x: float) -> float:
    return float(f"{x:.2e}")


def handle(cell: Cell) -> Iterator[Row]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from benchmarks.interpreted_bf16 import bf16

        with bf16():
            yield from measured(cell)
    else:
        yield from measured(cell)


def measured(cell: Cell) -> Iterator[Row]:
    name, kind, shape = cell["spec"], cell["data"], TINY if cell["tiny"] else BIG
    fixed = PARAMS.get(name, ())
    with tempfile.TemporaryDirectory() as folder:
        agg = load(name, Path(folder))
        call = functools.partial(called, agg)
        if kind == "trained":
            x = trained(name, agg, shape, 3 if cell["tiny"] else 300)
        else:
            x = {k: t.float() for k, t in inputs(name, shape, kind).items()}
        made = torch.Generator(device=measure.device()).manual_seed(99)
        with torch.no_grad():
            weight = torch.randn(call(x).shape, device=measure.device(), generator=made)
        exact = oracle(agg, fixed, x, weight)
        for dtype, kept in DTYPES.items():
            same: Row = {"spec": name, "shape": shape.label, "dtype": dtype, "data": kind, "pass": "fwd+bwd"}
            rough, w = lower(x, fixed, kept), weight.to(kept).float()
            ours = errors(derived(call, rough, w), exact)
            row = same | {"plan": agg.plan.name} | summary(ours) | {"worst": sorted_worst(ours)[0]}
            if dtype == "bfloat16":
                best = oracle(agg, fixed, {k: t.float() for k, t in rough.items()}, w)
                perfect, both = errors(best, exact), errors(lower(best, fixed, kept), exact)
                over = {k: ours[k] / max(perfect[k], 1e-9) for k in ours}
                worst = sorted_worst(over)[0]
                row |= summary(perfect, "rounding ") | {"over rounding": short(over[worst]), "of": worst}
                fair = {k: ours[k] / max(both[k], 1e-9) for k in ours}
                row |= {"over both": short(fair[sorted_worst(fair)[0]])}
                row["ok"] = row["over both"] <= BARS[dtype]
            else:
                row["ok"] = max(ours.values()) <= BARS[dtype] and not any(e != e for e in ours.values())
            yield row
            if kind in ("iid", "gates"):
                yield same | {"pass": "causal"} | causal(name, agg, shape, kind, rough)
            free()
        if name in chunk_peers.PEERS and name != "mlstm" and chunk_peers.installed(name):
            rough = lower(x, fixed, torch.bfloat16)
            yield {"spec": name, "shape": shape.label, "dtype": "bfloat16", "data": kind, "pass": "fwd+bwd"} | peer(
                name, rough, weight, exact
            )


def called(agg: Any, x: Tensors) -> Tensor:
    y: Tensor = agg(**x)
    return y


def causal(name: str, agg: Any, shape: Shape, kind: str, x: Tensors) -> Row:
    """Every tensor is another from some token on; two calls with the same tensors must agree, too."""
    fixed, changed = PARAMS.get(name, ()), 0.0
    with torch.no_grad():
        before = called(agg, x)
        changed = float((called(agg, x) != before).float().mean())
        for at in (shape.length // 5, shape.length // 2 + 1, shape.length - 3):
            other = {k: t if k in fixed else torch.cat([t[:, :at], t[:, at:].flip(1) * 0.5], 1) for k, t in x.items()}
            changed = max(changed, float((called(agg, other)[:, :at] != before[:, :at]).float().mean()))
    return {"changed": changed, "ok": changed == 0}


def peer(name: str, x: Tensors, weight: Tensor, exact: Tensors) -> Row:
    """fla on the same rounded tensors; its refusals are told."""
    if measure.device() != "cuda":
        return {}
    from benchmarks import peer_tuning

    os.environ.update(chunk_peers.ENV)
    peer_tuning.short()
    fixed = {k: x[k] for k in chunk_peers.NOT_TRAINED.get(name, ())}
    free_ = {k: t for k, t in x.items() if k not in fixed}
    row: Row = {}
    try:
        with torch.no_grad():
            row = {"fla output": short(relative(chunk_peers.PEERS[name](x), exact["output"]))}
        found = errors(derived(lambda given: chunk_peers.PEERS[name]({**given, **fixed}), free_, weight), exact)
        return row | summary(found, "fla ")
    except RuntimeError as error:
        if "CUDA error" in str(error):
            raise
        return {**row, "fla gradient": f"refused: {' '.join(str(error).split())[:60]}"}


# --- tables ----------------------------------------------------------------------------------------------------


def worst_rows(rows: list[Row]) -> list[Row]:
    """A row a dtype and kind of data: the worst of all specs, and where."""
    found = []
    for dtype in DTYPES:
        for kind in (*KINDS, "trained"):
            mine = [r for r in rows if r.get("data") == kind and r.get("dtype") == dtype and "table" not in r]
            of = [r for r in mine if r["pass"] == "fwd+bwd" and "output" in r]
            if not of:
                continue
            causal_rows = [r["changed"] for r in mine if r["pass"] == "causal" and "changed" in r]
            row: Row = {"data": kind, "dtype": dtype, "specs": len(of)}
            for key in ("output", "gradient", "over rounding", "over both", "fla output", "fla gradient"):
                named = {r["spec"]: r[key] for r in of if isinstance(r.get(key), float)}
                if named:
                    where = sorted_worst(named)[0]
                    row[key] = f"{named[where]:.2g} ({where})"
            row |= {"changed by later tokens": max(causal_rows)} if causal_rows else {}
            bad = sorted({r["spec"] for r in mine if r.get("ok") is False or "error" in r})
            found.append(row | {"not within bounds": ", ".join(bad) or "none"})
    return found


def failed(cell: Cell, why: str) -> list[Row]:
    shape = TINY if cell["tiny"] else BIG
    same = {"spec": cell["spec"], "shape": shape.label, "data": cell["data"], "pass": "fwd+bwd"}
    return [same | {"dtype": dtype, "error": why} for dtype in DTYPES]


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--specs", default=",".join(SPECS))
    parser.add_argument("--data", default="", help="kinds of data, with commas between; all")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes at once")
    given = parser.parse_args()
    if given.job:
        torch.set_num_threads(2)
        serve(given.job, handle)
        return 0
    wanted = given.data.split(",") if given.data else [*KINDS, "trained"]
    groups = []
    for name in given.specs.split(","):
        cells = [{"spec": name, "data": k, "tiny": given.smoke} for k in kinds(name) if k in wanted]
        cache = {"TRITON_CACHE_DIR": str(ROOT / "build" / "bench_cache" / "peers")} | chunk_peers.ENV
        groups.append(Group(name, tuple(cells), 150, cache))
    order = [*SPECS, None]
    results = Results(given.out, given.resume, lambda r: ("table" in r, order.index(r.get("spec")), r["dtype"]))
    results.run(__file__, groups, failed, workers=given.jobs, seconds=given.seconds)
    results.replace(WORST, worst_rows(list(results.rows.values())))
    measure.show(r for r in results.sorted() if "table" in r)
    print(json.dumps({"not measured": results.missing}) if results.missing else "all measured")
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main())
