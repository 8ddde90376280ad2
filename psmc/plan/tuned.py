"""A tuned file: the tiles that `psmc tune` found for one module on one kind of device.

    {"aggregator": "gated", "device": "NVIDIA H200", "digest": "0123456789abcdef", "plan": "chunked",
     "tiles": {"forward/2/128": {"keys": 128, "stages": 2, "tokens": 64, "values": 64, "warps": 8}},
     "versions": {"torch": "2.11.0", "triton": "3.6.0"}}

A tile's name is that of its row (`plan.tiles.Row`).

`digest` is that of the module with its shipped tiles: whatever changes a kernel changes it, and the file is stale.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from psmc.diagnostics import Diagnostic, fail
from psmc.plan.tiles import FIELDS, Row, changed, disagreement, fault
from psmc.source import read_bytes

_TEXTS = ("aggregator", "device", "digest", "plan")


@dataclass(frozen=True)
class Tuned:
    """`file`: its name, for messages and for the regenerate command; `tiles`: name of a row -> numbers."""

    file: str
    aggregator: str
    device: str
    digest: str
    plan: str
    tiles: tuple[tuple[str, tuple[int, ...]], ...]
    versions: tuple[tuple[str, str], ...]

    @property
    def triton(self) -> str:
        return dict(self.versions)["triton"]

    def text(self) -> str:
        """The file: sorted, without dates and paths."""
        lines = [f' "{name}": {json.dumps(getattr(self, name))},\n' for name in _TEXTS]
        tiles = []
        for name, numbers in self.tiles:
            tile = dict(zip(FIELDS[self.plan], numbers, strict=True))
            tiles.append(f'\n  "{name}": {json.dumps(tile, sort_keys=True)}')
        lines += [f' "tiles": {{{",".join(tiles)}\n }},\n', f' "versions": {json.dumps(dict(self.versions))}\n']
        return f"{{\n{''.join(lines)}}}\n"

    def rows(self, shipped: Sequence[Row]) -> tuple[Row, ...]:
        """The module's rows with these tiles. Raises PsmcError PSM622 where they do not fit together."""
        own = {row.name: row for row in shipped}
        for name, _ in self.tiles:
            if name not in own:
                _malformed(self.file, f"'{name}' is no row of this module's table", f"its rows are {', '.join(own)}")
        given = [Row(own[n].kernel, own[n].size, own[n].key, numbers) for n, numbers in self.tiles]
        found = changed(shipped, given)
        if (why := disagreement(self.plan, found)) is not None:
            _malformed(self.file, why)
        return found

    def stale(self, digest: str) -> Diagnostic:
        """The warning for a file that was made for this aggregator when its module was another."""
        return Diagnostic(
            "PSM623", f"{self.file} is for another module of '{self.aggregator}': it is ignored.",
            notes=(f"it was made for {self.digest}, and this is {digest}: the spec or the compiler has changed.",),
            helps=("run psmc tune again.",), severity="warning",
        )  # fmt: skip


def read_files(paths: Iterable[str]) -> tuple[Tuned, ...]:
    """Raises PsmcError PSM622."""
    found = []
    for path in map(Path, paths):
        try:
            text = read_bytes(path).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "it is not UTF-8"
            _malformed(str(path), why)
        found.append(read(text, path.name))
    return tuple(found)


def read(text: str, file: str) -> Tuned:
    """The same of one file's text."""
    try:
        data = json.loads(text)
    except ValueError as error:
        _malformed(file, f"it is not JSON: {error}")
    if not isinstance(data, dict):
        _malformed(file, "it holds no object")
    wanted = {*_TEXTS, "tiles", "versions"}
    if missing := sorted(wanted - data.keys()):
        _malformed(file, f"{', '.join(repr(m) for m in missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if unknown := sorted(data.keys() - wanted):
        _malformed(file, f"it has {', '.join(repr(u) for u in unknown)}, which nothing reads")
    for name in _TEXTS:
        if not isinstance(data[name], str) or not data[name].isprintable():
            _malformed(file, f"'{name}' is no text of one line")
    if data["plan"] not in FIELDS:
        _malformed(file, f"there is no plan '{data['plan']}' with tiles", f"they are {', '.join(FIELDS)}")
    versions = data["versions"]
    if not isinstance(versions, dict) or not all(isinstance(v, str) and v.isprintable() for v in versions.values()):
        _malformed(file, "'versions' is no object of texts of one line")
    if "triton" not in versions:
        _malformed(file, "'versions' does not say which triton")
    texts = {name: data[name] for name in _TEXTS}
    return Tuned(file=file, tiles=_tiles(data["plan"], data["tiles"], file), versions=tuple(sorted(versions.items())),
                 **texts)  # fmt: skip


def _tiles(plan: str, tiles: Any, file: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if not isinstance(tiles, dict) or not all(isinstance(t, Mapping) for t in tiles.values()):
        _malformed(file, "'tiles' is no object of tiles")
    for name, numbers in sorted(tiles.items()):
        if (why := fault(plan, numbers)) is not None:
            _malformed(file, f"{name}: {why}")
    return tuple((name, tuple(tiles[name][field] for field in FIELDS[plan])) for name in sorted(tiles))


def _malformed(file: str, why: str, note: str = "") -> NoReturn:
    fail(
        "PSM622", f"{file}: {why}.", notes=(f"{note}.",) if note else (),
        helps=("a tuned file is what psmc tune writes; run it again.",),
    )  # fmt: skip


__all__ = ["Tuned", "read", "read_files"]
