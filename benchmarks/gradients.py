"""Gradients of scans against the fp64 oracle: psmc, torch's associative_scan, jax's.

    python benchmarks/gradients.py --out benchmarks/results/gradients.json [--device cpu] [--smoke]

Relative errors (2-norm), the worst of all inputs; a missing gradient counts as 0. Written scan by scan.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import psmc
from benchmarks.measure import write

Rule = Callable[[Any, Any, Any], tuple[Any, ...]]  # (namespace of functions, left, right)

# name -> (spec, element components, the rule in Python, which component is read)
SPECS: dict[str, tuple[str, tuple[str, ...], Rule, int]] = {
    "linear recurrence": (
        "state a = 1, h = 0  combine (l, r) { a = l.a * r.a; h = r.a * l.h + r.h }  output y = h",
        ("a", "h"), lambda f, l, r: (l[0] * r[0], r[0] * l[1] + r[1]), 1,
    ),
    "log-sum-exp": (
        "state m = -inf, s = 0  combine (l, r) { m = max(l.m, r.m); s = l.s * exp(l.m - m) + r.s * exp(r.m - m) }"
        "  output y = s",
        ("m", "s"), lambda f, l, r: (
            f.maximum(l[0], r[0]),
            l[1] * f.exp(l[0] - f.maximum(l[0], r[0])) + r[1] * f.exp(r[0] - f.maximum(l[0], r[0])),
        ), 1,
    ),
    "max-plus": (
        "state a = 0, m = -inf  combine (l, r) { a = l.a + r.a; m = max(l.m + r.a, r.m) }  output y = m",
        ("a", "m"), lambda f, l, r: (l[0] + r[0], f.maximum(l[1] + r[0], r[1])), 1,
    ),
    "complex": (
        "state a : complex = 1, h : complex = 0  combine (l, r) { a = l.a * r.a; h = r.a * l.h + r.h }  output y = h",
        ("a", "h"), lambda f, l, r: (l[0] * r[0], r[0] * l[1] + r[1]), 1,
    ),
    "2x2 affine": (
        "state a = 1, b = 0, c = 0, d = 1, u = 0, v = 0  combine (l, r) {"
        " a = r.a * l.a + r.b * l.c; b = r.a * l.b + r.b * l.d; c = r.c * l.a + r.d * l.c; d = r.c * l.b + r.d * l.d;"
        " u = r.a * l.u + r.b * l.v + r.u; v = r.c * l.u + r.d * l.v + r.v }  output y = u",
        ("a", "b", "c", "d", "u", "v"), lambda f, l, r: (
            r[0] * l[0] + r[1] * l[2], r[0] * l[1] + r[1] * l[3], r[2] * l[0] + r[3] * l[2], r[2] * l[1] + r[3] * l[3],
            r[0] * l[4] + r[1] * l[5] + r[4], r[2] * l[4] + r[3] * l[5] + r[5],
        ), 4,
    ),
}  # fmt: skip


def data(name: str, count: int) -> list[Tensor]:
    """Elements [B, T, C] in fp64: transitions that neither vanish nor explode."""
    torch.manual_seed(0)
    shape = (2, 64, 16)
    if name == "2x2 affine":
        return [torch.rand(shape).double() * 0.5 for _ in range(4)] + [torch.randn(shape).double() for _ in range(2)]
    first = torch.rand(shape).double() * 0.5 + 0.5
    if name == "complex":
        return [torch.polar(first, torch.randn(shape).double()), torch.randn(shape, dtype=torch.complex128)]
    rest = torch.rand(shape).double() + 0.5 if name == "log-sum-exp" else torch.randn(shape).double()
    return [first.log() if name == "max-plus" else first, rest]


def worst(found: list[Tensor | None], wanted: list[Tensor]) -> float:
    """The largest relative error over all tensors; a missing gradient counts as 0."""
    errors = []
    for x, y in zip(found, wanted, strict=True):
        x = torch.zeros_like(y) if x is None else torch.as_tensor(x).cpu().to(y.dtype)
        errors.append(float((x - y).norm() / y.norm()))
    return max(errors)


def by_torch(rule: Rule, read: int, mode: str, compiled: bool) -> Callable[..., Tensor]:
    from torch._higher_order_ops.associative_scan import associative_scan

    def run(*x: Tensor) -> Tensor:
        found: Tensor = associative_scan(lambda l, r: rule(torch, l, r), x, dim=1, combine_mode=mode)[read]
        return found

    return torch.compile(run) if compiled else run


def by_jax(rule: Rule, read: int, x: list[Tensor], weight: Tensor) -> list[Tensor]:
    import jax
    import jax.numpy as jnp

    arrays = [jnp.asarray(t.cpu().numpy()) for t in x]
    w = jnp.asarray(weight.cpu().numpy())

    def loss(*a: Any) -> Any:
        return (jax.lax.associative_scan(lambda l, r: rule(jnp, l, r), a, axis=1)[read] * jnp.conj(w)).real.sum()

    grads = jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays)))))(*arrays)
    return [torch.from_numpy(__import__("numpy").array(g)).conj().resolve_conj() for g in grads]


def gradients(fn: Callable[..., Tensor], x: list[Tensor], weight: Tensor) -> list[Tensor | None]:
    leaves = [t.detach().clone().requires_grad_() for t in x]
    loss = (fn(*leaves) * weight.conj()).real.sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="the first scan only, without a compiler")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, (text, components, rule, read) in list(SPECS.items())[: 1 if options.smoke else None]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "spec.psm"
            path.write_text(f"aggregator spec_{name.replace('-', '_').replace(' ', '_')} {{ {text} associative: yes }}")
            agg = psmc.load(path)
            exact = data(name, len(components))
            weight = torch.randn_like(exact[-1])
            wanted = gradients(lambda *x: agg.reference(dict(zip(components, x, strict=True)))[0]["y"], exact, weight)  # noqa: B023
        low = torch.complex64 if name == "complex" else torch.float32
        x, w = [t.to(low).to(options.device) for t in exact], weight.to(low).to(options.device)
        row: dict[str, Any] = {"scan": name}
        runs: dict[str, Callable[[], list[Any]]] = {
            "psmc": lambda: gradients(agg, x, w),  # noqa: B023
            "torch pointwise, compiled": lambda: gradients(by_torch(rule, read, "pointwise", True), x, w),  # noqa: B023
            "torch generic": lambda: gradients(by_torch(rule, read, "generic", False), x, w),  # noqa: B023
            "jax": lambda: by_jax(rule, read, x, w),  # noqa: B023
        }
        if options.smoke:
            del runs["torch pointwise, compiled"]
        for who, run in runs.items():
            try:
                row[who] = float(f"{worst(run(), [t for t in wanted if t is not None]):.1e}")
            except Exception as error:
                row[who] = f"fails: {type(error).__name__}"
        rows.append(row)
        print(row, flush=True)
        write(options.out, rows, "python benchmarks/gradients.py --out benchmarks/results/gradients.json")


if __name__ == "__main__":
    main()
