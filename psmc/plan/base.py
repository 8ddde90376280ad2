"""What every plan says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Fold = Literal["scan", "left", "tree"]


@dataclass(frozen=True)
class Plan:
    """`name` as `psmc explain` prints it; `fold`: how the runtime orders combines; `why`: the reasons, a line each;
    `refused`: faster plans that do not apply, with the reason."""

    name: str
    fold: Fold
    why: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = field(default=())
