"""All measurements of one GPU, in order of their worth, within a budget; called again, it goes on with what is missing.

    python benchmarks/campaign.py --minutes 9 --out-dir build/campaign [--only chunked decode] [--text T --held H]
    python benchmarks/campaign.py --list

Each topic is a subprocess with a share of the time; one that fails or runs over ends itself alone, and keeps the rows
it has. DIR holds a result file a topic, as benchmarks/results does (copy what is to be published there, then `make
tables`), a log a topic, and campaign.json: what is done, at which commit. Rows of another commit are begun anew.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.measure import commit, save  # noqa: E402

GRACE = 15  # seconds between asking a topic to end and ending it
DONE, PARTIAL, FAILED = "done", "partial", "failed"


@dataclass(frozen=True)
class Topic:
    """A script with its arguments, the result file, the minutes that it may take."""

    name: str
    words: tuple[str, ...]
    out: str
    minutes: float
    flags: tuple[str, ...] = ("--resume", "--seconds")  # which of them the script takes
    smoke: str = "--smoke"


PLAIN: tuple[str, ...] = ()
TOPICS = (
    Topic("cold", ("cold.py",), "cold", 2),
    Topic("chunked", ("chunked.py", "--shapes", "main"), "chunked", 8),
    Topic("decode", ("decode.py",), "decode", 2),
    Topic("pointwise", ("pointwise.py",), "pointwise", 3),
    Topic("accuracy", ("accuracy.py",), "chunked_accuracy", 4),
    Topic("training", ("training.py",), "training", 8),
    Topic("chunked-alone", ("chunked.py", "--shapes", "alone"), "chunked", 4),
    Topic("pointwise-tiles", ("pointwise_tiles.py",), "pointwise_tiles", 4),
    Topic("gradients", ("gradients.py",), "gradients", 2, PLAIN),
    Topic("overhead", ("overhead.py",), "overhead", 1.5, PLAIN, "--host"),
    Topic("device", ("check_device.py", "--random", "100"), "accuracy", 8),
    Topic("tree", ("tree.py",), "tree", 2, PLAIN),
    Topic("attention", ("attention.py",), "attention", 3, PLAIN),
    Topic("psm-training", ("psm.py", "--only", "training", "combine"), "psm", 4, ("--resume",), "--quick"),
    Topic("psm-latency", ("psm.py", "--only", "latency"), "psm", 8, ("--resume",), "--quick"),
    Topic("chunked-more", ("chunked.py", "--shapes", "more"), "chunked", 8),
    Topic("chunk-tiles", ("chunk_tiles.py",), "chunk_tiles", 6),
)  # fmt: skip


class Campaign:
    """What is done, in a folder."""

    def __init__(self, folder: Path, smoke: bool, extra: dict[str, Sequence[str]]) -> None:
        self.folder, self.smoke, self.extra = folder, smoke, extra
        self.path = folder / "campaign.json"
        self.states: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.commit = commit()

    def state(self, topic: Topic) -> str | None:
        held = self.states.get(topic.name)
        return held["state"] if held and held["commit"] == self.commit else None

    def open(self, topics: Sequence[Topic]) -> list[Topic]:
        """What is not done; what failed is tried twice in all."""
        return [t for t in topics if self.state(t) in (None, PARTIAL)
                or (self.state(t) == FAILED and self.states[t.name]["tries"] < 2)]  # fmt: skip

    def run(self, topic: Topic, seconds: float) -> None:
        out = self.folder / f"{topic.out}.json"
        words = [sys.executable, str(ROOT / "benchmarks" / topic.words[0]), *topic.words[1:], "--out", str(out)]
        words += ["--resume"] if "--resume" in topic.flags else []
        words += ["--seconds", str(round(seconds - GRACE))] if "--seconds" in topic.flags else []
        words += [*self.extra.get(topic.name, ()), *([topic.smoke] if self.smoke else [])]
        began = time.monotonic()
        with (self.folder / f"{topic.name}.log").open("a") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, cwd=ROOT)
            code = self._wait(process, seconds)
        state = {0: DONE, 3: PARTIAL, None: PARTIAL}.get(code, FAILED)
        tries = self.states.get(topic.name, {}).get("tries", 0) if self.state(topic) else 0
        self.states[topic.name] = {"state": state, "seconds": round(time.monotonic() - began), "tries": tries + 1,
                                   "commit": self.commit, "exit": code}  # fmt: skip
        save(self.path, self.states)

    @staticmethod
    def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
        """The exit code; None if the time was up."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return None


def rows_of(path: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    except (OSError, KeyError, json.JSONDecodeError):
        return []
    return found


def summary(campaign: Campaign, topics: Sequence[Topic]) -> None:
    """One table, then what the topics themselves sum up."""
    print(f"\n{'topic':16} {'state':8} {'s':>5} {'rows':>5} {'errors':>7} {'of the floor, least / median / most':36}")
    for topic in topics:
        rows = rows_of(campaign.folder / f"{topic.out}.json")
        bad = sum((isinstance(r.get("error"), str) and "ms" not in r) or r.get("ok") is False for r in rows)
        shares = sorted(r["floor_ms"] / r["ms"] for r in rows if r.get("floor_ms") and r.get("ms"))
        share = f"{shares[0]:.2f} / {shares[len(shares) // 2]:.2f} / {shares[-1]:.2f}" if shares else ""
        held = campaign.states.get(topic.name, {})
        print(f"{topic.name:16} {campaign.state(topic) or 'not run':8} {held.get('seconds', ''):>5} {len(rows):>5} "
              f"{bad:>7} {share:36}")  # fmt: skip
    for out in dict.fromkeys(t.out for t in topics):
        for row in rows_of(campaign.folder / f"{out}.json"):
            if "table" in row:
                print(f"  {out}: " + "  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}"
                                               for k, v in row.items()))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for this call (default %(default)s)")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "build" / "campaign")
    parser.add_argument("--only", nargs="+", choices=[t.name for t in TOPICS], metavar="TOPIC", help="in this order")
    parser.add_argument("--again", action="store_true", help="what is done, too")
    parser.add_argument("--share", type=float, default=1.0, help="times the minutes of each topic")
    parser.add_argument("--text", help="text that the language models of 'training' train on")
    parser.add_argument("--held", help="text that they are scored on")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, any machine: shows that it runs")
    parser.add_argument("--list", action="store_true", help="the topics, and what is done of them")
    given = parser.parse_args()
    given.out_dir.mkdir(parents=True, exist_ok=True)
    named = {t.name: t for t in TOPICS}
    topics = [named[n] for n in given.only] if given.only else list(TOPICS)
    paths = {f"--{k}": getattr(given, k) for k in ("text", "held") if getattr(given, k)}
    text = [word for k, path in paths.items() for word in (k, str(Path(path).resolve()))]
    campaign = Campaign(given.out_dir.resolve(), given.smoke, {"training": text})
    if not given.list:
        end = time.monotonic() + 60 * given.minutes
        for topic in topics if given.again else campaign.open(topics):
            full = 60 * topic.minutes * given.share
            seconds = min(full, end - time.monotonic() - GRACE)
            if seconds < max(2 * GRACE, min(full, 60.0) if "--resume" in topic.flags else 0.6 * full):
                continue  # what cannot be gone on with is not begun to be cut off
            print(f"{topic.name}: at most {seconds:.0f} s ...", flush=True)
            campaign.run(topic, seconds)
            held = campaign.states[topic.name]
            print(f"{topic.name}: {held['state']} after {held['seconds']} s", flush=True)
    summary(campaign, topics)
    return 0 if all(campaign.state(t) == DONE for t in topics) else 3


if __name__ == "__main__":
    sys.exit(main())
