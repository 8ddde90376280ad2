"""`psmc tune`: tiles for one module on the GPU at hand, as a small file."""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from psmc.cli import console, inputs
from psmc.diagnostics import fail

if TYPE_CHECKING:
    from psmc.pipeline import Compilation
    from psmc.plan.tuned import Tuned
    from psmc.tuning import Result, Search, Shape, Target, Tried

_HEADINGS = ("kernel", "tile", "error", "ms", "gain", "verdict")


@click.command(
    epilog="\b\nExamples:\n  psmc tune gla.psm --shape \"B8 T4096 H16 K128 V128\" --out tuned.json\n"
    "  psmc compile gla.psm --tuned tuned.json     # a module with these tiles\n"
    "  PSMC_TUNED=tuned.json python train.py       # or what psmc.load and decorators compile\n"
    "  psmc tune gla.psm --interpret --shape \"B1 T40 H1 K16 V16\"   # the whole way, without a GPU",
)
@click.argument("file", metavar="FILE")
@click.option("--name", metavar="AGG", help="Which aggregator of the file.")
@click.option("--shape", "shapes", multiple=True, metavar="SHAPE", help="Rows, tokens, lanes, dims; may be repeated.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Of inputs.  [default: bf16]")
@click.option(
    "--seconds", type=inputs.Seconds(0, min_open=True), default=60.0, show_default=True, metavar="N",
    help="Time for the search; what it does not reach is not tried.",
)  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Checks at a time.  [default: at most 8]")
@click.option("--out", metavar="OUT", help="The tuned file.  [default: NAME.tuned.json]")
@click.option("--interpret", is_flag=True, help="In Triton's interpreter, on the CPU: checks all, measures nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print every candidate as JSON.")
def command(
    file: str, name: str | None, shapes: tuple[str, ...], dtype: str | None, seconds: float, jobs: int | None,
    out: str | None, interpret: bool, as_json: bool,
) -> int:  # fmt: skip
    """Find the tiles of a spec's kernels that are fastest on this machine.

    A tile says how many tokens, lanes or columns a program holds, in how many warps, with how many loads in flight. The
    shipped ones come from a cost model, and nothing is ever searched when a spec is compiled or called. This command
    tries a handful of others for each kernel and writes the best into a small file.

    \b
    check   each in a process of its own, against the sequential fold in fp64:
            outputs, final state and gradients, in buffers full of NaN, at small
            odd sizes with masks and packing, then at the lanes and dims asked for
    time    those that are right, in one process: the median of a call at each
            shape, forward for kernels named forward, else forward + backward;
            results must be those of the shipped tiles
    choose  the best of each kernel; together they are checked and timed again

    A shape names rows B, tokens T, the spec's open dims, and lanes by any other letter: "B8 T4096 H16 K128 V128". The
    file holds for this spec, this version of psmc, this kind of device and this version of triton.
    """
    from psmc import pipeline

    path = inputs.one_file(file)
    found = pipeline.pick(pipeline.read(path), name, str(path))
    text = found.shipped
    place = inputs.destination(out or f"{found.declared.name}.tuned.json", [path])
    _require_kernels(found)
    plan = "attention" if "ATTENTION_TILES = " in text else found.plan.name  # whose tiles they are
    _require_device(interpret)
    from psmc import tuning
    from psmc.runtime import cache

    quick = tuning.interpreted()
    if quick and dtype == "bf16":
        raise click.UsageError("Triton's interpreter has no bf16: pass --dtype fp32.")
    asked = _shapes(shapes, found, plan, quick)
    module = cache.stored(found.agg.name, text)
    target = tuning.Target(str(path), found.declared.name, str(module), dtype or ("fp32" if quick else "bf16"),
                    "cpu" if quick else "cuda", asked, quick)  # fmt: skip
    search = tuning.Search(target, plan, seconds, jobs or min(8, os.cpu_count() or 1))
    try:
        result = _searched(search)
    except tuning.NothingRuns as why:
        fail("PSM621", f"'{found.declared.name}' has nothing to tune here: {why}.", helps=(_SMALLER,))
    if as_json:
        inputs.say_json({"device": result.device, "rows": [_as_data(one, plan) for one in result.tried]})
    else:
        _show(found, target, plan, result)
    if not result.rows:
        fail(
            "PSM624", f"'{found.declared.name}': no tile of its kernels is right on {result.device}.",
            notes=("the checks compare with the sequential fold in fp64; the table says what was off.",),
            helps=("psmc test says more, and PSMC_DEBUG=1 shows what compilers print; please report it.",),
        )  # fmt: skip
    tuned = _tuned(found, plan, result, place)
    inputs.write(place, tuned.text())
    if not as_json:
        console.say(f"wrote {out or tuned.file}")
    return 0


_SMALLER = "--shape names rows, tokens, lanes and dims; kernels of matrix states take keys up to 256."


def _require_kernels(found: Compilation) -> None:
    if not any(f"= {name}(" in found.shipped for name in ("AttentionKernels", "PointwiseKernels", "TreeKernels")) and (
        "matrices=ChunkKernels(" not in found.shipped
    ):
        reasons = tuple(f"{plan}: {why}." for plan, why in found.plan.refused)
        fail(
            "PSM621",
            f"'{found.declared.name}' has nothing to tune: plan {found.plan.name} has no kernels with tiles here.",
            found.declared.where("name"), notes=reasons,
            helps=("Triton kernels have tiles, PyTorch has none; psmc explain says which plan a spec has, and why.",),
        )  # fmt: skip


def _require_device(interpret: bool) -> None:
    """PSM620 where nothing can be timed. `interpret` is for this process and those that it starts."""
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            fail("PSM620", f"psmc tune runs kernels, and {package} is not installed.",
                 helps=('pip install "psmc[gpu]", on a machine with a GPU.',))  # fmt: skip
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    from psmc.duality import available
    from psmc.tuning import interpreted

    if not interpreted() and not available("cuda"):
        fail(
            "PSM620", "psmc tune times kernels on a GPU, and this machine has none that torch can use.",
            helps=("run it on the machine that the tiles are for, and take the file along.",
                   "--interpret goes the whole way on the CPU: it checks every tile, but its times mean nothing."),
        )  # fmt: skip


def _shapes(texts: tuple[str, ...], found: Compilation, plan: str, quick: bool) -> tuple[Shape, ...]:
    from psmc.tuning import parse, usual

    if not texts:
        return (usual(found.declared, plan, quick),)
    shapes = []
    for text in texts:
        try:
            shapes.append(parse(text, found.declared))
        except ValueError as error:
            raise click.UsageError(f'--shape "{text}": {error}.') from error
    return tuple(dict.fromkeys(shapes))


def _searched(search: Search) -> Result:
    with console.progress("tuning", 1) as progress:
        progress.step(search.target.name)
        search.says = progress.detail
        return search.run()


def _tuned(found: Compilation, plan: str, result: Result, out: Path) -> Tuned:
    from psmc.plan.tuned import Tuned

    versions = (("torch", version("torch")), ("triton", result.triton))
    tiles = tuple(sorted((row.name, row.numbers) for row in result.rows))
    return Tuned(out.name, found.declared.name, result.device, found.digest, plan, tiles, versions)


def _show(found: Compilation, target: Target, plan: str, result: Result) -> None:
    shapes = "; ".join(shape.text for shape in target.shapes)
    console.say(
        console.bold(found.declared.name)
        + f": plan {found.plan.name}, {result.device}, triton {result.triton}, {target.dtype}, {shapes}"
    )
    console.table(_HEADINGS, [_cells(one, plan) for one in result.tried], right=_HEADINGS[2:5])
    if target.quick:
        console.say("ms by the wall clock, of Triton's interpreter: they say nothing about a GPU")
    for note in result.notes:
        console.say(f"note: {note}")


def _cells(one: Tried, plan: str) -> tuple[str, ...]:
    from psmc.plan.tiles import FIELDS
    from psmc.tuning import numbers_of

    return (
        one.candidate.kernel or "all",
        numbers_of(one.candidate, list(FIELDS[plan])),
        "-" if one.error is None else f"{one.error:.1e}",
        "-" if one.ms is None else f"{one.ms:.4g}",
        "-" if one.gain is None else f"{one.gain:.2f}",
        one.verdict,
    )


def _as_data(one: Tried, plan: str) -> dict[str, object]:
    from psmc.plan.tiles import FIELDS

    tiles = {row.name: dict(zip(FIELDS[plan], row.numbers, strict=True)) for row in one.candidate.rows}
    data = {"kernel": one.candidate.kernel or "all", "tiles": tiles, "error": one.error, "in": one.where, "ms": one.ms,
            "gain": one.gain, "verdict": one.verdict}  # fmt: skip
    return {k: v for k, v in data.items() if v is not None}
