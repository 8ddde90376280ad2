"""Multi-query associative recall: keys with values, then, far apart, keys again: which value was it?

    python examples/psm_tasks/mqar.py
    python examples/psm_tasks/mqar.py --models psm-64 gpt --minutes 10 --device cpu --dim 64

A sequence begins with 8 pairs (key, value); later each key stands once more, at places drawn uniformly, among tokens
that mean nothing. The target at such a place is the key's value. Vocabulary 8192: half keys, half values. Every model
trains on sequences of 128, 256 and 512 tokens, and is scored on each. Arora et al. 2023, arXiv 2312.04927, with uniform
instead of power-law gaps, as Yau et al. 2025, arXiv 2506.10918. psm-32 and psm-64 are Transformer-PSM of such chunks.
"""

from __future__ import annotations

import argparse
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
NOTHING = -100  # no target here


def draw(o: argparse.Namespace, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets [batch, length]; a target is a value where a key is asked for, else NOTHING."""
    half, pairs = o.vocab // 2, o.pairs

    def choice(rows: int, among: int, count: int) -> Tensor:
        """[rows, count] different numbers below `among` in each row."""
        return torch.rand(rows, among, generator=generator).topk(count, 1).indices

    keys = choice(batch, half, pairs)
    values = half + torch.randint(half, (batch, pairs), generator=generator)
    tokens = half + torch.randint(half, (batch, length), generator=generator)  # no key, so nothing is asked by chance
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    places = 2 * pairs + choice(batch, length - 2 * pairs, pairs)
    tokens.scatter_(1, places, keys)
    targets = torch.full((batch, length), NOTHING).scatter_(1, places, values)
    return tokens, targets


def models(o: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    heads = max(1, o.dim // 64)

    def psm(chunk: int) -> Callable[[], nn.Module]:
        return lambda: TransformerPSM(o.vocab, o.dim, chunk, heads=heads, agg_layers=o.layers, inf_layers=o.layers)

    def blocks(mixer: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: LanguageModel(o.vocab, o.dim, o.layers, mixer)

    return {
        "psm-32": psm(32),
        "psm-64": psm(64),
        "gpt": blocks(lambda d: Attention(d, heads)),
        "mamba2": blocks(
            lambda d: ScanMixer(SPECS / "mamba2.psm", d, heads=2 * d // 32, sizes={"N": 64, "P": 32},
                                shared=("B", "C"), conv=4)
        ),
        "gla": blocks(lambda d: ScanMixer(SPECS / "gla.psm", d, heads=heads, conv=4)),
    }  # fmt: skip


def accuracy(model: nn.Module, o: argparse.Namespace, length: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(10_000 + o.seed + length)
    right = 0
    for size in batches(o.sequences, 64):
        tokens, targets = draw(o, size, length, generator)
        asked = targets != NOTHING
        with autocast(o, device)():
            found = model(tokens.to(device)).argmax(-1).cpu()
        right += int((found[asked] == targets[asked]).sum())
    return right / (o.sequences * o.pairs)


def train(name: str, make: Callable[[], nn.Module], o: argparse.Namespace, device: torch.device) -> Score:
    torch.manual_seed(o.seed)
    model = make().to(device)
    training = Training(name, model, o, device)
    forward: Any = torch.compile(model, dynamic=False) if o.compile else model
    context = autocast(o, device)

    def batch(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(o.seed * 1_000_003 + step)
        length = o.lengths[step % len(o.lengths)]
        # As many tokens a step at each length.
        tokens, targets = draw(o, max(1, o.batch * min(o.lengths) // length), length, generator)
        tokens, targets = tokens.to(device), targets.to(device)
        with context():
            logits = forward(tokens)
        training.tokens += tokens.numel()
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NOTHING)

    def evaluate() -> Score:
        return {f"accuracy at {n}": accuracy(model, o, n, device) for n in o.lengths}

    training.run(batch, evaluate, o.every)
    return {"model": name, "parameters": parameters_of(model), "steps": training.step, "tokens": training.tokens,
            **training.history[-1], "history": training.history[:-1]}  # fmt: skip


def plot(rows: list[Score], o: argparse.Namespace, path: Path) -> None:
    figure, made = axes(f"MQAR: {o.pairs} pairs, {o.vocab} tokens", "length", "right values (%)")
    for row in rows:
        made.plot(o.lengths, [100 * row[f"accuracy at {n}"] for n in o.lengths], marker="o", label=row["model"])
    made.set_xscale("log", base=2)
    made.set_xticks(o.lengths, [str(n) for n in o.lengths])
    made.set_ylim(-2, 102)
    made.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    names = ["psm-32", "psm-64", "gpt", "mamba2", "gla"]
    p = parser(__doc__ or "", minutes=4, steps=20_000, rate=1e-3, batch=128, models=names)
    task = p.add_argument_group("task")
    task.add_argument("--dim", type=int, default=128, help="width (default %(default)s)")
    task.add_argument("--layers", type=int, default=2, help="blocks; of Agg and of Inf each (default %(default)s)")
    task.add_argument("--vocab", type=int, default=8192, help="half keys, half values (default %(default)s)")
    task.add_argument("--pairs", type=int, default=8, help="key-value pairs a sequence (default %(default)s)")
    task.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], help="trained and scored")
    task.add_argument("--sequences", type=int, default=512, help="test sequences a length (default %(default)s)")
    task.add_argument("--every", type=int, default=500, help="steps between evaluations (default %(default)s)")
    o = p.parse_args()
    if o.smoke:
        o.steps, o.batch, o.dim, o.sequences, o.every = min(o.steps, 4), 4, 32, 4, 2
        o.vocab, o.lengths = 128, [64, 128]
    if min(o.lengths) < 3 * o.pairs or o.vocab < 4 * o.pairs:
        p.error("lengths hold the pairs and as many questions, the vocabulary four times as many tokens as pairs")
    o.task = Path(__file__).name
    device = prepare(o)
    rows = []
    makers = models(o)
    for name in o.models:
        rows.append(train(name, makers[name], o, device))
        scores = ", ".join(f"{rows[-1][f'accuracy at {n}']:.1%} at {n}" for n in o.lengths)
        console.print(f"{name}: {rows[-1]['parameters']:,} parameters, {rows[-1]['steps']} steps, right: {scores}")
        write_json(o.out / "mqar.json", record(o, device, rows, task="mqar"))
        plot(rows, o, o.out / "mqar.png")
    console.print(f"results: {o.out / 'mqar.json'}   plot: {o.out / 'mqar.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
