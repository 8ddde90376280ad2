"""A byte-level language model trained with psmc's kernels, and the same model with a scan in plain fp32 PyTorch.

    python benchmarks/training.py --text wiki.valid.txt --held wiki.test.txt --out benchmarks/results/training.json

50 M parameters, 1,000 steps of 8 x 1024 bytes, bf16 autocast around the scan, equal weights, data and rates; mixers of
gla.psm and mamba2.psm. The reference's scans stand in reference_mixers.py and share nothing with psmc but the shapes.
Losses are in nats a byte: "last" is the mean over the last tenth of the steps, "held out" on text not trained on. Speed
leaves the first 20 steps out. A plot stands beside the result file.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "psm_tasks")]
from corpus import read  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.jobs import Cell, Group, Results, serve  # noqa: E402
from benchmarks.measure import EXAMPLES, Row, options  # noqa: E402
from benchmarks.reference_mixers import Reference  # noqa: E402

MIXERS = ("gla", "mamba2")
SIDES = ("psmc", "reference")
AGAINST = "psmc against the reference"
BOUND = 0.5  # per cent of the reference's loss


def make(name: str, dim: int, layers: int, expand: float) -> nn.Module:
    from psmc.nn import LanguageModel, ScanMixer

    def mixer(d: int) -> nn.Module:
        if name == "gla":
            return ScanMixer(EXAMPLES / "gla.psm", d, heads=d // 64, sizes={"K": 64, "V": 64})
        sizes = {"N": 64, "P": 64}
        return ScanMixer(EXAMPLES / "mamba2.psm", d, heads=2 * d // 64, sizes=sizes, shared=("B", "C"), conv=4)

    return LanguageModel(256, dim, layers, mixer, expand=expand)


def tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def batch(text: Tensor, step: int, rows: int, length: int) -> Tensor:
    """[rows, length + 1], the same for every model."""
    made = torch.Generator().manual_seed(1_000_003 + step)
    at = torch.randint(len(text) - length, (rows,), generator=made)
    return text[at[:, None] + torch.arange(length + 1)].to(measure.device())


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    cuda = measure.device() == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
        logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out(model: nn.Module, text: Tensor, rows: int, length: int, batches: int) -> float:
    """Mean loss on windows from the start on, at most so many batches of them."""
    count = min((len(text) - 1) // length, batches * rows)
    windows = torch.stack([text[n * length : (n + 1) * length + 1] for n in range(count)]).split(rows)
    losses = [loss_of(model, w.to(measure.device())) * len(w) for w in windows]
    return float(torch.stack(losses).sum()) / count


def handle(cell: Cell) -> Iterator[Row]:
    """One model; a row every tenth of the way, each in the place of the one before."""
    from psmc.nn import parameters_of, sizes_for

    name, who, steps, rows, length = (cell[k] for k in ("spec", "who", "steps", "rows", "length"))
    text, held = (tokens(t) for t in read(Path(cell["text"]), Path(cell["held"]) if cell["held"] else None, 2**27))
    torch.manual_seed(0)
    dim, expand = sizes_for(cell["parameters"], lambda d, e: make(name, d, cell["layers"], e))
    model: Any = make(name, dim, cell["layers"], expand).to(measure.device())
    if who == "reference":
        for block in model.stack():
            block.mixer.scan = Reference(name, block.mixer.scan)
    cuda = measure.device() == "cuda"
    optimiser = torch.optim.AdamW(model.parameters(), lr=cell["rate"], betas=(0.9, 0.98), weight_decay=0.01, fused=cuda)
    row: Row = {"spec": name, "who": who, "parameters": parameters_of(model), "width": dim, "layers": cell["layers"]}
    losses: list[Tensor] = []
    warm, skip = max(1, steps // 20), min(20, steps // 2)
    for step in range(steps):
        if step == skip:
            measure.wait()
            start = time.perf_counter()
        fall = 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimiser.param_groups:
            group["lr"] = cell["rate"] * min(1.0, (step + 1) / warm) * fall
        loss = loss_of(model, batch(text, step, rows, length))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.detach())
        if (step + 1) % max(1, steps // 10) == 0:
            spent = time.perf_counter() - start if step >= skip else 0.0
            found = torch.stack(losses).tolist()
            curve = curve_of(found, steps)
            row |= {"steps": step + 1, "last": round(sum(found[-max(1, steps // 10) :]) / max(1, steps // 10), 5),
                    "curve": curve}  # fmt: skip
            if spent:
                measure.wait()
                spent = time.perf_counter() - start
                row["tokens/s"] = round((step + 1 - skip) * rows * length / spent)
            if cuda:
                row["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            yield row
    model.eval()
    yield row | {"held out": round(held_out(model, held, rows, length, 64 if steps > 100 else 2), 5)}


def curve_of(losses: list[float], steps: int) -> list[float]:
    """Means over fiftieths of the whole way."""
    size = max(1, steps // 50)
    return [round(sum(part) / len(part), 4) for n in range(0, len(losses), size) if (part := losses[n : n + size])]


def against(rows: list[Row]) -> list[Row]:
    found = []
    for name in MIXERS:
        mine = {r["who"]: r for r in rows if r.get("spec") == name and r.get("who") in SIDES and "curve" in r}
        if len(mine) < 2 or mine["psmc"]["steps"] != mine["reference"]["steps"]:
            continue
        ours, theirs = (mine[w] for w in SIDES)
        row: Row = {"mixer": name, "parameters": ours["parameters"], "steps": ours["steps"]}
        apart = []
        for key in ("last", "held out"):
            if key in ours and key in theirs:
                share = 100 * (ours[key] - theirs[key]) / theirs[key]
                apart.append(abs(share))
                row |= {f"{key}: psmc": ours[key], f"{key}: reference": theirs[key], f"{key}: %": round(share, 3)}
        gaps = [abs(a - b) / b for a, b in zip(ours["curve"], theirs["curve"], strict=True)]
        row |= {"farthest on the way, %": round(100 * max(gaps), 3), "within 0.5 %": max(apart) <= BOUND}
        for who, r in mine.items():
            row |= {f"tokens/s: {who}": r.get("tokens/s")}
        found.append(row)
    return found


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, made = pyplot.subplots(figsize=(6, 3.6), constrained_layout=True)
    for row in rows:
        if "curve" in row:
            at = [(n + 1) * row["steps"] / len(row["curve"]) for n in range(len(row["curve"]))]
            style = "-" if row["who"] == "psmc" else "--"
            made.plot(at, row["curve"], style, linewidth=1.2, label=f"{row['spec']}, {row['who']}")
    made.set(xlabel="steps", ylabel="nats a byte")
    made.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--text", type=Path, default=EXAMPLES / "demo" / "wikitext.txt", help="a file or a folder")
    parser.add_argument("--held", type=Path, help="held-out text (default: the last tenth of --text)")
    parser.add_argument("--mixers", default=",".join(MIXERS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="sequences a step (default %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="bytes of a sequence (default %(default)s)")
    parser.add_argument("--parameters", type=float, default=50e6)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--limit", type=float, default=280, help="seconds a model (default %(default)s)")
    given = parser.parse_args()
    if given.job:
        serve(given.job, handle)
        return 0
    if not given.text.exists():
        parser.error(f"there is no {given.text}")
    if given.smoke:
        given.steps, given.rows, given.length, given.parameters, given.layers = 4, 2, 40, 2e5, 1
    groups = []
    for name in given.mixers.split(","):
        for who in SIDES:
            cell = {"spec": name, "who": who, "steps": given.steps, "rows": given.rows, "length": given.length,
                    "parameters": int(given.parameters), "layers": given.layers, "rate": given.rate,
                    "text": str(given.text), "held": str(given.held or "")}  # fmt: skip
            groups.append(Group(f"{name}, {who}", (cell,), given.limit))
    results = Results(given.out, given.resume, lambda r: ("table" not in r, r.get("spec", ""), r.get("who", "")))
    failed = lambda c, why: [{"spec": c["spec"], "who": c["who"], "error": why}]  # noqa: E731
    results.run(__file__, groups, failed, seconds=given.seconds, quiet=True)
    rows = list(results.rows.values())
    results.replace(AGAINST, against(rows))
    if given.out is not None:
        plot(rows, given.out.with_suffix(".png"))
    measure.show({k: v for k, v in r.items() if k != "curve"} for r in results.sorted())
    print(json.dumps({"not measured": results.missing}) if results.missing else "all measured")
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main())
