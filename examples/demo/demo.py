"""The tour: prove the specs of the literature, refute a wrong one, compile one, train a language model with it.

    python examples/demo/demo.py [--steps 300] [--out build/demo]
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

import psmc

sys.path.insert(0, str(Path(__file__).parent))
from model import ByteModel  # noqa: E402

HERE = Path(__file__).parent
EXAMPLES = HERE.parent
console = Console()


def command(*args: str) -> None:
    """Shows a psmc command and runs it."""
    console.print(f"\n[bold]$ psmc {' '.join(a if ' ' not in a else repr(a) for a in args)}[/]")
    subprocess.run([sys.executable, "-m", "psmc", *args], check=False)


def bigram_entropy(text: Tensor) -> float:
    """H(next byte | byte) of a text, by its own counts, in bits: what a table of pairs could reach if it knew the text."""
    pairs = torch.zeros(256, 256, dtype=torch.float64)
    pairs.index_put_((text[:-1], text[1:]), torch.ones(len(text) - 1, dtype=torch.float64), accumulate=True)
    joint = pairs / pairs.sum()
    given = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
    return float(-(joint * given.clamp(min=1e-300).log2()).sum())


def bits_per_byte(model: ByteModel, text: Tensor, length: int = 512) -> float:
    """Mean code length of a text, in windows of `length` bytes."""
    rows = (len(text) - 1) // length
    x, y = text[: rows * length].view(rows, length), text[1 : rows * length + 1].view(rows, length)
    model.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(a).flatten(0, 1), b.flatten()) for a, b in zip(x.split(16), y.split(16), strict=True)]
        sizes = [len(a) for a in x.split(16)]
    model.train()
    return float(sum(loss * n for loss, n in zip(losses, sizes, strict=True)) / rows / math.log(2))


def train(model: ByteModel, text: Tensor, held: Tensor, steps: int, bar: float) -> list[tuple[int, float, float]]:
    """(step, training bits, held-out bits) as it went."""
    batch, length, rate = 24, 192, 4e-3
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    curve: list[tuple[int, float, float]] = []
    generator = torch.Generator().manual_seed(0)
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TextColumn("{task.fields[note]}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, note="")
        for step in range(1, steps + 1):
            for group in optimiser.param_groups:
                warm = min(1.0, step / 20)
                group["lr"] = rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            at = torch.randint(len(text) - length - 1, (batch,), generator=generator)
            rows = text[at[:, None] + torch.arange(length + 1)]
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if step % max(1, steps // 12) == 0 or step == steps:
                curve.append((step, float(loss) / math.log(2), bits_per_byte(model, held[:16385])))
            known = f", held out {curve[-1][2]:.2f} (bigram entropy {bar:.2f})" if curve else ""
            progress.update(task, advance=1, note=f"{float(loss) / math.log(2):.2f} bits/byte{known}")
    return curve


@torch.no_grad()
def generate(model: ByteModel, prompt: str, count: int) -> tuple[str, float]:
    """Text byte by byte through `step`, and the largest difference of its logits to the parallel call's."""
    model.eval()
    torch.manual_seed(1)
    state, seen, logits = None, list(prompt.encode()), []
    for n in range(len(seen) + count - 1):
        if n >= len(seen):
            seen.append(int(torch.multinomial(torch.softmax(logits[-1][0] / 0.7, -1), 1)))
        row, state = model.step(torch.tensor([seen[n]]), state)
        logits.append(row)
    whole = model(torch.tensor([seen]))
    return bytes(seen).decode(errors="replace"), float((torch.cat(logits) - whole[0, : len(logits)]).abs().max())


def plot(curve: list[tuple[int, float, float]], bar: float, path: Path) -> None:
    """Bits per byte against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), constrained_layout=True)
    steps = [c[0] for c in curve]
    axes.plot(steps, [c[1] for c in curve], color="#9aa5b1", label="training batch")
    axes.plot(steps, [c[2] for c in curve], color="#1f6feb", marker="o", markersize=3, label="held-out text")
    axes.axhline(bar, color="#d1242f", linestyle="--", linewidth=1, label="bigram entropy of the held-out text")
    axes.set(xlabel="step", ylabel="bits per byte", title="A byte model whose mixer is mingru.psm")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=260, help="training steps (default 260, about a minute)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where the module and the plot go")
    options = parser.parse_args()
    begun = time.time()
    torch.manual_seed(0)

    console.rule("1. Proofs: the specs of the literature")
    command("check", str(EXAMPLES))
    console.rule("2. A wrong spec is refused, with numbers to check by hand")
    command("check", str(EXAMPLES / "wrong" / "leaky.psm"))
    console.rule("3. Compiled: one readable module")
    options.out.mkdir(parents=True, exist_ok=True)
    command("compile", str(EXAMPLES / "mingru.psm"), "-o", str(options.out / "mingru.py"))

    console.rule("4. A language model whose mixer is the compiled spec")
    data = torch.tensor(list((HERE / "wikitext.txt").read_bytes()))
    text, held = data[:-50_000], data[-50_000:]
    bar = bigram_entropy(held)
    model = ByteModel(psmc.load(EXAMPLES / "mingru.psm"))
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of text, "
                  f"{len(held):,} held out; bigram entropy of those: {bar:.3f} bits per byte")  # fmt: skip
    curve = train(model, text, held, options.steps, bar)
    final = bits_per_byte(model, held)
    plot(curve, bar, options.out / "training.png")
    sample, difference = generate(model, " The ", 240)

    console.rule("5. Result")
    console.print(f"held-out text: {final:.3f} bits per byte; its bigram entropy: {bar:.3f}")
    console.print(f"generated with step: [italic]{sample!r}[/]", highlight=False)
    console.print(f"steps and scan agree: largest difference of logits {difference:.1e}")
    console.print(f"plot: {options.out / 'training.png'}    module: {options.out / 'mingru.py'}    {time.time() - begun:.0f} s")
    passed = final < bar and difference < 1e-3
    console.print("[green]all of it worked[/]" if passed else "[red]the model did not beat the bigram entropy[/]")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
