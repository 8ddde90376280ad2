"""`psmc test`: the duality test on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from psmc.cli import console, externs, inputs
from psmc.diagnostics import fail

if TYPE_CHECKING:
    from psmc.duality import Row, Setting
    from psmc.duality.evidence import Evidence
    from psmc.pipeline import Compilation

_DTYPES = ("fp64", "fp32", "bf16", "fp16")
_HEADINGS = ("dtype", "path", "outputs", "state", "gradients", "limit", "verdict")


class _List(click.ParamType[Any]):
    """1,64,1000 or fp32,bf16."""

    name = "list"

    def __init__(self, allowed: Sequence[str] = (), least: int = 0) -> None:
        self.allowed, self.least = allowed, least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        if self.allowed:
            unknown = [part for part in parts if part not in self.allowed]
            if unknown or not parts:
                self.fail(f"{unknown or value!s}: choose from {', '.join(self.allowed)}.", param, ctx)
            return tuple(parts)
        if not parts or not all(part.isdecimal() and int(part) >= self.least for part in parts):
            self.fail(f"'{value}' is not a list of whole numbers from {self.least} on, such as 1,64,1000.", param, ctx)
        return tuple(int(part) for part in parts)


@click.command(
    epilog="\b\nExamples:\n  psmc test gla.psm\n"
    "  psmc test gla.psm --device cuda --dtype fp32,bf16 -T 1,65,1000 --lanes 16\n"
    "  psmc test gla.psm --dim K=64 --dim V=64 --json > duality.json\n"
    "  psmc test blocks.psm --extern blocks.py:join --dim D=8 --dtype fp32",
)
@click.argument("file", metavar="FILE")
@click.option("--name", metavar="AGG", help="Only this aggregator of the file.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", type=_List(_DTYPES), default="fp32,bf16", show_default=True, metavar="D,D", help="Of inputs.")
@click.option("-T", "lengths", type=_List(least=1), default="1,7,64", show_default=True, metavar="N,N", help="Tokens.")
@click.option("-B", "batch", type=click.IntRange(1), default=2, show_default=True, metavar="N", help="Rows.")
@click.option("--lanes", type=_List(least=1), default="3", show_default=True, metavar="N,N", help="Heads or channels.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=N", help="Size of a dim that the spec leaves open.")
@click.option("--extern", metavar="FILE.py:NAME", help="The rule of 'combine extern'; the file is run.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N")
@click.option("--json", "as_json", is_flag=True, help="Print every row as JSON.")
def command(
    file: str, name: str | None, device: str, dtype: tuple[str, ...], lengths: tuple[int, ...], batch: int,
    lanes: tuple[int, ...], dims: tuple[str, ...], extern: str | None, seed: int, as_json: bool,
) -> int:  # fmt: skip
    """Check on this machine that every way to run a spec gives the same.

    \b
    scan       the parallel call
    steps      one token after the other
    segments   split in three, the state carried over
    tree       elements combined in balanced halves (associative rules only)
    flags      masked tokens and restarts
    packed     sequences of different lengths in one row

    Outputs, final state and all gradients are compared with the sequential fold in fp64; errors are relative to the
    largest value. The limit is some units of rounding, or 16 times what the fold itself loses in that dtype. The
    distance between scan and steps is what reassociating floats costs this spec. Where nothing is proved (a rule from
    Python, 'associative: assume') both laws are tried on random elements too.
    """
    from psmc import pipeline

    path = inputs.one_file(file)
    found = pipeline.read(path)
    chosen = (pipeline.pick(found, name, str(path)),) if name else found
    if find_spec("torch") is None:
        raise click.UsageError("psmc test runs the spec, and torch is not installed: pip install torch.")
    _require(device)
    from psmc.duality import Setting

    sizes = _sizes(dims, chosen)
    setting = Setting(device, dtype, lengths, batch, lanes, sizes, seed=seed)
    rule = None if extern is None else _widened(externs.load(extern))
    results = [(each, *_run(each, setting, rule)) for each in chosen]
    if as_json:
        data = [_as_data(each, rows, tried, setting) for each, rows, tried in results]
        inputs.say_json({"results": data})
    else:
        for each, rows, tried in results:
            _show(each, rows, setting)
            if tried is not None:
                console.say(console.verdict("PASS" if tried.associative and tried.identity else "FAIL") + f" {tried}")
    held = all(row.passed for _, rows, _ in results for row in rows)
    return 0 if held and all(tried is None or (tried.associative and tried.identity) for *_, tried in results) else 1


def _require(device: str) -> None:
    from psmc.duality import available

    if not available(device):
        raise click.UsageError("this machine has no CUDA device that torch can use: pass --device cpu.")


def _sizes(dims: tuple[str, ...], chosen: Iterable[Compilation]) -> dict[str, int]:
    known = {d.name for c in chosen for d in c.declared.dims if d.size is None}
    out = {}
    for text in dims:
        name, _, size = text.partition("=")
        if name not in known or not size.isdecimal() or int(size) < 1:
            names = ", ".join(sorted(known)) or "none"
            raise click.UsageError(f"--dim {text}: write NAME=N; the open dims are {names}.")
        out[name] = int(size)
    return out


def _widened(rule: Callable[..., Any]) -> Callable[..., Any]:
    from psmc.duality.widened import Widened

    return Widened(rule)


def _run(found: Compilation, setting: Setting, rule: Callable[..., Any] | None) -> tuple[list[Row], Evidence | None]:
    """The comparisons, and evidence for laws that are vouched for."""
    from psmc.api import realise
    from psmc.duality import count, duality
    from psmc.duality.evidence import evidence

    agg = realise(found, rule)
    try:
        with console.progress(found.declared.name, count(setting)) as progress:
            rows = list(duality(agg, setting, begin=progress.step))
        tried = evidence(agg, sizes=dict(setting.sizes or {})) if found.declared.claim == "assume" else None
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        if rule is None:
            raise
        fail(
            "PSM296", f"the rule of '{found.declared.name}' raised {externs.last_line(error)}",
            helps=("it is called on dicts of tensors [batch, *lanes, *dims]; --dim sets sizes.",),
        )  # fmt: skip
    return rows, tried


def _show(found: Compilation, rows: list[Row], setting: Setting) -> None:
    lengths = ", ".join(str(t) for t in setting.lengths)
    lanes = ", ".join(str(n) for n in setting.lanes)
    console.say(
        console.bold(found.declared.name)
        + f": plan {found.plan.name}, {setting.device}, B {setting.batch}, T {lengths}, lanes {lanes}"
    )
    console.table(_HEADINGS, [_cells(group) for group in _groups(rows)], right=_HEADINGS[2:6])
    for dtype in setting.dtypes:
        mine = [row for row in rows if row.dtype == dtype]
        apart = max((row.reassociation or 0.0 for row in mine), default=0.0)
        fold = max((row.fold for row in mine), default=0.0)
        console.say(f"{dtype}: reassociation {_number(apart)}, the fold itself {_number(fold)}")
    for note in dict.fromkeys(row.note for row in rows if row.note):
        console.say(f"note: {note}")
    failed = [row for row in rows if not row.passed]
    for row in failed[:8]:
        console.say(console.verdict("FAIL") + f" {_explain(row)}")
    if len(failed) > 8:
        console.say(f"… and {len(failed) - 8} more")
    if not failed:
        console.say(console.verdict("PASS") + f" {len(rows)} comparisons with the fp64 oracle")


def _groups(rows: list[Row]) -> list[list[Row]]:
    """Rows of one dtype and path, in order."""
    keys = dict.fromkeys((row.dtype, row.path) for row in rows)
    return [[row for row in rows if (row.dtype, row.path) == key] for key in keys]


def _cells(group: list[Row]) -> tuple[str, ...]:
    """The row nearest to its limit, or past it."""
    first = group[0]
    states = [row.state for row in group if row.state is not None]
    gradients = [row.gradient for row in group if row.gradients]
    return (
        first.dtype,
        first.path,
        _number(max(row.outputs for row in group)),
        _number(max(states)) if states else "-",
        _number(max(gradients)) if gradients else "-",
        _number(max(max(row.limits) for row in group)),
        "PASS" if all(row.passed for row in group) else "FAIL",
    )


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else "no match"


def _explain(row: Row) -> str:
    what = []
    outputs, state, gradients = row.limits
    if row.outputs > outputs:
        what.append(f"outputs differ by {_number(row.outputs)} (limit {_number(outputs)})")
    if row.state is not None and row.state > state:
        what.append(f"the final state differs by {_number(row.state)} (limit {_number(state)})")
    bad = [f"{k} {_number(v)}" for k, v in row.gradients.items() if not v <= gradients]
    if bad:
        what.append(f"gradients differ: {', '.join(bad)} (limit {_number(gradients)})")
    if row.causal is False:
        what.append("later tokens change earlier outputs")
    return f"{row.path} in {row.dtype}, T {row.length}, {row.data} data: " + "; ".join(what)


def _as_data(found: Compilation, rows: list[Row], tried: Evidence | None, setting: Setting) -> dict[str, Any]:
    return {
        "aggregator": found.declared.name,
        "plan": found.plan.name,
        "device": setting.device,
        "passed": all(row.passed for row in rows),
        "reassociation": {
            d: max((r.reassociation or 0.0 for r in rows if r.dtype == d), default=0.0) for d in setting.dtypes
        },
        "evidence": None if tried is None else asdict(tried),
        "rows": [_row_data(row) for row in rows],
    }


def _row_data(row: Row) -> dict[str, Any]:
    data = {
        "dtype": row.dtype, "path": row.path, "T": row.length, "data": row.data, "outputs": row.outputs,
        "state": row.state, "gradients": dict(row.gradients),
        "limits": dict(zip(("outputs", "state", "gradients"), row.limits, strict=True)),
        "fold": row.fold, "reassociation": row.reassociation, "causal": row.causal, "passed": row.passed,
    }  # fmt: skip
    return {k: _finite(v) for k, v in data.items() if v is not None} | ({"note": row.note} if row.note else {})


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return "no match" if isinstance(value, float) and not math.isfinite(value) else value
