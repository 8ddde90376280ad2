"""State tracking in S5: after each of many permutations of five things, which one is their product so far?

    python examples/psm_tasks/s5.py                      # all models; minutes on a GPU
    python examples/psm_tasks/s5.py --things 4 --models psm --dim 64 --batch 128    # S4: minutes on a CPU

A token is one of all 120 permutations, drawn uniformly. The target at each token is the product of the tokens up to it:
no fixed number of layers of attention or of diagonal state-space recurrences is known to compute it at all lengths (it
is complete for NC1), a tree of depth log n does. Training lengths grow from 4 to 18 as the model masters them; the test
goes on to 180. Yau et al. 2025, arXiv 2506.10918; all models draw the same sequences for the same length.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Score, Training, autocast, axes, batches, console, parser, prepare, record, write_json
from torch import Tensor, nn
from torch.nn import functional as F

from psmc.nn import Attention, LanguageModel, ScanMixer, TransformerPSM, parameters_of

SPECS = Path(__file__).resolve().parent.parent
LEAST, MOST, TEST = 4, 18, 180


def products(things: int = 5) -> Tensor:
    """[n!, n!] int64: the number of the permutation `first a, then b`."""
    all_ = list(itertools.permutations(range(things)))
    number = {p: n for n, p in enumerate(all_)}
    return torch.tensor([[number[tuple(b[i] for i in a)] for b in all_] for a in all_])


def draw(table: Tensor, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and their running products, [batch, length] each."""
    tokens = torch.randint(len(table), (batch, length), generator=generator)
    states = [tokens[:, 0]]
    for t in range(1, length):
        states.append(table[states[-1], tokens[:, t]])
    return tokens, torch.stack(states, 1)


def models(o: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    """By name. The scan has its own width and depth: the paper compares models, not parameters, on this task."""
    heads, order = max(1, o.dim // 32), math.factorial(o.things)

    def blocks(mixer: Callable[[int], nn.Module]) -> nn.Module:
        return LanguageModel(order, o.dim, o.layers, mixer, classes=order)

    return {
        "psm": lambda: TransformerPSM(
            order,
            o.dim,
            1,
            heads=heads,
            agg_layers=o.psm_layers,
            inf_layers=o.psm_layers,
            expand=o.expand,
            classes=order,
            positions=o.positions,
            noise=o.noise,
        ),
        "gpt": lambda: blocks(lambda d: Attention(d, heads)),
        "mamba2": lambda: blocks(
            lambda d: ScanMixer(
                SPECS / "mamba2.psm", d, heads=2 * d // 32, sizes={"N": 32, "P": 32}, shared=("B", "C"), conv=4
            )
        ),
    }


def errors(model: nn.Module, table: Tensor, o: argparse.Namespace, length: int, device: torch.device) -> list[float]:
    """Share of wrong products after 1, 2, ... tokens, over the same test sequences each time."""
    generator = torch.Generator().manual_seed(10_000 + o.seed)
    wrong = torch.zeros(length, dtype=torch.float64)
    for size in batches(o.sequences, 256):
        tokens, states = draw(table, size, length, generator)
        with autocast(o, device)():
            found = model(tokens.to(device)).argmax(-1).cpu()
        wrong += (found != states).double().sum(0)
    return (wrong / o.sequences).tolist()


def train(
    name: str, make: Callable[[], nn.Module], table: Tensor, o: argparse.Namespace, device: torch.device
) -> Score:
    torch.manual_seed(o.seed)
    model = make().to(device)
    training = Training(name, model, o, device, state={"length": LEAST, "good": 0})
    forward: Any = torch.compile(model, dynamic=False) if o.compile else model
    context = autocast(o, device)

    def batch(step: int) -> Tensor:
        """One length a step: usually the longest so far, so that each is mastered, and at times a shorter one."""
        generator = torch.Generator().manual_seed(o.seed * 1_000_003 + step)
        length = training.state["length"]
        tokens, states = draw(table, o.batch, length, generator)
        tokens, states = tokens.to(device), states.to(device)
        with context():
            logits = forward(tokens)
        training.tokens += tokens.numel()
        if step % 10 == 9:  # a host sync, seldom
            right = (logits[:, -1].argmax(-1) == states[:, -1]).float().mean().item()
            if right > o.master and length < MOST:
                training.state["length"] += 1
        return F.cross_entropy(logits.flatten(0, 1).float(), states.flatten())

    def evaluate() -> Score:
        curve = errors(model, table, o, o.test, device)
        return {"length": training.state["length"], f"error at {MOST}": curve[MOST - 1],
                f"error at {o.test}": curve[-1], "errors": curve}  # fmt: skip

    training.run(batch, evaluate, o.every)
    last = training.history[-1]
    return {"model": name, "parameters": parameters_of(model), "steps": training.step, "tokens": training.tokens,
            "seconds": round(training.seconds, 1), **last, "history": training.history[:-1]}  # fmt: skip


def plot(rows: list[Score], path: Path) -> None:
    figure, made = axes("Running products of permutations, trained on at most 18 tokens", "token", "wrong products (%)")
    for row in rows:
        error = [100 * e for e in row["errors"]]
        made.plot(range(1, len(error) + 1), error, label=f"{row['model']}, {row['parameters'] / 1e6:.2f} M")
    made.axvline(MOST, color="#b6bec8", linestyle=":")
    made.set_ylim(-2, 102)
    made.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    names = ["psm", "gpt", "mamba2"]
    p = parser(__doc__ or "", minutes=6, steps=40_000, rate=1e-3, batch=512, models=names)
    task = p.add_argument_group("task")
    task.add_argument("--things", type=int, default=5, choices=[3, 4, 5], help="S3, S4 or S5 (default %(default)s)")
    task.add_argument("--noise", type=float, default=0.0, help="on psm's states in training (default %(default)s)")
    task.add_argument("--dim", type=int, default=128, help="width (default %(default)s)")
    task.add_argument("--layers", type=int, default=2, help="blocks of the baselines (default %(default)s)")
    task.add_argument("--psm-layers", type=int, default=1, help="of Agg and of Inf (default %(default)s)")
    task.add_argument("--expand", type=float, default=4.0, help="hidden width of the MLPs of psm (default %(default)s)")
    task.add_argument("--positions", choices=["rotary", "learned"], default="learned", help="in psm's windows of 2")
    task.add_argument("--master", type=float, default=0.9, help="accuracy at which training goes on to the next length")
    task.add_argument("--sequences", type=int, default=1024, help="test sequences (default %(default)s)")
    task.add_argument("--test", type=int, default=TEST, help="longest test length (default %(default)s)")
    task.add_argument("--every", type=int, default=1000, help="steps between evaluations (default %(default)s)")
    p.set_defaults(precision="fp32")  # what is small here is the model, and rounding adds up over a deep tree
    o = p.parse_args()
    if o.smoke:
        o.steps, o.batch, o.dim, o.sequences, o.test, o.every = min(o.steps, 12), 8, 32, 4, 24, 6
    o.task = Path(__file__).name
    device, table = prepare(o), products(o.things)
    rows = []
    makers = models(o)
    for name in o.models:
        rows.append(train(name, makers[name], table, o, device))
        row = rows[-1]
        console.print(f"{name}: {row['parameters']:,} parameters, {row['steps']} steps, length {row['length']}, error "
                      f"{row['errors'][MOST - 1]:.2%} at {MOST}, {row['errors'][-1]:.2%} at {o.test}")  # fmt: skip
        write_json(o.out / "s5.json", record(o, device, rows, task="s5"))
        plot(rows, o.out / "s5.png")
    console.print(f"results: {o.out / 's5.json'}   plot: {o.out / 's5.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
