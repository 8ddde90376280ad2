"""Texts at random through parse, fmt, resolve, lift and verify, and a sample of them through the prover.

    python benchmarks/fuzz.py [--inputs 100000] [--first 0] [--prove 10] [--jobs N] [--limit 60] [--out FILE.json]

The texts are those of tests/fuzz_grammar.py, which also says what must hold of each. Seeds are numbers: --first N
--inputs 1 repeats a failure. A text that takes more than --limit seconds is a hang; a worker has --memory MiB.
Failures are made small and written to --failures, one after the other; the exit code is 1 if there are any.
--prove N: every Nth text goes on to the prover, if it has a combine.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from fuzz_grammar import draw, examine

from psmc.cli import console

BUDGET = 1.0  # seconds for a proof
_CHUNK = 50
_SHRINK = 30.0  # seconds for making one failure small


class Options(NamedTuple):
    prove: int
    limit: float
    memory: int


class Failure(NamedTuple):
    seed: int
    kind: str
    signature: str
    text: str


class TooLongError(Exception):
    """A text took more than its share of time."""


# --- one text -------------------------------------------------------------------------------------


def tried(text: str, budget: float | None, limit: float) -> tuple[str, str]:
    """(what became of it, the failure's signature or nothing)."""

    def stop(*_: object) -> None:
        raise TooLongError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return examine(text, budget), ""
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        said = str(error).splitlines()[0][:60] if str(error) else ""
        return "failed", "hang" if isinstance(error, TooLongError) else f"{type(error).__name__} at {where}: {said}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def smaller(text: str, fails: Callable[[str], bool], deadline: float) -> str:
    """The text with as many words left out as keep it failing."""
    words = text.split(" ") if "\n" not in text else text.replace("\n", " \n ").split(" ")
    size = max(1, len(words) // 2)
    while size and time.monotonic() < deadline:
        at = 0
        while at < len(words) and time.monotonic() < deadline:
            rest = words[:at] + words[at + size :]
            if fails(" ".join(rest)):
                words = rest
            else:
                at += size
        size //= 2
    return " ".join(words)


# --- workers --------------------------------------------------------------------------------------


def work(pipe: Connection, seeds: list[int], options: Options) -> None:
    """Sends (seed, kind, outcome, signature, seconds) of each, None before each: the sign of life."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (options.memory * 2**20,) * 2)
    for seed in seeds:
        pipe.send(seed)
        kind, text = draw(seed)
        begun = time.perf_counter()
        outcome, signature = tried(text, BUDGET if options.prove and seed % options.prove == 0 else None, options.limit)
        pipe.send((seed, kind, outcome, signature, time.perf_counter() - begun))
    pipe.send(None)


class Worker:
    """A process with some seeds, replaced when it ends or hangs."""

    def __init__(self, seeds: list[int], options: Options) -> None:
        self.seeds, self.options = seeds, options
        self.pipe, theirs = mp.Pipe(duplex=False)
        self.process = mp.get_context("fork").Process(target=work, args=(theirs, seeds, options), daemon=True)
        self.process.start()
        theirs.close()
        self.seed, self.since = seeds[0], time.monotonic()

    def rest(self) -> list[int]:
        """What to do after the present seed was given up."""
        return self.seeds[self.seeds.index(self.seed) + 1 :]

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(seeds: list[int], options: Options, jobs: int, report: Callable[[tuple[Any, ...]], None]) -> None:
    """`report` gets one row a seed."""
    waiting = [seeds[n : n + _CHUNK] for n in range(0, len(seeds), _CHUNK)][::-1]
    workers: list[Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(Worker(waiting.pop(), options))
            ready = wait([w.pipe for w in workers], timeout=1.0)
            for worker in list(workers):
                finished = worker.pipe in ready and _heard(worker, report)
                stuck = time.monotonic() - worker.since > 2 * options.limit + 10
                if finished or stuck:
                    if finished != "done":
                        worker.process.join(1)
                        sign = "hang in C code" if stuck else f"the process died ({worker.process.exitcode})"
                        report((worker.seed, draw(worker.seed)[0], "failed", sign, time.monotonic() - worker.since))
                        if worker.rest():
                            waiting.append(worker.rest())
                    worker.end()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


def _heard(worker: Worker, report: Callable[[tuple[Any, ...]], None]) -> str:
    """'done', 'died', or nothing while it goes on."""
    try:
        while worker.pipe.poll():
            said = worker.pipe.recv()
            if said is None:
                return "done"
            if isinstance(said, int):
                worker.seed, worker.since = said, time.monotonic()
            else:
                report(said)
    except (EOFError, OSError):
        return "died"
    return ""


# --- the whole ------------------------------------------------------------------------------------


def shrunk(seed: int, kind: str, signature: str, options: Options) -> Failure:
    _, text = draw(seed)
    budget = BUDGET if options.prove and seed % options.prove == 0 else None
    if signature.startswith(("hang", "the process")):
        return Failure(seed, kind, signature, text)
    small = smaller(text, lambda t: tried(t, budget, 10)[1] == signature, time.monotonic() + _SHRINK)
    return Failure(seed, kind, signature, small)


def rows_of(counted: Counter[tuple[str, str]], slowest: dict[str, float]) -> list[dict[str, Any]]:
    """One a kind of text."""
    rows = []
    for kind in sorted({k for k, _ in counted}):
        own = Counter({o: n for (k, o), n in counted.items() if k == kind})
        refused = sum(n for o, n in own.items() if o.startswith("PSM"))
        codes = len([o for o in own if o.startswith("PSM")])
        verdicts = {word: own[word] for word in ("resolved", "proved", "refuted", "unknown", "failed")}
        row = {"texts": kind, "number": sum(own.values()), "refused": refused, "codes": codes, **verdicts}
        rows.append(row | {"slowest s": round(slowest[kind], 2)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--prove", type=int, default=10, help="every Nth text; 0: none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--memory", type=int, default=4096, help="MiB a worker")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures.txt"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    options = Options(given.prove, given.limit, given.memory)
    counted: Counter[tuple[str, str]] = Counter()
    slowest: dict[str, float] = Counter()  # type: ignore[assignment]
    failed: dict[str, tuple[int, str]] = {}
    begun = time.monotonic()
    draw(0)  # the grammar, the examples: once for all workers
    with console.progress("fuzzing", given.inputs) as bar:

        def report(row: tuple[Any, ...]) -> None:
            seed, kind, outcome, signature, seconds = row
            counted[kind, outcome] += 1
            slowest[kind] = max(slowest[kind], seconds)
            if signature and signature not in failed:
                failed[signature] = (seed, kind)
                print(f"seed {seed} ({kind}): {signature}", file=sys.stderr, flush=True)
            done = sum(counted.values())
            bar.step(f"{kind} {outcome}")
            if done % 1000 == 0 and not console.terminal(sys.stderr):
                print(f"{done} of {given.inputs}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)

        with suppress(KeyboardInterrupt):  # what is done is reported
            run(list(range(given.first, given.first + given.inputs)), options, given.jobs, report)
    failures = [shrunk(seed, kind, sign, options) for sign, (seed, kind) in failed.items()]
    if failures:
        given.failures.write_text(
            "".join(f"# seed {f.seed}, {f.kind}: {f.signature}\n{f.text}\n\n" for f in failures), encoding="utf-8"
        )
        print(f"{len(failures)} different failures: {given.failures}", file=sys.stderr)
    rows = rows_of(counted, slowest)
    seconds = round(time.monotonic() - begun)
    headings = tuple(rows[0]) if rows else ()
    console.table(headings, [[str(v) for v in row.values()] for row in rows], right=headings[1:])
    print(f"{sum(counted.values())} texts in {seconds} s, {len(failures)} different failures")
    if given.out:
        from measure import write

        write(given.out, rows, " ".join(["python benchmarks/fuzz.py", *sys.argv[1:]]), seconds=seconds)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
