"""What the templates say of a scan: names of its scalars in the order that it takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace

from psmc.codegen.pointwise_fields import dtype_of
from psmc.codegen.triton_expr import Key
from psmc.ir import Kind


def listed(prefix: str, names: Iterable[str]) -> str:
    return ", ".join(prefix + n for n in names)


def renamed(env: Mapping[Key, str], prefixes: Mapping[str, str]) -> dict[Key, str]:
    """The environment with whole spaces under another prefix."""
    return {k: prefixes[k[0]] + k[1] if k[0] in prefixes else v for k, v in env.items()}


def sides(names: Iterable[str], left: str, right: str) -> dict[Key, str]:
    """A combine's operands under two prefixes."""
    return {(side, n, 0): prefix + n for side, prefix in (("left", left), ("right", right)) for n in names}


def component(name: str, kind: Kind, start: str | None = "0.0", **more: object) -> SimpleNamespace:
    return SimpleNamespace(name=name, start=start, dtype=dtype_of(kind), **more)


def flagged(flag: str, names: Sequence[str], chosen: Sequence[str]) -> SimpleNamespace:
    """A combine's operands with a flag before them; `chosen`: the names that the flag selects."""
    left, right = (f"{side}_{flag}, {listed(side[0] + '_', names)}" for side in ("left", "right"))
    values = f"{listed('l_', names)}, {listed('r_', names)}"
    return SimpleNamespace(left=left, right=right, values=values, joined=listed("c_", names), names=chosen)
