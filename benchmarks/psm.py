"""Transformer-PSM on one machine: training against the loop over chunks, combines, latency and memory of decoding.

    python benchmarks/psm.py --out benchmarks/results/psm.json        # on a GPU, some 8 minutes
    python benchmarks/psm.py --out build/psm.json --quick             # anywhere, seconds: that everything runs

training   one step (forward, backward) of the tree against two loops over chunks, left to right, by the binary counter:
           one that keeps its partial folds as psmc's counter does, one that folds all roots again for each chunk. The
           loops' outputs are the tree's. 64, 256 and 512 chunks of 64 tokens, batch 8, width 256
combine    the prefixes alone, forward and backward, at batch 32 and width 768, where arithmetic bounds them
latency    one token with n tokens before it, n up to 40,000, at batch 1 and 32: T-PSM of chunks 32 to 256, a GPT with a
           cache of keys and values, Mamba-2 and GLA as psmc compiles them; equal parameters, bf16. Behind each n stand
           so many timed tokens, chunk ends among them; states come from prefilling n random tokens
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measure import commit, show, write
from psmc.nn import Attention, LanguageModel, ScanMixer, TransformerPSM, parameters_of, sizes_for, state_bytes
from psmc.runtime.kit_tree import Node, counter_push, counter_start, tree_scan

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
VOCAB = 256
Row = dict[str, Any]
Keep = Callable[[list[Row]], None]


class Machine:
    """The device, how it is timed, and the precision."""

    def __init__(self, quick: bool) -> None:
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.rounds = 1 if quick else 7

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self.cuda else nullcontext()

    def measure(self, run: Callable[[], Any]) -> Row:
        """Median ms of a call after one that warms up, and the peak memory that a call needs beyond what stands."""
        run()
        self.wait()
        held = torch.cuda.memory_allocated() if self.cuda else 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        row: Row = {"ms": round(1e3 * statistics.median(times), 4)}
        if self.cuda:
            row["peak MiB"] = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
        return row


# --- loops over chunks ---------------------------------------------------------------------------


def fold_again(merge: Callable[[Node, Node], Node], leaves: Node) -> Node:
    """The prefixes [B, n, ...] chunk by chunk; each is folded anew from all roots of the counter."""
    roots: dict[int, Node] = {}
    rows: list[Node] = []
    for i in range(next(iter(leaves.values())).shape[1]):
        carry, level = {k: x[:, i] for k, x in leaves.items()}, 0
        while level in roots:
            carry, level = merge(roots.pop(level), carry), level + 1
        roots[level] = carry
        high, *rest = sorted(roots, reverse=True)
        fold = roots[high]
        for k in rest:
            fold = merge(fold, roots[k])
        rows.append(fold)
    return {k: torch.stack([row[k] for row in rows], 1) for k in leaves}


def fold_kept(merge: Callable[[Node, Node], Node], leaves: Node) -> Node:
    """The same, by the counter that keeps its partial folds."""
    counter, rows = counter_start(next(iter(leaves.values())).shape[0]), []
    for i in range(next(iter(leaves.values())).shape[1]):
        row, counter = counter_push(merge, counter, {k: x[:, i] for k, x in leaves.items()})
        rows.append(row)
    return {k: torch.stack([row[k] for row in rows], 1) for k in leaves}


def by_tree(merge: Callable[[Node, Node], Node], leaves: Node) -> Node:
    return tree_scan(merge, leaves, keep=False)[0]


PLANS = {"tree": by_tree, "loop, folds kept": fold_kept, "loop, folds again": fold_again}


class Looped(nn.Module):
    """A Transformer-PSM whose prefixes are computed by one of PLANS; in a loop, inf runs chunk by chunk, too."""

    def __init__(self, model: TransformerPSM, plan: str) -> None:
        super().__init__()
        self.model, self.plan = model, plan

    def forward(self, tokens: Tensor) -> Tensor:
        if self.plan == "tree":
            return self.model(tokens)  # type: ignore[no-any-return]
        scan, words = self.model.scan, self.model.vocabulary
        c = scan.chunk_size
        chunks = words.embed(tokens).split(c, 1)
        leaves = {"element": torch.stack([scan.enc(x) for x in chunks[:-1]], 1)}
        prefixes = PLANS[self.plan](scan._merge, leaves)["element"]
        first = scan.identity_element.expand(len(tokens), -1, -1)
        outputs = [scan.inf(first if i == 0 else prefixes[:, i - 1], x) for i, x in enumerate(chunks)]
        return words.logits(torch.cat(outputs, 1))


def training(m: Machine, quick: bool, compiled: bool, keep: Keep) -> None:
    batch, chunk, dim = (2, 4, 32) if quick else (8, 64, 256)
    for chunks in (5, 8) if quick else (64, 256, 512):
        torch.manual_seed(0)
        model = TransformerPSM(VOCAB, dim, chunk, heads=max(1, dim // 64), agg_layers=1, inf_layers=2).to(m.device)
        tokens = torch.randint(VOCAB, (batch, chunks * chunk), device=m.device)
        outputs = {}
        for name in (*PLANS, "tree, recompute", *(["tree, compiled"] if compiled else [])):
            model.scan.recompute = name == "tree, recompute"
            looped: nn.Module = Looped(model, "tree" if name.startswith("tree") else name)
            if name == "tree, compiled":
                looped = torch.compile(looped, fullgraph=True, dynamic=False)

            def step(looped: nn.Module = looped, tokens: Tensor = tokens) -> None:
                with m.autocast():
                    logits = looped(tokens)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
                loss.backward()
                looped.zero_grad(set_to_none=True)

            outputs[name] = looped(tokens)[:1].detach()
            assert (outputs[name] - outputs["tree"]).abs().max() < 2e-2, name
            found = m.measure(step)
            speed = round(tokens.numel() / found["ms"] * 1e3)
            keep([{"topic": "training", "plan": name, "chunks": chunks, "B": batch, "c": chunk, "d": dim,
                   **found, "tokens/s": speed}])  # fmt: skip


def combine(m: Machine, quick: bool, keep: Keep) -> None:
    batch, chunk, dim = (2, 4, 32) if quick else (32, 64, 768)
    for chunks in (7,) if quick else (31, 63):  # what 32 and 64 chunks need
        torch.manual_seed(0)
        scan = TransformerPSM(VOCAB, dim, chunk, heads=max(1, dim // 64), agg_layers=1, inf_layers=1).scan.to(m.device)
        leaves = torch.randn(batch, chunks, chunk, dim, device=m.device, requires_grad=True)
        weight = torch.randn_like(leaves)
        for name, plan in PLANS.items():
            count = 0

            def merge(left: Node, right: Node, scan: Any = scan) -> Node:
                nonlocal count
                count += len(left["element"])
                return scan._merge(left, right)  # type: ignore[no-any-return]

            def run(
                plan: Any = plan, merge: Any = merge, scan: Any = scan, leaves: Tensor = leaves, weight: Tensor = weight
            ) -> None:
                with m.autocast():
                    prefix = plan(merge, {"element": leaves})["element"]
                torch.autograd.grad((prefix * weight).sum(), [leaves, *scan.agg.parameters()])

            run()
            each = count // batch
            row = m.measure(run)
            keep([{"topic": "combine", "plan": name, "chunks": chunks + 1, "B": batch, "c": chunk, "d": dim,
                   "combines": each, **row}])  # fmt: skip


# --- decoding --------------------------------------------------------------------------------------


def decoders(params: int, layers: int) -> dict[str, Callable[[], nn.Module]]:
    """Models of as many parameters, by name."""

    def sized(make: Callable[[int, float], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: make(*sizes_for(params, make))

    def psm(chunk: int) -> Callable[[], nn.Module]:
        inf, agg = max(1, layers * 2 // 3), max(1, layers // 3)
        return sized(
            lambda d, e: TransformerPSM(VOCAB, d, chunk, heads=d // 64, agg_layers=agg, inf_layers=inf, expand=e)
        )

    def blocks(mixer: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
        return sized(lambda d, e: LanguageModel(VOCAB, d, layers, mixer, expand=e))

    return {
        **{f"T-PSM, c {c}": psm(c) for c in (32, 64, 128, 256)},
        "GPT": blocks(lambda d: Attention(d, d // 64)),
        "Mamba-2": blocks(
            lambda d: ScanMixer(EXAMPLES / "mamba2.psm", d, heads=2 * d // 64, sizes={"N": 64, "P": 64},
                                shared=("B", "C"), conv=4)
        ),
        "GLA": blocks(lambda d: ScanMixer(EXAMPLES / "gla.psm", d, heads=d // 64, sizes={"K": 32, "V": 64})),
    }  # fmt: skip


@torch.no_grad()
def latency(m: Machine, quick: bool, params: float, layers: int, keep: Keep) -> None:
    places = (0, 70) if quick else (0, 1000, 2000, 5000, 10_000, 20_000, 40_000)
    tokens = 4 if quick else 1000
    for name, make in decoders(100_000 if quick else int(params), 2 if quick else layers).items():
        torch.manual_seed(0)
        model: Any = make().to(m.device).eval()
        if m.cuda:
            model = model.bfloat16()
        for batch in (2,) if quick else (1, 32):
            for place in places:
                # The last token of a prompt, too, is a step: what prefilling compiles or caches is not measured.
                seen = torch.randint(VOCAB, (batch, max(1, place)), device=m.device)
                state, token = prefilled(model, seen), seen[:, -1]
                del seen
                for _ in range(3):
                    logits, state = model.step(token, state, in_place=True)
                gc.collect()
                times = []
                gc.disable()  # the collector's pauses are Python's
                for _ in range(tokens):
                    m.wait()
                    start = time.perf_counter()
                    logits, state = model.step(token, state, in_place=True)
                    token = logits.argmax(-1)
                    m.wait()
                    times.append(1e3 * (time.perf_counter() - start))
                gc.enable()
                cuts = statistics.quantiles(times, n=100)
                keep([{
                    "topic": "latency", "model": name, "parameters": parameters_of(model), "B": batch, "before": place,
                    "mean ms": round(statistics.mean(times), 4), "p50 ms": round(cuts[49], 4),
                    "p99 ms": round(cuts[98], 4), "state bytes": state_bytes(state),
                }])  # fmt: skip
                del state
        del model
        if m.cuda:
            torch.cuda.empty_cache()


def prefilled(model: Any, seen: Tensor) -> Any:
    """The state after `seen` [B, T]: few streams at a time, for memory's sake."""
    from psmc.nn import join

    size = max(1, 2**18 // seen.shape[1])
    return join([model.prefill(part, last=True)[1] for part in seen.split(size)])


def plot(rows: list[Row], path: Path) -> None:
    """Latency and memory against tokens, by batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({r["B"] for r in rows})
    size = (5.4 * len(batches), 7)
    figure, grid = pyplot.subplots(2, len(batches), figsize=size, constrained_layout=True, squeeze=False)
    for column, batch in enumerate(batches):
        for name in dict.fromkeys(r["model"] for r in rows):
            mine = [r for r in rows if r["model"] == name and r["B"] == batch]
            at = [r["before"] for r in mine]
            (line,) = grid[0][column].plot(at, [r["mean ms"] for r in mine], marker="o", markersize=3, label=name)
            grid[0][column].plot(at, [r["p99 ms"] for r in mine], color=line.get_color(), linestyle=":", linewidth=1)
            grid[1][column].plot(at, [r["state bytes"] / 2**20 for r in mine], marker="o", markersize=3)
        grid[0][column].set(title=f"batch {batch}", ylabel="ms a token: mean, p99 dotted", yscale="log")
        grid[1][column].set(xlabel="tokens before", ylabel="state, MiB", yscale="log")
    grid[0][0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the result file; the plot stands beside it")
    parser.add_argument("--only", nargs="+", choices=["training", "combine", "latency"],
                        default=["training", "combine", "latency"], help="default: all")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="keep what --out has of other topics, at this commit")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--compile", action="store_true", help="the tree under torch.compile, too")
    parser.add_argument("--params", type=float, default=20e6, help="of each model in latency (default 20e6)")
    parser.add_argument("--layers", type=int, default=6, help="of the baselines in latency (default %(default)s)")
    options = parser.parse_args()
    machine, kept = Machine(options.quick), list[Row]()
    if options.resume and options.out.is_file():
        held = json.loads(options.out.read_text())
        kept = [r for r in held["rows"] if held["commit"] == commit() and r["topic"] not in options.only]
    rows = list(kept)

    def keep(found: list[Row]) -> None:
        """Written row by row: what comes later may not come."""
        show(found)
        rows.extend(found)
        said = list(dict.fromkeys(r["topic"] for r in rows))
        extra = {"quick": True} if options.quick else {}
        write(options.out, rows, f"python benchmarks/psm.py --out benchmarks/results/psm.json --only {' '.join(said)}",
              **extra)  # fmt: skip

    if "training" in options.only:
        training(machine, options.quick, options.compile, keep)
    if "combine" in options.only:
        combine(machine, options.quick, keep)
    if "latency" in options.only:
        latency(machine, options.quick, options.params, options.layers, keep)
        plot([r for r in rows if r["topic"] == "latency"], options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
