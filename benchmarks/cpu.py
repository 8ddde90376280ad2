"""On a CPU: psmc against its own oracle token by token; for some, torch's associative_scan over whole elements.

    python benchmarks/cpu.py --out benchmarks/results/cpu.json [--rounds 5] [--tokens 2048] [--threads 2 --wall]

All are run in turn, round after round, so that what else the machine does meets all alike; each gives its median. The
clock is that of the process on one thread: what others do on the machine does not count, only what they do to caches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import psmc
from benchmarks.measure import write

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HEADS, KEY, VALUE = 4, 64, 64
LANES, STATE = 64, 16  # of other specs
Tensors = dict[str, Tensor]


def tensors(length: int, seed: int = 0) -> Tensors:
    """One batch of what the specs read: unit keys, decays of a trained model's order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, length, HEADS, *shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(1, length, HEADS, *shape, generator=generator)

    return {
        "q": normal(KEY), "k": torch.nn.functional.normalize(normal(KEY), dim=-1), "v": normal(VALUE),
        "decay": -0.1 * uniform(KEY), "g": -0.1 * uniform(), "beta": uniform(), "dt": 0.1 * uniform() + 1e-3,
        "A": -uniform()[0, 0] - 0.1, "skip": normal()[0, 0], "w": normal(VALUE), "value_decay": -0.1 * uniform(VALUE),
        "rate": normal(KEY) - 3, "write": uniform(KEY), "bonus": normal(KEY)[0, 0], "gate": normal() + 3,
        "gamma": 1 - 2.0 ** -torch.arange(5, 5 + HEADS), "h": normal(KEY), "betas": 2 * uniform(2),
        "keys": torch.nn.functional.normalize(normal(2, KEY), dim=-1), "values": normal(2, VALUE),
        "positive": uniform(KEY),
    }  # fmt: skip


# spec -> (its inputs, its params) by the names above
SPECS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "linear_attention": ({"q": "q", "k": "k", "v": "v"}, {}),
    "gla": ({"q": "q", "k": "k", "v": "v", "g": "decay"}, {}),
    "mamba2": ({"x": "v", "dt": "dt", "B": "k", "C": "q"}, {"A": "A", "skip": "skip"}),
    "gated_deltanet": ({"q": "q", "k": "k", "v": "v", "beta": "beta", "g": "g"}, {}),
    "retnet": ({"q": "q", "k": "k", "v": "v"}, {"gamma": "gamma"}),
    "hgrn2": ({"q": "q", "v": "v", "g": "decay"}, {}),
    "rwkv6": ({"r": "q", "k": "k", "v": "v", "w": "rate"}, {"u": "bonus"}),
    "mlstm": ({"q": "q", "k": "k", "v": "v", "igate": "g", "fgate": "gate"}, {}),
    "gated_rfa": ({"q": "write", "k": "positive", "v": "v", "gate": "gate"}, {}),
    "two_writes": ({"q": "q", "k": "k", "v": "v", "h": "h", "w": "w", "f": "gate"}, {}),
    "value_gate": ({"q": "q", "k": "k", "v": "v", "g": "value_decay"}, {}),
    "grid_gate": ({"q": "q", "k": "k", "v": "v", "g": "decay", "h": "value_decay"}, {"u": "bonus"}),
    "deltanet": ({"q": "q", "k": "k", "v": "v", "beta": "beta"}, {}),
    "kda": ({"q": "q", "k": "k", "v": "v", "beta": "beta", "g": "decay"}, {}),
    "rwkv7": ({"r": "q", "d": "h", "k": "k", "v": "v", "kappa": "k", "a": "write"}, {}),
    "delta_product": ({"q": "q", "k": "keys", "v": "values", "beta": "betas"}, {}),
}
SCALARS = {"mingru": ("z", "x"), "logsumexp": ("x",), "affine2x2": ("a11", "a12", "a21", "a22", "b1", "b2")}
OTHERS = (*SCALARS, "welford", "lru", "mamba", "s4d", "viterbi", "reachability", "s5_word")
SCANNED = ("linear_attention", "gla", "mamba2", "gated_deltanet")  # what is also written for torch's associative_scan


def others(spec: str, length: int, seed: int = 0) -> tuple[str, Tensors, Tensors]:
    """(shape, inputs, params) of a spec without a matrix state of a head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, length, *shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(1, length, *shape, generator=generator)

    wide, square = f"B1 T{length} D{LANES} N{STATE}", f"B1 T{length} H{HEADS} N{STATE}"
    rates, each = torch.arange(1.0, 1 + STATE).repeat(LANES, 1), torch.zeros(LANES)
    given: dict[str, tuple[str, Tensors, Tensors]] = {
        "mamba": (wide, {"x": normal(LANES), "dt": 0.1 * uniform(LANES) + 1e-3, "B": normal(STATE), "C": normal(STATE)},
                  {"A": -rates}),
        "s4d": (wide, {"u": normal(LANES)}, {
            "log_dt": each - 4, "log_decay": 0 * rates - 0.7, "frequency": rates, "skip": each + 1,
            "C": torch.complex(normal(LANES, STATE)[0, 0], normal(LANES, STATE)[0, 0])}),
        "viterbi": (square, {"emission": normal(HEADS, STATE)}, {"transition": normal(STATE, STATE)[0, 0]}),
        "reachability": (square, {"edge": (uniform(HEADS, STATE, STATE) < 0.05).float(),
                                  "source": (uniform(HEADS, STATE) < 0.01).float()}, {}),
        "s5_word": (f"B1 T{length} D{LANES}", {"x": uniform(LANES, 5).argsort(-1)}, {}),
        "lru": (f"B1 T{length} D{LANES}", {"u": torch.complex(normal(LANES), normal(LANES))},
                {"nu": each - 3, "theta": each, "gamma": each}),
    }  # fmt: skip
    names = SCALARS.get(spec, ("x",))
    return given.get(spec) or (f"B1 T{length} D{LANES}", {k: 0.5 * normal(LANES) for k in names}, {})


def elements(spec: str, x: Tensors) -> tuple[Callable[[Any, Any], Any], tuple[Tensor, ...]]:
    """(the rule on whole elements, the elements [B, T, H, ...]); the last of them is the matrix state."""
    if spec == "linear_attention":
        phi = torch.relu(x["k"]) + torch.exp(torch.clamp(x["k"], max=0))
        return (lambda p, y: (p[0] + y[0], p[1] + y[1])), (phi, phi[..., None] * x["v"][..., None, :])
    outer = x["k"][..., None] * x["v"][..., None, :]
    if spec == "gla":
        return (lambda p, y: (p[0] * y[0], y[0][..., None] * p[1] + y[1])), (x["decay"].exp(), outer)
    if spec == "mamba2":
        a = (x["dt"] * x["A"]).exp()
        fed = x["dt"][..., None, None] * outer
        return (lambda p, y: (p[0] * y[0], y[0][..., None, None] * p[1] + y[1])), (a, fed)
    own = x["k"][..., None] * x["k"][..., None, :]
    a = x["g"].exp()[..., None, None] * (torch.eye(KEY) - x["beta"][..., None, None] * own)
    return (lambda p, y: (y[0] @ p[0], y[0] @ p[1] + y[1])), (a, x["beta"][..., None, None] * outer)


def readout(spec: str, x: Tensors, prefix: tuple[Tensor, ...]) -> Tensor:
    q = x["q"]
    if spec == "linear_attention":
        q = torch.relu(q) + torch.exp(torch.clamp(q, max=0))
        return torch.einsum("bthi,bthij->bthj", q, prefix[1]) / (q * prefix[0]).sum(-1, keepdim=True)
    o = torch.einsum("bthi,bthij->bthj", q, prefix[1])
    return o + x["skip"][..., None] * x["v"] if spec == "mamba2" else o / KEY**0.5


def associative_scan(spec: str, x: Tensors) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    rule, given = elements(spec, x)
    return readout(spec, x, scan(rule, given, dim=1, combine_mode="generic"))


def runs(spec: str, length: int) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], str]:
    """What to time, by name; the tensors that have gradients; the shape."""
    file = EXAMPLES / f"{spec}_recurrence.psm"
    agg = psmc.load(file if file.exists() else EXAMPLES / f"{spec}.psm")
    peers: dict[str, Callable[[], Tensor]] = {}
    if spec in SPECS:
        names, params = SPECS[spec]
        x = {k: v.requires_grad_() for k, v in tensors(length).items()}
        inputs, given = {k: x[n] for k, n in names.items()}, {k: x[n] for k, n in params.items()}
        shape = f"B1 T{length} H{HEADS} K{KEY} V{VALUE}"
        if spec in SCANNED:
            peers["associative_scan"] = partial(associative_scan, spec, x)
    else:
        shape, inputs, given = others(spec, length)
        for v in (*inputs.values(), *given.values()):
            v.requires_grad_(v.is_floating_point() or v.is_complex())
    used = {id(v): v for v in (*inputs.values(), *given.values()) if v.requires_grad}

    def first(found: Any) -> Tensor:
        one: Tensor = found[0] if isinstance(found, tuple) else found
        return one

    def oracle() -> Tensor:
        return next(iter(agg.reference(inputs, given)[0].values()))

    return {"psmc": lambda: first(agg(**inputs, **given)), "oracle": oracle, **peers}, list(used.values()), shape


def timed(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return (clock() - start) * 1e3


def measure(spec: str, length: int, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Rows of forward, and of forward + backward."""
    found, used, shape = runs(spec, length)
    out = found["psmc"]().detach()
    cotangent = torch.randn_like(out) if used else out
    reference = found["oracle"]().detach()

    def forward(run: Callable[[], Tensor]) -> Callable[[], Any]:
        def go() -> Any:
            with torch.no_grad():
                return run()

        return go

    def both(run: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run(), used, cotangent, allow_unused=True)

    errors = {}
    for name, run in found.items():
        try:
            gap = (run().detach() - reference).abs().max() / reference.abs().max()
            errors[name] = float(f"{gap.item():.1e}")
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:120]
    able = [k for k, e in errors.items() if isinstance(e, float)]
    rows = []
    for kind, wrap in (("fwd", forward), ("fwd+bwd", both))[: 2 if used else 1]:
        ms: dict[str, list[float]] = {k: [] for k in able}
        for _ in range(rounds):
            for k in able:
                ms[k] += [timed(wrap(found[k]), clock) for _ in range(5 if k == "psmc" else 1)]
        middle = {k: round(statistics.median(v), 1) for k, v in ms.items()}
        rows.append({
            "spec": spec, "shape": shape, "dtype": str(reference.dtype).removeprefix("torch."), "pass": kind,
            "ms": middle.pop("psmc"), "peers": middle, "error": errors["psmc"],
            "peer_error": {k: e for k, e in errors.items() if k != "psmc"},
        })  # fmt: skip
        print("  ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
        print("  times psmc: " + ", ".join(f"{k} {v / rows[-1]['ms']:.1f}" for k, v in middle.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="wall clock: for an idle machine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--spec", nargs="*", default=[*SPECS, *OTHERS])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.wall else time.process_time
    command = " ".join(["python benchmarks/cpu.py", *sys.argv[1:]])
    rows: list[dict[str, Any]] = []
    for spec in options.spec:
        rows += measure(spec, options.tokens, options.rounds, clock)
        if options.out:  # after each, so that what was measured is there whatever comes next
            write(options.out, rows, command, threads=options.threads, clock="wall" if options.wall else "process")


if __name__ == "__main__":
    main()
