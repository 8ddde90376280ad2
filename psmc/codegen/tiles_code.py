"""A module's table of tiles as text: the shipped ones, or those of a tuned file with the shipped ones beside them."""

from __future__ import annotations

from collections.abc import Sequence

from psmc.codegen.paste import paste
from psmc.plan.tiles import Row, table
from psmc.plan.tuned import Tuned


def literal(rows: Sequence[Row]) -> str:
    """On one line: kernel -> size -> a tile, or ((largest key, tile), ...)."""
    kernels = []
    for kernel, sizes in table(rows).items():
        each = ", ".join(f"{size!r}: {tile!r}" for size, tile in sizes.items())
        kernels.append(f'"{kernel}": {{{each}}}')
    return "{" + ", ".join(kernels) + "}"


def tiles_text(rows: Sequence[Row], tuned: Tuned | None, shipped: str | None = None) -> str:
    """`shipped`: `rows` as they are laid out where that is not on one line."""
    shipped = shipped or literal(rows)
    if tuned is None:
        return shipped
    place = f"{tuned.aggregator!r}, {tuned.device!r}, {tuned.triton!r}"
    return f"TunedTiles({place}, {literal(tuned.rows(rows))}, {shipped})"


def tiles_class(tuned: Tuned | None) -> list[str]:
    """The text that `tiles_text` needs before it."""
    return [] if tuned is None else [paste(("kit_tuned",), frozenset({"TunedTiles"})).body]
