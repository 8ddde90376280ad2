"""The plans that are right for every spec: PyTorch scans over the proved rule, the tree, the left fold."""

from __future__ import annotations

from psmc.ir import Aggregator, Extern
from psmc.plan.base import Plan


def general(agg: Aggregator) -> Plan:
    """`tree` and `left` where the order is the meaning, `scan` where it is free."""
    if agg.combine is None:
        return Plan("left", "left", ("a recurrence that is not lifted is run as it stands, one token after another",))
    if agg.claim == "no":
        if agg.order == "left":
            return Plan("left", "left", ("'order: left': the fold from the left is the meaning",))
        return Plan("tree", "tree", ("not associative: the Blelloch tree is the meaning, one batched combine a level",))
    trust = "assumed" if agg.claim == "assume" else "proved"
    rule = "from Python" if isinstance(agg.combine, Extern) else trust
    return Plan("general", "scan", (f"blocked scan in PyTorch over the rule ({rule} associative)",))
