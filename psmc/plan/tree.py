"""Fused tree kernels: several levels of the Blelloch tree inside a thread, for rules over a few scalars a lane.

A thread has all tokens of its block in one lane, so that halving and joining levels moves nothing. Compiled for sm_90,
a rule of 2 scalars and 15 params needs 64 registers forwards and 251 backwards at 8 tokens; with 32 tokens spread over
the threads of a block its backward has 450 barriers instead of 13, and spills.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from psmc.derive.unroll import Unrolled, unroll
from psmc.ir import Aggregator, Block
from psmc.ir.rewrite import refs, walk
from psmc.plan import attention
from psmc.plan.base import Plan

_MAX_SCALARS = 8  # of an element: a thread holds the nodes of all levels of its block
_MAX_PARAMS = 64  # scalars of params: each has a sum in registers
_MAX_OPERATIONS = 600  # of a combine
_NODES = 16  # scalars of the leaves of a block, which are all in one thread


@dataclass(frozen=True)
class TreePlan(Plan):
    """Blocks of 2^levels tokens x `lanes`, a lane a thread."""

    levels: int = 3
    lanes: int = 128


def licensed(agg: Aggregator) -> str | None:
    """None if the tree kernels can run this spec, else why not."""
    found = rule(agg)
    return found if isinstance(found, str) else None


def rule(agg: Aggregator) -> Unrolled | str:
    """The spec over scalars, or why the kernels cannot run it."""
    if not isinstance(agg.combine, Block) or agg.claim != "no" or agg.order != "tree":
        return "the rule is Python, or its order is free"
    if not agg.leaf_inputs:
        return "no inputs"
    kinds = {t.name: t.kind for t in agg.leaf_inputs} | {a.name: a.value.kind for a in agg.output.results}
    kinds |= {t.name: t.kind for t in agg.params} | {c.name: c.kind for c in agg.state}
    inputs = {t.name for t in agg.leaf_inputs} - {c.name for c in agg.state} - {a.name for a in agg.output.results}
    for name, kind in kinds.items():
        if kind != "real" and not (kind == "int" and name in inputs):
            return f"'{name}' holds {kind} numbers"
    if any(r.space in ("level", "prev_level") for a in (*agg.output.lets, *agg.output.results) for r in refs(a.value)):
        return "the output reads the counter level by level"
    found = unroll(agg)
    return found if isinstance(found, str) else _size(agg, found)


def _size(agg: Aggregator, found: Unrolled) -> Unrolled | str:
    scalars = len(found.combine.results)
    if scalars > _MAX_SCALARS:
        return f"an element has {scalars} scalars a lane, more than the {_MAX_SCALARS} that stay in registers"
    params = sum(len(found.scalars[t.name]) for t in agg.params)
    if params > _MAX_PARAMS:
        return f"{params} scalars of params a lane, more than {_MAX_PARAMS}"
    operations = sum(1 for _ in walk(*(a.value for a in found.combine.results)))
    if operations > _MAX_OPERATIONS:
        return f"a combine has {operations} operations, more than {_MAX_OPERATIONS}"
    return found


def plan(agg: Aggregator) -> TreePlan:
    """The block's size from how many scalars an element has."""
    found = rule(agg)
    assert isinstance(found, Unrolled)
    scalars = len(found.combine.results)
    levels = max(2, min(4, (_NODES // scalars).bit_length() - 1))
    what = f"{scalars} scalars an element" + (f", {', '.join(found.lanes)} as lanes" if found.lanes else "")
    return TreePlan(
        "tree",
        "tree",
        (
            "not associative: the Blelloch tree is the meaning",
            f"kernels for {levels} levels of it at a time: {what}",
            "calls with a mask, resets, packed sequences or a state, and steps, run it in PyTorch, one batched combine "
            "a level",
        ),
        levels=levels,
    )


def in_torch(agg: Aggregator, general: Plan, reason: str) -> Plan:
    """The tree in PyTorch, and why the kernels do not run it."""
    lines, refused = attention.notes(agg)
    return replace(general, why=(*general.why, *lines), refused=(("tree kernels", reason), *refused))
