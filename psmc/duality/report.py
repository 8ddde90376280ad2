"""What the duality test is asked, and what it says, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from psmc.duality.draw import Data

Path = Literal["scan", "steps", "segments", "tree", "flags", "packed"]


@dataclass(frozen=True)
class Setting:
    """What is run: lengths T, dtypes by name, B rows, lanes, sizes of dims that the spec leaves open."""

    device: str = "cpu"
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    lengths: tuple[int, ...] = (1, 7, 64)
    batch: int = 2
    lanes: tuple[int, ...] = (3,)
    sizes: Mapping[str, int] | None = None
    data: tuple[Data, ...] = ("mild", "hard")
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One path on one batch: relative errors against the oracle (None: nothing to compare), and what they may be.

    `reassociation` is the distance between the scan and the steps: the same rule, the same dtype, another order.
    `fold` is the error of the oracle itself in this dtype.
    """

    dtype: str
    path: Path
    length: int
    data: Data
    outputs: float
    state: float | None
    gradients: Mapping[str, float]
    limits: tuple[float, float, float]  # outputs, state, gradients
    fold: float
    reassociation: float | None = None
    causal: bool | None = None  # do later tokens leave earlier outputs alone, bit for bit?
    note: str = ""

    @property
    def gradient(self) -> float:
        return max(self.gradients.values(), default=0.0)

    @property
    def passed(self) -> bool:
        found = (self.outputs, self.state or 0.0, self.gradient)
        return self.causal is not False and all(e <= limit for e, limit in zip(found, self.limits, strict=True))
