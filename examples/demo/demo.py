"""The tour: prove the specs of the literature, refuse a wrong one, compile one, train a language model with it.

    python examples/demo/demo.py [--steps 600] [--out build/demo]

Needs no GPU. Exits 1 if anything of what it shows does not hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from model import ByteModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from training import Point, Settings, bigram_entropy, bits_per_byte, generate, plot, train

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
HELD_OUT = 50_000  # bytes at the end of the text
console = Console(highlight=False, soft_wrap=True)


def psmc(*args: str | Path, code: int = 0) -> None:
    """Shows a psmc command and runs it. Raises SystemExit if it does not end as expected."""
    shown = [str(a) for a in args]
    console.print(f"[bold]$ psmc {shlex.join(shown)}[/]")
    found = subprocess.run([sys.executable, "-m", "psmc", *shown], check=False).returncode
    if found != code:
        sys.exit(f"exit code {found}, {code} was expected")


def near(path: Path) -> Path:
    """Relative to where we are, if it lies below: shorter to read, and to copy."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def imported(path: Path) -> Any:
    """The module just written. It imports torch, and nothing of psmc."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def watched(model: ByteModel, text: torch.Tensor, held: torch.Tensor, settings: Settings, bar: float) -> list[Point]:
    """Trains, under a progress bar; without a terminal, a line for each measurement."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    curve: list[Point] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=settings.steps, note="")
        known = ""
        for point in train(model, text, held, settings):
            curve.append(point)
            if point.held is not None:
                known = f", held out {point.held:.2f} (bigram {bar:.2f})"
            note = f"{point.batch:.2f} bits/byte{known}"
            progress.update(task, advance=1, note=note)
            if point.held is not None and not console.is_terminal:
                console.print(f"step {point.step}/{settings.steps}: {note}")
    return curve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Settings.steps, help="training steps (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where the module and the plot go")
    parser.add_argument("--specs", type=Path, default=EXAMPLES, help="what the first table shows: a directory of specs")
    options = parser.parse_args()
    begun = time.time()
    torch.manual_seed(0)
    # Tensors are small here: threads that wait for each other on a busy machine cost more than they bring.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    options.out.mkdir(parents=True, exist_ok=True)
    module = options.out / "mingru.py"

    console.rule("1. The specs of the literature are proved", align="left")
    psmc("check", near(options.specs))
    console.rule("2. A wrong one is refused, with numbers to check by hand", align="left")
    psmc("check", near(EXAMPLES / "wrong" / "leaky.psm"), code=1)
    console.rule("3. A spec becomes one readable module", align="left")
    psmc("compile", near(EXAMPLES / "mingru.psm"), "-o", module)

    console.rule("4. The module mixes a language model over time", align="left")
    data = torch.tensor(list((HERE / "wikitext.txt").read_bytes()))
    text, held = data[:-HELD_OUT], data[-HELD_OUT:]
    bar = bigram_entropy(held)
    model = ByteModel(imported(module).mingru)
    size = sum(p.numel() for p in model.parameters())
    console.print(f"{size:,} parameters; {len(text):,} bytes of text to train on, {len(held):,} held out")
    console.print(f"bigram entropy of the held-out text: {bar:.3f} bits per byte")
    curve = watched(model, text, held, Settings(steps=options.steps), bar)
    final = bits_per_byte(model, held)
    picture = options.out / "training.png"
    plot(curve, bar, picture)
    sample, difference = generate(model, " The ", 300)

    console.rule("5. What came of it", align="left")
    console.print("generated token by token, with step:", style="bold")
    console.print(sample, markup=False)
    console.print(f"steps and scan agree: logits differ by at most {difference:.1e}")
    console.print(f"held-out text: {final:.3f} bits per byte, its bigram entropy: {bar:.3f}")
    console.print(f"module: {module}   plot: {picture}   {time.time() - begun:.0f} s")
    if difference > 1e-3:
        console.print("steps and scan differ: this is a bug", style="red")
        return 1
    if final >= bar:
        console.print("the model did not get below the bigram entropy: it needs more steps", style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
