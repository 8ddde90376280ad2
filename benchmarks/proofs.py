"""The prover against what has a known answer: examples, mutants of them, monoids by construction, wrong rules.

    python benchmarks/proofs.py --out benchmarks/results/proofs.json [--only mutants ...] [--seconds 30] [--jobs 2]

examples  every examples/*.psm: verdicts, seconds of one core for the proof, and for the whole of `psmc check`
mutants   mechanical mistakes in their combine rules and identity elements (tests/mutants.py)
monoids   rules that are associative by construction (tests/generated_rules.py)
wrong     rules that the fp64 oracle finds not associative, at points of its own (tests/wrong_rules.py)

Each refutation is evaluated once more in the fp64 oracle, each proof exactly at points that the prover did not look at,
and every verdict's certificate goes through the checker of `psmc verify`, which shares no code with the prover. Repairs
that are printed for mutants are held against the rule before it was changed. With --keep FILE, what is done is read
from there and added to it, so that a run that was stopped goes on. All seconds are of CPU time, the budget's too:
verdicts do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PARTS = ("examples", "mutants", "monoids", "wrong")
COUNTS = {"monoids": 1000, "wrong": 1000}
PER_SPEC = 24  # mutants of one example, evenly spread over those there are
UNSEEN = range(70_000, 70_020)
# What the checker says where numbers are equal to 100 digits, and it cannot tell whether they are.
UNCLEAR = ("is None at the counterexample", "no point was found", "too few points")
Row = dict[str, Any]


# --- what there is to do ------------------------------------------------------------------------


def tasks(parts: Sequence[str], counts: dict[str, int]) -> list[tuple[str, str, int]]:
    """(part, spec, number) of each proof."""
    found: list[tuple[str, str, int]] = []
    for part in parts:
        if part == "examples":
            found += [(part, path.stem, 0) for path in sorted((ROOT / "examples").glob("*.psm"))]
        elif part == "mutants":
            found += [(part, *m) for m in chosen_mutants()]
        else:
            found += [(part, "", seed) for seed in range(counts[part])]
    return found


def chosen_mutants() -> Iterator[tuple[str, int]]:
    """(example, number): different rules only, at most so many of one example, spread evenly over them."""
    from psmc.ir.text import show

    seen: set[str] = set()
    for path in sorted((ROOT / "examples").glob("*.psm")):
        new = []
        for number, (_, agg) in enumerate(mutants_of(path.stem)):
            text = show(replace(agg, name="", inputs=(), lift=None, readout=type(agg.readout)(), claim="yes", doc=""))
            if text not in seen:
                seen.add(text)
                new.append(number)
        step = max(1, -(-len(new) // PER_SPEC))
        yield from ((path.stem, number) for number in new[::step])


@cache
def mutants_of(example: str) -> list[tuple[str, Any]]:
    from mutants import mutants

    from psmc.ir import Block

    original = example_of(example)
    return list(mutants(original)) if isinstance(original.combine, Block) else []


def example_of(name: str) -> Any:
    """The (lifted) aggregator of an example."""
    from psmc.pipeline import read

    (found,) = read(ROOT / "examples" / f"{name}.psm")
    return found.agg


# --- one proof ----------------------------------------------------------------------------------


def run(task: tuple[str, str, int], seconds: float) -> Row:
    """The row of one proof. An exception is a row too: none is expected."""
    part, spec, number = task
    try:
        return {"task": list(task), **WORK[part](spec, number, seconds)}
    except Exception as error:
        return {"task": list(task), "outcome": "crash", "why": f"{type(error).__name__}: {error}"[:300]}


def of_example(spec: str, _: int, seconds: float) -> Row:
    from psmc.ir import Block

    agg = example_of(spec)
    if agg.claim == "no" or not isinstance(agg.combine, Block):
        return {"outcome": "fixed order", "claim": agg.claim}
    return judged(agg, seconds) | {"claim": agg.claim, "command": command_seconds(spec)}


def command_seconds(example: str) -> float:
    """Of `psmc check`, start of Python and all."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "psmc", "check", f"examples/{example}.psm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 3)


def of_mutant(spec: str, number: int, seconds: float) -> Row:
    kind, agg = mutants_of(spec)[number]
    row = judged(replace(agg, claim="yes", order="tree"), seconds)
    row["kind"] = kind
    original = example_of(spec)
    if row["outcome"] == "refuted" and original.claim == "yes":
        row["repair"] = repaired(replace(agg, claim="yes"), original, seconds)
    return row


def of_monoid(_: str, seed: int, seconds: float) -> Row:
    from generated_rules import random_rule
    from prover_specs import spec

    how, rule = random_rule(seed)
    row = judged(spec(rule.text()), seconds)
    return row | {"how": how, "identity_kept": rule.identity_kept}


def of_wrong(_: str, seed: int, seconds: float) -> Row:
    from wrong_rules import wrong_rule

    how, agg = wrong_rule(seed)
    return judged(agg, seconds) | {"how": how}


WORK: dict[str, Callable[[str, int, float], Row]] = {
    "examples": of_example, "mutants": of_mutant, "monoids": of_monoid, "wrong": of_wrong,
}  # fmt: skip


def judged(agg: Any, seconds: float) -> Row:
    """Both verdicts, what the others say of them, and what it took."""
    from psmc.algebra.prover import prove
    from psmc.algebra.verdict import Refuted, Unknown

    begun = time.process_time()
    proof = prove(agg, seconds, associativity=True)
    took = time.process_time() - begun
    verdicts = {"associativity": proof.associativity, "identity": proof.identity}
    names = {law: type(v).__name__.lower() for law, v in verdicts.items()}
    unknown = [f"{v.reason}; {v.residual}"[:300] for v in verdicts.values() if isinstance(v, Unknown)]
    refuted = [v.counterexample for v in verdicts.values() if isinstance(v, Refuted)]
    outcome = "refuted" if refuted else "proved" if not unknown else "unknown"
    row: Row = {"outcome": outcome, **names, "seconds": round(took, 3)}
    if unknown:
        row["why"] = unknown
    row["contradiction"] = [w for w in unknown if "contradict" in w] + list(contradictions(agg, proof))
    row["oracle"] = [oracle(agg, c) for c in refuted]
    row["checker"], row["rejected"] = checker(agg, proof)
    row["contradiction"] += row["rejected"] if row["checker"] == "rejected" else []
    return row


def contradictions(agg: Any, proof: Any) -> Iterator[str]:
    """Counterexamples to what was proved, at points that the prover did not look at."""
    from psmc.algebra.intervals import closure
    from psmc.algebra.prover import deep_recursion
    from psmc.algebra.refute import Refuter
    from psmc.algebra.samples import Sampler
    from psmc.algebra.verdict import Proved

    laws = [(proof.associativity, "associativity"), *((proof.identity, f"{s} identity") for s in ("left", "right"))]
    with deep_recursion():
        refuter = Refuter(agg, Sampler.of(agg, closure(agg).closed))
        for verdict, law in laws:
            if isinstance(verdict, Proved):
                found = refuter.search(law, UNSEEN, time.monotonic() + 3)
                if found is not None:
                    yield f"{law}: {found.text}"


def checker(agg: Any, proof: Any) -> tuple[str, list[str]]:
    """(what the checker of certificates says of the laws that are proved or refuted, and why it rejects one).

    accepted; rejected; unclear (it could not evaluate the counterexample: numbers that are equal, but only to 100
    digits); nothing (both laws are unknown, or the certificate cannot state the rule).
    """
    from psmc.algebra.certificate import certificate_of
    from psmc.checker import check

    rows = check(json.loads(json.dumps(certificate_of(agg, proof))), points=12)
    decided = [row for row in rows if row["verdict"] in ("proved", "refuted")]
    rejected = [f"{row['law']}: {row.get('why', '')}"[:300] for row in decided if row["accepted"] is False]
    if rejected:
        return ("unclear" if all(any(u in why for u in UNCLEAR) for why in rejected) else "rejected"), rejected
    return ("accepted" if decided else "nothing"), []


def oracle(agg: Any, found: Any) -> str:
    """The counterexample in fp64 torch: confirmed, too close for fp64, or denied."""
    import math

    import torch

    from psmc.reference.evaluate import Env, run

    def tensor(value: object) -> torch.Tensor:
        return torch.tensor(_number(value))

    def _number(value: object) -> Any:
        if isinstance(value, tuple):
            return [_number(v) for v in value]
        if hasattr(value, "im"):
            return complex(float(value.re), float(value.im))  # type: ignore[attr-defined]
        return float(value)  # type: ignore[arg-type]

    kinds = {t.name: t.kind for t in (*agg.state, *agg.params)}
    sizes = dict(found.dims)
    given = {n: {c: _kind(tensor(v), kinds[c]) for c, v in parts} for n, parts in found.elements}
    params = {("param", n, 0): x for n, x in given.pop("params", {}).items()}
    if found.law != "associativity":
        block = type(agg.combine)(results=tuple(c.identity for c in agg.state))
        given["e"] = {n: _kind(x, kinds[n]) for n, x in run(block, Env(params, sizes)).items()}

    def combine(x: Any, y: Any) -> Any:
        values = {("left", n, 0): v for n, v in x.items()} | {("right", n, 0): v for n, v in y.items()}
        return run(agg.combine, Env({**values, **params}, sizes))

    if found.law == "associativity":
        a, b, c = (given[n] for n in "abc")
        left, right = combine(combine(a, b), c), combine(a, combine(b, c))
    else:
        e, right = given["e"], given["x"]
        left = combine(e, right) if found.law == "left identity" else combine(right, e)
    x, y = (complex(side[found.component][found.position]) for side in (left, right))
    if found.left is None:
        return "confirmed" if x != x else "denied"  # NaN
    told = [_number(v) for v in (found.left, found.right)]
    close = [_close(u, v) for u, v in zip((x, y), told, strict=True)]
    if all(close) and x != y:
        return "confirmed"
    wild = any(not math.isfinite(abs(v)) or abs(v) > 1e12 for v in (x, y, *map(complex, told)))
    return "too close for fp64" if wild or abs(complex(told[0]) - complex(told[1])) < 1e-9 else "denied"


def _kind(x: Any, kind: str) -> Any:
    import torch

    return x.to({"int": torch.int64, "real": torch.float64, "complex": torch.complex128}[kind])


def _close(x: complex, y: Any) -> bool:
    return x == y or abs(x - y) <= 1e-6 * (1 + abs(y))


def repaired(agg: Any, original: Any, seconds: float) -> str:
    """none; restored (the rule from before the change, up to equality); another (also proved, but not that)."""
    from psmc.algebra.prover import prove
    from psmc.algebra.repair import repair

    found = repair(agg, prove(agg, seconds, associativity=True), min(seconds, 4))
    if found is None:
        return "none"
    return "restored" if same_rule(found.agg, original) else "another"


def same_rule(one: Any, two: Any) -> bool:
    """l∘r is the same for all l and r."""
    from psmc.algebra import laws
    from psmc.algebra.equality import decide
    from psmc.algebra.facts import Facts
    from psmc.algebra.prover import deep_recursion
    from psmc.algebra.ring import Ring
    from psmc.algebra.terms import OutOfBudgetError

    sizes = {d.name: d.size for d in one.dims if d.size is not None}
    with deep_recursion():
        x, y = (
            laws.combined(laws.flat_combine(agg), laws.operand(agg, "a"), laws.operand(agg, "b")) for agg in (one, two)
        )
        try:
            return all(
                decide(left, right, Ring(Facts({}, sizes), time.monotonic() + 3)).equal
                for left, right in laws.sides(x, y).values()
            )
        except OutOfBudgetError:
            return False


# --- tables -------------------------------------------------------------------------------------


def tables(rows: list[Row]) -> list[Row]:
    by = {part: [r for r in rows if r["task"][0] == part] for part in PARTS}
    out: list[Row] = []
    if proved := [r for r in by["examples"] if "seconds" in r]:
        slowest = max(proved, key=lambda r: r["seconds"])
        out.append({
            "table": "Examples", "claimed": len(proved), "proved": sum(r["outcome"] == "proved" for r in proved),
            "certificates accepted": sum(r.get("checker") == "accepted" for r in proved),
            "median s": round(statistics.median(r["seconds"] for r in proved), 2), "slowest s": slowest["seconds"],
            "slowest": slowest["task"][1],
            "check, median s": round(statistics.median(r["command"] for r in proved), 2),
            "check, slowest s": max(r["command"] for r in proved),
        })  # fmt: skip
    kinds = Counter(r.get("kind", "crash") for r in by["mutants"])
    for kind in [*sorted(kinds), "all"] if kinds else []:
        mine = [r for r in by["mutants"] if kind in ("all", r.get("kind", "crash"))]
        out.append({"table": "Mutants of the examples", "change": kind, "rules": len(mine), **_verdicts(mine),
                    **_repairs(mine)})  # fmt: skip
    made = Counter(part for r in by["monoids"] for part in set(r.get("how", "crash").split(", ")))
    for how in [*sorted(made), "all"] if made else []:
        mine = [r for r in by["monoids"] if how == "all" or how in r.get("how", "crash").split(", ")]
        decided = sum(r["outcome"] != "crash" and r["associativity"] != "unknown" for r in mine)
        out.append({
            "table": "Monoids by construction (a rule counts in every row of its making)", "made with": how,
            "rules": len(mine), "proved": sum(r.get("associativity") == "proved" for r in mine),
            "identity decided": sum(r.get("identity", "unknown") != "unknown" for r in mine),
            "decided %": round(100 * decided / len(mine), 1), "wrong": sum(map(_wrong_monoid, mine)),
            "checker accepts": sum(r.get("checker") == "accepted" for r in mine),
            "median s": round(statistics.median(r.get("seconds", 0) for r in mine), 2),
        })  # fmt: skip
    sources = Counter(r.get("how", "crash") for r in by["wrong"])
    for how in [*sorted(sources), "all"] if sources else []:
        mine = [r for r in by["wrong"] if how in ("all", r.get("how", "crash"))]
        out.append({
            "table": "Rules that are not associative", "made by": how, "rules": len(mine),
            "refuted": sum(r.get("associativity") == "refuted" for r in mine),
            "unknown": sum(r.get("associativity") == "unknown" for r in mine),
            "proved (wrong)": sum(r.get("associativity") == "proved" for r in mine),
            "confirmed in fp64": sum("confirmed" in r.get("oracle", ()) for r in mine),
            "checker accepts": sum(r.get("checker") == "accepted" for r in mine),
        })  # fmt: skip
    return out


def _wrong_monoid(row: Row) -> bool:
    """A verdict that the construction contradicts."""
    lost = row.get("identity") == "refuted" and row["identity_kept"]
    return row["outcome"] == "crash" or row["associativity"] == "refuted" or lost or bool(row["contradiction"])


def _verdicts(rows: list[Row]) -> Row:
    refuted = [r for r in rows if r["outcome"] == "refuted"]
    proved = [r for r in rows if r["outcome"] == "proved"]
    return {
        "refuted": len(refuted), "of these confirmed in fp64": sum("confirmed" in r["oracle"] for r in refuted),
        "and by the checker": sum(r.get("checker") == "accepted" for r in refuted), "still a monoid": len(proved),
        "of these confirmed by the checker": sum(r.get("checker") == "accepted" for r in proved),
        "unknown": sum(r["outcome"] in ("unknown", "crash") for r in rows),
        "contradictions": sum(bool(r.get("contradiction")) or "denied" in r.get("oracle", ()) for r in rows),
    }  # fmt: skip


def _repairs(rows: list[Row]) -> Row:
    found = Counter(r["repair"] for r in rows if "repair" in r)
    return {"repaired": found["restored"] + found["another"], "as before": found["restored"]}


def noteworthy(rows: list[Row]) -> list[Row]:
    """All that is not as it should be, with the reason."""
    keys = ("task", "kind", "how", "outcome", "associativity", "identity", "why", "contradiction", "oracle", "checker",
            "rejected")  # fmt: skip
    odd = [
        r for r in rows
        if r["outcome"] == "crash" or r.get("why") or r.get("contradiction") or "denied" in r.get("oracle", ())
        or (r["task"][0] == "wrong" and r["associativity"] != "refuted") or r.get("checker", "accepted") != "accepted"
    ]  # fmt: skip
    return [{k: r[k] for k in keys if r.get(k)} for r in odd]


# --- running ------------------------------------------------------------------------------------


def finished(keep: Path | None) -> dict[str, Row]:
    lines = keep.read_text(encoding="utf-8").splitlines() if keep is not None and keep.exists() else []
    return {str(row["task"]): row for row in map(json.loads, lines)}


def all_rows(todo: list[tuple[str, str, int]], options: argparse.Namespace) -> list[Row]:
    from rich.console import Console
    from rich.progress import track

    done = finished(options.keep)
    missing = [t for t in todo if str(list(t)) not in done]
    with ProcessPoolExecutor(options.jobs, initializer=_one_thread) as pool:
        running = [pool.submit(run, t, options.seconds) for t in missing]
        finishing = as_completed(running)
        for future in track(finishing, "proofs", total=len(running), console=Console(stderr=True)):
            row = future.result()
            done[str(row["task"])] = row
            if options.keep is not None:
                with options.keep.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return [done[str(list(t))] for t in todo]


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    time.monotonic = time.process_time  # what budgets are counted in
    import torch

    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--count", type=int, help="monoids, and wrong rules")
    parser.add_argument("--seconds", type=float, default=30.0, help="budget of a proof, CPU time")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a file of finished proofs to go on from")
    options = parser.parse_args()
    counts = COUNTS if options.count is None else dict.fromkeys(COUNTS, options.count)
    begun = time.monotonic()
    rows = all_rows(tasks(options.only, counts), options)
    minutes = round((time.monotonic() - begun) / 60, 1)
    found, odd = tables(rows), noteworthy(rows)
    for row in found:
        print("  ".join(f"{k}={v}" for k, v in row.items()))
    for row in odd:
        print(json.dumps(row, ensure_ascii=False))
    print(f"{len(rows)} proofs, {minutes} minutes")
    if options.out is not None:
        from benchmarks.measure import write

        command = " ".join(["python benchmarks/proofs.py", *sys.argv[1:]])
        write(options.out, found, command, budget_s=options.seconds, minutes=minutes, noteworthy=odd)


if __name__ == "__main__":
    main()
