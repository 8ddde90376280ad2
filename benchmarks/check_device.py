"""Every example and a batch of random specs on a device, against the fp64 oracle on the CPU.

    python benchmarks/check_device.py --device cuda --out benchmarks/results/accuracy.json [--quick] [--random 100]

Outputs, final state and every gradient under varlen, masks, resets, initial states, reverse; steps in place against
the call; later tokens against earlier outputs, bit for bit. Buffers that a kernel allocates hold NaN before it runs.
One process a spec at a time and many at once: what is slow is the compilation of kernels, and a fault of one (an
illegal access takes the process with it) is a row of the table and nothing more. With TRITON_INTERPRET=1 and
--device cpu the kernels run without a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import multiprocessing.connection
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from contract.cases import fitting  # noqa: E402
from contract.compare import compiled, error, errors, named, oracle  # noqa: E402
from contract.data import Batch, Case, make  # noqa: E402
from contract.examples import NAMES, declared, domain, example, scratch_cache  # noqa: E402
from contract.poison import poisoned_memory  # noqa: E402
from contract.specs import specs  # noqa: E402
from contract.texts import TEXTS, from_text  # noqa: E402
from measure import commit, write  # noqa: E402

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest error over the largest magnitude of a tensor. A plan may sum in another order than the fold, and choose tf32
# nowhere; what is worse than these is still right if a plain fold in fp32 is as bad (`conditioned`).
TOLERANCES = {
    "float32": {"output": 2e-5, "state": 2e-5, "grad": 1e-4},
    "bfloat16": {"output": 6e-3, "state": 2e-5, "grad": 8e-3},
}
SLACK = 8
QUICK = (
    ("float32", Case(65, lanes=(3,), initial=True, strided=True)),
    ("float32", Case(64, lanes=(4,), grouped=True, mask=True, reset=True, initial=True, seed=1)),
    ("float32", Case(199, lanes=(2, 3), packed=True, initial=True, reverse=True, seed=2)),
)
FULL = (
    *QUICK,
    ("float32", Case(0, lanes=(3,), initial=True)),
    ("float32", Case(1, reset=True, seed=3)),
    ("float32", Case(2, lanes=(2, 3), mask=True, packed=True)),
    ("float32", Case(63, lanes=(2, 4), grouped=True, packed=True, mask=True, reset=True, initial=True, reverse=True)),
    ("bfloat16", Case(130, lanes=(5,), mask=True, initial=True, seed=4)),
    ("float32", Case(1000, batch=1, lanes=(2,), initial=True, seed=8)),
)
LONG = ("float32", Case(4099, batch=1, lanes=(2,), initial=True, reset=True, seed=5))  # split over time
LONG_SPECS = ("linear_recurrence", "logsumexp", "welford", "affine2x2", "lru", "gla", "gated_deltanet")
PATIENCE = 1200 if os.environ.get("TRITON_INTERPRET") else 240  # seconds a spec may take


@dataclass(frozen=True)
class Job:
    """One spec: a shipped one or a corner by name, else a random one by its text."""

    name: str
    text: str | None
    quick: bool
    device: str


def measure(job: Job) -> list[dict[str, Any]]:
    """The rows of a spec: one a case, then steps and causality."""
    agg = example(job.name) if job.text is None else from_text(job.text)
    cases = list(QUICK if job.quick else FULL)
    if job.name in LONG_SPECS and not job.quick:
        cases.append(LONG)
    rows = [compare(agg, job, dtype, fitting(case, agg)) for dtype, case in cases]
    rows += [steps(agg, job), causal(agg, job)]
    return [{"spec": job.name, "plan": agg.plan.name, **row} for row in rows]


def prepared(agg: Any, job: Job, dtype: str, case: Case) -> tuple[Batch, Batch]:
    """The data in fp64 on the CPU, and as it is passed on the device."""
    exact = make(declared(agg), case, FLOATS[dtype], live=agg.spec.live, intervals=domain(job.name), extern=agg.rule)
    return exact, exact.lower(FLOATS[dtype]).map(lambda x: x.to(job.device))


def compare(agg: Any, job: Job, dtype: str, case: Case) -> dict[str, Any]:
    """Outputs, final state, gradients."""
    exact, batch = prepared(agg, job, dtype, case)
    wanted = oracle(agg, exact, FLOATS[dtype], on(agg.rule, "cpu"))
    with poisoned_memory():
        found = compiled(agg, batch, FLOATS[dtype], on(agg.rule, job.device))
    gaps = errors(found, wanted)
    worst = {kind: max([v for k, v in gaps.items() if k.startswith(kind)], default=0.0) for kind in TOLERANCES[dtype]}
    bad = {k: v for k, v in gaps.items() if not v <= TOLERANCES[dtype][k.split()[0]]}
    row = {"shape": shape(case), "options": str(case), "dtype": dtype, "pass": "fwd+bwd", "error": worst}
    if bad and dtype == "float32":
        plain = errors(oracle(agg, exact.lower(torch.float32), torch.float32, on(agg.rule, "cpu")), wanted)
        row["conditioned"] = {k: plain[k] for k in sorted(bad)}
        bad = {k: v for k, v in bad.items() if not v <= SLACK * plain[k]}
    return row | ({"ok": False, "worst": bad} if bad else {"ok": True})


def steps(agg: Any, job: Job) -> dict[str, Any]:
    """`step_` in place with slots, token by token, against the parallel call on the same device."""
    case = Case(9, batch=3, lanes=(4,), seed=6)
    _, batch = prepared(agg, job, "float32", case)
    sizes = {d.name: n for d, n in zip(batch.agg.dims, (3, 2, 4), strict=False) if d.size is None}
    state = agg.init_state(5, (4,), job.device, **sizes)
    slots = torch.tensor([4, 0, 3], device=job.device)
    with poisoned_memory():
        whole = named(agg, agg(**batch.inputs, **batch.params))
        found = []
        for t in range(case.length):
            token = {k: x[:, t] for k, x in batch.inputs.items()}
            found.append(named(agg, agg.step_(state, slots=slots, **token, **batch.params)))
    gap = max(error(torch.stack([f[k] for f in found], 1), y) for k, y in whole.items())
    return {"shape": shape(case), "dtype": "float32", "pass": "step", "error": {"output": gap}, "ok": gap <= 5e-5}


def causal(agg: Any, job: Job) -> dict[str, Any]:
    """Later tokens change nothing before them, bit for bit: what is changed, as a share of the outputs."""
    case, at = Case(150, lanes=(2,), reset=True, seed=7), 97
    _, batch = prepared(agg, job, "float32", case)
    late = {k: torch.cat([x[:, :at], x[:, at:].flip(1)], 1) for k, x in batch.inputs.items()}
    one, two = (named(agg, agg(**x, **batch.params, **batch.flags)) for x in (batch.inputs, late))
    changed = max(float((one[k][:, :at] != two[k][:, :at]).float().mean()) for k in one)
    return {
        "shape": shape(case),
        "dtype": "float32",
        "pass": "causal",
        "error": {"output": changed},
        "ok": changed == 0,
    }


def on(rule: Any, device: str) -> Any:
    return None if rule is None else rule.to(device)


def shape(case: Case) -> str:
    return " ".join((f"B{case.batch if not case.packed else 1}", f"T{case.length}", *(f"H{n}" for n in case.lanes)))


# --- processes ------------------------------------------------------------------------------------------------


def worker(pipe: multiprocessing.connection.Connection) -> None:
    """Jobs from the pipe, rows into it; the process ends after an error of the device, which it does not survive."""
    torch.set_num_threads(1)
    scratch_cache()
    while True:
        job: Job | None = pipe.recv()
        if job is None:
            return
        start = time.perf_counter()
        try:
            rows, broken = measure(job), False
            if job.device == "cuda":
                torch.cuda.synchronize()
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            text = f"{type(e).__name__}: {str(e)[:600]} ({Path(last.filename).name}:{last.lineno})"
            rows, broken = [{"spec": job.name, "pass": "run", "ok": False, "failure": text}], "CUDA" in text
        pipe.send((job, rows, time.perf_counter() - start))
        if broken:
            os._exit(1)


class Pool:
    """Worker processes; one that dies or hangs costs its job and is replaced."""

    def __init__(self, count: int) -> None:
        self.context = mp.get_context("spawn")
        self.workers = [self.spawn() for _ in range(count)]

    def spawn(self) -> tuple[Any, multiprocessing.connection.Connection]:
        here, there = self.context.Pipe()
        process = self.context.Process(target=worker, args=(there,), daemon=True)
        process.start()
        there.close()
        return process, here

    def run(self, jobs: list[Job], end: float) -> Any:
        """(job, rows, seconds) as they come; none begins after `end`, and what runs longer than it may is ended."""
        waiting = jobs[::-1]
        busy: dict[Any, tuple[int, Job, float]] = {}

        def give(slot: int) -> None:
            if waiting and time.monotonic() < end:
                job = waiting.pop()
                self.workers[slot][1].send(job)
                busy[self.workers[slot][1]] = (slot, job, time.monotonic())

        for slot in range(len(self.workers)):
            give(slot)
        while busy:
            for pipe in multiprocessing.connection.wait(list(busy), timeout=5):
                slot, job, _ = busy.pop(pipe)
                try:
                    yield pipe.recv()
                except (EOFError, ConnectionError):
                    yield job, [{"spec": job.name, "pass": "run", "ok": False, "failure": "the process died"}], 0.0
                    self.replace(slot)
                give(slot)
            for pipe, (slot, job, since) in list(busy.items()):
                if time.monotonic() - since > PATIENCE or time.monotonic() > end + 10:
                    del busy[pipe]
                    self.replace(slot)
                    yield (
                        job,
                        [{"spec": job.name, "pass": "run", "ok": False, "failure": "out of time"}],
                        time.monotonic() - since,
                    )
                    give(slot)

    def replace(self, slot: int) -> None:
        self.workers[slot][0].kill()
        self.workers[slot] = self.spawn()

    def close(self) -> None:
        for process, pipe in self.workers:
            try:
                pipe.send(None)
                process.join(5)
            finally:
                process.kill()


# --- the table --------------------------------------------------------------------------------------------------


def line(rows: list[dict[str, Any]], seconds: float) -> str:
    """One spec: the worst of each kind over its cases."""
    cells = [f"{rows[0]['spec']:32}", f"{rows[0].get('plan', '-'):9}"]
    for dtype in FLOATS:
        for kind in ("output", "state", "grad"):
            values = [r["error"][kind] for r in rows if r["pass"] == "fwd+bwd" and r["dtype"] == dtype]
            cells.append(f"{max(values):8.1e}" if values else " " * 8)
    values = [r["error"]["output"] for r in rows if r["pass"] == "step"]
    cells.append(f"{max(values):8.1e}" if values else " " * 8)
    passed = "PASS, as far off as a plain fold in fp32" if any("conditioned" in r for r in rows) else "PASS"
    cells += [f"{seconds:5.0f}s", passed if all(r["ok"] for r in rows) else "FAIL"]
    failures = [f"\n    {r.get('failure') or (r['pass'], r.get('options', r['shape']), r.get('worst', r['error']))}"
                for r in rows if not r["ok"]]  # fmt: skip
    return "  ".join(cells) + "".join(failures[:4])


COLUMNS = ("fp32 out", "state", "grad", "bf16 out", "state", "grad", "step")
HEAD = "  ".join((f"{'spec':32}", f"{'plan':9}", *(f"{name:8}" for name in COLUMNS)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument("--quick", action="store_true", help="three cases a spec instead of nine")
    parser.add_argument("--random", type=int, default=100, metavar="N", help="random specs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="*", default=None, metavar="NAME", help="specs whose name contains one of these"
    )
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=1e9, help="time for all of it; the rest is left out")
    parser.add_argument("--resume", action="store_true", help="keep what --out has, at this commit")
    parser.add_argument("--smoke", action="store_true", help="two specs, quickly: shows that it runs")
    given = parser.parse_args()
    if given.smoke:
        given.quick, given.random, given.only = True, 0, ["ema", "gla"]

    jobs = [Job(name, None, given.quick, given.device) for name in NAMES]
    jobs += [Job(name, text, given.quick, given.device) for name, text in TEXTS.items()]
    jobs += [Job(f"random_{n}", t, given.quick, given.device) for n, t in enumerate(specs(given.random, given.seed))]
    if given.only:
        jobs = [job for job in jobs if any(word in job.name for word in given.only)]
    print(HEAD, flush=True)
    start = time.perf_counter()
    found: dict[str, list[dict[str, Any]]] = {}
    if given.resume and given.out and given.out.is_file():
        held = json.loads(given.out.read_text())
        for row in (r for r in held["rows"] if "table" not in r and held["commit"] == commit()):
            found.setdefault(row["spec"], []).append(row)
    todo = [job for job in jobs if job.name not in found]
    words = [w for w in sys.argv[1:] if w != "--resume"]
    pool = Pool(max(1, min(given.jobs, len(todo))))
    for job, rows, seconds in pool.run(todo, time.monotonic() + given.seconds):
        late = any("out of time" in row.get("failure", "") for row in rows) and seconds < PATIENCE
        if not late:
            found[job.name] = rows
        print(line(rows, seconds), flush=True)
        if given.out:
            rows = kept(jobs, found)
            write(given.out, [*rows, *by_plan(rows)], f"python benchmarks/check_device.py {' '.join(words)}")
    pool.close()
    rows = kept(jobs, found)
    left_out = [job.name for job in jobs if job.name not in found]
    failed = sorted({row["spec"] for row in rows if not row["ok"]})
    took = time.perf_counter() - start
    print(f"{len(jobs)} specs, {len(rows)} rows, {took:.0f} s, failed: {', '.join(failed) or 'none'}")
    if left_out:
        print(f"no time for {', '.join(left_out)}")
        return 3
    return 1 if failed else 0


def by_plan(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What README shows: the worst of each plan."""
    found = []
    for plan in dict.fromkeys(r.get("plan", "none") for r in rows):
        mine = [r for r in rows if r.get("plan", "none") == plan]
        row: dict[str, Any] = {"table": "The worst of each plan", "plan": plan, "specs": len({r["spec"] for r in mine})}
        for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
            of = [r["error"] for r in mine if r["pass"] == "fwd+bwd" and r["dtype"] == dtype]
            row |= {f"{short} {kind}": max(e[kind] for e in of) for kind in ("output", "state", "grad") if of}
        for kind, name in (("step", "steps"), ("causal", "changed by later tokens")):
            of = [r["error"]["output"] for r in mine if r["pass"] == kind and "error" in r]
            row |= {name: max(of)} if of else {}
        as_far = sorted({r["spec"] for r in mine if "conditioned" in r and r["ok"]})
        wrong = sorted({r["spec"] for r in mine if not r["ok"]})
        found.append(row | {"where a plain fp32 fold is as far off": ", ".join(as_far), "wrong": ", ".join(wrong)})
    return found


def kept(jobs: list[Job], found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all that has been run, in the order of the jobs."""
    return [row for job in jobs for row in found.get(job.name, ())]


if __name__ == "__main__":
    sys.exit(main())
