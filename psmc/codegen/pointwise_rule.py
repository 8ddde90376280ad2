"""A spec's combine over one lane's scalars: what scans of segments' products compose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from psmc.codegen.triton_expr import Key, LaneFunction, print_function
from psmc.ir import Aggregator, Block, Kind
from psmc.ir.query import restrict
from psmc.structure.live import element_state


@dataclass(frozen=True)
class Rule:
    """`names`: the components of an element, `live` among them those that are carried. `combine`: both operands whole;
    `advance`: of the left one, and of the result, only what is live."""

    names: tuple[str, ...]
    live: tuple[str, ...]
    kinds: Mapping[str, Kind]
    combine: LaneFunction
    advance: LaneFunction


def rule(agg: Aggregator, live: Sequence[str]) -> Rule:
    assert isinstance(agg.combine, Block)
    names = element_state(agg, live)
    kinds = {c.name: c.kind for c in agg.state if c.name in names}
    block = restrict(agg.combine, names)
    sides: list[Key] = [(side, c, 0) for side in ("left", "right") for c in names]
    return Rule(
        names,
        tuple(live),
        kinds,
        print_function("lane_combine", block, sides, kinds, whole=True),
        print_function("lane_advance", restrict(block, tuple(live)), sides, kinds),
    )
