"""Language modelling: Transformer-PSM of several chunk sizes against GPT, Mamba-2 and GLA of as many parameters.

    python examples/psm_tasks/lm.py                                        # the text of the demo, some 350 kB
    python examples/psm_tasks/lm.py --text train.txt --held test.txt --vocab 4096 --params 20e6
    python examples/psm_tasks/lm.py --text .venv/lib/python3.11/site-packages --limit 200e6 --minutes 10

--text is a file (its last tenth is held out, or --held is) or a folder of sources (whole packages are held out).
Every model gets --params parameters, --steps times --batch times --length tokens, and --minutes at most. Scores are on
windows of --length held-out tokens; latency is the mean over 200 tokens behind one such window, one stream, step by
step with cached keys. Yau et al. 2025, arXiv 2506.10918; GPT is a pre-norm transformer with rotary positions.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Score, Training, autocast, axes, console, parser, prepare, record, write_json
from corpus import Bytes, Pairs, read
from torch import Tensor, nn
from torch.nn import functional as F

from psmc.nn import Attention, LanguageModel, ScanMixer, TransformerPSM, generate, parameters_of, sizes_for, state_bytes

SPECS = Path(__file__).resolve().parent.parent
SHIPPED = SPECS / "demo" / "wikitext.txt"
CHUNKS = (32, 64, 128, 256)
Make = Callable[[int, float], nn.Module]


def models(o: argparse.Namespace, vocab: int) -> dict[str, Make]:
    """By name, from a width (a multiple of 64) and the MLPs' expansion."""

    def psm(chunk: int) -> Make:
        depths = {"agg_layers": o.agg_layers, "inf_layers": o.inf_layers}
        return lambda d, e: TransformerPSM(vocab, d, chunk, heads=d // 64, expand=e, recompute=o.recompute, **depths)

    def blocks(mixer: Callable[[int], nn.Module]) -> Make:
        return lambda d, e: LanguageModel(vocab, d, o.layers, mixer, expand=e)

    return {
        **{f"psm-{c}": psm(c) for c in CHUNKS},
        "gpt": blocks(lambda d: Attention(d, d // 64)),
        "mamba2": blocks(
            lambda d: ScanMixer(SPECS / "mamba2.psm", d, heads=2 * d // 64, sizes={"N": 64, "P": 64},
                                shared=("B", "C"), conv=4)
        ),
        "gla": blocks(
            lambda d: ScanMixer(SPECS / "gla.psm", d, heads=d // 64, sizes={"K": 32, "V": 64})
        ),
    }  # fmt: skip


class Task:
    """The corpus and the scores on it."""

    def __init__(self, o: argparse.Namespace, device: torch.device) -> None:
        self.o, self.device = o, device
        text, held = read(o.text, o.held, int(o.limit))
        self.coder = Bytes() if o.vocab == 256 else Pairs(text[: int(o.learn)], o.vocab)
        self.text, self.held = self.coder.encode(text), self.coder.encode(held[: int(o.scored)])
        self.bytes_a_token = len(held[: int(o.scored)]) / len(self.held)
        if len(self.text) < 2 * o.length or len(self.held) < o.length + 1:
            raise SystemExit(f"{o.text}: too little text for windows of {o.length} tokens")

    def rows(self, step: int) -> Tensor:
        o = self.o
        generator = torch.Generator().manual_seed(o.seed * 1_000_003 + step)
        at = torch.randint(len(self.text) - o.length, (o.batch,), generator=generator)
        return self.text[at[:, None] + torch.arange(o.length + 1)].to(self.device)

    def score(self, model: nn.Module, windows: int) -> Score:
        """Per token over windows of `length`: nats, their exponential, bits a byte."""
        length = self.o.length
        count = min(windows, (len(self.held) - 1) // length)
        now = self.held[: count * length].view(count, length)
        following = self.held[1 : count * length + 1].view(count, length)
        total = 0.0
        for x, y in zip(now.split(self.o.batch), following.split(self.o.batch), strict=True):
            with autocast(self.o, self.device)():
                logits = model(x.to(self.device))
            total += F.cross_entropy(logits.flatten(0, 1).float(), y.to(self.device).flatten(), reduction="sum").item()
        nats = total / (count * length)
        bits = nats / math.log(2) / self.bytes_a_token
        return {"nats": nats, "perplexity": math.exp(min(nats, 50)), "bits a byte": bits}

    @torch.no_grad()
    def latency(self, model: Any) -> Score:
        """Milliseconds a token behind one window, and the bytes of the state then."""
        state = model.prefill(self.held[None, : self.o.length].to(self.device), last=True)[1]
        token = self.held[self.o.length : self.o.length + 1].to(self.device)
        count = 10 if self.o.smoke else 200
        for n in range(count + 10):
            if n == 10:
                self._wait()
                start = time.perf_counter()
            state = model.step(token, state, in_place=True)[1]
        self._wait()
        return {"ms a token": 1e3 * (time.perf_counter() - start) / count, "state bytes": state_bytes(state)}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def train(name: str, make: Make, task: Task) -> Score:
    o, device = task.o, task.device
    width, expand = sizes_for(int(o.params), make)
    torch.manual_seed(o.seed)
    model = make(width, expand).to(device)
    training = Training(name, model, o, device)
    forward: Any = torch.compile(model, dynamic=False) if o.compile else model
    context = autocast(o, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def batch(step: int) -> Tensor:
        rows = task.rows(step)
        with context():
            logits = forward(rows[:, :-1])
        training.tokens += rows[:, 1:].numel()
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    training.run(batch, lambda: task.score(model, o.windows), o.every)
    model.eval()
    row = {"model": name, "parameters": parameters_of(model), "width": width, "expand": round(expand, 3)}
    row |= {"steps": training.step, "tokens": training.tokens}
    row["tokens a second"] = round(training.tokens / training.seconds)
    if device.type == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    with torch.no_grad():
        row |= task.score(model, 10**9)
    row |= task.latency(model)
    prompt = task.held[None, : o.length // 2].to(device)
    sample = generate(model, prompt, 8 if o.smoke else 200, temperature=0.8, top_k=50, seed=o.seed)[0].tolist()
    return {**row, "sample": task.coder.decode(sample).decode(errors="replace"), "history": training.history}


def plot(rows: list[Score], path: Path) -> None:
    figure, made = axes("Held-out text", "training tokens (millions)", "bits a byte")
    for row in rows:
        each = row["tokens"] / row["steps"] / 1e6
        curve = [(h["step"] * each, h["bits a byte"]) for h in row["history"]]
        made.plot(*zip(*curve, strict=True), label=f"{row['model']}: {row['bits a byte']:.3f}")
    made.legend(frameon=False)
    figure.savefig(path, dpi=110)


def table(rows: list[Score]) -> None:
    from rich.table import Table

    shown = Table("model", "parameters", "bits a byte", "perplexity", "tokens/s", "ms a token", "state kB", "peak GiB")
    for r in rows:
        scores = (f"{r['bits a byte']:.4f}", f"{r['perplexity']:.3f}", f"{r['tokens a second']:,}")
        costs = (f"{r['ms a token']:.2f}", f"{r['state bytes'] / 1e3:.0f}", f"{r.get('peak GiB', 0):.2f}")
        shown.add_row(r["model"], f"{r['parameters']:,}", *scores, *costs)
    console.print(shown)


def main() -> int:
    names = [*(f"psm-{c}" for c in CHUNKS), "gpt", "mamba2", "gla"]
    p = parser(__doc__ or "", minutes=5, steps=100_000, rate=1e-3, batch=32, models=names)
    task = p.add_argument_group("task")
    task.add_argument("--text", type=Path, default=SHIPPED, help="a file, or a folder of packages")
    task.add_argument("--held", type=Path, help="scored text (default: a tenth of --text)")
    task.add_argument("--limit", type=float, default=1e9, help="bytes of training text at most")
    task.add_argument("--vocab", type=int, default=256, help="256: bytes; more: byte pairs learned from the text")
    task.add_argument("--learn", type=float, default=4e6, help="bytes of text that byte pairs are learned from")
    task.add_argument("--scored", type=float, default=4e6, help="bytes of held-out text at most")
    task.add_argument("--length", type=int, default=1024, help="tokens of a window (default %(default)s)")
    task.add_argument("--params", type=float, default=10e6, help="parameters of each model (default 10e6)")
    task.add_argument("--layers", type=int, default=6, help="blocks of the baselines (default %(default)s)")
    task.add_argument("--agg-layers", type=int, default=2, help="of Transformer-PSM (default %(default)s)")
    task.add_argument("--inf-layers", type=int, default=4, help="of Transformer-PSM (default %(default)s)")
    task.add_argument("--recompute", action="store_true", help="combines again in backward: less memory, more time")
    task.add_argument("--every", type=int, default=500, help="steps between scores (default %(default)s)")
    task.add_argument("--windows", type=int, default=64, help="windows of a score on the way (default %(default)s)")
    o = p.parse_args()
    if o.smoke:
        o.steps, o.batch, o.length, o.every, o.windows = min(o.steps, 2), 2, 96, 2, 2
        o.params, o.limit, o.scored, o.learn = 2e5, 1e5, 2e3, 2e4
    if o.vocab < 256:
        p.error("--vocab is 256 for bytes, or more for byte pairs")
    if not o.text.exists():
        p.error(f"there is no {o.text}")
    o.task = Path(__file__).name
    device = prepare(o)
    data = Task(o, device)
    sizes = f"{len(data.text):,} tokens to train on, {len(data.held):,} held out"
    console.print(f"{sizes}, {data.bytes_a_token:.2f} bytes each")
    rows: list[Score] = []
    makers = models(o, data.coder.size)
    for name in o.models:
        rows.append(train(name, makers[name], data))
        write_json(o.out / "lm.json", record(o, device, rows, task="lm"))
        plot(rows, o.out / "lm.png")
    table(rows)
    console.print(f"results: {o.out / 'lm.json'}   plot: {o.out / 'lm.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
