"""What the tasks share: options, a budgeted training loop with progress bars and checkpoints, results, plots."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

console = Console(highlight=False, soft_wrap=True)
Score = dict[str, Any]


def parser(
    doc: str, *, minutes: float, steps: int, rate: float, batch: int, models: list[str]
) -> argparse.ArgumentParser:
    """The options that every task has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    budget = made.add_argument_group("budget", "training stops at whichever comes first; the rate falls to 0")
    budget.add_argument("--minutes", type=float, default=minutes, help="a model, tests apart (default %(default)s)")
    budget.add_argument("--steps", type=int, default=steps, help="optimiser steps a model (default %(default)s)")
    training = made.add_argument_group("training")
    training.add_argument("--models", nargs="+", choices=models, default=models, help="which, in order (default: all)")
    training.add_argument("--batch", type=int, default=batch, help="sequences a step (default %(default)s)")
    training.add_argument("--rate", type=float, default=rate, help="AdamW's largest (default %(default)s)")
    training.add_argument("--decay", type=float, default=0.01, help="weight decay (default %(default)s)")
    training.add_argument("--seed", type=int, default=0, help="of weights and data (default %(default)s)")
    machine = made.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto: cuda where there is one, else cpu")
    machine.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                         help="bf16 is autocast; auto: bf16 on cuda, fp32 on cpu (default: %(default)s)")  # fmt: skip
    machine.add_argument("--compile", action="store_true", help="torch.compile the training forward")
    machine.add_argument("--threads", type=int, default=0, help="CPU threads (default: half the cores)")
    files = made.add_argument_group("files")
    files.add_argument("--out", type=Path, default=Path("build/psm_tasks"), help="results, plots, checkpoints")
    files.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    files.add_argument("--smoke", action="store_true", help="everything once, tiny, in seconds; figures mean nothing")
    return made


def prepare(options: argparse.Namespace) -> torch.device:
    """Seeds, threads, the device. Raises SystemExit where there is nothing to do."""
    if options.steps < 1 or options.minutes <= 0 or options.batch < 1 or options.every < 1:
        raise SystemExit("--steps, --batch and --every are from 1 on, --minutes above 0")
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads or max(1, (os.cpu_count() or 1) // 2))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    options.out.mkdir(parents=True, exist_ok=True)
    if name.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if options.compile:  # a graph for each length
        from torch._dynamo import config

        config.cache_size_limit = 64
    return torch.device(name)


def autocast(options: argparse.Namespace, device: torch.device) -> Callable[[], Any]:
    wanted = "bf16" if options.precision == "auto" and device.type == "cuda" else options.precision
    return (lambda: torch.autocast(device.type, torch.bfloat16)) if wanted == "bf16" else nullcontext


@dataclass
class Training:
    """One model's training: `batch(step) -> loss` is all that a task has to say.

    state   what else a checkpoint keeps: a curriculum's level, generators
    """

    name: str
    model: nn.Module
    options: argparse.Namespace
    device: torch.device
    tokens: int = 0
    step: int = 0
    seconds: float = 0.0
    state: dict[str, Any] = field(default_factory=dict)
    history: list[Score] = field(default_factory=list)

    def __post_init__(self) -> None:
        o = self.options
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": o.decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=o.rate, betas=(0.9, 0.98), fused=self.device.type == "cuda")
        self.checkpoint = o.out / f"{Path(o.task).stem}-{self.name}.pt"
        if o.resume and self.checkpoint.is_file():
            self._load()

    def done(self) -> float:
        """How much of the budget is used, 0 to 1."""
        return min(1.0, max(self.step / self.options.steps, self.seconds / (60 * self.options.minutes)))

    def rate(self) -> float:
        """Warm-up over the first 10 %, a constant rate, then down to 0 over the last 40 %."""
        done = self.done()
        return self.options.rate * min(1.0, (done + 1e-3) / 0.1, (1 - done) / 0.4)

    def run(self, batch: Callable[[int], Tensor], evaluate: Callable[[], Score], every: int) -> None:
        """Until the budget is used. `evaluate` runs every so many steps and at the end, off the clock."""
        with bar() as progress:
            task = progress.add_task(self.name, total=1.0, note="", completed=self.done())
            since, kept, first = time.perf_counter(), 0.0, True
            while self.done() < 1:
                for group in self.optimiser.param_groups:
                    group["lr"] = self.rate()
                loss = batch(self.step)
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimiser.step()
                self.step += 1
                if self.step % 20 == 0 or first:  # a host sync
                    value = loss.item()
                    if not math.isfinite(value):
                        raise SystemExit(f"{self.name}: the loss is {value} at step {self.step}: try a lower --rate")
                    kept = value
                first = False
                now = time.perf_counter()
                self.seconds, since = self.seconds + now - since, now
                if self.step % every == 0 or self.done() >= 1:
                    self.model.eval()
                    with torch.no_grad():
                        score = {"step": self.step, "seconds": round(self.seconds, 1), "loss": kept, **evaluate()}
                    self.model.train()
                    self.history.append(score)
                    self._save()
                    note = ", ".join(f"{k} {v:.4g}" for k, v in score.items() if isinstance(v, float))
                    progress.update(task, note=note)
                    if not console.is_terminal:
                        console.print(f"{self.name} step {self.step}: {note}")
                    since = time.perf_counter()
                progress.update(task, completed=self.done())

    def _save(self) -> None:
        parts = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(), "state": self.state}
        known = {k: getattr(self, k) for k in ("tokens", "step", "seconds", "history")}
        aside = self.checkpoint.with_suffix(".new")
        torch.save({**parts, **known, "random": torch.get_rng_state()}, aside)
        aside.replace(self.checkpoint)

    def _load(self) -> None:
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        torch.set_rng_state(saved["random"])
        self.state.update(saved["state"])
        for name in ("tokens", "step", "seconds", "history"):
            setattr(self, name, saved[name])
        console.print(f"{self.name}: going on from step {self.step}")


def bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def write_json(path: Path, record: Any) -> None:
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(path)


def record(options: argparse.Namespace, device: torch.device, rows: list[Score], **more: Any) -> Score:
    """What a result file says."""
    said = {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("out", "resume")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"options": said, "device": name, "torch": torch.__version__, **more, "rows": rows}


def axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    """A figure with one pair of axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, made = pyplot.subplots(figsize=(6.4, 3.8), constrained_layout=True)
    made.set(xlabel=x, ylabel=y, title=title)
    made.spines[["top", "right"]].set_visible(False)
    return figure, made


def batches(total: int, size: int) -> Iterator[int]:
    """Sizes that sum to `total`, `size` at most."""
    for at in range(0, total, size):
        yield min(size, total - at)
