"""Training, measuring, sampling and plotting of the demo's byte model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from model import ByteModel, State
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Settings:
    """Sized for two CPU cores and less than a minute."""

    steps: int = 600
    batch: int = 8
    length: int = 192
    rate: float = 4e-3
    warm: float = 0.07  # of the steps
    points: int = 12  # of the curve


@dataclass(frozen=True)
class Point:
    """Bits per byte after that many steps: of the last batch, and of held-out text where it was measured."""

    step: int
    batch: float
    held: float | None


def bigram_entropy(text: Tensor) -> float:
    """H(next byte | byte) of a text by its own counts, in bits: what a table of byte pairs reaches that knew it."""
    pairs = torch.bincount(text[:-1] * 256 + text[1:], minlength=256 * 256).view(256, 256).double()
    joint = pairs / pairs.sum()
    given = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
    return float(-(joint * given.clamp(min=1e-300).log2()).sum())


@torch.no_grad()
def bits_per_byte(model: ByteModel, text: Tensor, length: int = 512) -> float:
    """Mean code length of the bytes of a text, in windows of `length`, each predicted from those before it."""
    rows = (len(text) - 1) // length
    now, following = text[: rows * length].view(rows, length), text[1 : rows * length + 1].view(rows, length)
    total = 0.0
    for x, y in zip(now.split(16), following.split(16), strict=True):
        total += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / (rows * length) / math.log(2)


def train(model: ByteModel, text: Tensor, held: Tensor, settings: Settings) -> Iterator[Point]:
    """One point a step; AdamW, warm-up, cosine decay."""
    s = settings
    optimiser = torch.optim.AdamW(model.parameters(), lr=s.rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    every = max(1, s.steps // s.points)
    for step in range(1, s.steps + 1):
        fall = 0.05 + 0.95 * (1 + math.cos(math.pi * step / s.steps)) / 2
        for group in optimiser.param_groups:
            group["lr"] = s.rate * min(1.0, step / max(1.0, s.warm * s.steps)) * fall
        at = torch.randint(len(text) - s.length, (s.batch,), generator=generator)
        rows = text[at[:, None] + torch.arange(s.length + 1)]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        measured = step % every == 0 or step == s.steps
        yield Point(step, loss.item() / math.log(2), bits_per_byte(model, held[:16385]) if measured else None)


@torch.no_grad()
def generate(model: ByteModel, prompt: str, count: int, temperature: float = 0.5) -> tuple[str, float]:
    """Text byte by byte through `step`, and the largest difference of its logits to those of one parallel call."""
    generator = torch.Generator().manual_seed(1)
    seen = list(prompt.encode())
    state: State | None = None
    logits: list[Tensor] = []
    for n in range(len(seen) + count):
        if n >= len(seen):
            odds = torch.softmax(logits[-1][0] / temperature, -1)
            seen.append(int(torch.multinomial(odds, 1, generator=generator)))
        row, state = model.step(torch.tensor([seen[n]]), state)
        logits.append(row)
    whole = model(torch.tensor([seen]))
    return bytes(seen).decode(errors="replace"), (torch.cat(logits) - whole[0]).abs().max().item()


def plot(curve: list[Point], bar: float, path: Path) -> None:
    """Bits per byte against steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    held = [(p.step, p.held) for p in curve if p.held is not None]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), constrained_layout=True)
    axes.plot([p.step for p in curve], [p.batch for p in curve], color="#b6bec8", linewidth=1, label="training batch")
    axes.plot(*zip(*held, strict=True), color="#1f6feb", marker="o", markersize=3, label="held-out text")
    axes.axhline(bar, color="#d1242f", linestyle="--", linewidth=1, label="bigram entropy of the held-out text")
    axes.set(xlabel="step", ylabel="bits per byte", title="A byte-level language model over mingru.psm")
    axes.set_ylim(top=6.5)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
