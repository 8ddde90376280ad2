"""Where a kernel finds each scalar: pointers, rows and lanes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from psmc.codegen.linearise import fresh
from psmc.codegen.triton_expr import Key
from psmc.ir import Kind


@dataclass(frozen=True)
class Field:
    """One scalar of a tensor [rows, lanes] in memory; complex tensors hold two, side by side.

    `value` is its name in the kernel, `dtype` its type there. A row has `width` lanes; a program's are `flat`,
    [BC], and those of R rows `offsets`, [R, BC].
    """

    key: Key
    value: str
    pointer: str
    dtype: str
    pair: bool
    at: int
    width: str
    offsets: str
    flat: str

    @property
    def near(self) -> str:
        """The name of a pointer to the lanes at a tile's first row."""
        return "q" + self.pointer[1:]

    def begin(self, row: str) -> str:
        """What `near` is at that row."""
        place = f"({row} * {self.width} + {self.flat})"
        return f"{self.pointer} + " + (f"2 * {place}" if self.pair else place)

    def after(self, rows: str) -> str:
        """So many rows (a constant) behind `near`."""
        lanes = f"{rows} * {self.width}" if rows != "0" else ""
        terms = (self.near, f"2 * {lanes}" if lanes and self.pair else lanes, str(self.at) if self.at else "")
        return " + ".join(t for t in terms if t)

    def tile(self, row: str) -> str:
        """The lanes of R rows from that one on."""
        return self._address(f"{row} * {self.width} + {self.offsets}")

    def line(self, row: str) -> str:
        return self._address(f"{row} * {self.width} + {self.flat}")

    def _address(self, place: str) -> str:
        if not self.pair:
            return f"{self.pointer} + {place}"
        return f"{self.pointer} + 2 * ({place})" + (f" + {self.at}" if self.at else "")

    @property
    def name(self) -> str:
        return self.key[1]


def dtype_of(kind: Kind) -> str:
    return "tl.int64" if kind == "int" else "tl.float32"


class Pointers:
    """Names of a kernel's pointer arguments, in order, each once."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.names: list[str] = []
        self._taken = {"p_kind", "p_cu", *taken}

    def add(self, wish: str) -> str:
        name = fresh(f"p_{wish}", self._taken)
        self._taken.add(name)
        self.names.append(name)
        return name

    def text(self) -> str:
        """As parameters, some to a line."""
        lines: list[str] = [""]
        for name in self.names:
            if len(lines[-1]) + len(name) > 100:
                lines.append("")
            lines[-1] += f"{', ' if lines[-1] else ''}{name}"
        return ",\n    ".join(lines)


def lane_maps(labels: Sequence[str]) -> str:
    """Kernel parameters: for each tensor the two constants that take a lane to its place in the tensor."""
    return "".join(f"Q_{x}: tl.constexpr, D_{x}: tl.constexpr,\n    " for x in labels)


def token_fields(
    pointer: str, label: str, lag: int, scalars: Sequence[str], kind: Kind, space: str
) -> tuple[Field, ...]:
    """The scalars of an input [B, T, lanes] or a param [lanes], which may have fewer lanes than the state."""
    pair = len(scalars) == 2
    place = f"2 * k_{label}" if pair and space == "param" else f"k_{label}"
    return tuple(
        Field(
            (space, scalar, lag),
            f"b_{scalar}" + (f"_lag{lag}" if lag else ""),
            pointer,
            dtype_of(kind),
            pair,
            at,
            f"C_{label}",
            f"oc_{label}",
            place + (f" + {at}" if at and space == "param" else ""),
        )
        for at, scalar in enumerate(scalars)
    )


def lane_fields(
    pointer: str, scalars: Sequence[str], kind: Kind, prefix: str, space: str = "state"
) -> tuple[Field, ...]:
    """The scalars of a tensor that has all lanes: outputs, states and their cotangents."""
    pair = len(scalars) == 2
    return tuple(
        Field((space, scalar, 0), prefix + scalar, pointer, dtype_of(kind), pair, at, "C", "o", "o_c")
        for at, scalar in enumerate(scalars)
    )
